"""Drives the runs that this process holds: next step, handler, commit, until a run must stop or is no longer ours.

Owns leases while they are held: renewal, self-fencing, giving back. Which runs are claimed is the caller's business
(worker.py, or client.py for `execute`); what may follow what is decided in transitions.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any, Protocol

from . import ops, transitions
from .attempt import Attempt, Kind, Outcome, failure_of, timeout_failure
from .bus import Event, EventBus, global_event_bus
from .cache import RunCache, RunNote
from .committer import GroupCommitter, Verdict, judge
from .context import AbortSignal, Context, SleepEnding
from .definition import Definition, StepDefinition
from .documents import check_payload, misfit, parse_run
from .env import Env
from .errors import ErrorCode, LeaseLostError, PayloadTooLargeError, StoreUnavailableError, WorkflowError
from .model import StepStatus
from .procedures import Procedure
from .store import AsyncStore, Store
from .transitions import Change, Failure

__all__ = ["Engine", "Flight", "Observer"]

log = logging.getLogger("streamline_pool")

_SAFETY = 0.9  # a lease counts as over after this part of it, so that no handler outlives it by a slow clock
_RENEW_AFTER = 1 / 3  # of the lease, so that two renewals may fail before anyone may take the run
_STATEMENT_BYTES = 600  # of a commit without payloads


class _SupersededError(Exception):
    """A driver whose handler was given up on, and has ended after all, has nothing left to do."""


class Observer(Protocol):
    """Who is told what happens to the runs in flight, in the loop's thread."""

    def parked(self, lane: str, wake_at: datetime) -> None:
        """A run was given up, to be claimed again from that instant on."""

    def landed(self, run_id: str, status: str) -> None:
        """A run is through with this process; its stored status as far as known here."""

    def store_answered(self, ok: bool) -> None:
        """A command to the database succeeded or failed."""

    def stuck(self, what: str) -> None:
        """A handler goes on after its attempt is over and cannot be stopped."""


class Flight:
    """A run in flight: the holder's copy of its document, its lease, and the attempt under way."""

    __slots__ = (
        "_checkpoint_lock",
        "attempt",
        "deadline",
        "definition",
        "document",
        "engine",
        "lease_id",
        "lost",
        "place",
        "renew_now",
        "task",
    )

    def __init__(self, engine: Engine, definition: Definition, document: dict[str, Any], lease_id: str, deadline: float) -> None:
        self.engine = engine
        self.definition = definition
        self.document = document
        self.lease_id = lease_id
        self.deadline = deadline  # monotonic seconds; past it no handler is entered and nothing goes on
        self.lost: str | None = None  # why the run is no longer ours, once that is known
        self.attempt: Attempt | None = None
        self.place = 0
        self.renew_now = False
        self.task: asyncio.Task[None] | None = None
        self._checkpoint_lock = threading.Lock()

    @property
    def run_id(self) -> str:
        """The run's id."""
        return str(self.document["_id"])

    def fence(self) -> ops.Fence:
        """What the next write must find unchanged."""
        document = self.document
        return ops.Fence(document["_id"], self.lease_id, document["rev"], document["token"])

    # What `ctx` asks for (context.Port).

    def save_checkpoint(self, value: Any, size: int) -> None:
        """See context.Port. On the loop's own thread only a blocking write can be durable on return."""
        with self._checkpoint_lock:
            statement = ops.save_checkpoint(self.fence(), self.place, value, self.engine.store.now(), size + _STATEMENT_BYTES)
            if threading.get_ident() == self.engine.loop_thread:
                verdict = self.engine.blocking_store().drive(_write_alone(statement))
            else:
                verdict = asyncio.run_coroutine_threadsafe(self.engine.write(statement), self.engine.loop).result()
            if verdict not in (Verdict.LANDED, Verdict.LANDED_BY_READ):
                self.engine.loop.call_soon_threadsafe(self.engine.abort, self, "lease-lost")
                raise LeaseLostError(f"run {self.run_id}: another worker owns it by now; the checkpoint was not stored", run_id=self.run_id)
            self.document["rev"] += 1
            self.document["steps"][self.place]["checkpoint"] = value

    def heartbeat(self) -> None:
        """See context.Port."""
        self.renew_now = True
        self.engine.loop.call_soon_threadsafe(self.engine.renew_soon)

    def emit(self, name: str, data: Any) -> None:
        """See context.Port."""
        self.engine.publish(self.document, ((name, self.document["currentStepId"], data),))


