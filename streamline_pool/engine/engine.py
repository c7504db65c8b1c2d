"""Drives the runs that this process holds: next step, handler, commit, until a run must stop or is no longer ours.

Owns the order of things for a run that is held. Which runs are claimed is the caller's business (worker.py, or local.py
for `execute`), what may follow what is decided in transitions.py, leases are kept by leases.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

from streamline_pool.config.env import Env
from streamline_pool.domain import transitions
from streamline_pool.domain.definition import Definition, StepDefinition
from streamline_pool.domain.errors import DataCorruptionError, StoreUnavailableError, ValidationError, WorkflowError
from streamline_pool.domain.model import StepStatus
from streamline_pool.domain.transitions import Change
from streamline_pool.events.bus import Event, EventBus, global_event_bus
from streamline_pool.events.publisher import EventPublisher
from streamline_pool.protocol import commits, durable_events, recovery
from streamline_pool.protocol.codec import check_payload, decode_payload
from streamline_pool.protocol.operations import Statement
from streamline_pool.protocol.payloads import EXTERNAL_KEY, external_ids, is_external
from streamline_pool.protocol.run_document import validate_run_document
from streamline_pool.storage.files import putting_file, reading_outputs
from streamline_pool.storage.store import AsyncStore, Store

from .active_run import STATEMENT_BYTES, ActiveRun, Observer
from .attempt import Attempt, Kind, Outcome, failure_of
from .context import AbortSignal, Context
from .group_commit import GroupCommitter, WriteOutcome
from .leases import LeaseKeeper
from .outcomes import Decided, Moment, allowed, change_after, damaged, failed, version_mismatch
from .run_cache import RunCache, RunNote

__all__ = ["Engine"]

log = logging.getLogger("streamline_pool")


_READ_AGAIN_S = 0.2  # while the database does not answer; a guess


Events = tuple[tuple[str, str | None, Any], ...]


class _SupersededError(Exception):
    """A driver whose handler was given up on, and has ended after all, has nothing left to do."""


class Engine:
    """Everything in flight in one event loop. `start` it there, `admit` claimed documents, `close` it at the end."""

    def __init__(
        self,
        *,
        store: AsyncStore,
        blocking_store: Callable[[], Store],
        env: Env,
        definition_of: Callable[[Mapping[str, Any]], Definition | None],
        events: EventBus,
        broadcast: EventPublisher,
        lease_s: float,
        threads_max: int,
        observer: Observer,
    ) -> None:
        self.store = store
        self.blocking_store = blocking_store
        self.env = env
        self.cache = RunCache()
        self.active_runs: dict[str, ActiveRun] = {}
        self.draining = False
        self.steps_total = 0
        self._definition_of = definition_of
        self._own_events = events
        self.broadcast = broadcast
        self._observer = observer
        self._committer = GroupCommitter(store, env, observer.store_answered)
        # Threads are made as needed; the margin is for handlers that outlive their attempt until the worker is recycled.
        self._threads = ThreadPoolExecutor(max_workers=2 * threads_max + 8, thread_name_prefix="streamline-handler")
        self.leases = LeaseKeeper(store, env, self.active_runs, lease_s, observer)
        self._reports: set[asyncio.Task[None]] = set()
        self._closed = False
        self._empty = asyncio.Event()
        self._empty.set()

    def start(self) -> None:
        """Begin to commit and to renew, in the running loop."""
        self.loop = asyncio.get_running_loop()
        self.loop_thread = threading.get_ident()
        self._committer.start()
        self.broadcast.start()
        self.leases.start()

    async def close(self) -> None:
        """Stop. Runs still in flight are left to the expiry of their leases; drain first to give them back."""
        self._closed = True
        await self.leases.close()
        for active in list(self.active_runs.values()):
            if active.task is not None:
                active.task.cancel()
        await self._committer.close()
        await self.broadcast.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # --- admission -------------------------------------------------------------------------------------------------

    def admit(self, document: dict[str, Any], deadline: float) -> asyncio.Task[None]:
        """Drive a claimed run. The task ends when the run is parked, terminal, given back or lost; it never raises."""
        reason = validate_run_document(document)
        definition = self._definition_of(document) if reason is None else None
        run_id = document["_id"]
        if definition is None:
            task = self.loop.create_task(self._report_corrupt(run_id, reason or _unknown(document)))
            self._reports.add(task)  # a task that nobody refers to may be collected
            task.add_done_callback(self._reports.discard)
            return task
        active = ActiveRun(self, definition, document, document["lease"]["id"], deadline)
        self.active_runs[run_id] = active
        self._empty.clear()
        self.cache.put(run_id, RunNote(document["version"], document["token"], deadline, True))
        active.task = self.loop.create_task(self._run_task(active))
        return active.task

    async def _report_corrupt(self, run_id: str, reason: str) -> None:
        log.error("run_corrupt", extra={"run_id": run_id, "reason": reason})
        try:
            await self.store.run(recovery.mark_corrupt(run_id, reason, self.store.now()))
        except WorkflowError:
            log.warning("run_corrupt_unmarked", extra={"run_id": run_id})  # its lease expires, and the next claimer tries again

    # --- driving ---------------------------------------------------------------------------------------------------

    async def _run_task(self, active: ActiveRun, change: Change | None = None) -> None:
        try:
            if change is None or await self._store(active, change):
                await self._drive(active, resumed=change is not None)
        except _SupersededError:
            return
        except asyncio.CancelledError:
            if self._closed:
                raise
            # Somebody kept the task that ran a handler and cancelled it too late: as bad as a defect of ours, and no worse.
            log.warning("driver_cancelled", extra={"run_id": active.run_id})
        except Exception:
            # A defect of ours: the run is not wedged by it, since a lease that is not renewed expires.
            log.exception("drive_failed", extra={"run_id": active.run_id})
            self.publish(active.document, (("engine:error", None, {"run_id": active.run_id}),))
        self._detach(active)

    def _detach(self, active: ActiveRun) -> None:
        if self.active_runs.get(active.run_id) is active:  # else the run has been claimed again, here, in the meantime
            del self.active_runs[active.run_id]
        self.cache.put(active.run_id, RunNote(active.document["version"], active.document["token"], active.deadline, False))
        if not self.active_runs:
            self._empty.set()
        self._observer.on_finished(active.run_id, active.document["status"] if active.lost is None else "lost")

    def _on_stuck_handler(self, active: ActiveRun, attempt: Attempt, what: str) -> None:
        """A handler does not end. A thread leaves its driver free; a coroutine holds its driver, so a new one goes on."""
        self._observer.on_stuck(what)
        if attempt.settled is not None or active.attempt is not attempt:
            return
        attempt.context._close()
        active.attempt = None
        decided = self._change_after(active, active.place, attempt.context, Outcome(Kind.ABANDONED, None))
        if decided is None:
            self._detach(active)
        else:
            active.task = self.loop.create_task(self._run_task(active, decided.change))

    async def _drive(self, active: ActiveRun, resumed: bool) -> None:
        if not resumed and self._has_subscribers():
            self._publish_claimed(active)
        misplaced = version_mismatch(active.document, active.definition, self.store.now())
        if misplaced is not None:
            await self._store(active, misplaced)
            return
        if active.document.get("paused") is True:
            # Paused between the claim's update and its read-back: given up at once.
            place = transitions.current_place(active.document) or 0
            await self._store(active, transitions.release(active.document, place, self.store.now(), entered=False))
            return
        while True:
            decided = await self._next_change(active)
            if decided is None or not await self._store_decided(active, decided):
                return

    async def _next_change(self, active: ActiveRun) -> Decided | None:
        """The next transition of a run; None when the run is no longer ours."""
        document = active.document
        place = transitions.current_place(document)
        now = self.store.now()
        if place is None:
            return Decided(transitions.finish(document, now))
        active.place = place
        stored = document["steps"][place]
        if stored["status"] == StepStatus.WAITING.value:
            change = await self._end_wait(active, place, stored["waitingFor"])
            # What has been found is stored as the step's output, and once more as the run's if this is the last one.
            size = 2 * check_payload(change.steps[place]["output"], "output") if change.name == "look" else 0
            return Decided(change, size)
        if self.draining or active.release_requested:
            return Decided(transitions.release(document, place, now, entered=False))
        if active.lost is not None:
            return None
        try:
            await self._load_outputs(active)
        except DataCorruptionError as exc:
            return Decided(damaged(document, place, exc, now))
        if self.env.clock.monotonic() >= active.deadline:
            # Looked at immediately before a handler may be entered: past the deadline another worker may hold the run.
            # If nobody does, it is given back; the write's fence sees to that.
            log.warning("lease_ran_out", extra={"run_id": active.run_id})
            return Decided(transitions.release(document, place, now, entered=False))
        step = active.definition.steps[place]
        if step.is_conditional and not stored.get("decided"):
            return Decided(await self._decide_entry(active, step, place))
        return await self._attempt(active, step, place)

    async def _load_outputs(self, active: ActiveRun) -> None:
        """Have at hand what the run's document only refers to: handlers and conditions may ask for any earlier output."""
        missing = [file_id for file_id in external_ids(active.document) if file_id not in active.outputs]
        while missing:
            try:
                active.outputs |= await self.store.drive(reading_outputs(active.document, missing))
                return
            except StoreUnavailableError:
                await self.env.async_sleep(_READ_AGAIN_S)

    async def _end_wait(self, active: ActiveRun, place: int, waiting_for: Mapping[str, Any]) -> Change:
        """A run that waits was claimed, or has just begun to wait for an event: has its wait ended? Its handler is through."""
        document, definition = active.document, active.definition
        if waiting_for["type"] == "timer":
            return transitions.wake(document, definition, place, self.store.now())
        if waiting_for["type"] == "event":
            # Looked up first, whoever claimed the run and why: no broadcast may be missed for a deadline or a crash.
            name = waiting_for["eventName"]
            found = transitions.arrived(document, {"name": name}) or await self._find_event(active, name)
            if found is not None:
                return transitions.wait_answered(document, definition, place, found, self.store.now())
        now, expires_at = self.store.now(), waiting_for.get("expiresAt")
        if expires_at is not None and expires_at <= now:
            return transitions.time_out(document, definition, place, now)
        return transitions.park(document, place)

    async def _find_event(self, active: ActiveRun, name: str) -> Mapping[str, Any] | None:
        """An event that was sent to all since the run exists, and that it has not had."""
        document = active.document
        while True:
            try:
                found = await self.store.run(durable_events.find_event_for(name, document.get("bornAt"), document.get("seen") or ()))
                return dict(found[0]) if found else None
            except StoreUnavailableError:
                await self.env.async_sleep(_READ_AGAIN_S)

    async def _decide_entry(self, active: ActiveRun, step: StepDefinition, place: int) -> Change:
        context = Context(active.document, place, AbortSignal(), active, active.outputs)
        try:
            enter = await allowed(step, context, active.document, active.outputs)
        except BaseException as exc:  # a predicate is user code: what it raises is a failed attempt
            if self._closed:
                raise
            return failed(active.document, step, place, failure_of(exc), self._moment())
        if enter:
            return transitions.decide_entry(active.document, place)
        return transitions.skip(active.document, active.definition, place, context._sets, self.store.now())

    async def _attempt(self, active: ActiveRun, step: StepDefinition, place: int) -> Decided | None:
        context = Context(active.document, place, AbortSignal(), active, active.outputs)
        attempt = active.attempt = Attempt(self.loop, context, functools.partial(self._on_stuck_handler, active))
        if self._has_subscribers():
            self.publish(active.document, (("step:started", step.id, {"attempt": context.attempt}),))
        outcome = await attempt.run(step, self._threads)
        if active.attempt is not attempt:
            raise _SupersededError  # the run went on without this handler, and with another driver
        context._close()
        active.attempt = None
        self.steps_total += 1
        self.env.probe("handler.after")
        return self._change_after(active, place, context, outcome)

    def _change_after(self, active: ActiveRun, place: int, context: Context, outcome: Outcome) -> Decided | None:
        """What an attempt's outcome means for the run; None if that is no longer ours to say."""
        if active.lost is not None or self._closed:
            return None
        return change_after(active.document, active.definition, place, context, outcome, self._moment())

    def _moment(self) -> Moment:
        return Moment(self.store.now(), self.env.random(), self.env.new_id)

    # --- storing ---------------------------------------------------------------------------------------------------

    async def _store_decided(self, active: ActiveRun, decided: Decided) -> bool:
        """As `_store`; a large output goes into its file first, so that nothing ever refers to a file that is not there."""
        if decided.file is None:
            return await self._store(active, decided.change, decided.size)
        file = decided.file
        while True:
            try:
                await self.store.drive(putting_file(file.id, file.content, active.run_id))
                break
            except StoreUnavailableError:
                await self.env.async_sleep(_READ_AGAIN_S)
            except ValidationError as exc:
                step = active.definition.steps[active.place]
                return await self._store(active, failed(active.document, step, active.place, failure_of(exc), self._moment()))
        active.outputs[file.id] = decode_payload(file.content)
        # Should the commit find the run lost, the file stays until the run is deleted: the write may have landed before.
        return await self._store(active, decided.change, decided.size)

    async def _store(self, active: ActiveRun, change: Change, size: int = 0) -> bool:
        """Make a transition durable. True if the run is still ours and goes on."""
        if (self.draining or active.release_requested) and change.name == "advance":
            # The next step would not be entered here: leave it to whoever claims the run, in this same write.
            change = transitions.without_grant(active.document, change, self.store.now())
        first, twin = change, False
        await active.saves_done()
        while True:
            if self._has_subscribers():
                await self._load_told(active, change)
            now = self.store.now()
            make = commits.commit_under_pause if twin else commits.commit
            self.env.probe("commit.before")
            try:
                statement = make(active.fence(), change, now, size + STATEMENT_BYTES)
                verdict = await self._committer.write(statement, express=change.name == "wake")
            except ValidationError as exc:
                if change.name == "fail":
                    return await self._fail_minimal(active, exc)
                step = active.definition.steps[active.place]
                change = first = failed(active.document, step, active.place, failure_of(exc), self._moment())
                continue
            self.env.probe("commit.after")
            if verdict is WriteOutcome.COMMITTED or verdict is WriteOutcome.COMMITTED_BY_READ:
                return await self._committed(active, change, verdict)
            if verdict is WriteOutcome.FENCED:
                active.lost = active.lost or "lease-lost"
                log.info("run_fenced", extra={"run_id": active.run_id, "change": change.name})
                return False
            if verdict is WriteOutcome.NOT_YET:
                change = first = transitions.park(active.document, active.place)
            elif verdict is WriteOutcome.ARRIVED:
                # What the run was about to wait for came first: it is in the document, and not in our copy yet.
                document = await self._read_held(active)
                if document is None:
                    active.lost = active.lost or "lease-lost"
                    return False
                active.document = document
                change = first = transitions.take(document, active.definition, first, now) or first
                if (self.draining or active.release_requested) and change.name == "advance":
                    change = first = transitions.without_grant(document, change, now)
                twin = False
            else:
                twin = verdict is WriteOutcome.PAUSED
                change = transitions.under_pause(active.document, first, self.store.now()) if twin else first

    async def _load_told(self, active: ActiveRun, change: Change) -> None:
        """Have at hand what subscribers will be told and the document only refers to: an answer that is in a file."""
        told = [data[EXTERNAL_KEY] for _, _, data in change.events if is_external(data) and data[EXTERNAL_KEY] not in active.outputs]
        if told:
            with contextlib.suppress(WorkflowError):  # then they are told of the file, and the run goes on
                active.outputs |= await self.store.drive(reading_outputs(active.document, told))

    async def _fail_minimal(self, active: ActiveRun, exc: ValidationError) -> bool:
        """Not even its failure fits into the run: say so in as few bytes as possible."""
        try:
            await self.write(commits.fail_minimal(active.fence(), active.place, exc.code, exc.message, self.store.now()))
            active.document["status"] = "failed"
        except ValidationError:
            log.exception("run_unstorable", extra={"run_id": active.run_id})
            active.lost = "lease-lost"
        return False

    async def _committed(self, active: ActiveRun, change: Change, verdict: WriteOutcome) -> bool:
        if verdict is WriteOutcome.COMMITTED_BY_READ and not change.releases:
            # After a lost reply the document itself says where the run is, not our memory of what we sent.
            document = await self._read_held(active)
            if document is None:
                active.lost = active.lost or "lease-lost"
                return False
            active.document = document
        else:
            transitions.apply(active.document, change)
        if self._has_subscribers():
            self.publish(active.document, _with_values(change.events, active.outputs))
        if change.name in ("retry", "fail"):
            _log_failure(active, change)
        if change.releases and change.wake_at is not None:
            self._observer.on_parked(active.document["lane"], change.wake_at, active.run_id)
        return not change.releases

    async def _read_held(self, active: ActiveRun) -> dict[str, Any] | None:
        while True:
            try:
                found = await self.store.run(commits.read_held(active.run_id, active.lease_id))
                return dict(found[0]) if found else None
            except StoreUnavailableError:
                await self.env.async_sleep(_READ_AGAIN_S)

    def check(self, run_id: str) -> None:
        """Somebody says that something was done to this run from outside: find out, if it is in flight here."""
        active = self.active_runs.get(run_id)
        if active is not None:
            self.leases.check(active)

    # --- flight.Ground ---------------------------------------------------------------------------------------------

    async def write(self, statement: Statement) -> WriteOutcome:
        """Hand a fenced write to the group, and wait for its verdict."""
        return await self._committer.write(statement)

    def now(self) -> datetime:
        """The server's time, as known here."""
        return self.store.now()

    def renew_soon(self) -> None:
        """A handler has sent a heartbeat."""
        self.leases.renew_soon()

    # --- stopping --------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Start no further step; steps in flight end and are stored, their runs given back."""
        self.draining = True

    def stop(self, grace_s: float) -> None:
        """Drain now: signals fire with reason "shutdown", handlers have `grace_s` seconds, their runs are given back."""
        self.draining = True
        for active in list(self.active_runs.values()):
            if active.attempt is not None:
                active.attempt.abort("shutdown", grace_s)

    def stop_run(self, run_id: str) -> None:
        """Stop one run as `stop` stops all: it is given back, uncounted."""
        active = self.active_runs.get(run_id)
        if active is not None:
            active.release_requested = True
            active.abort("shutdown")

    async def emptied(self) -> None:
        """Return once nothing is in flight."""
        await self._empty.wait()

    # --- events ----------------------------------------------------------------------------------------------------

    def _has_subscribers(self) -> bool:
        return self._own_events.active or global_event_bus.active or self.broadcast.active

    def _publish_claimed(self, active: ActiveRun) -> None:
        document = active.document
        if document["token"] == 1:
            self.publish(document, (("workflow:started", None, document.get("input")),))
        elif document["crashes"]:
            self.publish(document, (("workflow:recovered", document["currentStepId"], {"crashes": document["crashes"]}),))

    def publish(self, document: Mapping[str, Any], events: tuple[tuple[str, str | None, Any], ...]) -> None:
        """Tell the subscribers in this process, and those who stream, what has durably happened."""
        for name, step_id, data in events:
            self._publish(name, data, document["_id"], document["workflowId"], step_id)

    def publish_error(self, name: str, data: Any) -> None:
        """Tell them of a trouble that is no run's own."""
        self._publish(name, data, None, None, None)

    def _publish(self, name: str, data: Any, run_id: str | None, workflow_id: str | None, step_id: str | None) -> None:
        event = Event(name=name, run_id=run_id, workflow_id=workflow_id, step_id=step_id, data=data, at=self.store.now())
        for bus in (self._own_events, global_event_bus, self.broadcast):
            bus.publish(event)


def _with_values(events: Events, outputs: Mapping[str, Any]) -> Events:
    """Events whose data is an output that the document only refers to."""
    return tuple((name, step_id, outputs.get(data[EXTERNAL_KEY], data) if is_external(data) else data) for name, step_id, data in events)


def _unknown(document: Mapping[str, Any]) -> str:
    named = f"fields 'workflowId' {document['workflowId']!r} and 'version' {document['version']!r} name no workflow"
    return f"{named} of this application, though its lane {document['lane']!r} does"


def _log_failure(active: ActiveRun, change: Change) -> None:
    """The pool's log is where people look first for a step that failed."""
    step = active.document["steps"][active.place]
    fields = {"run_id": active.run_id, "workflow_id": active.definition.workflow_id, "step_id": step["stepId"], "attempt": step["attempts"]}
    if change.name == "retry":
        error = step["error"]
        log.warning("attempt_failed", extra={**fields, "error": f"{error['type']}: {error['message']}", "again_at": str(change.wake_at)})
    else:
        error = active.document["error"]
        more = f"streamline-pool runs show {active.run_id}"  # with the traceback, which is too long for a line
        log.error("run_failed", extra={**fields, "error": f"{error['code']}: {error['type']}: {error['message']}", "more": more})
