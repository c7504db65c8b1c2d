"""Several pieces of work at once within one step: `execute_parallel`, and `execute_parallel_sync` for `def` handlers.

Owns the modes, the limits, the timeouts, and the ending of what is still at work when a call is over: nothing that a
call has started outlives it, but for what refuses to end within `GRACE_S`, which is logged. Stores nothing and knows
nothing of runs. There is one implementation; the synchronous call drives it in an event loop of its own.
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
from datetime import timedelta
from typing import Any, Literal, NamedTuple, overload

from streamline_pool.domain.definition import is_coroutine_function
from streamline_pool.domain.errors import ValidationError, WorkflowError
from streamline_pool.domain.model import seconds

from .abort_signal import AbortSignal, current_signal

__all__ = ["GRACE_S", "MODES", "THREADS_MAX", "Settled", "execute_parallel", "execute_parallel_sync"]

log = logging.getLogger("streamline_pool.parallel")

_Tasks = Sequence[Callable[[], Any]]
_Timeout = float | timedelta | None

MODES = ("all", "race", "any", "all_settled")

GRACE_S = 0.8
"""How long a task that was told to stop is awaited. Below the shortest grace that a cancelled handler gets itself (1 s)."""

_AGAIN_S = 0.5  # within the grace a task is cancelled once more: one cancellation can get lost (see tasks.py)

THREADS_MAX = 64
"""Plain callables of one call that are at work at once when `concurrency` names no limit. A guess: beyond what waiting for
others needs, below what a container allows."""


@dataclass(frozen=True, slots=True)
class Settled:
    """How one task of `mode="all_settled"` ended."""

    ok: bool  # it returned
    value: Any = None  # what it returned; None if it failed
    error: Exception | None = None  # what it raised, TimeoutError if it took too long; None if it returned


@overload
async def execute_parallel(
    tasks: _Tasks, mode: Literal["all"] = "all", concurrency: int | None = None, timeout: _Timeout = None
) -> list[Any]: ...
@overload
async def execute_parallel(
    tasks: _Tasks, mode: Literal["all_settled"], concurrency: int | None = None, timeout: _Timeout = None
) -> list[Settled]: ...
@overload
async def execute_parallel(tasks: _Tasks, mode: str, concurrency: int | None = None, timeout: _Timeout = None) -> Any: ...
async def execute_parallel(tasks: _Tasks, mode: str = "all", concurrency: int | None = None, timeout: _Timeout = None) -> Any:
    """Do several things at once, in a step or anywhere else; the results come in the order of `tasks`.

    tasks: a list of callables without arguments. An `async def` runs in the caller's event loop. Any other is called on
    a thread of its own, so that it may block; an awaitable that it returns is then awaited in the loop. Both see the
    caller's context variables, and their own changes to these stay their own.

    mode:
      "all"          a list of all values; the first error is raised, and the rest is stopped
      "all_settled"  a list of `Settled(ok, value, error)`; raises nothing that an ordinary failure causes
      "any"          the first value; an ExceptionGroup of all errors, in the order of `tasks`, if there is none
      "race"         the value or error of whichever ends first

    concurrency: at most so many tasks at once, in their order ("all" and "all_settled" only). Without it all of them,
    but of plain callables at most `THREADS_MAX`.
    timeout: seconds, or a timedelta, for each task from when it begins. One that takes longer is stopped and counts as
    failed, with a built-in TimeoutError that names its place.

    Stopping: an `async def` is cancelled and awaited. A thread cannot be stopped: its task is over at once, it is
    awaited all the same, and whatever it returns later is dropped. Both for `GRACE_S` seconds at most; a task that is
    still at work then is left behind with a warning `parallel_task_left_behind` in the log. So is everything, in any
    mode, if the caller is cancelled; the caller's CancelledError is raised when all have ended.

    What is no Exception ends the call in every mode, and is raised as it is: `ctx.sleep` and its kin in a task end the
    handler as they do outside of one.

    Raises ValidationError, before anything is started, for arguments that make no sense.
    """
    order = _checked("execute_parallel", tasks, mode, concurrency, timeout)
    return _unwrap(await _Group(order).run())


@overload
def execute_parallel_sync(
    tasks: _Tasks, mode: Literal["all"] = "all", concurrency: int | None = None, timeout: _Timeout = None
) -> list[Any]: ...
@overload
def execute_parallel_sync(
    tasks: _Tasks, mode: Literal["all_settled"], concurrency: int | None = None, timeout: _Timeout = None
) -> list[Settled]: ...
@overload
def execute_parallel_sync(tasks: _Tasks, mode: str, concurrency: int | None = None, timeout: _Timeout = None) -> Any: ...
def execute_parallel_sync(tasks: _Tasks, mode: str = "all", concurrency: int | None = None, timeout: _Timeout = None) -> Any:
    """`execute_parallel` for `def` handlers: the same arguments, results and errors. Blocks the calling thread.

    `async def` tasks run in an event loop that lives as long as the call. In a handler whose attempt is over (`ctx.signal`
    has fired) the tasks are stopped, and WorkflowCancelledError or LeaseLostError is raised as by
    `ctx.signal.raise_if_aborted()`. On a thread that runs an event loop: ValidationError.
    """
    order = _checked("execute_parallel_sync", tasks, mode, concurrency, timeout)
    if _is_in_loop():
        raise ValidationError("execute_parallel_sync: this thread runs an event loop, which would stand still; await execute_parallel(...)")
    signal = current_signal.get()
    if signal is not None:
        signal.raise_if_aborted()
    # Not `with`: the runner's own clean-up waits without an end for tasks and threads that refuse to end.
    runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
    loop = runner.get_loop()
    try:
        outcome = runner.run(_watched(order, signal))
    finally:
        _close(loop)
    return _unwrap(outcome)


# --- what was asked for ------------------------------------------------------------------------------------------------


class _Order(NamedTuple):
    """Checked arguments of a call."""

    calls: Sequence[Callable[[], Any]]
    mode: str
    concurrency: int | None
    timeout_s: float | None


def _checked(where: str, tasks: Any, mode: Any, concurrency: Any, timeout: Any) -> _Order:
    if not isinstance(tasks, list | tuple):
        _drop(tasks)
        raise ValidationError(f"{where}: tasks is a list of callables without arguments, not {type(tasks).__name__}")
    try:
        for place, task in enumerate(tasks):
            if not callable(task):
                hint = "; pass what makes it, as in `lambda: fetch(url)`" if inspect.isawaitable(task) else ""
                raise ValidationError(f"{where}: tasks[{place}] is not a callable without arguments but {task!r:.100}{hint}", index=place)
        if not isinstance(mode, str) or mode not in MODES:
            raise ValidationError(f"{where}: mode is one of {', '.join(MODES)}, not {mode!r}")
        if not tasks and mode in ("race", "any"):
            raise ValidationError(f"{where}: mode {mode!r} needs at least one task, it has no result without")
        if concurrency is not None:
            if mode in ("race", "any"):
                raise ValidationError(f"{where}: mode {mode!r} starts all tasks at once and takes no concurrency")
            if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
                raise ValidationError(f"{where}: concurrency is a whole number of at least 1, or None for no limit, not {concurrency!r}")
        timeout_s = None if timeout is None else seconds(timeout, f"{where}: timeout")
    except ValidationError:
        for task in tasks:
            _drop(task)  # a coroutine that was made too early; the error says so, a warning would say it twice
        raise
    return _Order(tuple(tasks), mode, concurrency, timeout_s)


# --- doing it ----------------------------------------------------------------------------------------------------------


class _Outcome(NamedTuple):
    """What came of a task, or of the call. Data, because an exit raised in an asyncio task would end the whole loop."""

    value: Any = None
    error: BaseException | None = None


class _Lane:
    """Jobs that share a limit."""

    __slots__ = ("room", "waiting")

    def __init__(self, room: int) -> None:
        self.room = room  # so many more may be started now
        self.waiting: deque[_Job] = deque()  # not started yet, in the order of the tasks


class _Job:
    """One task on its way."""

    __slots__ = ("call", "has_left", "is_late", "is_stopped", "lane", "on_thread", "place", "reply", "settled", "task", "timers")

    task: asyncio.Task[_Outcome]  # from its start on

    def __init__(self, place: int, call: Callable[[], Any], lane: _Lane) -> None:
        self.place = place
        self.call = call
        self.lane = lane
        self.has_left = False  # its place in the lane is free again
        self.is_late = False  # its timeout has passed
        self.is_stopped = False  # it was told to stop, for whatever reason
        self.settled: Settled | None = None
        self.on_thread = False  # a thread of its is at work
        self.reply: asyncio.Future[_Outcome] | None = None  # of the thread, to the task
        self.timers: list[asyncio.TimerHandle] = []


_left_behind: set[asyncio.Task[_Outcome]] = set()  # an event loop alone would let them be collected half-way


class _Group:
    """The jobs of one call. Everything but the threads' own work happens in the loop's thread, mostly in callbacks."""

    def __init__(self, order: _Order) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._order = order
        common = _Lane(order.concurrency or len(order.calls))
        self._threads = _Lane(THREADS_MAX) if order.concurrency is None else common
        self._jobs = [_Job(place, call, common if is_coroutine_function(call) else self._threads) for place, call in enumerate(order.calls)]
        for job in self._jobs:
            job.lane.waiting.append(job)
        self._unsettled = len(self._jobs)
        self._alive: set[_Job] = set()  # started, and neither ended nor left behind
        self._decided: asyncio.Future[_Outcome] = self._loop.create_future()  # the call's outcome; cancelled if the call is
        self._exit: BaseException | None = None  # the first error that is no Exception
        self._emptied: asyncio.Future[None] | None = None

    async def run(self) -> _Outcome:
        """Bring back the call's outcome once nothing is at work any more. Raises only its caller's cancellation."""
        if not self._jobs:
            return _Outcome([])
        cancelled: asyncio.CancelledError | None = None
        for lane in dict.fromkeys(job.lane for job in self._jobs):
            self._fill(lane)
        try:
            await self._decided
        except asyncio.CancelledError as exc:
            cancelled = exc
        cancelled = await self._end() or cancelled
        if cancelled is not None:
            raise cancelled
        return self._decided.result() if self._exit is None else _Outcome(error=self._exit)

    def _fill(self, lane: _Lane) -> None:
        while lane.waiting and lane.room > 0 and not self._decided.done():
            lane.room -= 1
            job = lane.waiting.popleft()
            self._alive.add(job)
            # From a thread's reply we get here without the caller's context variables.
            context = self._context.copy()
            job.task = self._loop.create_task(self._work(job), name=f"streamline-parallel-{job.place}", context=context)
            job.task.add_done_callback(functools.partial(self._task_ended, job))
            if self._order.timeout_s is not None:
                job.timers.append(self._loop.call_later(self._order.timeout_s, self._time_out, job))

    async def _work(self, job: _Job) -> _Outcome:
        try:
            if is_coroutine_function(job.call):
                return _Outcome(await job.call())
            outcome = await self._call_on_thread(job)
            if outcome.error is None and inspect.isawaitable(outcome.value):
                return _Outcome(await outcome.value)
            return outcome
        except BaseException as exc:  # noqa: BLE001 -- user code may raise anything; what it means is decided in `_settle`
            return _Outcome(error=exc)

    async def _call_on_thread(self, job: _Job) -> _Outcome:
        """A daemon thread for each: a pool's few would be used up by tasks that are stuck, and hold up the process's exit."""
        reply: asyncio.Future[_Outcome] = self._loop.create_future()
        job.reply = reply
        call = functools.partial(contextvars.copy_context().run, job.call)
        threading.Thread(target=self._thread, args=(job, call), name=f"streamline-parallel-{job.place}", daemon=True).start()
        job.on_thread = True
        try:
            return await reply
        except asyncio.CancelledError:
            if reply.done() and not reply.cancelled():
                _drop(reply.result().value)
            raise

    def _thread(self, job: _Job, call: Callable[[], Any]) -> None:
        try:
            outcome = _Outcome(call())
        except BaseException as exc:  # noqa: BLE001 -- as above
            outcome = _Outcome(error=exc)
        try:
            self._loop.call_soon_threadsafe(self._thread_ended, job, outcome)
        except RuntimeError:  # the loop is closed: the call was over long ago
            _drop(outcome.value)

    def _thread_ended(self, job: _Job, outcome: _Outcome) -> None:
        assert job.reply is not None, "it is made before the thread is"
        job.on_thread = False
        if not job.reply.done():
            job.reply.set_result(outcome)
        else:  # its task was stopped meanwhile
            _drop(outcome.value)
            self._note_exit(outcome.error)
        if self._order.concurrency is None:
            self._leave(job)  # what is awaited from here on needs no thread
        self._let_go(job)

    def _task_ended(self, job: _Job, task: asyncio.Task[_Outcome]) -> None:
        self._settle(job, _Outcome(error=asyncio.CancelledError()) if task.cancelled() else task.result())
        self._let_go(job)

    # --- what it means -------------------------------------------------------------------------------------------------

    def _settle(self, job: _Job, outcome: _Outcome) -> None:
        self._note_exit(outcome.error)
        if job.settled is not None:
            return
        job.settled = self._judge(job, outcome)
        self._unsettled -= 1
        self._decide(job.settled)
        self._leave(job)

    def _judge(self, job: _Job, outcome: _Outcome) -> Settled:
        """A job's end as an ordinary result or failure. What it does after its time is up makes no difference."""
        error = outcome.error
        if job.is_late:
            late = TimeoutError(f"tasks[{job.place}] took longer than its timeout of {self._order.timeout_s:g} s")
            late.__cause__ = error if isinstance(error, Exception) else None
            return Settled(False, None, late)
        if error is None:
            return Settled(True, outcome.value)
        if not isinstance(error, Exception):
            # Passed on as it is, a CancelledError would look as if somebody had cancelled the caller.
            error, cause = RuntimeError(f"tasks[{job.place}] was cancelled by its own code"), error
            error.__cause__ = cause
        return Settled(False, None, error)

    def _note_exit(self, error: BaseException | None) -> None:
        """What is no Exception (`ctx.sleep`, an exit, an interrupt) ends the call in every mode, however late it comes."""
        if error is None or isinstance(error, Exception | asyncio.CancelledError):
            return
        self._exit = self._exit or error
        if not self._decided.done():
            self._decided.set_result(_Outcome(error=error))

    def _decide(self, latest: Settled) -> None:
        if self._decided.done():
            return
        mode, is_last = self._order.mode, self._unsettled == 0
        if mode == "race" or (mode == "all" and not latest.ok) or (mode == "any" and latest.ok):
            self._decided.set_result(_Outcome(latest.value, latest.error))
        elif is_last:
            settled = [job.settled for job in self._jobs if job.settled is not None]
            errors = [one.error for one in settled if one.error is not None]
            if mode == "any":
                outcome = _Outcome(error=ExceptionGroup(f"execute_parallel: all of {len(errors)} tasks failed", errors))
            else:
                outcome = _Outcome([one.value for one in settled] if mode == "all" else settled)
            self._decided.set_result(outcome)

    def _leave(self, job: _Job) -> None:
        if not job.has_left:
            job.has_left = True
            job.lane.room += 1
            self._fill(job.lane)

    # --- ending --------------------------------------------------------------------------------------------------------

    async def _end(self) -> asyncio.CancelledError | None:
        """Stop what is still at work and wait for it. A cancellation in the meantime cuts nothing short; it is returned."""
        for job in self._alive:
            self._stop(job)
        cancelled = None
        while self._alive:
            self._emptied = self._loop.create_future()
            try:
                await self._emptied
            except asyncio.CancelledError as exc:
                cancelled = exc
        return cancelled

    def _time_out(self, job: _Job) -> None:
        if not job.task.done():  # else its result is here, and would be thrown away for the loop's own delay
            job.is_late = True
            self._stop(job)

    def _stop(self, job: _Job) -> None:
        if not job.is_stopped:
            job.is_stopped = True
            job.task.cancel()
            job.timers.append(self._loop.call_later(_AGAIN_S, job.task.cancel))
            job.timers.append(self._loop.call_later(GRACE_S, self._give_up, job))

    def _give_up(self, job: _Job) -> None:
        if not job.task.done():
            _left_behind.add(job.task)
            job.task.add_done_callback(_left_behind.discard)
        self._settle(job, _Outcome())
        kind = "thread" if job.on_thread else "coroutine"
        log.warning("parallel_task_left_behind", extra={"place": job.place, "kind": kind, "function": _name_of(job.call)})
        self._part_with(job)

    def _let_go(self, job: _Job) -> None:
        if job.task.done() and not job.on_thread:
            self._part_with(job)

    def _part_with(self, job: _Job) -> None:
        for timer in job.timers:
            timer.cancel()
        self._alive.discard(job)
        if not self._alive and self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)


