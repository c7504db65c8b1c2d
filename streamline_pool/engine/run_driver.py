"""Drives one active run: its next step, its handler, its commit, until the run must stop or this worker holds it no more.

Owns the order of these. What follows a result is decided in domain/ and outcomes.py; run_writer.py stores it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from streamline_pool.config.env import Env
from streamline_pool.domain import transitions, waits
from streamline_pool.domain.change import Change, ChangeKind
from streamline_pool.domain.document import RunDocument, WaitDocument
from streamline_pool.domain.errors import DataCorruptionError
from streamline_pool.domain.model import StepStatus
from streamline_pool.protocol import durable_events
from streamline_pool.protocol.codec import check_payload
from streamline_pool.protocol.payloads import external_ids
from streamline_pool.storage.procedures import until_answered
from streamline_pool.storage.store import AsyncStore

from .abort_signal import AbortSignal
from .active_run import ActiveRun
from .asking import Asking, ConditionStuckError
from .attempt import Attempt, Kind, Outcome
from .context import Context
from .durable.attempts import EngineParts
from .durable.calls import Calls
from .durable.context import BlockingDurableContext, DurableContext
from .durable.handler import durable_step
from .failures import conditions_timeout_failure, failure_of, forget_frames
from .group_outputs import GroupOutputs
from .handler_threads import HandlerThreads
from .intents import Intents, changed_in_place
from .outcomes import Decided, allowed, attempt_ended, damaged, failed, version_mismatch
from .output_demand import OutputDemand
from .run_context import RunContext
from .run_events import RunEvents
from .run_writer import EngineState, RunWriter
from .solitude import Solitude

__all__ = ["CONDITION_TIMEOUT_S", "RunDriver", "SupersededError"]

log = logging.getLogger("streamline_pool")

CONDITION_TIMEOUT_S = 60.0
"""How long the conditions of a step without a `timeout` may take. A guess: much longer than a question to a service."""

_SEARCHES_MAX = 16  # under way at once. Each needs a connection, and a group commit lets a hundred runs begin to wait in one moment


class SupersededError(Exception):
    """Ends a driver whose handler was abandoned and has ended after all: another driver goes on with the run."""


class RunDriver:
    """The loop that every active run goes through. One for all runs of an engine; it keeps no state of a run."""

    def __init__(
        self,
        store: AsyncStore,
        env: Env,
        writer: RunWriter,
        outputs: GroupOutputs,
        events: RunEvents,
        state: EngineState,
        threads: HandlerThreads,
        solitude: Solitude,
        lease_s: float,
        threads_max: int,
        on_stuck: Callable[[ActiveRun, Attempt | None, str], None],
    ) -> None:
        self._store = store
        self._env = env
        self._writer = writer
        self._outputs = outputs
        self._demand = OutputDemand()
        self._searches = asyncio.Semaphore(_SEARCHES_MAX)
        self._events = events
        self._state = state
        self._threads = threads
        self._solitude = solitude
        self._parts = EngineParts(
            store=store,
            env=env,
            record=writer.record,
            outputs=outputs,
            events=events,
            threads=threads,
            thread_places=asyncio.Semaphore(threads_max),
            code_left=solitude.code_left,
            is_draining=lambda: state.draining,
            count_step=self._count_step,
            lease_s=lease_s,
        )
        self._on_stuck = on_stuck  # called for a handler that does not end, and without an attempt for a condition

    def _count_step(self) -> None:
        self._state.steps_total += 1

    async def drive(self, active: ActiveRun) -> None:
        """Go on with a run until it is released, ended or lost."""
        await self._solitude.reach(active)
        active.is_driven = True
        mismatch = version_mismatch(active.document, active.definition, self._store.now())
        if mismatch is not None:
            await self._writer.store(active, mismatch)
            return
        if active.document.get("paused") is True:
            # Paused between the claim's update and its read-back: released at once.
            place = transitions.current_place(active.document) or 0
            await self._writer.store(active, transitions.release(active.document, place, self._store.now(), was_entered=False))
            return
        just_claimed = True
        while True:
            decided = await self._next_change(active, just_claimed)
            if decided is None or not await self._writer.store_decided(active, decided):
                return
            just_claimed = False

    async def _next_change(self, active: ActiveRun, just_claimed: bool) -> Decided | None:
        """The next transition of a run; None when this worker holds the run no more."""
        document = active.document
        place = transitions.current_place(document)
        if place is None:
            return Decided(transitions.finish(document, self._store.now()))
        active.place = place
        if document["steps"][place]["status"] == StepStatus.WAITING.value:
            return await self._waiting(active, place, just_claimed)
        if active.definition.is_durable:
            active.place = place = 0
        try:
            await self._load_outputs(active)
        except DataCorruptionError as exc:
            return Decided(damaged(document, place, exc, self._store.now()))
        if active.lost is not None:
            return None
        if self._state.draining or active.release_requested:
            return Decided(transitions.release(document, place, self._store.now(), was_entered=False))
        if not self._has_lease(active):
            # Checked immediately before a handler may be entered: after the deadline another worker may hold the run.
            # If none does, it is released; the write's fence decides.
            log.warning("lease_ran_out", extra={"run_id": active.run_id})
            return Decided(transitions.release(document, place, self._store.now(), was_entered=False))
        if active.step.is_conditional and not document["steps"][place].get("decided"):
            change = await self._decide_entry(active, place)
            return None if change is None else Decided(change)
        if active.is_alone:
            active.release_requested = True  # after this step it is no suspect any more, and this worker may claim others again
        return await self._attempt(active, place)

    def _has_lease(self, active: ActiveRun) -> bool:
        """By the clock alone; the run may have been taken away."""
        return self._env.clock.monotonic() < active.deadline

    async def _load_outputs(self, active: ActiveRun) -> None:
        """Load what the run's document only refers to, as far as the step's handler and conditions are expected to ask for it."""
        if active.definition.is_durable or not external_ids(active.document) or self._state.draining or active.release_requested:
            return
        expected = self._demand.expected(active.definition, active.place, active.document)
        missing = [output_id for output_id in expected if output_id not in active.outputs]
        if missing:
            active.is_loading = True
            try:
                await self._outputs.load(active.document, missing, active.outputs)
            finally:
                active.is_loading = False
        active.outputs.asked = set()

    def _observe_demand(self, active: ActiveRun) -> None:
        """The step's handler or condition has ended."""
        asked, active.outputs.asked = active.outputs.asked, None
        if asked is not None:
            self._demand.observe(active.definition, active.place, active.document, asked)

    # --- a step that waits -----------------------------------------------------------------------------------------

    async def _waiting(self, active: ActiveRun, place: int, just_claimed: bool) -> Decided:
        """A waiting run was claimed, or the run has just begun to wait for an event: has its wait ended?"""
        change = await self._end_wait(active, place, just_claimed)
        if change.kind is not ChangeKind.WAIT_ANSWERED:
            return Decided(change)
        # The answer is stored as the step's output, and once more as the run's if this is the last step.
        return Decided(change, 2 * check_payload(change.steps[place]["output"], "output"))

    async def _end_wait(self, active: ActiveRun, place: int, just_claimed: bool) -> Change:
        document = active.document
        waiting_for: WaitDocument = document["steps"][place]["waitingFor"]
        if waiting_for["type"] == "timer":
            return waits.wake(document, place, self._store.now())
        if waiting_for["type"] == "event":
            # Searched first, whatever the claim was for: the run must not miss a broadcast because of a deadline or a crash.
            name = waiting_for["eventName"]
            found = waits.arrived(document, {"name": name}) or await self._find_event(active, name)
            if found is not None:
                return waits.wait_answered(document, place, found, self._store.now())
        now, expires_at = self._store.now(), waiting_for.get("expiresAt")
        if expires_at is not None and (just_claimed or expires_at <= now):
            # The claim shows that the run was due by the server's clock, and that clock decides about this write, too. With its own
            # reading, a worker whose reading is slow would park the run and claim it again, until its reading has come to the deadline.
            return waits.time_out(document, place, now)
        return waits.park(document, place)

    async def _find_event(self, active: ActiveRun, name: str) -> Mapping[str, Any] | None:
        """A broadcast event that was sent after the run was stored, and that the run has not received."""
        document = active.document
        search = durable_events.find_event_for(name, document.get("bornAt"), document.get("seen") or ())
        async with self._searches:
            found = await until_answered(lambda: self._store.run(search), self._env)
        return dict(found[0]) if found else None

    # --- a step that runs ------------------------------------------------------------------------------------------

    async def _decide_entry(self, active: ActiveRun, place: int) -> Change | None:
        """Ask the step's conditions. None if this worker holds the run no more."""
        intents = Intents()
        context = Context(active.document, place, AbortSignal(), active, intents, active.outputs)
        active.forget_interruptions()
        limit_s = active.step.timeout_s or CONDITION_TIMEOUT_S
        conditions = functools.partial(allowed, active.step, context, active.document, active.outputs)
        active.asking = asking = Asking(conditions, context.signal)
        try:
            enter = await asking.answer(limit_s)
        except BaseException as exc:  # a predicate is user code: what it raises is a failed attempt
            if self._state.closed:
                raise
            if isinstance(exc, ConditionStuckError):
                active.has_left_condition = True
                self._solitude.code_left(asking)
                self._on_stuck(active, None, f"run {active.run_id}: a condition of step {active.step.id} goes on although it was cancelled")
            if active.lost is not None:
                return None
            if exc is active.outputs.damaged:
                return damaged(active.document, place, exc, self._store.now())
            if active.is_interruption(exc):  # the database did not answer `get_output`: the condition is asked again
                return transitions.release(active.document, place, self._store.now(), was_entered=False)
            if context.signal.aborted:  # this worker is to let go of the run, and another one asks again
                return transitions.release(active.document, place, self._store.now(), was_entered=False)
            failure = conditions_timeout_failure(active.step, limit_s) if asking.is_late else failure_of(exc)
            return failed(active.document, active.step, place, failure, self._writer.moment())
        finally:
            active.asking = None
            active.forget_interruptions()
            self._observe_demand(active)
            _warn_of_lost_changes(active.document, intents, "a condition")
        if enter:
            return transitions.decide_entry(active.document, place)
        return transitions.skip(active.document, place, intents.sets, self._store.now())

    async def _attempt(self, active: ActiveRun, place: int) -> Decided | None:
        intents = Intents()
        calls = self._calls_of(active, intents) if active.definition.is_durable else None
        context = self._context_of(active, place, intents, calls)
        on_stuck, may_enter = functools.partial(self._on_stuck, active), functools.partial(self._has_lease, active)
        attempt = Attempt(asyncio.get_running_loop(), context, intents, on_stuck, may_enter)
        active.forget_interruptions()
        active.attempt = attempt
        if self._events.wanted:
            self._events.publish(active.document, (("step:started", active.step.id, {"attempt": context.attempt}),))
        outcome = await attempt.run(active.step if calls is None else durable_step(active.step, calls), self._threads)
        if outcome.kind is Kind.TOO_LATE:
            log.warning("lease_ran_out", extra={"run_id": active.run_id})
        if active.attempt is not attempt:
            raise SupersededError  # the run went on without this handler, and with another driver
        if calls is not None:
            outcome = calls.close(outcome)
            await calls.settled()
            if active.attempt is not attempt:
                raise SupersededError
        self.close_attempt(active, attempt)
        if active.is_saving:
            await active.saves_done()  # before the decision, which stores the step as it is now
        _warn_of_lost_changes(active.document, attempt.intents, "the handler")
        if calls is None:
            self._count_step()
        self._env.probe("handler.after")
        decided = self._decide(active, attempt, outcome)
        forget_frames(outcome.value)
        return decided

    def _calls_of(self, active: ActiveRun, intents: Intents) -> Calls:
        calls = active.calls = Calls(active, intents, self._parts, functools.partial(self._on_stuck, active))
        return calls

    @staticmethod
    def _context_of(active: ActiveRun, place: int, intents: Intents, calls: Calls | None) -> RunContext:
        """What the handler gets."""
        if calls is None:
            return Context(active.document, place, AbortSignal(), active, intents, active.outputs)
        make = DurableContext if active.step.is_async else BlockingDurableContext
        return make(active.document, AbortSignal(), active, intents, active.outputs, calls)

    def close_attempt(self, active: ActiveRun, attempt: Attempt) -> None:
        """From here on nothing that the handler does has any effect."""
        attempt.intents.close()
        active.attempt = active.calls = None
        active.left_attempt = attempt if attempt.goes_on else None
        self._solitude.code_left(attempt)
        self._observe_demand(active)

    async def leave(self, active: ActiveRun, attempt: Attempt) -> None:
        """An attempt is over, and its handler goes on: store what that means, then go on with the run."""
        await active.saves_done()  # those of the handler's threads, too: the decision stores the step as it is now
        decided = self._decide(active, attempt, Outcome(Kind.ABANDONED, None))
        if decided is not None and await self._writer.store_decided(active, decided):
            await self.drive(active)

    def _decide(self, active: ActiveRun, attempt: Attempt, outcome: Outcome) -> Decided | None:
        """What an attempt's outcome means for its run; None if this worker holds the run no more."""
        if active.lost is not None or self._state.closed:
            return None
        if outcome.kind is Kind.RAISED and active.is_interruption(outcome.value):
            # The database did not answer a checkpoint, hook or `get_output`: no failure of the handler. It is entered again.
            return Decided(transitions.release(active.document, active.place, self._store.now(), was_entered=True))
        if outcome.value is not None and outcome.value is active.outputs.damaged:
            return Decided(damaged(active.document, active.place, active.outputs.damaged, self._store.now()))
        return attempt_ended(active.document, active.definition, active.place, attempt, outcome, self._writer.moment())


def _warn_of_lost_changes(document: RunDocument, intents: Intents, who: str) -> None:
    """Log that user code changed a list or mapping of `ctx.context` which it did not set. It may be scratch data, so no error."""
    key = changed_in_place(intents, document.get("context") or {})
    if key is not None:
        fields = {"run_id": document["_id"], "workflow_id": document["workflowId"], "step_id": document["currentStepId"]}
        # The whole sentence is the message: it is for the handler's author, whose test or program may print nothing else.
        log.warning(
            "context_changed: %s changed ctx.context[%r] in place, which is not stored without ctx.set(%r, …)", who, key, key, extra=fields
        )
