"""A run in flight: the holder's copy of its document, its lease, and what is under way with it.

Owns nothing that is stored: engine.py drives flights, leases.py keeps their leases alive. Also what `ctx` asks for
while a handler is at work (context.Port).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, Protocol

from streamline_pool.config.env import Env
from streamline_pool.domain.definition import Definition
from streamline_pool.domain.errors import InvalidStateError, LeaseLostError, StoreUnavailableError
from streamline_pool.domain.transitions import Document
from streamline_pool.protocol import commits
from streamline_pool.protocol.operations import Fence, Statement
from streamline_pool.storage.procedures import Procedure
from streamline_pool.storage.store import Store

from .attempt import Attempt
from .group_commit import WriteOutcome, refusal, resolve_write
from .hooks import hash_token, make_token

__all__ = ["STATEMENT_BYTES", "ActiveRun", "Observer"]

_SAVE_POLL_S = 0.002  # for the threads that a handler has left behind: one write takes about as long
_HOOK_BYTES = 10_000  # of a few of them; the reason is the largest part
STATEMENT_BYTES = 600  # of a holder's write without payloads; measured: some 450


class Observer(Protocol):
    """Who is told what happens to the runs in flight, in the loop's thread."""

    def on_parked(self, lane: str, wake_at: datetime, run_id: str) -> None:
        """A run was given up, to be claimed again from that instant on."""

    def on_finished(self, run_id: str, status: str) -> None:
        """A run is through with this process; its stored status as far as known here."""

    def store_answered(self, ok: bool) -> None:
        """A command to the database succeeded or failed."""

    def on_stuck(self, what: str) -> None:
        """A handler goes on after its attempt is over and cannot be stopped."""


class EnginePort(Protocol):
    """What a flight needs of its engine."""

    env: Env
    loop: asyncio.AbstractEventLoop
    loop_thread: int

    def blocking_store(self) -> Store: ...

    async def write(self, statement: Statement) -> WriteOutcome: ...

    def now(self) -> datetime: ...

    def renew_soon(self) -> None: ...

    def publish(self, document: Document, events: tuple[tuple[str, str | None, Any], ...]) -> None: ...