def _write_alone(statement: ops.Statement) -> Procedure[Verdict]:
    """One fenced write outside the group, with its verdict; unknown outcomes are read, then repeated."""
    while True:
        reply = yield ops.write_statements([statement])
        if reply["n"] == 1:
            return Verdict.LANDED
        found = yield ops.read_fences([statement.fence.run_id])
        verdict = judge(statement, found[0] if found else None)
        if verdict is not None:
            return verdict


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
        self._lease_s = lease_s
        self._observer = observer
        self._committer = GroupCommitter(store, env, observer.store_answered)
        # Threads are made as needed; the margin is for handlers that outlive their attempt until the worker is recycled.
        self._threads = ThreadPoolExecutor(max_workers=2 * threads_max + 8, thread_name_prefix="streamline-handler")
        self._keeper: asyncio.Task[None] | None = None
        self._closed = False
        self._renew_wanted = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()

    def start(self) -> None:
        """Begin to commit and to renew, in the running loop."""
        self.loop = asyncio.get_running_loop()
        self.loop_thread = threading.get_ident()
        self._committer.start()
        self._keeper = self.loop.create_task(self._keep_leases(), name="lease-keeper")

    async def close(self) -> None:
        """Stop. Runs still in flight are left to the expiry of their leases; drain first to give them back."""
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        for flight in list(self.flights.values()):
            if flight.task is not None:
                flight.task.cancel()
        await self._committer.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # --- admission -------------------------------------------------------------------------------------------------

    def lease_deadline(self) -> float:
        """The monotonic deadline of a lease that is requested now; take it *before* sending the request."""
        return self.env.clock.monotonic() + self._lease_s * _SAFETY

    def admit(self, document: dict[str, Any], deadline: float) -> asyncio.Task[None]:
        """Drive a claimed run. The task ends when the run is parked, terminal, given back or lost; it never raises."""
        lease = document["lease"]
        definition = self._definition_of(document)
        reason = misfit(document)
        run_id = document["_id"]
        if reason is not None or definition is None:
            work = self._report_corrupt(run_id, reason or "its workflow is unknown here")
            return self.loop.create_task(work)
        flight = Flight(self, definition, document, lease["id"], deadline)
        self.flights[run_id] = flight
        self._empty.clear()
        self.cache.put(run_id, RunNote(document["version"], document["token"], deadline, True))
        flight.task = self.loop.create_task(self._fly(flight))
        return flight.task

    async def _report_corrupt(self, run_id: str, reason: str) -> None:
        log.error("run_corrupt", extra={"run_id": run_id, "reason": reason})
        try:
            await self.store.run(ops.mark_corrupt(run_id, reason, self.store.now()))
        except StoreUnavailableError:
            log.warning("run_corrupt_unmarked", extra={"run_id": run_id})  # its lease expires, and the next claimer tries again

    # --- driving ---------------------------------------------------------------------------------------------------

    async def _fly(self, flight: Flight, change: Change | None = None) -> None:
        try:
            if change is None or await self._store(flight, change):
                await self._drive(flight, resumed=change is not None)
        except _SupersededError:
            return
        except asyncio.CancelledError:
            raise
        except Exception:
            # A defect of ours: the run is not wedged by it, since a lease that is not renewed expires.
            log.exception("drive_failed", extra={"run_id": flight.run_id})
            self.publish(flight.document, (("engine:error", None, {"run_id": flight.run_id}),))
        self._leave(flight)

    def _leave(self, flight: Flight) -> None:
        self.flights.pop(flight.run_id, None)
        self.cache.put(flight.run_id, RunNote(flight.document["version"], flight.document["token"], flight.deadline, False))
        if not self.flights:
            self._empty.set()
        self._observer.landed(flight.run_id, flight.document["status"] if flight.lost is None else "lost")

    def _stuck(self, flight: Flight, step: StepDefinition, attempt: Attempt, what: str) -> None:
        """A handler does not end. A thread leaves its driver free; a coroutine holds its driver, so a new one goes on."""
        self._observer.stuck(what)
        if attempt.settled is not None or flight.attempt is not attempt:
            return
        attempt.context._close()
        flight.attempt = None
        change, _ = self._change_after(flight, step, flight.place, attempt.context, Outcome(Kind.ABANDONED, None))
        if change is None:
            self._leave(flight)
        else:
            flight.task = self.loop.create_task(self._fly(flight, change))

    async def _drive(self, flight: Flight, resumed: bool) -> None:
        if not resumed and self._listening():
            self._publish_claimed(flight)
        misplaced = _version_mismatch(flight)
        if misplaced is not None:
            await self._store(flight, misplaced(self.store.now()))
            return
        if flight.document.get("paused") is True:
            # Paused between the claim's update and its read-back: given up at once.
            place = transitions.current_place(flight.document) or 0
            await self._store(flight, transitions.give_back(flight.document, place, self.store.now(), entered=False))
            return
        while True:
            change, size = await self._next_change(flight)
            if change is None or not await self._store(flight, change, size):
                return

    async def _next_change(self, flight: Flight) -> tuple[Change | None, int]:
        """The next transition of a run and the size of what it stores; None when the run is no longer ours."""
        document = flight.document
        place = transitions.current_place(document)
        now = self.store.now()
        if place is None:
            return transitions.finish(document, now), 0
        flight.place = place
        stored = document["steps"][place]
        if stored["status"] == StepStatus.WAITING.value:
            return transitions.wake(document, flight.definition, place, now), 0
        if self.draining:
            return transitions.give_back(document, place, now, entered=False), 0
        if flight.lost is not None or self.env.clock.monotonic() >= flight.deadline:
            # Looked at immediately before a handler may be entered: past the deadline another worker may hold the run.
            flight.lost = flight.lost or "lease-lost"
            return None, 0
        step = flight.definition.steps[place]
        if step.is_conditional and not stored.get("decided"):
            return await self._decide_entry(flight, step, place), 0
        return await self._attempt(flight, step, place)

    async def _decide_entry(self, flight: Flight, step: StepDefinition, place: int) -> Change:
        context = Context(flight.document, place, AbortSignal(), flight)
        try:
            enter = await _allowed(step, context, flight.document)
        except asyncio.CancelledError:
            raise
        except BaseException as exc:  # noqa: BLE001 -- a predicate is user code: what it raises is a failed attempt
            return self._failed(flight, step, place, failure_of(exc))
        now = self.store.now()
        if enter:
            return transitions.decide_entry(flight.document, place)
        return transitions.skip(flight.document, flight.definition, place, context._sets, now)

    async def _attempt(self, flight: Flight, step: StepDefinition, place: int) -> tuple[Change | None, int]:
        context = Context(flight.document, place, AbortSignal(), flight)
        attempt = flight.attempt = Attempt(self.loop, context, functools.partial(self._stuck, flight, step))
        if self._listening():
            self.publish(flight.document, (("step:started", step.id, {"attempt": context.attempt}),))
        outcome = await attempt.run(step, self._threads)
        if flight.attempt is not attempt:
            raise _SupersededError  # the run went on without this handler, and with another driver
        context._close()
        flight.attempt = None
        self.steps_total += 1
        self.env.probe("handler.after")
        return self._change_after(flight, step, place, context, outcome)

    def _change_after(
        self, flight: Flight, step: StepDefinition, place: int, context: Context, outcome: Outcome
    ) -> tuple[Change | None, int]:
        """What an attempt's outcome means for the run."""
        reason = context.signal.reason
        document, now = flight.document, self.store.now()
        if flight.lost is not None or reason in ("cancelled", "lease-lost") or self._closed:
            return None, 0
        if reason == "timeout":
            return self._failed(flight, step, place, timeout_failure(step)), 0
        ending = context._ending  # also when the handler swallowed it and returned
        if ending is None and isinstance(outcome.value, SleepEnding) and outcome.kind is Kind.ENDED:
            ending = outcome.value
        if isinstance(ending, SleepEnding):
            until = now + timedelta(milliseconds=round(ending.delay_s * 1000))
            return transitions.sleep(document, place, until, context._sets, now), 0
        if outcome.kind is Kind.RETURNED:
            try:
                size = check_payload(outcome.value, f"output of step {step.id}")
            except WorkflowError as exc:
                return self._failed(flight, step, place, failure_of(exc)), 0
            return transitions.advance(document, flight.definition, place, outcome.value, context._sets, now), size
        if reason == "shutdown":
            return transitions.give_back(document, place, now, entered=True), 0
        return self._failed(flight, step, place, failure_of(outcome.value)), 0

    def _failed(self, flight: Flight, step: StepDefinition, place: int, failure: Failure) -> Change:
        now = self.store.now()
        delay_s = step.retry.delay_after(flight.document["failures"] + 1, self.env.random())
        retry_at = now + timedelta(milliseconds=round(delay_s * 1000))
        return transitions.step_failed(flight.document, step, place, failure, now, retry_at)

    # --- storing ---------------------------------------------------------------------------------------------------

    async def write(self, statement: ops.Statement) -> Verdict:
        """Hand a fenced write to the group, and wait for its verdict."""
        return await self._committer.write(statement)

    async def _store(self, flight: Flight, change: Change, size: int = 0) -> bool:
        """Make a transition durable. True if the run is still ours and goes on."""
        if self.draining and change.name == "advance":
            # The next step would not be entered here: leave it to whoever claims the run, in this same write.
            change = transitions.without_grant(change, self.store.now())
        first, twin = change, False
        while True:
            now = self.store.now()
            make = ops.commit_under_pause if twin else ops.commit
            self.env.probe("commit.before")
            try:
                verdict = await self._committer.write(make(flight.fence(), change, now, size + _STATEMENT_BYTES))
            except PayloadTooLargeError as exc:
                step = flight.definition.steps[flight.place]
                change = first = self._failed(flight, step, flight.place, failure_of(exc))
                continue
            self.env.probe("commit.after")
            if verdict is Verdict.LANDED or verdict is Verdict.LANDED_BY_READ:
                return await self._landed(flight, change, verdict)
            if verdict is Verdict.FENCED:
                flight.lost = flight.lost or "lease-lost"
                log.info("run_fenced", extra={"run_id": flight.run_id, "change": change.name})
                return False
            if verdict is Verdict.NOT_YET:
                change = first = transitions.park_timer(flight.document, flight.place)
            else:
                twin = verdict is Verdict.PAUSED
                change = transitions.under_pause(first, self.store.now()) if twin else first

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
            self.publish(flight.document, change.events)
        if change.releases and change.wake_at is not None:
            self._observer.parked(flight.document["lane"], change.wake_at)
        return not change.releases

    async def _read_held(self, flight: Flight) -> dict[str, Any] | None:
        while True:
            try:
                found = await self.store.run(ops.read_held(flight.run_id, flight.lease_id))
                return dict(found[0]) if found else None
            except StoreUnavailableError:
                await self.env.async_sleep(0.2)

    # --- leases ----------------------------------------------------------------------------------------------------

    def renew_soon(self) -> None:
        """Look at the leases now instead of at the next tick."""
        self._renew_wanted.set()

    def check(self, run_id: str) -> None:
        """Somebody says that something was done to this run from outside: find out, if it is in flight here."""
        flight = self.flights.get(run_id)
        if flight is not None:
            flight.renew_now = True
            self.renew_soon()

    async def _keep_leases(self) -> None:
        tick_s = min(1.0, self._lease_s / 20)
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._renew_wanted.wait(), tick_s)
            self._renew_wanted.clear()
            now = self.env.clock.monotonic()
            renew_before = now + self._lease_s * (_SAFETY - _RENEW_AFTER)
            due = [flight for flight in self.flights.values() if flight.deadline <= renew_before or flight.renew_now]
            for flight in due:
                if flight.deadline <= now + tick_s:
                    self.abort(flight, "lease-lost")  # before the lease can expire: nobody else holds the run yet
            if due:
                await self._renew([flight for flight in due if flight.lost is None])

    async def _renew(self, flights: list[Flight]) -> None:
        if not flights:
            return
        run_ids = [flight.run_id for flight in flights]
        deadline = self.lease_deadline()
        for flight in flights:
            flight.renew_now = False
        try:
            renewed = await self.store.run(ops.renew(run_ids, list({flight.lease_id for flight in flights}), self._lease_s))
            missed = {} if renewed == len(flights) else {doc["_id"]: doc for doc in await self.store.run(ops.read_fences(run_ids))}
            self._observer.store_answered(True)
        except StoreUnavailableError as exc:
            self._observer.store_answered(False)
            log.warning("renew_failed", extra={"runs": len(flights), "error": str(exc)})
            return
        for flight in flights:
            found = missed.get(flight.run_id, {}) if renewed != len(flights) else {"lease": {"id": flight.lease_id}}
            if (found.get("lease") or {}).get("id") == flight.lease_id:
                flight.deadline = deadline
            elif flight.run_id in self.flights:
                self.abort(flight, "cancelled" if found.get("status") == "cancelled" else "lease-lost")

    def abort(self, flight: Flight, reason: str) -> None:
        """The run is no longer ours: stop its handler, store nothing more."""
        if flight.lost is None and self.flights.get(flight.run_id) is flight:
            flight.lost = reason
            log.info("run_aborted", extra={"run_id": flight.run_id, "reason": reason})
            if flight.attempt is not None:
                flight.attempt.abort(reason)

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

    async def emptied(self) -> None:
        """Return once nothing is in flight."""
        await self._empty.wait()

    # --- events ----------------------------------------------------------------------------------------------------

    def _listening(self) -> bool:
        return self._own_events.active or global_event_bus.active

    def _publish_claimed(self, flight: Flight) -> None:
        document = flight.document
        if document["token"] == 1:
            self.publish(document, (("workflow:started", None, document.get("input")),))
        elif document["crashes"]:
            self.publish(document, (("workflow:recovered", document["currentStepId"], {"crashes": document["crashes"]}),))

    def publish(self, document: Mapping[str, Any], events: tuple[tuple[str, str | None, Any], ...]) -> None:
        """Tell the subscribers, in this process, what has durably happened."""
        for name, step_id, data in events:
            event = Event(
                name=name, run_id=document["_id"], workflow_id=document["workflowId"], step_id=step_id, data=data, at=self.store.now()
            )
            self._own_events.publish(event)
            global_event_bus.publish(event)


