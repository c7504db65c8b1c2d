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
from streamline_pool.events.publisher import Broadcaster
from streamline_pool.protocol import commits, durable_events, recovery
from streamline_pool.protocol.codec import check_payload, decode_payload
from streamline_pool.protocol.operations import Statement
from streamline_pool.protocol.payloads import EXTERNAL_KEY, external_ids, is_external
from streamline_pool.protocol.run_document import misfit
from streamline_pool.storage.files import putting_file, reading_outputs
from streamline_pool.storage.store import AsyncStore, Store

from .active_run import STATEMENT_BYTES, Flight, Observer
from .attempt import Attempt, Kind, Outcome, failure_of
from .context import AbortSignal, Context
from .group_commit import GroupCommitter, Verdict
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
        broadcast: Broadcaster,
        lease_s: float,
        threads_max: int,
        observer: Observer,
    ) -> None:
        self.store = store
        self.blocking_store = blocking_store
        self.env = env
        self.cache = RunCache()
        self.flights: dict[str, Flight] = {}
        self.draining = False
        self.steps_total = 0
        self._definition_of = definition_of
        self._own_events = events
        self.broadcast = broadcast
        self._observer = observer
        self._committer = GroupCommitter(store, env, observer.store_answered)
        # Threads are made as needed; the margin is for handlers that outlive their attempt until the worker is recycled.
        self._threads = ThreadPoolExecutor(max_workers=2 * threads_max + 8, thread_name_prefix="streamline-handler")
        self.leases = LeaseKeeper(store, env, self.flights, lease_s, observer)
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
        for flight in list(self.flights.values()):
            if flight.task is not None:
                flight.task.cancel()
        await self._committer.close()
        await self.broadcast.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # --- admission -------------------------------------------------------------------------------------------------

    def admit(self, document: dict[str, Any], deadline: float) -> asyncio.Task[None]:
        """Drive a claimed run. The task ends when the run is parked, terminal, given back or lost; it never raises."""
        reason = misfit(document)
        definition = self._definition_of(document) if reason is None else None
        run_id = document["_id"]
        if definition is None:
            task = self.loop.create_task(self._report_corrupt(run_id, reason or _unknown(document)))
            self._reports.add(task)  # a task that nobody refers to may be collected
            task.add_done_callback(self._reports.discard)
            return task
        flight = Flight(self, definition, document, document["lease"]["id"], deadline)
        self.flights[run_id] = flight
        self._empty.clear()
        self.cache.put(run_id, RunNote(document["version"], document["token"], deadline, True))
        flight.task = self.loop.create_task(self._fly(flight))
        return flight.task

    async def _report_corrupt(self, run_id: str, reason: str) -> None:
        log.error("run_corrupt", extra={"run_id": run_id, "reason": reason})
        try:
            await self.store.run(recovery.mark_corrupt(run_id, reason, self.store.now()))
        except WorkflowError:
            log.warning("run_corrupt_unmarked", extra={"run_id": run_id})  # its lease expires, and the next claimer tries again

    # --- driving ---------------------------------------------------------------------------------------------------

    async def _fly(self, flight: Flight, change: Change | None = None) -> None:
        try:
            if change is None or await self._store(flight, change):
                await self._drive(flight, resumed=change is not None)
        except _SupersededError:
            return
        except asyncio.CancelledError:
            if self._closed:
                raise
            # Somebody kept the task that ran a handler and cancelled it too late: as bad as a defect of ours, and no worse.
            log.warning("driver_cancelled", extra={"run_id": flight.run_id})
        except Exception:
            # A defect of ours: the run is not wedged by it, since a lease that is not renewed expires.
            log.exception("drive_failed", extra={"run_id": flight.run_id})
            self.publish(flight.document, (("engine:error", None, {"run_id": flight.run_id}),))
        self._leave(flight)

    def _leave(self, flight: Flight) -> None:
        if self.flights.get(flight.run_id) is flight:  # else the run has been claimed again, here, in the meantime
            del self.flights[flight.run_id]
        self.cache.put(flight.run_id, RunNote(flight.document["version"], flight.document["token"], flight.deadline, False))
        if not self.flights:
            self._empty.set()
        self._observer.landed(flight.run_id, flight.document["status"] if flight.lost is None else "lost")

    def _stuck(self, flight: Flight, attempt: Attempt, what: str) -> None:
        """A handler does not end. A thread leaves its driver free; a coroutine holds its driver, so a new one goes on."""
        self._observer.stuck(what)
        if attempt.settled is not None or flight.attempt is not attempt:
            return
        attempt.context._close()
        flight.attempt = None
        decided = self._change_after(flight, flight.place, attempt.context, Outcome(Kind.ABANDONED, None))
        if decided is None:
            self._leave(flight)
        else:
            flight.task = self.loop.create_task(self._fly(flight, decided.change))

    async def _drive(self, flight: Flight, resumed: bool) -> None:
        if not resumed and self._listening():
            self._publish_claimed(flight)
        misplaced = version_mismatch(flight.document, flight.definition, self.store.now())
        if misplaced is not None:
            await self._store(flight, misplaced)
            return
        if flight.document.get("paused") is True:
            # Paused between the claim's update and its read-back: given up at once.
            place = transitions.current_place(flight.document) or 0
            await self._store(flight, transitions.give_back(flight.document, place, self.store.now(), entered=False))
            return
        while True:
            decided = await self._next_change(flight)
            if decided is None or not await self._store_decided(flight, decided):
                return

    async def _next_change(self, flight: Flight) -> Decided | None:
        """The next transition of a run; None when the run is no longer ours."""
        document = flight.document
        place = transitions.current_place(document)
        now = self.store.now()
        if place is None:
            return Decided(transitions.finish(document, now))
        flight.place = place
        stored = document["steps"][place]
        if stored["status"] == StepStatus.WAITING.value:
            change = await self._end_wait(flight, place, stored["waitingFor"])
            # What has been found is stored as the step's output, and once more as the run's if this is the last one.
            size = 2 * check_payload(change.steps[place]["output"], "output") if change.name == "look" else 0
            return Decided(change, size)
        if self.draining or flight.leaving:
            return Decided(transitions.give_back(document, place, now, entered=False))
        if flight.lost is not None:
            return None
        try:
            await self._load_outputs(flight)
        except DataCorruptionError as exc:
            return Decided(damaged(document, place, exc, now))
        if self.env.clock.monotonic() >= flight.deadline:
            # Looked at immediately before a handler may be entered: past the deadline another worker may hold the run.
            # If nobody does, it is given back; the write's fence sees to that.
            log.warning("lease_ran_out", extra={"run_id": flight.run_id})
            return Decided(transitions.give_back(document, place, now, entered=False))
        step = flight.definition.steps[place]
        if step.is_conditional and not stored.get("decided"):
            return Decided(await self._decide_entry(flight, step, place))
        return await self._attempt(flight, step, place)

    async def _load_outputs(self, flight: Flight) -> None:
        """Have at hand what the run's document only refers to: handlers and conditions may ask for any earlier output."""
        missing = [file_id for file_id in external_ids(flight.document) if file_id not in flight.outputs]
        while missing:
            try:
                flight.outputs |= await self.store.drive(reading_outputs(flight.document, missing))
                return
            except StoreUnavailableError:
                await self.env.async_sleep(_READ_AGAIN_S)

    async def _end_wait(self, flight: Flight, place: int, waiting_for: Mapping[str, Any]) -> Change:
        """A run that waits was claimed, or has just begun to wait for an event: has its wait ended? Its handler is through."""
        document, definition = flight.document, flight.definition
        if waiting_for["type"] == "timer":
            return transitions.wake(document, definition, place, self.store.now())
        if waiting_for["type"] == "event":
            # Looked up first, whoever claimed the run and why: no broadcast may be missed for a deadline or a crash.
            name = waiting_for["eventName"]
            found = transitions.arrived(document, {"name": name}) or await self._find_event(flight, name)
            if found is not None:
                return transitions.look_found(document, definition, place, found, self.store.now())
        now, expires_at = self.store.now(), waiting_for.get("expiresAt")
        if expires_at is not None and expires_at <= now:
            return transitions.time_out(document, definition, place, now)
        return transitions.park(document, place)

    async def _find_event(self, flight: Flight, name: str) -> Mapping[str, Any] | None:
        """An event that was sent to all since the run exists, and that it has not had."""
        document = flight.document
        while True:
            try:
                found = await self.store.run(durable_events.find_event_for(name, document.get("bornAt"), document.get("seen") or ()))
                return dict(found[0]) if found else None
            except StoreUnavailableError:
                await self.env.async_sleep(_READ_AGAIN_S)

    async def _decide_entry(self, flight: Flight, step: StepDefinition, place: int) -> Change:
        context = Context(flight.document, place, AbortSignal(), flight, flight.outputs)
        try:
            enter = await allowed(step, context, flight.document, flight.outputs)
        except BaseException as exc:  # a predicate is user code: what it raises is a failed attempt
            if self._closed:
                raise
            return failed(flight.document, step, place, failure_of(exc), self._moment())
        if enter:
            return transitions.decide_entry(flight.document, place)
        return transitions.skip(flight.document, flight.definition, place, context._sets, self.store.now())

    async def _attempt(self, flight: Flight, step: StepDefinition, place: int) -> Decided | None:
        context = Context(flight.document, place, AbortSignal(), flight, flight.outputs)
        attempt = flight.attempt = Attempt(self.loop, context, functools.partial(self._stuck, flight))
        if self._listening():
            self.publish(flight.document, (("step:started", step.id, {"attempt": context.attempt}),))
        outcome = await attempt.run(step, self._threads)
        if flight.attempt is not attempt:
            raise _SupersededError  # the run went on without this handler, and with another driver
        context._close()
        flight.attempt = None
        self.steps_total += 1
        self.env.probe("handler.after")
        return self._change_after(flight, place, context, outcome)

    def _change_after(self, flight: Flight, place: int, context: Context, outcome: Outcome) -> Decided | None:
        """What an attempt's outcome means for the run; None if that is no longer ours to say."""
        if flight.lost is not None or self._closed:
            return None
        return change_after(flight.document, flight.definition, place, context, outcome, self._moment())

    def _moment(self) -> Moment:
        return Moment(self.store.now(), self.env.random(), self.env.new_id)

    # --- storing ---------------------------------------------------------------------------------------------------

    async def _store_decided(self, flight: Flight, decided: Decided) -> bool:
        """As `_store`; a large output goes into its file first, so that nothing ever refers to a file that is not there."""
        if decided.file is None:
            return await self._store(flight, decided.change, decided.size)
        file = decided.file
        while True:
            try:
                await self.store.drive(putting_file(file.id, file.content, flight.run_id))
                break
            except StoreUnavailableError:
                await self.env.async_sleep(_READ_AGAIN_S)
            except ValidationError as exc:
                step = flight.definition.steps[flight.place]
                return await self._store(flight, failed(flight.document, step, flight.place, failure_of(exc), self._moment()))
        flight.outputs[file.id] = decode_payload(file.content)
        # Should the commit find the run lost, the file stays until the run is deleted: the write may have landed before.
        return await self._store(flight, decided.change, decided.size)

    async def _store(self, flight: Flight, change: Change, size: int = 0) -> bool:
        """Make a transition durable. True if the run is still ours and goes on."""
        if (self.draining or flight.leaving) and change.name == "advance":
            # The next step would not be entered here: leave it to whoever claims the run, in this same write.
            change = transitions.without_grant(flight.document, change, self.store.now())
        first, twin = change, False
        await flight.saves_done()
        while True:
            if self._listening():
                await self._load_told(flight, change)
            now = self.store.now()
            make = commits.commit_under_pause if twin else commits.commit
            self.env.probe("commit.before")
            try:
                statement = make(flight.fence(), change, now, size + STATEMENT_BYTES)
                verdict = await self._committer.write(statement, express=change.name == "wake")
            except ValidationError as exc:
                if change.name == "fail":
                    return await self._fail_barely(flight, exc)
                step = flight.definition.steps[flight.place]
                change = first = failed(flight.document, step, flight.place, failure_of(exc), self._moment())
                continue
            self.env.probe("commit.after")
            if verdict is Verdict.LANDED or verdict is Verdict.LANDED_BY_READ:
                return await self._landed(flight, change, verdict)
            if verdict is Verdict.FENCED:
                flight.lost = flight.lost or "lease-lost"
                log.info("run_fenced", extra={"run_id": flight.run_id, "change": change.name})
                return False
            if verdict is Verdict.NOT_YET:
                change = first = transitions.park(flight.document, flight.place)
            elif verdict is Verdict.ARRIVED:
                # What the run was about to wait for came first: it is in the document, and not in our copy yet.
                document = await self._read_held(flight)
                if document is None:
                    flight.lost = flight.lost or "lease-lost"
                    return False
                flight.document = document
                change = first = transitions.take(document, flight.definition, first, now) or first
                if (self.draining or flight.leaving) and change.name == "advance":
                    change = first = transitions.without_grant(document, change, now)
                twin = False
            else:
                twin = verdict is Verdict.PAUSED
                change = transitions.under_pause(flight.document, first, self.store.now()) if twin else first

    async def _load_told(self, flight: Flight, change: Change) -> None:
        """Have at hand what subscribers will be told and the document only refers to: an answer that is in a file."""
        told = [data[EXTERNAL_KEY] for _, _, data in change.events if is_external(data) and data[EXTERNAL_KEY] not in flight.outputs]
        if told:
            with contextlib.suppress(WorkflowError):  # then they are told of the file, and the run goes on
                flight.outputs |= await self.store.drive(reading_outputs(flight.document, told))

    async def _fail_barely(self, flight: Flight, exc: ValidationError) -> bool:
        """Not even its failure fits into the run: say so in as few bytes as possible."""
        try:
            await self.write(commits.fail_barely(flight.fence(), flight.place, exc.code, exc.message, self.store.now()))
            flight.document["status"] = "failed"
        except ValidationError:
            log.exception("run_unstorable", extra={"run_id": flight.run_id})
            flight.lost = "lease-lost"
        return False

    async def _landed(self, flight: Flight, change: Change, verdict: Verdict) -> bool:
        if verdict is Verdict.LANDED_BY_READ and not change.releases:
            # After a lost reply the document itself says where the run is, not our memory of what we sent.
            document = await self._read_held(flight)
            if document is None:
                flight.lost = flight.lost or "lease-lost"
                return False
            flight.document = document
        else:
            transitions.apply(flight.document, change)
        if self._listening():
            self.publish(flight.document, _with_values(change.events, flight.outputs))
        if change.name in ("retry", "fail"):
            _log_failure(flight, change)
        if change.releases and change.wake_at is not None:
            self._observer.parked(flight.document["lane"], change.wake_at, flight.run_id)
        return not change.releases

    async def _read_held(self, flight: Flight) -> dict[str, Any] | None:
        while True:
            try:
                found = await self.store.run(commits.read_held(flight.run_id, flight.lease_id))
                return dict(found[0]) if found else None
            except StoreUnavailableError:
                await self.env.async_sleep(_READ_AGAIN_S)

    def check(self, run_id: str) -> None:
        """Somebody says that something was done to this run from outside: find out, if it is in flight here."""
        flight = self.flights.get(run_id)
        if flight is not None:
            self.leases.check(flight)

    # --- flight.Ground ---------------------------------------------------------------------------------------------

    async def write(self, statement: Statement) -> Verdict:
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
        for flight in list(self.flights.values()):
            if flight.attempt is not None:
                flight.attempt.abort("shutdown", grace_s)

    def give_up(self, run_id: str) -> None:
        """Stop one run as `stop` stops all: it is given back, uncounted."""
        flight = self.flights.get(run_id)
        if flight is not None:
            flight.leaving = True
            flight.abort("shutdown")

    async def emptied(self) -> None:
        """Return once nothing is in flight."""
        await self._empty.wait()

    # --- events ----------------------------------------------------------------------------------------------------

    def _listening(self) -> bool:
        return self._own_events.active or global_event_bus.active or self.broadcast.active

    def _publish_claimed(self, flight: Flight) -> None:
        document = flight.document
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


def _log_failure(flight: Flight, change: Change) -> None:
    """The pool's log is where people look first for a step that failed."""
    step = flight.document["steps"][flight.place]
    fields = {"run_id": flight.run_id, "workflow_id": flight.definition.workflow_id, "step_id": step["stepId"], "attempt": step["attempts"]}
    if change.name == "retry":
        error = step["error"]
        log.warning("attempt_failed", extra={**fields, "error": f"{error['type']}: {error['message']}", "again_at": str(change.wake_at)})
    else:
        error = flight.document["error"]
        more = f"streamline-pool runs show {flight.run_id}"  # with the traceback, which is too long for a line
        log.error("run_failed", extra={**fields, "error": f"{error['code']}: {error['type']}: {error['message']}", "more": more})
