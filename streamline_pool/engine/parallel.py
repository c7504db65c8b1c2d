"""Several tasks at once within one step: `execute_parallel`, and `execute_parallel_sync` for `def` handlers.

Owns the public calls, the check of their arguments, and the event loop of a synchronous call. Running and stopping the
tasks is left to parallel_group.py. Stores nothing and knows nothing of runs.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal, overload

from streamline_pool.domain.errors import ValidationError, WorkflowError
from streamline_pool.domain.model import seconds

from .abort_signal import AbortSignal, current_signal
from .parallel_group import GRACE_S, MODES, THREADS_MAX, Outcome, ParallelCall, Settled, TaskGroup, abandoned_tasks, close_unawaited

__all__ = ["GRACE_S", "MODES", "THREADS_MAX", "Settled", "execute_parallel", "execute_parallel_sync"]

_Tasks = Sequence[Callable[[], Any]]
_Timeout = float | timedelta | None


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
    """Run several tasks at once, in a step or anywhere else. The results come in the order of `tasks`.

    tasks: a list of callables without arguments. An `async def` runs in the caller's event loop. Any other callable runs
    on a thread of its own, so it may block; if it returns an awaitable, that is then awaited in the loop. Both see the
    caller's context variables. Changes to these stay within the task.

    mode:
      "all"          a list of all values; the first error is raised, and the other tasks are stopped
      "all_settled"  a list of `Settled(ok, value, error)`; no ordinary failure is raised
      "any"          the first value; if every task fails, an ExceptionGroup of all errors, in the order of `tasks`
      "race"         the value or error of the task that ends first

    concurrency: the number of tasks that may run at once; they start in their order ("all" and "all_settled" only).
    None: all of them, but at most `THREADS_MAX` plain callables.
    timeout: seconds or a timedelta, for each task, counted from its start. A task that takes longer is stopped and counts
    as failed, with a built-in TimeoutError that names its place. If threads that go on after their task's timeout hold every
    place, the tasks that wait for one time out as well, from that moment on.

    Stopping: an `async def` is cancelled and awaited. A thread cannot be stopped: its task ends at once, the thread is
    awaited all the same, and its later result is dropped. Until it ends, it counts among the tasks that run at once. Both
    are awaited for at most `GRACE_S` seconds. A task that still runs then is abandoned, with the warning
    `parallel_task_left_behind` in the log. When the caller is cancelled, all tasks are stopped in every mode; the caller's
    CancelledError is raised after they have ended.

    A BaseException that is no Exception ends the call in every mode and is raised as it is. So `ctx.sleep` and the like in
    a task end the handler.

    Raises ValidationError for invalid arguments, before any task starts.
    """
    call = _checked_call("execute_parallel", tasks, mode, concurrency, timeout)
    return _unwrap(await TaskGroup(call).run())


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

    `async def` tasks run in an event loop that lives as long as the call. When the attempt of the handler is over
    (`ctx.signal` has fired), the tasks are stopped, and WorkflowCancelledError or LeaseLostError is raised as by
    `ctx.signal.raise_if_aborted()`. On a thread that runs an event loop: ValidationError.
    """
    call = _checked_call("execute_parallel_sync", tasks, mode, concurrency, timeout)
    if _is_in_loop():
        raise ValidationError("execute_parallel_sync: this thread runs an event loop, which would stand still; await execute_parallel(...)")
    signal = current_signal.get()
    if signal is not None:
        signal.raise_if_aborted()
    # Not `with`: the runner's own clean-up waits without limit for tasks and threads that do not end.
    runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
    loop = runner.get_loop()
    try:
        outcome = runner.run(_run_until_aborted(call, signal))
    finally:
        _close(loop)
    return _unwrap(outcome)


def _unwrap(outcome: Outcome) -> Any:
    if outcome.error is not None:
        raise outcome.error
    return outcome.value


# --- arguments ---------------------------------------------------------------------------------------------------------


def _checked_call(where: str, tasks: Any, mode: Any, concurrency: Any, timeout: Any) -> ParallelCall:
    if not isinstance(tasks, list | tuple):
        close_unawaited(tasks)
        raise ValidationError(f"{where}: tasks is a list of callables without arguments, not {type(tasks).__name__}")
    try:
        _check_tasks(where, tasks)
        _check_mode(where, tasks, mode, concurrency)
        timeout_s = None if timeout is None else seconds(timeout, f"{where}: timeout")
    except ValidationError:
        for task in tasks:
            close_unawaited(task)  # a coroutine in place of a callable; Python's warning would only repeat our error
        raise
    return ParallelCall(tuple(tasks), mode, concurrency, timeout_s)


def _check_tasks(where: str, tasks: Sequence[Any]) -> None:
    for place, task in enumerate(tasks):
        if not callable(task):
            hint = "; pass what makes it, as in `lambda: fetch(url)`" if inspect.isawaitable(task) else ""
            raise ValidationError(f"{where}: tasks[{place}] is not a callable without arguments but {task!r:.100}{hint}", index=place)


def _check_mode(where: str, tasks: Sequence[Any], mode: Any, concurrency: Any) -> None:
    if not isinstance(mode, str) or mode not in MODES:
        raise ValidationError(f"{where}: mode is one of {', '.join(MODES)}, not {mode!r}")
    if not tasks and mode in ("race", "any"):
        raise ValidationError(f"{where}: mode {mode!r} needs at least one task, it has no result without")
    if concurrency is None:
        return
    if mode in ("race", "any"):
        raise ValidationError(f"{where}: mode {mode!r} starts all tasks at once and takes no concurrency")
    if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
        raise ValidationError(f"{where}: concurrency is a whole number of at least 1, or None for no limit, not {concurrency!r}")


# --- the event loop of a synchronous call ------------------------------------------------------------------------------


def _is_in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _run_until_aborted(call: ParallelCall, signal: AbortSignal | None) -> Outcome:
    """The outcome of the call. The handler's signal stops it, as a cancellation stops an `async def` handler."""
    group = TaskGroup(call)
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
            return Outcome(error=exc)
        raise
    finally:
        watching.cancel()  # `_close` waits for it


def _close(loop: asyncio.AbstractEventLoop) -> None:
    left = loop.run_until_complete(_end_other_tasks())
    if not left:
        loop.close()
        return

    def finish() -> None:
        loop.run_until_complete(asyncio.wait(left))
        loop.close()

    # A coroutine that does not end needs a loop to continue in. Dropped in the middle, it would end in no defined state.
    threading.Thread(target=finish, name="streamline-parallel-rest", daemon=True).start()


async def _end_other_tasks() -> set[asyncio.Task[Any]]:
    """What `asyncio.run` does before it closes its loop, but with a time limit. Returns the tasks that did not end."""
    current = asyncio.current_task()
    others = {task for task in asyncio.all_tasks() if task is not current}
    unawaited = others - abandoned_tasks  # tasks that the callables started themselves and did not await
    for task in unawaited:
        task.cancel()
    if unawaited:
        await asyncio.wait(unawaited, timeout=GRACE_S)
    left = {task for task in others if not task.done()}
    if not left:
        generators = asyncio.create_task(asyncio.get_running_loop().shutdown_asyncgens())
        await asyncio.wait({generators}, timeout=GRACE_S)
        left = set() if generators.done() else {generators}
    return left
