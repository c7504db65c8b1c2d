"""Runs operations on MongoDB, by PyMongo's synchronous or its asyncio API. The only module that talks to PyMongo.

Owns connections, write and read concerns, the server's clock and the translation of driver errors. It knows
operations only as data (ops.py), never what they are for, and it never repeats a write by itself: callers know
which of theirs may be repeated.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Generator, Mapping
from datetime import datetime, timedelta
from typing import Any, TypeVar, cast

import bson.errors
import pymongo
import pymongo.errors
from bson.codec_options import CodecOptions
from pymongo import AsyncMongoClient, CursorType, MongoClient
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.read_concern import ReadConcern
from pymongo.read_preferences import ReadPreference
from pymongo.synchronous.client_session import ClientSession
from pymongo.write_concern import WriteConcern

from streamline_pool.config.env import Env
from streamline_pool.config.parsing import redact_text, redact_uri
from streamline_pool.config.settings import DEFAULT_MONGODB_URI
from streamline_pool.domain.errors import PayloadTooLargeError, StoreUnavailableError, ValidationError, WorkflowError
from streamline_pool.protocol import engine_indexes, run_lifecycle
from streamline_pool.protocol.codec import CODEC
from streamline_pool.protocol.operations import Command, Find, Op, Signal, Tail
from streamline_pool.protocol.signals import ensure_signals

from .procedures import AwaitSignal, Effect, Procedure, Sleep, is_hint, repeating

__all__ = ["AsyncStore", "DatabaseTarget", "ServerClock", "Store", "open_clients"]

Document = dict[str, Any]
T = TypeVar("T")

WRITE_CONCERN: Mapping[str, Any] = {"w": "majority", "j": True}
"""A decision counts only once it cannot be rolled back."""

SERVER_VERSION_MIN = (6, 0)
"""`$in` in a partial index (the TTL of terminal runs) needs 6.0."""

_SELECTION_TIMEOUT_MS = 5_000  # how long one operation looks for a primary; callers repeat, with back-off
_SOCKET_TIMEOUT_MS = 20_000  # above the longest await of a tail, below the lease
_TAILS_MAX = 20  # of the hundred connections of a client; who comes later looks at intervals instead
TAIL_AWAIT_S = 15.0  # four getMore a minute while idle
_DEAD_CURSOR_PAUSE_S = 0.5  # a tail of an empty capped collection ends at once
_CLOCK_STALE_S = 300.0  # quartz drifts some 15 ms in this time

_TOO_LARGE = frozenset({10334, 17419, 17420})
_REFUSED = frozenset({15, 121})  # nested too deep; against a validator that users have put on the collection
_NAMESPACE_EXISTS = 48
_UNAUTHORIZED = 13
_AUTH_FAILED = 18


_COMMAND_CODEC = cast("CodecOptions[Mapping[str, Any]]", CODEC)  # what `command` is typed to take


class DatabaseTarget:
    """Which server, database and collections: resolved once, shown without its password."""

    def __init__(self, uri: str, database: str | None, prefix: str) -> None:
        try:
            parsed = pymongo.uri_parser.parse_uri(uri, validate=True, warn=False)
        except (pymongo.errors.PyMongoError, ValueError) as exc:
            raise ValidationError(f"mongodb_uri {redact_uri(uri)}: {redact_text(str(exc))}") from None
        self.uri = uri
        self.database = database or parsed.get("database") or "streamline"
        self.prefix = prefix
        self.shown = redact_uri(uri)

    def collection(self, name: str) -> str:
        """The stored name of the collection that operations call `name`; one that begins with "/" is a stored name itself."""
        return name[1:] if name.startswith("/") else self.prefix + name

    def client_options(self) -> dict[str, Any]:
        """Options of every client; what the URI itself sets wins."""
        given = {key.lower() for key in pymongo.uri_parser.parse_uri(self.uri, warn=False)["options"]}
        ours = {
            "serverSelectionTimeoutMS": _SELECTION_TIMEOUT_MS,
            "connectTimeoutMS": _SELECTION_TIMEOUT_MS,
            "socketTimeoutMS": _SOCKET_TIMEOUT_MS,
            "appname": "streamline-pool",
        }
        return {key: value for key, value in ours.items() if key.lower() not in given}


class ServerClock:
    """The server's clock as this process knows it: one reading, carried on by the monotonic clock.

    So neither a wrong nor a jumping clock of this host reaches a stored instant. The error of a reading is at most
    half a round trip, and a run is never announced sooner than a round trip after its `wakeAt` was made.
    """

    def __init__(self, env: Env) -> None:
        self._env = env
        self._base: datetime | None = None
        self._read_at = 0.0
        self._shown_ms = -1
        self.offset_s = 0.0  # server minus host, at the last reading

    def now(self) -> datetime:
        """Aware UTC, whole milliseconds; this host's clock before the first reading."""
        if self._base is None:
            return self._env.clock.now()
        elapsed_ms = int((self._env.clock.monotonic() - self._read_at) * 1000)
        if elapsed_ms != self._shown_ms:  # asked several times per step; a `datetime` is made once per millisecond
            self._shown_ms = elapsed_ms
            self._shown = self._base + timedelta(milliseconds=elapsed_ms)
        return self._shown

    @property
    def stale(self) -> bool:
        """True if it is time for another reading."""
        return self._base is None or self._env.clock.monotonic() - self._read_at > _CLOCK_STALE_S

    def read(self, server_time: datetime, asked_at: float, arrived_at: float) -> None:
        """Take over a reading that was asked for at `asked_at` and came at `arrived_at` (both monotonic)."""
        self._base = server_time + timedelta(milliseconds=round((arrived_at - asked_at) * 500))
        self._read_at = arrived_at
        self._shown_ms = -1
        self.offset_s = (self.now() - self._env.clock.now()).total_seconds()


