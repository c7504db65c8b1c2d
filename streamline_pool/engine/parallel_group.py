"""The tasks of one parallel call: starts, times, stops and awaits them, and decides the outcome of the call.

Owns the limits, the timeouts, and the end of every task: no task outlives its call, except one that does not end within
`GRACE_S`, which is logged. Checking the arguments and raising the outcome is left to parallel.py.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from streamline_pool.domain.definition import is_coroutine_function

__all__ = ["GRACE_S", "MODES", "THREADS_MAX", "Outcome", "ParallelCall", "Settled", "TaskGroup", "abandoned_tasks", "close_unawaited"]

log = logging.getLogger("streamline_pool.parallel")

MODES = ("all", "race", "any", "all_settled")

GRACE_S = 0.8
"""How long a stopped task is awaited. Below the shortest grace that a cancelled handler itself gets (1 s)."""

_CANCEL_AGAIN_S = 0.5  # within the grace a task is cancelled once more: one cancellation can get lost (config/asyncio_tasks.py)

THREADS_MAX = 64
"""Plain callables of one call that run at once when `concurrency` names no limit. A guess: more than tasks need that wait
for other services, fewer than a container allows."""

abandoned_tasks: set[asyncio.Task[Outcome]] = set()
"""Tasks that did not end within the grace. An event loop holds its tasks weakly; without this set they could be collected."""


@dataclass(frozen=True, slots=True)
class Settled:
    """How one task of `mode="all_settled"` ended."""

    ok: bool  # it returned
    value: Any = None  # what it returned; None if it failed
    error: Exception | None = None  # what it raised, TimeoutError if it took too long; None if it returned


class ParallelCall(NamedTuple):
    """The checked arguments of a call."""

    functions: Sequence[Callable[[], Any]]
    mode: str  # one of MODES
    concurrency: int | None  # at least 1; None for no limit
    timeout_s: float | None  # for each task, from its start


class Outcome(NamedTuple):
    """The result of a task, or of the call. Data, because a SystemExit raised in an asyncio task would end the whole loop."""

    value: Any = None
    error: BaseException | None = None


class _ConcurrencyLimit:
    """Jobs that share a limit."""

    __slots__ = ("free_places", "late_threads", "places", "timer", "waiting")

    def __init__(self, places: int) -> None:
        self.places = places
        self.free_places = places  # so many more jobs may start now
        self.late_threads = 0  # places of jobs that have a result, such as a timeout, and whose thread goes on
        self.waiting: deque[_Job] = deque()  # not started yet, in the order of the tasks
        self.timer: asyncio.TimerHandle | None = None  # for the waiting jobs, while late threads hold every place


class _Job:
    """One task of the call, from before its start to its end."""

    __slots__ = ("function", "holds_place", "is_stopping", "limit", "on_thread", "place", "reply", "result", "task", "timed_out", "timers")

    task: asyncio.Task[Outcome]  # set when it starts

    def __init__(self, place: int, function: Callable[[], Any], limit: _ConcurrencyLimit) -> None:
        self.place = place  # its index in `tasks`
        self.function = function
        self.limit = limit
        self.holds_place = True  # False once its place in the limit is free again
        self.timed_out = False
        self.is_stopping = False  # it was cancelled, for whatever reason
        self.result: Settled | None = None
        self.on_thread = False  # its thread runs
        self.reply: asyncio.Future[Outcome] | None = None  # from the thread to the task
        self.timers: list[asyncio.TimerHandle] = []


class TaskGroup:
    """The jobs of one call. All but the threads' own work happens in the loop's thread, mostly in callbacks."""

    def __init__(self, call: ParallelCall) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._call = call
        common = _ConcurrencyLimit(call.concurrency or len(call.functions))
        threads = _ConcurrencyLimit(THREADS_MAX) if call.concurrency is None else common
        self._jobs = [
            _Job(place, function, common if is_coroutine_function(function) else threads) for place, function in enumerate(call.functions)
        ]
        self._limits = tuple(dict.fromkeys(job.limit for job in self._jobs))
        for job in self._jobs:
            job.limit.waiting.append(job)
        self._unresolved = len(self._jobs)
        self._running: set[_Job] = set()  # started, and neither ended nor abandoned
        self._outcome: asyncio.Future[Outcome] = self._loop.create_future()  # of the call; cancelled if the caller is
        self._exit: BaseException | None = None  # the first error that is no Exception
        self._all_ended: asyncio.Future[None] | None = None

    async def run(self) -> Outcome:
        """Run the tasks. Returns the outcome of the call once no task runs any more. Raises only the caller's cancellation."""
        if not self._jobs:
            return Outcome([])
        cancelled: asyncio.CancelledError | None = None
        for limit in self._limits:
            self._start_waiting(limit)
        try:
            await self._outcome
        except asyncio.CancelledError as exc:
            cancelled = exc
        for limit in self._limits:
            _stop_timer(limit)
        cancelled = await self._stop_all() or cancelled
        if cancelled is not None:
            raise cancelled
        return self._outcome.result() if self._exit is None else Outcome(error=self._exit)

    # --- running -------------------------------------------------------------------------------------------------------

    def _start_waiting(self, limit: _ConcurrencyLimit) -> None:
        """Start jobs while the limit has free places and the call has no outcome."""
        while limit.waiting and limit.free_places > 0 and not self._outcome.done():
            limit.free_places -= 1
            job = limit.waiting.popleft()
            self._running.add(job)
            # A thread's reply calls this without the caller's context variables.
            context = self._context.copy()
            job.task = self._loop.create_task(self._execute(job), name=f"streamline-parallel-{job.place}", context=context)
            job.task.add_done_callback(functools.partial(self._on_task_end, job))
            if self._call.timeout_s is not None:
                job.timers.append(self._loop.call_later(self._call.timeout_s, self._on_timeout, job))

    async def _execute(self, job: _Job) -> Outcome:
        try:
            if is_coroutine_function(job.function):
                return Outcome(await job.function())
            outcome = await self._call_on_thread(job)
            if outcome.error is None and inspect.isawaitable(outcome.value):
                return Outcome(await outcome.value)
            return outcome
        except BaseException as exc:  # noqa: BLE001 -- user code may raise anything; `_resolve` decides what it means
            return Outcome(error=exc)

    async def _call_on_thread(self, job: _Job) -> Outcome:
        """Call it on a daemon thread of its own. Stuck tasks would use up the threads of a pool and delay the process's exit."""
        reply: asyncio.Future[Outcome] = self._loop.create_future()
        job.reply = reply
        function = functools.partial(contextvars.copy_context().run, job.function)
        threading.Thread(target=self._thread_main, args=(job, function), name=f"streamline-parallel-{job.place}", daemon=True).start()
        job.on_thread = True
        try:
            return await reply
        except asyncio.CancelledError:
            if reply.done() and not reply.cancelled():
                close_unawaited(reply.result().value)
            raise

    def _thread_main(self, job: _Job, function: Callable[[], Any]) -> None:
        try:
            outcome = Outcome(function())
        except BaseException as exc:  # noqa: BLE001 -- as in `_execute`
            outcome = Outcome(error=exc)
        try:
            self._loop.call_soon_threadsafe(self._on_thread_end, job, outcome)
        except RuntimeError:  # the loop is closed: the call ended long ago
            close_unawaited(outcome.value)

    def _on_thread_end(self, job: _Job, outcome: Outcome) -> None:
        assert job.reply is not None, "it is made before the thread is"
        job.on_thread = False
        if not job.reply.done():
            job.reply.set_result(outcome)
        else:  # its task was stopped before
            close_unawaited(outcome.value)
            self._record_exit(outcome.error)
        if job.result is not None:
            job.limit.late_threads -= 1
            _stop_timer(job.limit)
            self._free_place(job)
        elif self._call.concurrency is None:
            self._free_place(job)  # the limit is one of threads, and an awaitable that was returned needs none
        self._forget_if_ended(job)

    def _on_task_end(self, job: _Job, task: asyncio.Task[Outcome]) -> None:
        self._resolve(job, Outcome(error=asyncio.CancelledError()) if task.cancelled() else task.result())
        self._forget_if_ended(job)

    # --- results -------------------------------------------------------------------------------------------------------

    def _resolve(self, job: _Job, outcome: Outcome) -> None:
        """Give the job its result, once. That may decide the call, and frees a place for another job, unless its thread goes on."""
        self._record_exit(outcome.error)
        if job.result is not None:
            return
        job.result = self._result_of(job, outcome)
        self._unresolved -= 1
        self._decide(job.result)
        if job.on_thread:
            job.limit.late_threads += 1
            self._limit_wait(job.limit)
        else:
            self._free_place(job)

    def _result_of(self, job: _Job, outcome: Outcome) -> Settled:
        """The job's end as an ordinary result or failure. What a job does after its timeout has no effect."""
        error = outcome.error
        if job.timed_out:
            timeout = TimeoutError(f"tasks[{job.place}] took longer than its timeout of {self._call.timeout_s:g} s")
            timeout.__cause__ = error if isinstance(error, Exception) else None
            return Settled(False, None, timeout)
        if error is None:
            return Settled(True, outcome.value)
        if not isinstance(error, Exception):
            # Raised as it is, a CancelledError would look like a cancellation of the caller.
            error, cause = RuntimeError(f"tasks[{job.place}] was cancelled by its own code"), error
            error.__cause__ = cause
        return Settled(False, None, error)

    def _record_exit(self, error: BaseException | None) -> None:
        """An error that is no Exception (`ctx.sleep`, SystemExit, an interrupt) ends the call in every mode, however late it comes."""
        if error is None or isinstance(error, Exception | asyncio.CancelledError):
            return
        self._exit = self._exit or error
        if not self._outcome.done():
            self._outcome.set_result(Outcome(error=error))

    def _decide(self, latest: Settled) -> None:
        """Set the outcome of the call if this result decides it."""
        if self._outcome.done():
            return
        mode, is_last = self._call.mode, self._unresolved == 0
        if mode == "race" or (mode == "all" and not latest.ok) or (mode == "any" and latest.ok):
            self._outcome.set_result(Outcome(latest.value, latest.error))
        elif is_last:
            results = [job.result for job in self._jobs if job.result is not None]
            errors = [result.error for result in results if result.error is not None]
            if mode == "any":
                outcome = Outcome(error=ExceptionGroup(f"execute_parallel: all of {len(errors)} tasks failed", errors))
            else:
                outcome = Outcome([result.value for result in results] if mode == "all" else results)
            self._outcome.set_result(outcome)

    def _free_place(self, job: _Job) -> None:
        if job.holds_place:
            job.holds_place = False
            job.limit.free_places += 1
            self._start_waiting(job.limit)

    def _limit_wait(self, limit: _ConcurrencyLimit) -> None:
        """Have the waiting jobs time out if late threads hold every place: these may never end, and the call must."""
        if limit.late_threads == limit.places and limit.waiting and self._call.timeout_s is not None and not self._outcome.done():
            limit.timer = self._loop.call_later(self._call.timeout_s, self._on_wait_timeout, limit)

    def _on_wait_timeout(self, limit: _ConcurrencyLimit) -> None:
        held = f"its timeout of {self._call.timeout_s:g} s: every place is held by a thread that goes on"
        while limit.waiting:
            job = limit.waiting.popleft()
            job.holds_place = False
            self._resolve(job, Outcome(error=TimeoutError(f"tasks[{job.place}] could not start within {held}")))

    # --- ending --------------------------------------------------------------------------------------------------------

    async def _stop_all(self) -> asyncio.CancelledError | None:
        """Stop every running job and wait for it. A cancellation meanwhile does not shorten the wait; it is returned."""
        for job in self._running:
            self._stop(job)
        cancelled = None
        while self._running:
            self._all_ended = self._loop.create_future()
            try:
                await self._all_ended
            except asyncio.CancelledError as exc:
                cancelled = exc
        return cancelled

    def _on_timeout(self, job: _Job) -> None:
        if not job.task.done():  # a finished task keeps its result: only the loop was late
            job.timed_out = True
            self._stop(job)

    def _stop(self, job: _Job) -> None:
        if not job.is_stopping:
            job.is_stopping = True
            job.task.cancel()
            job.timers.append(self._loop.call_later(_CANCEL_AGAIN_S, job.task.cancel))
            job.timers.append(self._loop.call_later(GRACE_S, self._abandon, job))

    def _abandon(self, job: _Job) -> None:
        """The grace is over: continue without this job."""
        if not job.task.done():
            abandoned_tasks.add(job.task)
            job.task.add_done_callback(abandoned_tasks.discard)
        self._resolve(job, Outcome())
        kind = "thread" if job.on_thread else "coroutine"
        log.warning("parallel_task_left_behind", extra={"place": job.place, "kind": kind, "function": _name_of(job.function)})
        self._forget(job)

    def _forget_if_ended(self, job: _Job) -> None:
        if job.task.done() and not job.on_thread:
            self._forget(job)

    def _forget(self, job: _Job) -> None:
        for timer in job.timers:
            timer.cancel()
        self._running.discard(job)
        if not self._running and self._all_ended is not None and not self._all_ended.done():
            self._all_ended.set_result(None)


def _stop_timer(limit: _ConcurrencyLimit) -> None:
    if limit.timer is not None:
        limit.timer.cancel()
        limit.timer = None


def close_unawaited(value: Any) -> None:
    """Close a coroutine that will not be awaited, so that Python does not warn of it. Does nothing with other values."""
    if inspect.iscoroutine(value) and inspect.getcoroutinestate(value) == inspect.CORO_CREATED:
        value.close()


def _name_of(function: Callable[[], Any]) -> str:
    # No `repr`: that may be user code, and an error in it would break a callback.
    return function.__qualname__ if inspect.isroutine(function) else type(function).__qualname__
