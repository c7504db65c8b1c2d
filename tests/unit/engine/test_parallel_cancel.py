"""Parallel calls: cancellation of the caller, suspensions and exits in tasks, and the end of the event loop."""

from __future__ import annotations

import asyncio
import functools
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
from parallel_tasks import FOREVER_S, Sleeper, fail, failing, value_of

from streamline_pool import LeaseLostError, WorkflowCancelledError, execute_parallel, execute_parallel_sync
from streamline_pool.engine.abort_signal import AbortSignal, current_signal, fire_signal
from streamline_pool.engine.attempt import ABORT_GRACE_S
from streamline_pool.engine.intents import SleepSuspension, Suspension
from streamline_pool.engine.parallel import GRACE_S, MODES
from support import eventually, shown

pytestmark = pytest.mark.usefixtures("nothing_is_left")


# --- the caller is cancelled -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_cancelled_caller_stops_and_awaits_every_task(mode: str) -> None:
    sleeper, cancelled, plain_ended = Sleeper(), threading.Event(), []

    def plain() -> None:
        assert cancelled.wait(FOREVER_S)
        plain_ended.append(1)

    async def main() -> None:
        parallel = asyncio.create_task(execute_parallel([sleeper, sleeper, plain], mode))
        while sleeper.entered < 2:
            await asyncio.sleep(0)
        parallel.cancel("no longer wanted")
        cancelled.set()
        with pytest.raises(asyncio.CancelledError, match="no longer wanted"):
            await parallel
        assert (sleeper.stopped, plain_ended) == (2, [1])
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_second_cancellation_does_not_shorten_the_clean_up() -> None:
    sleeper = Sleeper()

    async def main() -> None:
        parallel = asyncio.create_task(execute_parallel([sleeper, sleeper], concurrency=1))
        while not sleeper.entered:
            await asyncio.sleep(0)
        for _ in range(3):
            parallel.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await parallel
        assert (sleeper.entered, sleeper.stopped) == (1, 1)

    asyncio.run(main())


def test_a_cancellation_while_stopped_tasks_are_awaited_is_not_lost() -> None:
    """Otherwise the handler would go on as if the run had not been cancelled."""

    async def main() -> None:
        cleaning = asyncio.Event()

        async def loser() -> None:
            try:
                await asyncio.sleep(FOREVER_S)
            finally:
                cleaning.set()
                await asyncio.sleep(0.02)

        parallel = asyncio.create_task(execute_parallel([loser, lambda: value_of(1)], "race"))
        await cleaning.wait()
        parallel.cancel()
        with pytest.raises(asyncio.CancelledError):
            await parallel

    asyncio.run(main())


def test_a_cancellation_at_the_moment_of_the_result_is_not_lost() -> None:
    async def main() -> None:
        parallel: asyncio.Task[Any]

        async def cancel_and_return() -> int:
            asyncio.get_running_loop().call_soon(parallel.cancel)
            return 1

        parallel = asyncio.create_task(execute_parallel([cancel_and_return]))
        with pytest.raises(asyncio.CancelledError):
            await parallel

    asyncio.run(main())


def test_a_timeout_of_the_caller_works_around_the_call() -> None:
    sleeper = Sleeper()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await execute_parallel([sleeper])
        assert sleeper.stopped == 1
        await asyncio.sleep(0)  # and no cancellation is left over

    asyncio.run(main())


def test_an_interrupt_stops_the_synchronous_call() -> None:
    """Ctrl-C in the main thread of a program."""
    sleeper = Sleeper()

    async def interrupt() -> None:
        while not sleeper.entered:
            await asyncio.sleep(0)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        execute_parallel_sync([sleeper, interrupt, sleeper])
    assert sleeper.entered == sleeper.stopped == 2


@pytest.mark.parametrize(("reason", "error"), [("cancelled", WorkflowCancelledError), ("timeout", LeaseLostError)])
def test_the_signal_of_a_def_handler_stops_its_tasks(reason: str, error: type[Exception]) -> None:
    """A thread cannot be cancelled. Without the signal, the tasks of a cancelled run would go on to their end."""
    sleeper, abort = Sleeper(), AbortSignal()

    def watch() -> None:
        eventually(lambda: sleeper.entered)
        fire_signal(abort, reason)

    watcher = threading.Thread(target=watch)
    token = current_signal.set(abort)
    try:
        watcher.start()
        with pytest.raises(error):
            execute_parallel_sync([sleeper])
        assert sleeper.stopped == 1
        with pytest.raises(error):
            execute_parallel_sync([sleeper])
        assert sleeper.entered == 1
    finally:
        current_signal.reset(token)
        watcher.join()