def open_clients() -> list[str]:
    """The MongoDB clients that this process has opened and not closed, as text; forking with one is unsafe."""
    clients: list[Any] = [*MongoClient._clients.values(), *AsyncMongoClient._clients.values()]
    return [str(client.address or client) for client in clients if client._opened and not client._closed]


def _command_document(op: Command, where: DatabaseTarget, *, in_transaction: bool) -> Document:
    target: Any = where.collection(op.collection) if op.collection else 1
    document: Document = {op.verb: target, **op.body}
    if op.writes and not in_transaction:
        document["writeConcern"] = WRITE_CONCERN
    return document


def _result(op: Command, reply: Mapping[str, Any]) -> Any:
    failed = reply.get("writeConcernError")
    if failed:
        # Applied, but not known to be durable: an unknown outcome like a lost reply.
        raise StoreUnavailableError(f"{op.name}: not acknowledged by a majority: {failed.get('errmsg')}", transient=True)
    return op.parse(reply)


def _refusal(name: str, exc: Exception, where: DatabaseTarget) -> WorkflowError:
    """What a driver error means to callers. `context["transient"]` tells whether to try again."""
    text = redact_text(re.split(r", Timeout:| \(configured timeouts:", str(exc))[0])
    code = getattr(exc, "code", None)
    if isinstance(exc, pymongo.errors.DocumentTooLarge) or code in _TOO_LARGE:
        return PayloadTooLargeError(f"{name}: the document would grow above MongoDB's 16 MiB: {text}")
    if code == _UNAUTHORIZED:
        return StoreUnavailableError(
            f"{name}: MongoDB at {where.shown} refuses: {text}; grant the user readWrite on database {where.database!r}", transient=False
        )
    if code == _AUTH_FAILED:
        return StoreUnavailableError(
            f"{name}: MongoDB at {where.shown} does not accept the user name or password; check them and authSource", transient=False
        )
    if code in _REFUSED or isinstance(exc, _CODEC_ERRORS):
        return ValidationError(f"{name}: MongoDB refuses the document: {text[:500]}")
    if isinstance(exc, pymongo.errors.InvalidOperation):
        if text.endswith("after close"):
            return ValidationError(f"{name}: {text}; this app was closed while the call was under way: close it when all have returned")
        return ValidationError(f"{name}: {text}; use a session of this app's `client` (of `async_client` for the _async methods)")
    if isinstance(exc, pymongo.errors.ConfigurationError):
        return ValidationError(f"mongodb_uri {where.shown}: {text}")
    transient = not isinstance(exc, pymongo.errors.OperationFailure) or _is_transient(exc)
    hint = "; is it running, and is the address right?" if isinstance(exc, pymongo.errors.ServerSelectionTimeoutError) else ""
    if hint and where.uri == DEFAULT_MONGODB_URI:
        hint += " This is the default; STREAMLINE_MONGODB_URI names another one"
    return StoreUnavailableError(f"{name}: MongoDB at {where.shown}: {text}{hint}", transient=transient)


