"""What Store and AsyncStore have in common: everything that waits for nothing.

Owns the state of a store (server clock, what it has ensured, open tails), the cursors, and the procedures that both drive.
The two classes in store.py add only the calls of their API.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, TypeVar, cast

from bson.codec_options import CodecOptions
from pymongo import CursorType
from pymongo.read_concern import ReadConcern
from pymongo.read_preferences import ReadPreference
from pymongo.write_concern import WriteConcern

from streamline_pool.config.env import Env
from streamline_pool.domain.errors import StoreUnavailableError
from streamline_pool.protocol import engine_indexes, run_lifecycle, server_codes
from streamline_pool.protocol.codec import CODEC, RAW_CODEC, Tick, read_document
from streamline_pool.protocol.operations import Command, Find, Tail
from streamline_pool.protocol.signals import ensure_signals, tail_query

from .driver_errors import DriverErrors, has_code
from .procedures import AwaitSignal, Effect, Procedure, ProcedureRun, Sleep, repeating
from .requests import WRITE_CONCERN, command_document, command_result, find_arguments, milliseconds
from .server_clock import ServerClock
from .server_facts import server_facts
from .target import DatabaseTarget

__all__ = ["DEAD_CURSOR_PAUSE_S", "TAIL_AWAIT_S", "StoreBase"]

T = TypeVar("T")

TAIL_AWAIT_S = 15.0  # four getMore a minute while idle
DEAD_CURSOR_PAUSE_S = 0.5  # a tail of an empty capped collection ends at once

_TAILS_MAX = 20  # of the hundred connections of a client; further callers poll at intervals instead
_COMMAND_CODEC = cast("CodecOptions[Mapping[str, Any]]", RAW_CODEC)  # the type that `command` takes

_ENSURE = (
    engine_indexes.ensure_indexes("runs"),
    engine_indexes.ensure_indexes("hosts"),
    engine_indexes.ensure_indexes("events"),
    engine_indexes.ensure_indexes("outputs"),
    ensure_signals(),
)


class StoreBase:
    """State and procedures of a store. `client` is a PyMongo client of either API; a subclass calls it.

    What stands below "what the two APIs share" is for the two subclasses in store.py only.
    """

    def __init__(self, where: DatabaseTarget, env: Env, client: Any) -> None:
        self.where = where
        self.clock = ServerClock(env)
        self.env = env
        self._ensured = False
        self._tails_open: set[object] = set()
        self.database = client.get_database(where.database, codec_options=CODEC)

    def now(self) -> datetime:
        """The server's time, as this process knows it: aware UTC, whole milliseconds."""
        return self.clock.now()

    # --- procedures ------------------------------------------------------------------------------------------------

    def syncing_clock(self) -> Procedure[float]:
        """Read the server's clock. Returns the seconds that it is ahead of this host's.

        The quickest of three answers counts: the first may have waited for a connection, and any for the server.
        """
        readings = []
        for _ in range(3):
            asked_at = self.env.clock.monotonic()
            hello = yield run_lifecycle.server_info()
            answered_at = self.env.clock.monotonic()
            readings.append((answered_at - asked_at, asked_at, answered_at, hello["localTime"]))
        _, asked_at, answered_at, server_time = min(readings, key=lambda reading: reading[0])
        self.clock.read(server_time, asked_at, answered_at)
        return self.clock.offset_s

    def reading_facts(self) -> Procedure[dict[str, Any]]:
        """See `server_facts`."""
        return server_facts((yield run_lifecycle.server_info()), (yield run_lifecycle.build_info()), self.where)

    def ensuring(self) -> Procedure[None]:
        """Create the indexes and collections that the engine needs, once per store. Read the clock when the reading is old."""
        if self.clock.stale:
            yield from self.syncing_clock()
        if self._ensured:
            return
        for op in _ENSURE:
            try:
                yield op
            except StoreUnavailableError as exc:
                if not has_code(exc, server_codes.NAMESPACE_EXISTS):
                    raise
        self._ensured = True

    @property
    def is_ensured(self) -> bool:
        """True once `ensuring` has created what the engine needs."""
        return self._ensured

    def adopt_ensured(self, other: StoreBase) -> None:
        """Take over what another store of this process has ensured, and its clock. `other` must use the same target."""
        self._ensured = other.is_ensured
        self.clock = other.clock

    # --- what the two APIs share -----------------------------------------------------------------------------------

    def begin(self, procedure: Procedure[T], session: Any, within_s: float | None = None) -> ProcedureRun[T]:
        """A procedure to be driven. Within a transaction no effect is repeated: the owner of the transaction decides that."""
        return ProcedureRun(procedure if in_transaction(session) else repeating(procedure, self.env, within_s))

    def admitted(self, effect: Effect, tails: Container[Tail]) -> Effect:
        """The effect; a Sleep instead of a wait for which no tail may be opened. `tails`: those that this procedure has open."""
        if isinstance(effect, AwaitSignal) and effect.tail not in tails and len(self._tails_open) >= _TAILS_MAX:
            return Sleep(effect.seconds)
        return effect

    def errors_of(self, name: str, session: Any = None) -> DriverErrors:
        return DriverErrors(name, self.where, in_transaction=in_transaction(session))

    def command_arguments(self, op: Command, session: Any) -> dict[str, Any]:
        """Keyword arguments of PyMongo's `command`. Its reply is for `read_reply`."""
        document = command_document(op, self.where, in_transaction=in_transaction(session))
        return {"command": document, "codec_options": _COMMAND_CODEC, "session": session}

    def read_reply(self, op: Command, reply: Any) -> Any:
        """What the operation yields. The reply of a write is decoded here, where a value that PyMongo cannot read does not lose it."""
        return command_result(op, read_document(reply))

    def cursor(self, op: Find, session: Any) -> Any:
        """A majority read on the primary, not sent yet. Within a transaction the transaction has the read concern.

        Its documents are for `read_document`: one that PyMongo cannot read must not make those beside it unreadable.
        """
        concern = None if in_transaction(session) else ReadConcern("majority")
        name = self.where.collection(op.collection)
        collection = self.database.get_collection(name, RAW_CODEC, read_concern=concern, read_preference=ReadPreference.PRIMARY)
        return collection.find(**find_arguments(op), session=session)

    def signals_for_hints(self) -> Any:
        """The collection of signals, for an insert that waits for no reply."""
        return self.database.get_collection(self.where.collection("signals"), write_concern=WriteConcern(w=0))

    def tail_cursor(self, tail: Tail, position: Tick, wait_s: float) -> Any:
        """A tailing read from `position` on, not sent yet, that waits up to `wait_s` seconds for each signal.

        Its documents are for `read_document`.
        """
        signals = self.database.get_collection(self.where.collection("signals"), RAW_CODEC)
        return signals.find(tail_query(tail, position), cursor_type=CursorType.TAILABLE_AWAIT).max_await_time_ms(milliseconds(wait_s))

    @contextmanager
    def counted_tail(self) -> Iterator[None]:
        """Count a tail as open. `admitted` limits how many there are."""
        mine = object()
        self._tails_open.add(mine)
        try:
            yield
        finally:
            self._tails_open.discard(mine)

    def collection(self, name: str) -> Any:
        """PyMongo's own collection, for users' direct queries.

        Its read and write concerns are those of the API: a state that is read here is durable, so the reader may act on it.
        """
        return self.database.get_collection(
            self.where.collection(name), read_concern=ReadConcern("majority"), write_concern=WriteConcern(**WRITE_CONCERN)
        )


def in_transaction(session: Any) -> bool:
    """True for a PyMongo session with a transaction under way."""
    return session is not None and bool(session.in_transaction)