def test_a_signal_that_never_fires_keeps_nothing_of_the_calls_it_watched() -> None:
    abort = AbortSignal()
    token = current_signal.set(abort)
    try:
        assert [execute_parallel_sync([lambda: value_of(1)]) for _ in range(3)] == [[1]] * 3
    finally:
        current_signal.reset(token)
    assert abort._futures == []


# --- errors that are no Exception ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize("error", [SleepSuspension(60), SystemExit(3), KeyboardInterrupt()], ids=shown)
def test_an_error_that_is_no_exception_ends_the_call_in_every_mode(
    call: Callable[..., Any], mode: str, kind: str, error: BaseException
) -> None:
    """`ctx.sleep` in a task must suspend the run, and `sys.exit` must not end the worker's event loop."""
    sleeper = Sleeper()
    leave = (lambda: fail(error)) if kind == "def" else functools.partial(failing, error)
    with pytest.raises(type(error)) as raised:
        call([sleeper, leave, sleeper], mode)
    assert raised.value is error
    assert sleeper.entered == sleeper.stopped == 2


def test_a_suspension_is_not_lost_when_it_comes_while_a_task_is_stopped(call: Callable[..., Any]) -> None:
    async def leave_at_last() -> None:
        try:
            await asyncio.sleep(FOREVER_S)
        finally:
            raise SleepSuspension(60)

    with pytest.raises(Suspension):
        call([leave_at_last, lambda: value_of(1)], "race")
    with pytest.raises(Suspension):
        call([leave_at_last], "all_settled", timeout=0.02)


def test_a_suspension_of_a_plain_task_is_not_lost_after_its_timeout(call: Callable[..., Any]) -> None:
    begun = threading.Event()

    def leave_late() -> None:
        begun.set()
        threading.Event().wait(0.1)
        raise SleepSuspension(60)

    with pytest.raises(Suspension):
        call([leave_late], "all_settled", timeout=0.02)
    assert begun.is_set()


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_task_that_cancels_itself_has_failed_and_the_caller_is_not_cancelled(call: Callable[..., Any], kind: str) -> None:
    """A CancelledError raised as it is would look like a cancellation of the whole handler. No ExceptionGroup takes it."""
    error = asyncio.CancelledError()
    cancel = (lambda: fail(error)) if kind == "def" else functools.partial(failing, error)
    with pytest.raises(RuntimeError, match=r"tasks\[1\] was cancelled by its own code") as raised:
        call([lambda: value_of(1), cancel])
    assert raised.value.__cause__ is error
    with pytest.raises(ExceptionGroup):
        call([cancel], "any")


# --- the loop of the synchronous call ----------------------------------------------------------------------------------


def test_a_task_that_a_callable_started_itself_ends_with_the_loop() -> None:
    stray = Sleeper()

    async def careless() -> Any:
        task = asyncio.create_task(stray())
        await asyncio.sleep(0)
        return task

    assert execute_parallel_sync([careless])[0].cancelled()
    assert stray.stopped == 1


def test_an_unfinished_generator_is_closed_with_the_loop() -> None:
    closed: list[int] = []

    async def numbers() -> Any:
        try:
            yield 1
            yield 2
        finally:
            closed.append(1)

    async def first() -> Any:
        left = numbers()
        await anext(left)
        return left

    kept = execute_parallel_sync([first])
    assert (len(kept), closed) == (1, [1])


def test_a_thread_that_a_task_started_itself_does_not_delay_the_call() -> None:
    """`asyncio.run` waits for such threads without a limit."""
    release = threading.Event()

    async def work() -> None:
        await asyncio.to_thread(release.wait, FOREVER_S)

    try:
        with pytest.raises(TimeoutError):
            execute_parallel_sync([work], timeout=0.05)
        assert not release.is_set()
    finally:
        release.set()


def test_the_time_of_many_tasks_grows_with_their_number_only() -> None:
    """To wait for all of them again after each would take quadratic time: minutes."""
    assert sum(execute_parallel_sync([functools.partial(value_of, 1)] * 20_000)) == 20_000


def test_the_grace_of_a_task_is_shorter_than_that_of_a_handler() -> None:
    """Otherwise a handler that waits for such a task would itself count as stuck, and its worker would be replaced."""
    assert GRACE_S < 1.0 < ABORT_GRACE_S  # 1 s: what `shutdown` gives