def _is_transient(exc: pymongo.errors.OperationFailure) -> bool:
    not_primary_or_stepping_down = exc.code in {6, 7, 64, 89, 91, 112, 189, 262, 9001, 10107, 11600, 11602, 13435, 13436}
    return not_primary_or_stepping_down or exc.has_error_label("TransientTransactionError") or isinstance(exc, pymongo.errors.WTimeoutError)


_CODEC_ERRORS = (bson.errors.BSONError, UnicodeError, OverflowError)  # raised where documents are encoded or decoded
_DRIVER_ERRORS = (pymongo.errors.PyMongoError, pymongo.errors.DocumentTooLarge, OSError, *_CODEC_ERRORS)


def server_facts(hello: Mapping[str, Any], build: Mapping[str, Any], where: DatabaseTarget) -> dict[str, Any]:
    """Version, topology and database, for banners; a StoreUnavailableError when the server is too old."""
    version = str(build.get("version", "0"))
    if tuple(int(part) for part in version.split(".")[:2]) < SERVER_VERSION_MIN:
        needed = ".".join(map(str, SERVER_VERSION_MIN))
        raise StoreUnavailableError(f"MongoDB at {where.shown} is version {version}; at least {needed} is needed", transient=False)
    if hello.get("setName"):
        topology = f"replica set {hello['setName']}"
    else:
        topology = "sharded cluster" if hello.get("msg") == "isdbgrid" else "standalone"
    return {"version": version, "topology": topology, "database": where.database, "uri": where.shown}


class _StoreBase:
    """What both stores know, and the procedures that both drive."""

    def __init__(self, where: DatabaseTarget, env: Env) -> None:
        self.where = where
        self.clock = ServerClock(env)
        self._env = env
        self._ensured = False
        self._tails_open: set[object] = set()

    def now(self) -> datetime:
        """The server's time, as known here."""
        return self.clock.now()

    def syncing_clock(self) -> Procedure[float]:
        """Read the server's clock; seconds that it is ahead of this host's.

        The quickest of three answers counts: the first may have waited for a connection, and any for the server.
        """
        readings = []
        for _ in range(3):
            asked_at = self._env.clock.monotonic()
            hello = yield run_lifecycle.server_info()
            answered_at = self._env.clock.monotonic()
            readings.append((answered_at - asked_at, asked_at, answered_at, hello["localTime"]))
        _, asked_at, answered_at, server_time = min(readings, key=lambda reading: reading[0])
        self.clock.read(server_time, asked_at, answered_at)
        return self.clock.offset_s

    def reading_facts(self) -> Procedure[dict[str, Any]]:
        """Version, topology and database; StoreUnavailableError when the server is too old."""
        return server_facts((yield run_lifecycle.server_info()), (yield run_lifecycle.build_info()), self.where)

    def ensuring(self) -> Procedure[None]:
        """Once per store: indexes and collections that the engine needs. Now and then: the clock."""
        if self.clock.stale:
            yield from self.syncing_clock()
        if self._ensured:
            return
        for op in _ENSURE:
            try:
                yield op
            except StoreUnavailableError as exc:
                if not _already_there(exc):
                    raise
        self._ensured = True