async def _allowed(step: StepDefinition, context: Context, document: Mapping[str, Any]) -> bool:
    """`condition`, then `skip_if`, then `run_if`; each may be async."""
    questions: list[tuple[Callable[[], Any], bool]] = []
    if step.condition is not None:
        condition = step.condition
        questions.append((lambda: condition(context, parse_run(document)), True))
    if step.skip_if is not None:
        skip_if = step.skip_if
        questions.append((lambda: skip_if(context), False))
    if step.run_if is not None:
        run_if = step.run_if
        questions.append((lambda: run_if(context), True))
    for ask, wanted in questions:
        answer = ask()
        if inspect.isawaitable(answer):
            answer = await answer
        if bool(answer) is not wanted:
            return False
    return True


def _version_mismatch(flight: Flight) -> Callable[[datetime], Change] | None:
    """How the run fails when its stored steps are not those of the version it names; None when they are."""
    stored = [step["stepId"] for step in flight.document["steps"]]
    if stored == list(flight.definition.index):
        return None
    message = (
        f"run {flight.run_id} was stored with steps {', '.join(stored)}, but workflow {flight.definition.workflow_id} "
        f"{flight.definition.version} has {', '.join(flight.definition.index)}; give changed steps a new version"
    )
    failure = Failure(ErrorCode.VERSION_MISMATCH, message, "VersionMismatchError", "", False)
    place = transitions.current_place(flight.document) or 0
    failures = flight.document["failures"]
    return lambda now: transitions.fail_run(flight.document, place, failure, now, failures=failures, code=failure.code)
