"""Makes decisions about an active run durable. Owns the performing of what `write_outcome.after_write` decides.

Large outputs go first, so that no document ever refers to one that does not exist; events go last, once the write is durable.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import assert_never

from streamline_pool.config.env import Env
from streamline_pool.domain.change import Change, ChangeKind, apply
from streamline_pool.domain.document import RunDocument
from streamline_pool.domain.errors import ValidationError, WorkflowError
from streamline_pool.protocol import commits
from streamline_pool.protocol.operations import Find
from streamline_pool.protocol.payloads import EXTERNAL_KEY, is_external
from streamline_pool.protocol.run_document import validate_run_document
from streamline_pool.storage.procedures import until_answered
from streamline_pool.storage.store import AsyncStore

from .active_run import STATEMENT_BYTES, ActiveRun
from .failures import failure_of
from .group_commit import GroupCommitter
from .group_outputs import GroupOutputs
from .outcomes import Decided, Moment, failed
from .ports import Observer
from .run_events import RunEvents
from .write_outcome import (
    Committed,
    FailMinimal,
    FindStored,
    Lost,
    ReadFirst,
    Send,
    Write,
    WriteOutcome,
    after_reading,
    after_write,
    first_write,
    stored_form,
)

__all__ = ["EngineState", "RunWriter"]

log = logging.getLogger("streamline_pool")


@dataclass(slots=True)
class EngineState:
    """What the engine has been asked to do, and how much it has done. The engine writes it; its parts read it."""

    draining: bool = False  # no further step is entered
    closed: bool = False  # nothing more is stored
    steps_total: int = 0  # handlers that have ended


class RunWriter:
    """Stores changes of active runs, each until its outcome is known."""

    def __init__(
        self,
        store: AsyncStore,
        env: Env,
        committer: GroupCommitter,
        outputs: GroupOutputs,
        events: RunEvents,
        observer: Observer,
        state: EngineState,
    ) -> None:
        self._store = store
        self._env = env
        self._committer = committer
        self._outputs = outputs
        self._events = events
        self._observer = observer
        self._state = state

    def moment(self) -> Moment:
        """The circumstances of a decision that is made now."""
        return Moment(self._store.now(), self._env.random(), self._env.new_id)

    async def store_decided(self, active: ActiveRun, decided: Decided) -> bool:
        """As `store`. A large output is stored beside the run first."""
        output = decided.output
        if output is None:
            return await self.store(active, decided.change, decided.size)
        try:
            await self._outputs.put(output)
        except ValidationError as exc:
            return await self.store(active, failed(active.document, active.step, active.place, failure_of(exc), self.moment()))
        active.outputs.add(output.id, output.content)
        # If the commit finds the run lost, the output stays until the run is deleted: an earlier copy of the write may be stored.
        return await self.store(active, decided.change, decided.size)

    async def store(self, active: ActiveRun, change: Change, size: int = 0) -> bool:
        """Make a change durable. True if this worker still holds the run and goes on with it."""
        await active.saves_done()
        write = self._first_write(active, change)
        while True:
            if self._events.wanted:
                await self._load_event_data(active, write.change)
            self._env.probe("commit.before")
            result: WriteOutcome | ValidationError
            try:
                result = await self._send(active, write, size)
            except ValidationError as exc:
                result = exc
            else:
                self._env.probe("commit.after")
            if result is WriteOutcome.COMMITTED:  # by far the most frequent: nothing to decide
                return self._committed(active, write.change)
            match after_write(result, write, active.held(draining=self._state.draining), self.moment()):
                case Send(write=write):
                    continue
                case Committed(change=change):
                    return self._committed(active, change)
                case ReadFirst():
                    if not await self._reread(active):
                        return False
                    write = after_reading(write, active.held(draining=self._state.draining), self._store.now())
                case FindStored():
                    return await self._find_stored(active, write)
                case Lost():
                    return self._fenced(active, write)
                case FailMinimal(cause=cause):
                    await self._fail_minimal(active, cause)
                    return False
                case _ as never:
                    assert_never(never)

    async def record(self, active: ActiveRun, change: Change, size: int) -> bool:
        """Store calls of a durable function, which goes on, also in a paused run. False: this worker holds the run no more.

        In a paused run, `release_requested` is set: no further call begins here. Raises ValidationError if the server can never store it.
        """
        change = active.filled(change)
        outcome = WriteOutcome.PAUSED if active.document.get("paused") is True else None
        while outcome in (None, WriteOutcome.PAUSED):
            active.release_requested = active.release_requested or outcome is WriteOutcome.PAUSED
            make = commits.commit if outcome is None else commits.record_under_pause
            self._env.probe("commit.before")
            statement = make(active.fence(), change, self._store.now(), size + STATEMENT_BYTES * len(change.steps))
            outcome = await self._committer.write(statement)
            self._env.probe("commit.after")
        if outcome is WriteOutcome.COMMITTED:
            return self._committed(active, change)
        return self._fenced(active, Write(change, change))

    def _first_write(self, active: ActiveRun, change: Change) -> Write:
        if self._state.draining or active.release_requested:
            return first_write(change, active.held(draining=self._state.draining), self._store.now())
        return Write(change, change)  # the same, without the holder's view, which costs on every step

    def _send(self, active: ActiveRun, write: Write, size: int) -> asyncio.Future[WriteOutcome]:
        make = commits.commit_under_pause if write.under_pause else commits.commit
        statement = make(active.fence(), active.filled(write.change), self._store.now(), size + STATEMENT_BYTES)
        if write.earlier:
            statement = statement._replace(follows_form=True)
        return self._committer.write(statement, urgent=write.change.kind is ChangeKind.WAKE)

    async def _load_event_data(self, active: ActiveRun, change: Change) -> None:
        """Load what subscribers will get and the document only refers to: an answer that is stored beside the run."""
        missing = [data[EXTERNAL_KEY] for _, _, data in change.events if is_external(data) and data[EXTERNAL_KEY] not in active.outputs]
        if missing:
            with contextlib.suppress(WorkflowError):  # then subscribers get the reference, and the run goes on
                await self._outputs.load(active.document, missing, active.outputs)

    def _committed(self, active: ActiveRun, change: Change) -> bool:
        apply(active.document, change)
        active.steps_stored = max(active.steps_stored, 1 + max(change.steps, default=0))
        if change.kind is ChangeKind.CONTINUE:
            active.steps_stored = len(active.document["steps"])
        return self._stored(active, change)

    def _stored(self, active: ActiveRun, change: Change) -> bool:
        """The change is durable, and the holder's copy has it."""
        self._events.publish_committed(active, change)
        if change.releases and change.wake_at is not None:
            self._observer.on_parked(active.document["lane"], change.wake_at, active.run_id)
        return not change.releases

    async def _find_stored(self, active: ActiveRun, write: Write) -> bool:
        """Of several forms that were sent, go on from the one that is stored. As `store`."""
        found = await self._read(commits.read_run(active.run_id))
        change = None if found is None else stored_form(write, active.document, found)
        if found is None or change is None:
            return self._fenced(active, write)
        active.replace_document(found)
        if self._events.wanted:
            await self._load_event_data(active, change)
        return self._stored(active, change)

    def _fenced(self, active: ActiveRun, write: Write) -> bool:
        active.mark_lost()
        log.info("run_fenced", extra={"run_id": active.run_id, "change": write.change.kind.value})
        return False

    async def _reread(self, active: ActiveRun) -> bool:
        """Replace the holder's copy by what is stored. False: this worker holds the run no more, or must not go on with it."""
        found = await self._read(commits.read_held(active.run_id, active.lease_id))
        if found is None:
            active.mark_lost()
            return False
        active.replace_document(found)
        return True

    async def _read(self, find: Find) -> RunDocument | None:
        """The run that is found. A damaged one counts as none: it is left to the expiry of its lease, and the next claim reports it."""
        found: list[RunDocument] = await until_answered(lambda: self._store.run(find), self._env)
        return found[0] if found and validate_run_document(found[0]) is None else None

    async def _fail_minimal(self, active: ActiveRun, cause: ValidationError) -> None:
        try:
            statement = commits.fail_minimal(active.fence(), active.place, cause.code, cause.message, self._store.now())
            if await self._committer.write(statement) is WriteOutcome.COMMITTED:
                active.document["status"] = "failed"
            else:
                active.mark_lost()
        except ValidationError:
            log.exception("run_unstorable", extra={"run_id": active.run_id})
            active.lost = "lease-lost"
