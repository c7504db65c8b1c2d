"""An active run: the lease holder's copy of its document, its lease, and what is under way with it.

Owns nothing that is stored: run_driver.py drives active runs, leases.py keeps their leases. Implements `context.Port`,
which is what `ctx` asks for while a handler runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple, cast

from streamline_pool.domain.change import Change
from streamline_pool.domain.definition import Definition, StepDefinition
from streamline_pool.domain.document import Fields, HookDocument, RunDocument
from streamline_pool.domain.errors import DataCorruptionError, InvalidStateError, LeaseLostError, StoreUnavailableError, ValidationError
from streamline_pool.protocol import commits
from streamline_pool.protocol.operations import Fence, Statement
from streamline_pool.storage.outputs import Wanted, reading_outputs
from streamline_pool.storage.procedures import Procedure

from .asking import Asking
from .attempt import ABORT_GRACE_S, Attempt
from .group_commit import refusal
from .hooks import hash_token, make_token
from .intents import Intents
from .loaded_outputs import LoadedOutputs
from .ports import CallsPort, EnginePort
from .write_outcome import Held, WriteOutcome, resolve_write

__all__ = ["STATEMENT_BYTES", "ActiveRun"]

_SAVE_POLL_S = 0.002  # for the threads that a handler has left behind: one write takes about as long
_HOOK_BYTES = 10_000  # of a few of them; the reason is the largest part
STATEMENT_BYTES = 600  # of a holder's write without payloads; measured: about 450


class Save(NamedTuple):
    """A write of one field of the current step."""

    statement: Statement
    field: str
    value: Any


class ActiveRun:
    """One claimed run, from the claim's read-back to the write that releases it."""

    __slots__ = (
        "__weakref__",
        "_blocking_save",
        "_engine",
        "_interruptions",
        "_saving",
        "_woken",
        "asking",
        "attempt",
        "calls",
        "deadline",
        "definition",
        "document",
        "has_left_condition",
        "is_alone",
        "is_driven",
        "is_loading",
        "lease_id",
        "left_attempt",
        "lost",
        "outputs",
        "place",
        "release_requested",
        "renew_now",
        "steps_stored",
        "task",
        "unsettled",
    )

    def __init__(self, engine: EnginePort, definition: Definition, document: RunDocument, lease_id: str, deadline: float) -> None:
        self._engine = engine
        self.definition = definition
        self.document = document
        self.lease_id = lease_id
        self.deadline = deadline  # monotonic seconds; after it no handler is entered
        self.lost: str | None = None  # why this worker is known to hold the run no more; None while it may hold it
        self.attempt: Attempt | None = None  # while a handler runs
        self.asking: Asking | None = None  # while conditions are asked
        self.left_attempt: Attempt | None = None  # the last one, if its outcome came before the end of its handler
        self.is_driven = False  # False: it has been claimed, and waits for other executions to be over
        self.is_alone = False  # a suspect that runs alone in its worker
        self.is_loading = False  # outputs that the next handler or condition is expected to ask for
        self.has_left_condition = False  # one goes on although it was cancelled
        self._interruptions: weakref.WeakSet[StoreUnavailableError] | None = None  # what calls of this attempt or condition have raised
        self.unsettled: Save | None = None  # such a checkpoint or hook: no other write may be sent before its outcome is known
        self.outputs = LoadedOutputs(_loader_of(self))  # those that the document only refers to
        self.place = 0  # of the current step
        self.steps_stored = len(document["steps"])  # the steps behind these are calls that a durable function has begun here
        self.calls: CallsPort | None = None  # of a durable function, while it runs
        self.renew_now = False
        self.release_requested = False  # no further step is to be entered here
        self.task: asyncio.Task[None] | None = None  # its driver
        self._woken: asyncio.Event | None = None  # while it waits to be driven
        self._saving: asyncio.Future[None] | None = None  # a checkpoint or hook under way: no other write may be sent
        self._blocking_save = threading.Lock()  # held while one is under way on a thread

    @property
    def run_id(self) -> str:
        """The run's id."""
        return str(self.document["_id"])

    @property
    def step(self) -> StepDefinition:
        """The current step."""
        return self.definition.step_at(self.place)

    def fence(self) -> Fence:
        """What the next write must find unchanged."""
        document = self.document
        return Fence(document["_id"], self.lease_id, document["rev"], document["token"])

    def held(self, *, draining: bool) -> Held:
        """The holder's view of the run, for decisions."""
        return Held(self.document, self.step, self.place, draining or self.release_requested)

    def filled(self, change: Change) -> Change:
        """The change with every call that it would leave out of `steps` behind what is stored: a write by place must leave no gap."""
        last = max(change.steps, default=0)
        if last <= self.steps_stored:
            return change
        begun = {place: self.document["steps"][place] for place in range(self.steps_stored, last)}
        return change._replace(steps={**begun, **change.steps})

    def replace_document(self, stored: RunDocument) -> None:
        """Go on with what is stored, and with the calls that have begun here and are not stored yet."""
        # A write in doubt may have stored some of them; in another generation they are gone.
        is_same = stored.get("rewinds", 0) == self.document.get("rewinds", 0)
        begun = self.document["steps"][len(stored["steps"]) :] if is_same else []
        self.steps_stored = len(stored["steps"])
        stored["steps"].extend(begun)
        self.document = stored

    def mark_lost(self, reason: str = "lease-lost") -> None:
        """This worker holds the run no more. The first reason counts."""
        self.lost = self.lost or reason

    @property
    def in_user_code(self) -> bool:
        """Whether a handler runs, or a condition is asked."""
        return self.attempt is not None or self.asking is not None

    def abort(self, reason: str, grace_s: float = ABORT_GRACE_S) -> None:
        """Stop the handler, if one runs, or the condition that is asked. `grace_s`: see `Attempt.abort`."""
        if self.calls is not None:
            self.calls.abort(reason, grace_s)
        if self.attempt is not None:
            self.attempt.abort(reason, grace_s)
        if self.asking is not None:
            self.asking.abort(reason)
        self.wake()

    async def woken(self) -> None:
        """Return at the next `wake`. For its driver alone."""
        self._woken = asyncio.Event()
        await self._woken.wait()

    def wake(self) -> None:
        """What the driver waits for before it begins may have come."""
        if self._woken is not None:
            self._woken.set()

    # --- context.Port ----------------------------------------------------------------------------------------------

    def save_checkpoint(self, intents: Intents, value: Any, size: int) -> None:
        """See context.Port."""
        self._save(intents, "checkpoint", lambda: value, size)

    def save_hook(self, intents: Intents, reason: str, expires_s: float | None) -> str:
        """See context.Port."""
        token = make_token(self.run_id, self._engine.env.new_secret())
        hook: HookDocument = {"hash": hash_token(token), "gen": self.document.get("waitGen", 0) + 1, "reason": reason}
        if expires_s is not None:
            hook["expiresAt"] = self._engine.now() + timedelta(milliseconds=round(expires_s * 1000))
        # The hooks of earlier attempts stay valid: their tokens may be in use.
        self._save(intents, "hooks", lambda: [*self.document["steps"][self.place].get("hooks", ()), hook], _HOOK_BYTES)
        return token

    def heartbeat(self) -> None:
        """See context.Port."""
        self.renew_now = True
        self._engine.loop.call_soon_threadsafe(self._engine.renew_soon)

    def emit(self, name: str, data: Any) -> None:
        """See context.Port."""
        self._engine.publish(self.document, ((name, self.document["currentStepId"], data),))

    def _load_output(self, output_id: str) -> bytes:
        """The content of an output of this run. Blocks, in the way that `_save` does. Raises DataCorruptionError, StoreUnavailableError."""
        wanted = Wanted(self.document, output_id)
        if self._may_wait_for_loop:
            return asyncio.run_coroutine_threadsafe(self._engine.read_output(wanted), self._engine.loop).result()
        with self._noting_interruptions():
            content = self._engine.drive_blocking(reading_outputs([wanted]), self.run_id)[0]
        if isinstance(content, DataCorruptionError):
            raise content
        return content

    @property
    def _may_wait_for_loop(self) -> bool:
        """Whether the calling thread may wait for the event loop, which may be waiting for one of an `async def` handler or a condition."""
        has_condition = self.asking is not None or self.has_left_condition
        return not self.step.is_async and not has_condition and not self._engine.blocking.on_loop

    @contextlib.contextmanager
    def _noting_interruptions(self) -> Iterator[None]:
        """A database that does not answer is no failure of the handler, which is entered again: see `is_interruption`."""
        try:
            yield
        except StoreUnavailableError as exc:
            self._interruptions = self._interruptions or weakref.WeakSet()  # weak: an error knows the frames, and they the payload
            self._interruptions.add(exc)
            raise

    def is_interruption(self, raised: BaseException) -> bool:
        """Whether a handler or condition has raised what its calls have raised, because the database did not answer."""
        if isinstance(raised, BaseExceptionGroup):
            return all(self.is_interruption(each) for each in raised.exceptions)
        return self._interruptions is not None and raised in self._interruptions

    def forget_interruptions(self) -> None:
        """Another attempt begins, or another condition is asked."""
        self._interruptions = None

    # --- writes while a handler runs -------------------------------------------------------------------------------

    def _save(self, intents: Intents, field: str, value: Callable[[], Any], size: int) -> None:
        """Store one field of the current step; durable on return. On the loop's own thread only a blocking write can be that."""
        if self._may_wait_for_loop:
            asyncio.run_coroutine_threadsafe(self._save_in_group(intents, field, value, size), self._engine.loop).result()
            return
        with self._noting_interruptions(), self._blocking_save_alone():
            self._check_running(intents)
            if self.unsettled is not None:
                self._save_blocking(self.unsettled)  # the next one names the `rev` that follows it
            saved = value()
            self._save_blocking(Save(self._statement(field, saved, size), field, saved))

    @contextlib.contextmanager
    def _blocking_save_alone(self) -> Iterator[None]:
        """One blocking save at a time. The loop's thread waits for those of the handler's own threads no longer than for the database."""
        blocking = self._engine.blocking
        if not self._blocking_save.acquire(blocking=not blocking.on_loop):
            with blocking.waiting(self.run_id) as seconds:
                if not self._blocking_save.acquire(timeout=seconds):
                    raise StoreUnavailableError(f"run {self.run_id}: the saves of its handler's threads get no answer", transient=True)
        try:
            yield
        finally:
            self._blocking_save.release()

    def _save_blocking(self, save: Save) -> None:
        self._engine.blocking.admit(self.run_id)  # else it is not sent, and nothing is unsettled
        self.unsettled = save
        try:
            outcome = self._engine.drive_blocking(_write_alone(save.statement), self.run_id)
        except ValidationError:
            self.unsettled = None  # refused: it is not stored
            raise
        self.unsettled = None
        self._saved(outcome, save.field, save.value)

    async def _save_in_group(self, intents: Intents, field: str, value: Callable[[], Any], size: int) -> None:
        while self._saving is not None:
            await self._saving
        self._check_running(intents)
        done = self._saving = self._engine.loop.create_future()
        try:
            saved = value()
            self._saved(await self._engine.write(self._statement(field, saved, size)), field, saved)
        finally:
            self._saving = None
            done.set_result(None)

    def _statement(self, field: str, value: Any, size: int) -> Statement:
        return commits.save_in_step(self.fence(), self.place, field, value, self._engine.now(), size + STATEMENT_BYTES)

    def _check_running(self, intents: Intents) -> None:
        """The attempt whose record this is runs: a thread that an earlier one has left must store nothing in the step of a later one."""
        if self.lost is not None:
            raise LeaseLostError(f"run {self.run_id}: this worker no longer holds it; nothing was stored", run_id=self.run_id)
        if self.attempt is None or self.attempt.intents is not intents:
            raise InvalidStateError(f"run {self.run_id}: the handler that asks is not running; nothing was stored", run_id=self.run_id)

    def _saved(self, outcome: WriteOutcome, field: str, value: Any) -> None:
        if outcome is not WriteOutcome.COMMITTED:
            self.mark_lost()
            self._engine.loop.call_soon_threadsafe(self.abort, "lease-lost")
            raise LeaseLostError(f"run {self.run_id}: this worker no longer holds it; {field} was not stored", run_id=self.run_id)
        self.document["rev"] += 1
        cast(Fields, self.document["steps"][self.place])[field] = value

    @property
    def is_saving(self) -> bool:
        """Whether the outcome of such a write is unknown so far."""
        return self._saving is not None or self.unsettled is not None or self._blocking_save.locked()

    async def saves_done(self) -> None:
        """Return once the outcome of every such write is known. None begins any more, because the attempt is over."""
        while self._saving is not None:
            await self._saving
        while self._blocking_save.locked():
            await asyncio.sleep(_SAVE_POLL_S)
        if self.unsettled is not None:
            save, self.unsettled = self.unsettled, None
            with contextlib.suppress(ValidationError, LeaseLostError):  # refused, or lost, which the next write finds as well
                self._saved(await self._engine.write(save.statement), save.field, save.value)


def _loader_of(active: ActiveRun) -> Callable[[str], bytes]:
    """`active._load_output`, without keeping the run, which keeps its outputs.

    Such a circle would keep every run, with its document, in memory until a full garbage collection. Measured: up to 2 000 ended runs.
    """
    reference = weakref.ref(active)

    def load(output_id: str) -> bytes:
        alive = reference()
        assert alive is not None, "a handler and a condition keep the run by their context, and the engine keeps it while it drives it"
        return alive._load_output(output_id)

    return load


def _write_alone(statement: Statement) -> Procedure[WriteOutcome]:
    """One fenced write apart from the group, with its outcome; an unknown outcome is read, then the write is repeated."""
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
