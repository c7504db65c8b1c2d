"""The calls of one entry into a durable function: found by name if their result is stored, made and stored otherwise.

Owns replay, and when a call may begin. names.py numbers calls, attempts.py makes them, recorder.py stores them, idleness.py decides
when the function is left.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import logging
from collections.abc import Callable, Coroutine, Sequence
from datetime import datetime
from typing import Any, TypeVar

from streamline_pool.domain import journal
from streamline_pool.domain.definition import MAIN
from streamline_pool.domain.document import StepDocument, WaitDocument
from streamline_pool.domain.errors import InvalidStateError
from streamline_pool.domain.model import ENDED_STEPS, StepStatus
from streamline_pool.engine.active_run import ActiveRun
from streamline_pool.engine.attempt import Attempt, Kind, Outcome
from streamline_pool.engine.intents import Intents, ReleaseSuspension, SleepSuspension, WaitSuspension
from streamline_pool.protocol import commits
from streamline_pool.storage.procedures import until_answered

from .attempts import Attempts, CallOptions, EngineParts
from .idleness import Idleness
from .names import CallNames
from .recorder import Entry, Recorder
from .results import Results

__all__ = ["Calls"]

T = TypeVar("T")

log = logging.getLogger("streamline_pool")

_IN_MEMORY_MAX_S = 2.0  # sleeps and back-offs up to this are spent in memory: to park a run and to claim it again costs two writes
_IN_MEMORY_SHARE = 0.1  # ... and up to this share of the lease
_LOOK_AFTER_S = 0.5  # a call that begins so long after the last look at the run looks whether it is paused. A guess


class Calls:
    """One for each entry into a durable function. Its coroutines run in the event loop."""

    def __init__(self, active: ActiveRun, intents: Intents, parts: EngineParts, on_stuck: Callable[[Attempt | None, str], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.names = CallNames(active.document)
        self._active = active
        self._intents = intents  # of the function's attempt
        self._parts = parts
        self._idleness = Idleness(intents, self.names)
        self._recorder = Recorder(active, intents, parts.record, parts.env.clock.monotonic)
        self._results = Results(active, parts.outputs)
        self._attempts = Attempts(active, parts, self._idleness, self._recorder, self._results, on_stuck)
        self._places = {step["stepId"]: place for place, step in enumerate(active.document["steps"]) if place}
        self._unawaited: dict[str, tuple[Coroutine[Any, Any, Any], Coroutine[Any, Any, Any]]] = {}  # outer and inner coroutine
        self._open: set[str] = set()
        self._is_sleeping = False
        self._looked_at = parts.env.clock.monotonic()

    @property
    def waiting_threads(self) -> set[concurrent.futures.Future[Any]]:
        """What the threads of a function that is a `def` wait for: the results of its calls."""
        return self._attempts.waiting_threads

    # --- coroutines ------------------------------------------------------------------------------------------------

    def watched(self, name: str, call: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        """The coroutine of a call, whose `await` may be forgotten."""
        watched = self._made(name, call)
        self._unawaited[name] = (watched, call)
        return watched

    async def _made(self, name: str, call: Coroutine[Any, Any, T]) -> T:
        self._unawaited.pop(name, None)
        self._open.add(name)
        try:
            return await call
        finally:
            self._open.discard(name)

    # --- kinds of calls --------------------------------------------------------------------------------------------

    async def step(self, name: str, fn: Callable[..., Any], args: tuple[Any, ...], options: CallOptions) -> Any:
        """The result of `fn(*args)`, once it is durable; the stored one if there is one. Raises MaxRetriesExceededError."""
        call = self._stored(name)
        if call is not None and call["status"] in ENDED_STEPS:
            return await self._result_of(call)
        await self._wait_for_attempt(call)
        while True:
            await self._enter()
            with self._idleness.working():
                async with self._attempts.place_for(fn):
                    if self._must_stop:
                        continue  # it has waited for a thread; `_enter` leaves the function
                    place = self._start(name, "step")
                    following = await self._attempts.make(place, fn, args, options)
                if following is None:
                    return await self._results.of(self._active.document["steps"][place])
                if self._fits_in_memory(following.in_s):
                    await self._parts.env.async_sleep(following.in_s)
                    continue
            await self._idleness.until(following.at, following.in_s)

    async def map(
        self, names: Sequence[str], fn: Callable[..., Any], items: Sequence[Any], concurrency: int | None, options: CallOptions
    ) -> list[Any]:
        """See DurableContext.map."""
        has_failed = False
        free = asyncio.Semaphore(concurrency or max(1, len(items)))

        async def make(name: str, item: Any) -> Any:
            nonlocal has_failed
            async with free:
                if has_failed:
                    return None
                try:
                    return await self.step(name, fn, (item,), options)
                except BaseException:
                    has_failed = True
                    raise

        results = await asyncio.gather(*map(make, names, items), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    async def sleep(self, name: str, delay_s: float) -> None:
        """Return so many seconds after the first time that the function came here."""
        call = self._stored(name)
        if call is not None and call["status"] in ENDED_STEPS:
            return
        began = call.get("startedAt") if call is not None else None
        if began is not None:
            delay_s = max(0.0, delay_s - (self._now() - began).total_seconds())
        self._begin_wait(name)
        self._is_sleeping = True
        try:
            await self._enter()
            place = self._start(name, "sleep")
            if not self._fits_in_memory(delay_s):
                await self._idleness.until_left(SleepSuspension(delay_s, place))
            with self._idleness.working():
                await self._parts.env.async_sleep(delay_s)
                await self._recorder.store_result(Entry(place, journal.ended(self._active.document["steps"][place], None, self._now())))
        finally:
            self._is_sleeping = False

    async def wait(self, name: str, kind: str, waiting_for: WaitDocument, timeout_s: float | None) -> Any:
        """The answer; after `timeout_s` seconds without one, a value for which `is_timeout` is true."""
        call = self._stored(name)
        if call is not None and call["status"] in ENDED_STEPS:
            return await self._result_of(call)
        self._begin_wait(name)
        await self._enter()
        return await self._idleness.until_left(WaitSuspension(waiting_for, timeout_s, self._start(name, kind)))

    def patched(self, name: str) -> bool:
        """Whether the run came here for the first time with this code. Stored with the next call."""
        call = self._stored(name)
        if call is not None:
            return bool(call.get("output"))
        self._check_open()
        is_new = self.names.is_past_the_stored
        place = self._start(name, "patch")
        # Not stored, so that the next write fills the gap with it: an answer of its own write could be refused, and the rest stored.
        self._active.document["steps"][place] = journal.ended(self._active.document["steps"][place], is_new, self._now())
        return is_new

    # --- the life of one entry -------------------------------------------------------------------------------------

    def abort(self, reason: str, grace_s: float) -> None:
        """See ports.CallsPort."""
        self._attempts.abort(reason, grace_s)

    def close(self, outcome: Outcome) -> Outcome:
        """See ports.CallsPort."""
        self._attempts.has_ended = True
        self._idleness.end()
        self.names.forget_users()
        forgotten = [name for name, (watched, _) in self._unawaited.items() if inspect.getcoroutinestate(watched) == inspect.CORO_CREATED]
        for coroutines in self._unawaited.values():
            for coroutine in coroutines:
                coroutine.close()
        self._unawaited.clear()
        if outcome.kind is not Kind.RETURNED or self._intents.suspension is not None:
            return outcome
        if forgotten or self._open:
            state = "was never awaited" if forgotten else "was under way"
            name = next(iter(forgotten or sorted(self._open)))
            text = f"the durable function has ended, and its call {name!r} {state}; write `await` before each call"
            return Outcome(Kind.RAISED, self._invalid(text, name))
        not_made = self.names.not_made
        if not_made:
            fields = {"run_id": self._active.run_id, "workflow_id": self._active.document["workflowId"], "calls": not_made[:20]}
            log.warning("calls_not_made_again", extra=fields)
        return outcome

    async def settled(self) -> None:
        """See ports.CallsPort."""
        await self._idleness.settled()
        await self._recorder.settled()

    # --- shared ----------------------------------------------------------------------------------------------------

    def _invalid(self, text: str, name: str) -> InvalidStateError:
        return InvalidStateError(f"run {self._active.run_id}: {text}", run_id=self._active.run_id, step_id=name)

    def _now(self) -> datetime:
        return self._parts.store.now()

    def _stored(self, name: str) -> StepDocument | None:
        place = self._places.get(name)
        return None if place is None else self._active.document["steps"][place]

    async def _result_of(self, call: StepDocument) -> Any:
        with self._idleness.working():  # it may be beside the run
            return await self._results.of(call)

    def _check_open(self) -> None:
        if self._intents.suspension is not None:
            raise self._intents.suspension
        if self._attempts.left_by is not None:
            raise ReleaseSuspension
        if self._attempts.has_ended or self._intents.closed:
            raise self._invalid("the durable function has ended, and its ctx can do nothing more", MAIN)

    def _begin_wait(self, name: str) -> None:
        self._check_open()
        if self._idleness.is_waiting or self._is_sleeping:
            raise self._invalid(f"{name!r} would be a second wait at the same time; a run waits for one thing at once", name)

    async def _enter(self) -> None:
        """Return when a call may begin here. Raises a Suspension if none may."""
        self._check_open()
        known_s = self._parts.env.clock.monotonic() - max(self._looked_at, self._recorder.stored_at)
        if known_s > _LOOK_AFTER_S and not self._must_stop:
            with self._idleness.working():
                await self._look()
        if self._active.lost is not None:
            raise ReleaseSuspension
        if self._must_stop or self._parts.env.clock.monotonic() >= self._active.deadline:
            await self._idleness.until_left(ReleaseSuspension())
        self._check_open()

    @property
    def _must_stop(self) -> bool:
        """No further call begins here. A suspect makes one call, or a group of calls, alone."""
        is_requested = self._active.release_requested and not (self._active.is_alone and not self._recorder.results)
        return self._parts.is_draining() or is_requested or self._active.lost is not None or self._intents.suspension is not None

    async def _look(self) -> None:
        """The function has worked for a while since its last call: is the run paused?"""
        found = await until_answered(lambda: self._parts.store.run(commits.read_fences([self._active.run_id])), self._parts.env)
        self._looked_at = self._parts.env.clock.monotonic()
        if found and found[0].get("paused") is True:
            self._active.release_requested = True

    def _start(self, name: str, kind: str) -> int:
        """The call begins, again or for the first time. Its place among the run's steps."""
        steps = self._active.document["steps"]
        place = self._places.get(name)
        if place is None:
            self._recorder.check_room(name)
            place = self._places[name] = len(steps)
            steps.append(journal.begun(name, kind, self._now()))
        elif kind == "step" or steps[place]["status"] == StepStatus.PENDING.value:  # a wait whose answer could not be stored
            steps[place] = journal.begun_again(steps[place], self._now())
        return place

    def _fits_in_memory(self, delay_s: float) -> bool:
        return delay_s <= min(_IN_MEMORY_MAX_S, self._parts.lease_s * _IN_MEMORY_SHARE)

    async def _wait_for_attempt(self, call: StepDocument | None) -> None:
        """A call whose last attempt has failed waits for its next one, also under another holder."""
        retry_at = call.get("retryAfter") if call is not None else None
        delay_s = 0.0 if retry_at is None else (retry_at - self._now()).total_seconds()
        if retry_at is None or delay_s <= 0:
            return
        await self._enter()
        if self._fits_in_memory(delay_s):
            with self._idleness.working():
                await self._parts.env.async_sleep(delay_s)
        else:
            await self._idleness.until(retry_at, delay_s)