class Store(_StoreBase):
    """Operations by the synchronous API. Connects at the first one."""

    def __init__(self, where: DatabaseTarget, env: Env) -> None:
        super().__init__(where, env)
        self.client: MongoClient[Document] = MongoClient(where.uri, tz_aware=True, connect=False, **where.client_options())
        self._database = self.client.get_database(where.database, codec_options=CODEC)

    def run(self, op: Op, session: ClientSession | None = None) -> Any:
        """Run one operation, once. Raises StoreUnavailableError (outcome unknown if it wrote) or what the server refused."""
        try:
            if isinstance(op, Find):
                return list(self._cursor(op, session))
            if isinstance(op, Signal):
                self._unanswered("signals").insert_one(dict(op.document))
                return None
            document = _command_document(op, self.where, in_transaction=_in_transaction(session))
            return _result(op, self._database.command(document, codec_options=_COMMAND_CODEC, session=session))
        except _DRIVER_ERRORS as exc:
            if _is_for_owner(exc, session):
                raise
            raise _refusal(op.name, exc, self.where) from exc

    def drive(self, procedure: Procedure[T], session: ClientSession | None = None) -> T:
        """Run a procedure to its end. Inside of a transaction nothing is repeated: its owner decides about that."""
        effects = procedure if _in_transaction(session) else repeating(procedure, self._env)
        tails: dict[Tail, Generator[Document | None, None, None]] = {}
        try:
            effect = next(effects)
            while True:
                try:
                    answer = self._perform(effect, session, tails)
                except WorkflowError as exc:
                    effect = effects.throw(exc)
                else:
                    effect = effects.send(answer)
        except StopIteration as stop:
            return cast(T, stop.value)
        finally:
            effects.close()
            for tail in tails.values():
                tail.close()

    def _perform(self, effect: Effect, session: ClientSession | None, tails: dict[Tail, Generator[Document | None, None, None]]) -> Any:
        match effect:
            case Sleep():
                return self._env.sleep(effect.seconds)
            case AwaitSignal():
                if effect.tail not in tails and len(self._tails_open) >= _TAILS_MAX:
                    return self._env.sleep(effect.seconds)
                tail = tails.pop(effect.tail, None) or self.tail(effect.tail, effect.seconds)
                heard = next(tail)
                tails[effect.tail] = tail  # not reached by a tail that has failed: the next one is a new one
                return heard
            case _:
                return self.run(effect, None if is_hint(effect) else session)

    def _cursor(self, op: Find, session: ClientSession | None) -> Any:
        concern = None if _in_transaction(session) else ReadConcern("majority")
        name = self.where.collection(op.collection)
        collection = self._database.get_collection(name, read_concern=concern, read_preference=ReadPreference.PRIMARY)
        return collection.find(op.filter, op.projection, sort=op.sort or None, limit=op.limit, hint=op.hint, session=session)

    def _unanswered(self, name: str) -> Any:
        return self._database.get_collection(self.where.collection(name), write_concern=WriteConcern(w=0))

    def collection(self, name: str) -> Any:
        """PyMongo's own collection, for users' direct queries. It reads as the API does: who sees a state here may act on it at once."""
        return self._database.get_collection(
            self.where.collection(name), read_concern=ReadConcern("majority"), write_concern=WriteConcern(**WRITE_CONCERN)
        )

    def tail(self, tail: Tail, wait_s: float) -> Generator[Document | None, None, None]:
        """Matching signals as they are written; None after each `wait_s` seconds without one. Endless but for errors."""
        mine = object()
        self._tails_open.add(mine)
        try:
            while True:
                signals = self._database.get_collection(self.where.collection("signals"))
                found = signals.find(tail.filter, cursor_type=CursorType.TAILABLE_AWAIT)
                with found.max_await_time_ms(_milliseconds(wait_s)) as cursor:
                    while cursor.alive:
                        yield next(cursor, None)
                self._env.sleep(min(wait_s, _DEAD_CURSOR_PAUSE_S))
                yield None
        except _DRIVER_ERRORS as exc:
            raise _refusal("tail_signals", exc, self.where) from exc
        finally:
            self._tails_open.discard(mine)

    def close(self) -> None:
        """Give the connections back. The store can be used no more."""
        self.client.close()