def _unwrap(outcome: _Outcome) -> Any:
    if outcome.error is not None:
        raise outcome.error
    return outcome.value


def _name_of(call: Callable[[], Any]) -> str:
    # No `repr`: that may be user code, and what it raises would break a callback.
    return call.__qualname__ if inspect.isroutine(call) else type(call).__qualname__


def _drop(value: Any) -> None:
    """A coroutine that nobody will await is closed, or Python would warn of it."""
    if inspect.iscoroutine(value) and inspect.getcoroutinestate(value) == inspect.CORO_CREATED:
        value.close()


# --- an event loop for one call ----------------------------------------------------------------------------------------


def _is_in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _watched(order: _Order, signal: AbortSignal | None) -> _Outcome:
    """The call's outcome. The handler's signal stops it, as a cancellation would stop an `async def` handler."""
    group = _Group(order)
    if signal is None:
        return await group.run()
    task = asyncio.current_task()
    assert task is not None, "the runner made one"

    async def watch() -> None:
        await signal
        task.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await group.run()
    except asyncio.CancelledError:
        try:
            signal.raise_if_aborted()
        except WorkflowError as exc:
            return _Outcome(error=exc)
        raise
    finally:
        watching.cancel()  # `_close` waits for it


def _close(loop: asyncio.AbstractEventLoop) -> None:
    left = loop.run_until_complete(_wind_up())
    if not left:
        loop.close()
        return

    def finish() -> None:
        loop.run_until_complete(asyncio.wait(left))
        loop.close()

    # A coroutine that refuses to end needs a loop to go on in; dropped half-way it would end in no defined state.
    threading.Thread(target=finish, name="streamline-parallel-rest", daemon=True).start()


async def _wind_up() -> set[asyncio.Task[Any]]:
    """What `asyncio.run` does before it closes its loop, with an end: the tasks that go on all the same."""
    current = asyncio.current_task()
    others = {task for task in asyncio.all_tasks() if task is not current}
    strays = others - _left_behind  # what the tasks have started themselves and not awaited
    for task in strays:
        task.cancel()
    if strays:
        await asyncio.wait(strays, timeout=GRACE_S)
    left = {task for task in others if not task.done()}
    if not left:
        generators = asyncio.create_task(asyncio.get_running_loop().shutdown_asyncgens())
        await asyncio.wait({generators}, timeout=GRACE_S)
        left = set() if generators.done() else {generators}
    return left