class ActiveRun:
    """One claimed run, from the claim's read-back to the write that gives it up."""

    __slots__ = (
        "_engine",
        "attempt",
        "blocking_save",
        "deadline",
        "definition",
        "document",
        "lease_id",
        "lost",
        "outputs",
        "place",
        "release_requested",
        "renew_now",
        "saving",
        "task",
    )

    def __init__(self, engine: EnginePort, definition: Definition, document: Document, lease_id: str, deadline: float) -> None:
        self._engine = engine
        self.definition = definition
        self.document = document
        self.lease_id = lease_id
        self.deadline = deadline  # monotonic seconds; past it no handler is entered
        self.lost: str | None = None  # why the run is known to be no longer ours; None while it may be
        self.attempt: Attempt | None = None  # while a handler is at work
        self.outputs: dict[str, Any] = {}  # by file id: outputs that the document only refers to, once somebody may want them
        self.place = 0  # of the step at hand
        self.renew_now = False
        self.release_requested = False  # no further step is to be entered here
        self.task: asyncio.Task[None] | None = None  # its driver
        self.saving: asyncio.Future[None] | None = None  # a checkpoint or hook under way: no other write may be sent
        self.blocking_save = threading.Lock()  # held while one is under way on a thread

    @property
    def run_id(self) -> str:
        """The run's id."""
        return str(self.document["_id"])

    def fence(self) -> Fence:
        """What the next write must find unchanged."""
        document = self.document
        return Fence(document["_id"], self.lease_id, document["rev"], document["token"])

    def abort(self, reason: str) -> None:
        """Stop the handler, if one is at work."""
        if self.attempt is not None:
            self.attempt.abort(reason)

    # --- context.Port ----------------------------------------------------------------------------------------------

    def save_checkpoint(self, value: Any, size: int) -> None:
        """See context.Port."""
        self._save("checkpoint", lambda: value, size)

    def save_hook(self, reason: str, expires_s: float | None) -> str:
        """See context.Port."""
        token = make_token(self.run_id, self._engine.env.new_secret())
        hook: dict[str, Any] = {"hash": hash_token(token), "gen": self.document.get("waitGen", 0) + 1, "reason": reason}
        if expires_s is not None:
            hook["expiresAt"] = self._engine.now() + timedelta(milliseconds=round(expires_s * 1000))
        # Those of earlier attempts stay good: somebody may hold one of them.
        self._save("hooks", lambda: [*self.document["steps"][self.place].get("hooks", ()), hook], _HOOK_BYTES)
        return token

    def _save(self, field: str, value: Callable[[], Any], size: int) -> None:
        """Store one field of the step at hand; durable on return. On the loop's own thread only a blocking write can be that.

        The threads of an `async def` handler take the same way: waiting for a loop that waits for them would be for ever.
        """
        if not self.definition.steps[self.place].is_async and threading.get_ident() != self._engine.loop_thread:
            asyncio.run_coroutine_threadsafe(self._save_in_group(field, value, size), self._engine.loop).result()
            return
        with self.blocking_save:
            self._check_at_work()
            saved = value()
            statement = self._statement(field, saved, size)
            try:
                outcome = self._engine.blocking_store().drive(_write_alone(statement))
            except StoreUnavailableError:
                self.lost = "lease-lost"  # whether it landed is unknown, so nothing more may be sent for this run
                raise
            self._save_landed(outcome, field, saved)

    async def _save_in_group(self, field: str, value: Callable[[], Any], size: int) -> None:
        while self.saving is not None:
            await self.saving
        self._check_at_work()
        done = self.saving = self._engine.loop.create_future()
        try:
            saved = value()
            self._save_landed(await self._engine.write(self._statement(field, saved, size)), field, saved)
        finally:
            self.saving = None
            done.set_result(None)

    def _statement(self, field: str, value: Any, size: int) -> Statement:
        return commits.save_in_step(self.fence(), self.place, field, value, self._engine.now(), size + STATEMENT_BYTES)

    def _check_at_work(self) -> None:
        if self.lost is not None:
            raise LeaseLostError(f"run {self.run_id}: it is no longer this worker's; nothing was stored", run_id=self.run_id)
        if self.attempt is None:
            raise InvalidStateError(f"run {self.run_id}: no handler is at work; nothing was stored", run_id=self.run_id)

    async def saves_done(self) -> None:
        """Return once no such write is under way. None begins any more, since the attempt is over."""
        while self.saving is not None:
            await self.saving
        while self.blocking_save.locked():
            await asyncio.sleep(_SAVE_POLL_S)

    def _save_landed(self, outcome: WriteOutcome, field: str, value: Any) -> None:
        if outcome not in (WriteOutcome.COMMITTED, WriteOutcome.COMMITTED_BY_READ):
            self.lost = self.lost or "lease-lost"
            self._engine.loop.call_soon_threadsafe(self.abort, "lease-lost")
            raise LeaseLostError(f"run {self.run_id}: it is no longer this worker's; the step's {field} was not stored", run_id=self.run_id)
        self.document["rev"] += 1
        self.document["steps"][self.place][field] = value

    def heartbeat(self) -> None:
        """See context.Port."""
        self.renew_now = True
        self._engine.loop.call_soon_threadsafe(self._engine.renew_soon)

    def emit(self, name: str, data: Any) -> None:
        """See context.Port."""
        self._engine.publish(self.document, ((name, self.document["currentStepId"], data),))


def _write_alone(statement: Statement) -> Procedure[WriteOutcome]:
    """One fenced write outside the group, with its verdict; unknown outcomes are read, then repeated."""
    while True:
        reply = yield commits.write_statements([statement])
        if reply["n"] == 1:
            return WriteOutcome.COMMITTED
        found = yield commits.read_fences([statement.fence.run_id])
        outcome = resolve_write(statement, found[0] if found else None)
        if outcome is not None:
            return outcome
        if reply.get("writeErrors"):
            raise refusal(statement, reply["writeErrors"][0])