class AsyncStore(_StoreBase):
    """Operations by the asyncio API; belongs to the event loop in which it was made."""

    def __init__(self, where: DatabaseTarget, env: Env) -> None:
        super().__init__(where, env)
        self.client: AsyncMongoClient[Document] = AsyncMongoClient(where.uri, tz_aware=True, connect=False, **where.client_options())
        self._database = self.client.get_database(where.database, codec_options=CODEC)

    async def run(self, op: Op, session: AsyncClientSession | None = None) -> Any:
        """Run one operation, once. Raises StoreUnavailableError (outcome unknown if it wrote) or what the server refused."""
        try:
            if isinstance(op, Find):
                return await self._cursor(op, session).to_list()
            if isinstance(op, Signal):
                await self._unanswered("signals").insert_one(dict(op.document))
                return None
            document = _command_document(op, self.where, in_transaction=_in_transaction(session))
            return _result(op, await self._database.command(document, codec_options=_COMMAND_CODEC, session=session))
        except _DRIVER_ERRORS as exc:
            if _is_for_owner(exc, session):
                raise
            raise _refusal(op.name, exc, self.where) from exc

    async def drive(self, procedure: Procedure[T], session: AsyncClientSession | None = None) -> T:
        """Run a procedure to its end. Inside of a transaction nothing is repeated: its owner decides about that."""
        effects = procedure if _in_transaction(session) else repeating(procedure, self._env)
        tails: dict[Tail, AsyncGenerator[Document | None, None]] = {}
        try:
            effect = next(effects)
            while True:
                try:
                    answer = await self._perform(effect, session, tails)
                except WorkflowError as exc:
                    effect = effects.throw(exc)
                else:
                    effect = effects.send(answer)
        except StopIteration as stop:
            return cast(T, stop.value)
        finally:
            effects.close()
            for tail in tails.values():
                await tail.aclose()

    async def _perform(
        self, effect: Effect, session: AsyncClientSession | None, tails: dict[Tail, AsyncGenerator[Document | None, None]]
    ) -> Any:
        match effect:
            case Sleep():
                return await self._env.async_sleep(effect.seconds)
            case AwaitSignal():
                if effect.tail not in tails and len(self._tails_open) >= _TAILS_MAX:
                    return await self._env.async_sleep(effect.seconds)
                tail = tails.pop(effect.tail, None) or self.tail(effect.tail, effect.seconds)
                heard = await anext(tail)
                tails[effect.tail] = tail  # not reached by a tail that has failed: the next one is a new one
                return heard
            case _:
                return await self.run(effect, None if is_hint(effect) else session)

    def _cursor(self, op: Find, session: AsyncClientSession | None) -> Any:
        concern = None if _in_transaction(session) else ReadConcern("majority")
        name = self.where.collection(op.collection)
        collection = self._database.get_collection(name, read_concern=concern, read_preference=ReadPreference.PRIMARY)
        return collection.find(op.filter, op.projection, sort=op.sort or None, limit=op.limit, hint=op.hint, session=session)

    def _unanswered(self, name: str) -> Any:
        return self._database.get_collection(self.where.collection(name), write_concern=WriteConcern(w=0))

    async def tail(self, tail: Tail, wait_s: float = TAIL_AWAIT_S) -> AsyncGenerator[Document | None, None]:
        """Matching signals as they are written; None after each `wait_s` seconds without one. Endless but for errors."""
        signals = self._database.get_collection(self.where.collection("signals"))
        mine = object()
        self._tails_open.add(mine)
        try:
            while True:
                found = signals.find(tail.filter, cursor_type=CursorType.TAILABLE_AWAIT)
                async with found.max_await_time_ms(_milliseconds(wait_s)) as cursor:
                    while cursor.alive:
                        yield await anext(cursor, None)
                await self._env.async_sleep(min(wait_s, _DEAD_CURSOR_PAUSE_S))
                yield None
        except _DRIVER_ERRORS as exc:
            raise _refusal("tail_signals", exc, self.where) from exc
        finally:
            self._tails_open.discard(mine)

    async def ensure(self) -> None:
        """See `ensuring`."""
        await self.drive(self.ensuring())

    async def ensure_again(self) -> None:
        """See `ensuring`; also when it has been done before."""
        self._ensured = False
        await self.ensure()

    async def facts(self) -> dict[str, Any]:
        """See `reading_facts`."""
        return await self.drive(self.reading_facts())

    async def sync_clock(self) -> float:
        """See `syncing_clock`."""
        return await self.drive(self.syncing_clock())

    async def close(self) -> None:
        """Give the connections back. The store can be used no more."""
        await self.client.close()


_ENSURE = (
    engine_indexes.ensure_indexes("runs"),
    engine_indexes.ensure_indexes("hosts"),
    engine_indexes.ensure_indexes("events"),
    ensure_signals(),
)


def _milliseconds(wait_s: float) -> int:
    return max(1, round(wait_s * 1000))


def _in_transaction(session: ClientSession | AsyncClientSession | None) -> bool:
    return session is not None and session.in_transaction


def _is_for_owner(exc: Exception, session: ClientSession | AsyncClientSession | None) -> bool:
    """True for what makes PyMongo's `with_transaction` run the whole transaction again: only its owner can."""
    return _in_transaction(session) and isinstance(exc, pymongo.errors.PyMongoError) and exc.has_error_label("TransientTransactionError")


def _already_there(exc: StoreUnavailableError) -> bool:
    cause = exc.__cause__
    return isinstance(cause, pymongo.errors.OperationFailure) and cause.code == _NAMESPACE_EXISTS
