"""Attempts at the calls of one entry into a durable function: entered, stopped, and brought to a record.

Owns what follows an attempt: a result, another attempt, or the call's failure. Which call may begin is decided in calls.py.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from streamline_pool.config.env import Env
from streamline_pool.domain import journal
from streamline_pool.domain.change import Change
from streamline_pool.domain.definition import StepDefinition, is_coroutine_function
from streamline_pool.domain.errors import ValidationError, WorkflowError
from streamline_pool.domain.model import RetryPolicy
from streamline_pool.domain.transitions import Failure
from streamline_pool.engine.abort_signal import AbortSignal
from streamline_pool.engine.active_run import ActiveRun
from streamline_pool.engine.attempt import ABORT_GRACE_S, Attempt, Kind, Outcome
from streamline_pool.engine.failures import failure_of, timeout_failure
from streamline_pool.engine.group_outputs import GroupOutputs
from streamline_pool.engine.handler_threads import HandlerThreads
from streamline_pool.engine.intents import Intents, ReleaseSuspension
from streamline_pool.engine.run_events import RunEvents
from streamline_pool.protocol.outputs import NewOutput
from streamline_pool.protocol.payloads import EXTERNAL_KEY, split_output
from streamline_pool.storage.store import AsyncStore

from .call_attempt import CallAttempt, handler_of
from .idleness import Idleness
from .recorder import Entry, Recorder
from .results import Results, error_of_call, ignore_result
from .step_context import StepContext

__all__ = ["Attempts", "CallOptions", "EngineParts", "NextAttempt"]

log = logging.getLogger("streamline_pool")

_NO_THREAD_PAUSE_S = 0.5  # as in outcomes.py


class EngineParts(NamedTuple):
    """What the calls use of their engine."""

    store: AsyncStore
    env: Env
    record: Callable[[ActiveRun, Change, int], Coroutine[Any, Any, bool]]
    outputs: GroupOutputs
    events: RunEvents
    threads: HandlerThreads
    thread_places: asyncio.Semaphore  # for `def` calls of all runs, so that they leave threads to functions and steps
    code_left: Callable[[Attempt], None]  # told of a thread that may go on after its attempt
    is_draining: Callable[[], bool]
    count_step: Callable[[], None]
    lease_s: float


class CallOptions(NamedTuple):
    """How a call is attempted."""

    retry: RetryPolicy
    timeout_s: float | None


class NextAttempt(NamedTuple):
    """An attempt has failed, and another one follows."""

    at: datetime  # by the server's clock
    in_s: float  # seconds from now


class Attempts:
    """One for each entry. In the event loop."""

    def __init__(
        self,
        active: ActiveRun,
        parts: EngineParts,
        idleness: Idleness,
        recorder: Recorder,
        results: Results,
        on_stuck: Callable[[Attempt | None, str], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._active = active
        self._parts = parts
        self._idleness = idleness
        self._recorder = recorder
        self._results = results
        self._on_stuck = on_stuck
        self._under_way: set[CallAttempt] = set()
        self.left_by: str | None = None  # the call that does not end, so that the function was left in it
        self.has_ended = False  # the function has
        self.waiting_threads: set[concurrent.futures.Future[Any]] = set()  # of a function that is a `def`: what its calls will return

    @contextlib.asynccontextmanager
    async def place_for(self, fn: Callable[..., Any]) -> AsyncIterator[None]:
        """Within this block there is a thread for `fn`, if it needs one."""
        if is_coroutine_function(fn):
            yield
        else:
            async with self._parts.thread_places:
                yield

    def abort(self, reason: str, grace_s: float) -> None:
        """Stop what the calls are doing; see `Attempt.abort`."""
        for attempt in list(self._under_way):
            attempt.abort(reason, grace_s)
        self._idleness.leave(ReleaseSuspension())

    async def make(self, place: int, fn: Callable[..., Any], args: tuple[Any, ...], options: CallOptions) -> NextAttempt | None:
        """One attempt at the call at `place`, and its record. None: it has a result. Raises MaxRetriesExceededError if it has failed."""
        active, parts = self._active, self._parts
        handler, is_async = handler_of(fn, args)
        name = active.document["steps"][place]["stepId"]
        step = StepDefinition(id=name, handler=handler, is_async=is_async, retry=options.retry, timeout_s=options.timeout_s)
        intents = Intents()
        context = StepContext(active.document, place, AbortSignal(), active, intents, active.outputs)
        context.recorder = self._recorder
        attempt = CallAttempt(self._loop, context, intents, functools.partial(self._stuck, step, place), self._has_lease)
        if parts.events.wanted:
            parts.events.publish(active.document, (("step:started", step.id, {"attempt": context.attempt}),))
        cancellations = _cancellations()
        outcome = await self._run(attempt, step)
        if attempt.is_stuck or self._recorder.is_closed:
            raise ReleaseSuspension  # the function was left meanwhile
        parts.count_step()
        parts.env.probe("handler.after")
        if isinstance(outcome.value, asyncio.CancelledError) and _cancellations() > cancellations:
            raise outcome.value  # the function has cancelled its call, or is cancelled itself
        reason = context.signal.reason
        is_stopped = reason not in (None, "timeout") and outcome.kind is not Kind.RETURNED
        if is_stopped or outcome.kind in (Kind.NOT_ENTERED, Kind.TOO_LATE, Kind.SUSPENDED):  # suspended: by a checkpoint of a lost run
            self._idleness.leave(ReleaseSuspension(_NO_THREAD_PAUSE_S if outcome.kind is Kind.NOT_ENTERED else 0.0))
            raise ReleaseSuspension
        return await self._end(step, place, outcome, reason, intents)

    async def _run(self, attempt: CallAttempt, step: StepDefinition) -> Outcome:
        self._under_way.add(attempt)
        try:
            return await attempt.run(step, self._parts.threads)
        finally:
            if not attempt.over:  # the caller was cancelled while a thread works
                attempt.abort("cancelled")
            self._under_way.discard(attempt)
            attempt.intents.close()
            if attempt.goes_on:
                self._parts.code_left(attempt)

    async def _end(self, step: StepDefinition, place: int, outcome: Outcome, reason: str | None, intents: Intents) -> NextAttempt | None:
        """Store what came of an attempt. As `make`."""
        if reason == "timeout":
            return await self._fail(step, place, timeout_failure(step))
        if outcome.kind is not Kind.RETURNED:
            return await self._fail(step, place, failure_of(outcome.value), outcome.value)
        try:
            output, content, size = split_output(outcome.value, f"output of step {step.id}", self._parts.env.new_id)
            if content is not None:
                await self._parts.outputs.put(NewOutput(output[EXTERNAL_KEY], self._active.run_id, content))
                self._results.keep(output[EXTERNAL_KEY], content)
                if self._parts.events.wanted:
                    self._active.outputs.add(output[EXTERNAL_KEY], content)
            done = journal.ended(self._active.document["steps"][place], output, self._parts.store.now())
            await self._recorder.store_result(Entry(place, done, size, (("step:completed", step.id, output),)), intents)
        except ValidationError as exc:
            return await self._fail(step, place, failure_of(exc), exc)
        return None

    async def _fail(self, step: StepDefinition, place: int, failure: Failure, exc: BaseException | None = None) -> NextAttempt:
        """Store that an attempt failed. As `make`."""
        call, now = self._active.document["steps"][place], self._parts.store.now()
        if exc is not None:
            exc.__traceback__ = None  # its frames lead to this call, and to `exc`: a circle would keep the run in memory. The text is kept
        failures = call.get("failures", 0) + 1
        if not failure.retriable or failures >= step.retry.attempts_max:
            failed = journal.failed_for_good(call, failure, now)
            await self._recorder.add(Entry(place, failed, events=(("step:failed", step.id, failed["error"]),)))
            raise error_of_call(self._active.run_id, failed, failure.traceback) from exc
        delay_s = step.retry.delay_after(failures, self._parts.env.random())
        retry_at = now + timedelta(milliseconds=round(delay_s * 1000))
        failed = journal.call_failed(call, failure, retry_at)
        data = {"error": failed["error"], "retryAfter": retry_at, "attempt": call["attempts"]}
        facts = {"run_id": self._active.run_id, "step_id": step.id, "attempt": call["attempts"], "error": failure.message}
        log.info("call_failed", extra=facts)
        await self._recorder.add(Entry(place, failed, events=(("step:retry-scheduled", step.id, data),)))
        return NextAttempt(retry_at, delay_s)

    def _has_lease(self) -> bool:
        return self._parts.env.clock.monotonic() < self._active.deadline

    # --- calls that do not end -------------------------------------------------------------------------------------

    def _stuck(self, step: StepDefinition, place: int, attempt: Attempt, what: str) -> None:
        """`fn` does not end. On a thread, the call goes on without it; in a coroutine it blocks the function, which is left there."""
        self._on_stuck(None, what)
        if not attempt.on_thread:
            self._loop.create_task(self._leave(step, place, attempt)).add_done_callback(ignore_result)

    async def _leave(self, step: StepDefinition, place: int, attempt: Attempt) -> None:
        self.left_by = step.id
        try:
            if attempt.context.signal.reason == "timeout":
                await self._fail(step, place, timeout_failure(step))
        except WorkflowError:
            pass  # stored, or not storable: the next entry finds out
        self._recorder.is_closed = True
        self.abort("shutdown", ABORT_GRACE_S)  # the other calls would go on beside the next entry
        await self._recorder.settled()
        self._idleness.give_up()
        for waiting in list(self.waiting_threads):
            if not waiting.done():
                waiting.set_exception(ReleaseSuspension())
        if not self.has_ended:
            self._on_stuck(self._active.attempt, f"run {self._active.run_id}: the durable function is held up by its call {step.id}")


def _cancellations() -> int:
    task = asyncio.current_task()
    assert task is not None, "calls are made in tasks"
    return task.cancelling()
