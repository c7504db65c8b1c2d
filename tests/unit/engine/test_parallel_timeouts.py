"""Parallel calls: timeouts of tasks, and tasks that do not end when they are stopped."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from parallel_tasks import FOREVER_S, Sleeper, abandoned_in_log, failing, value_of

from streamline_pool import execute_parallel, execute_parallel_sync
from streamline_pool.engine import parallel_group
from streamline_pool.engine.parallel_group import abandoned_tasks
from support import eventually, shown

pytestmark = pytest.mark.usefixtures("nothing_is_left")


# --- timeouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0.05, timedelta(milliseconds=50)], ids=shown)
def test_a_task_that_takes_too_long_is_stopped_and_named(call: Callable[..., Any], timeout: Any) -> None:
    sleeper, quick = Sleeper(), functools.partial(value_of, 1)  # no thread: on a busy machine that may not be quick
    with pytest.raises(TimeoutError, match=r"^tasks\[1\] took longer than its timeout of 0\.05 s$"):
        call([quick, sleeper], timeout=timeout)
    settled = call([sleeper, quick, sleeper], "all_settled", timeout=timeout)
    assert [type(one.error) for one in settled] == [TimeoutError, type(None), TimeoutError]
    with pytest.raises(ExceptionGroup) as raised:
        call([sleeper, functools.partial(failing, ValueError())], "any", timeout=timeout)
    assert [type(error) for error in raised.value.exceptions] == [TimeoutError, ValueError]
    with pytest.raises(TimeoutError):
        call([sleeper], "race", timeout=timeout)
    assert sleeper.entered == sleeper.stopped == 5


def test_the_timeout_counts_from_the_start_of_each_task(call: Callable[..., Any]) -> None:
    """Counted from the call, the last tasks in the queue would have no time at all."""
    lived: list[float] = []

    async def work() -> None:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            await asyncio.sleep(FOREVER_S)
        finally:
            lived.append(loop.time() - begun)

    settled = call([work] * 3, "all_settled", concurrency=1, timeout=0.05)
    assert [type(one.error) for one in settled] == [TimeoutError] * 3
    assert min(lived) > 0.04


def test_a_result_that_is_ready_is_kept_when_the_loop_is_late(call: Callable[..., Any]) -> None:
    """The timer and the end of a task may fall into the same iteration of the loop."""

    async def block_the_loop() -> int:
        threading.Event().wait(0.1)
        return 2

    settled = call([functools.partial(value_of, 1), block_the_loop], "all_settled", timeout=0.05)
    assert [one.value for one in settled] == [1, 2]


def test_what_a_task_does_after_its_timeout_has_no_effect(call: Callable[..., Any]) -> None:
    error = ValueError("while cleaning up")

    async def late() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(FOREVER_S)
        return "late"

    async def broken() -> str:
        try:
            await asyncio.sleep(FOREVER_S)
        finally:
            raise error

    settled = call([late, broken], "all_settled", timeout=0.02)
    assert [(one.ok, type(one.error), one.error.__cause__) for one in settled] == [
        (False, TimeoutError, None),
        (False, TimeoutError, error),
    ]


def test_a_plain_task_that_takes_too_long_ends_and_its_later_result_is_dropped(
    call: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A thread cannot be stopped; a call that waited for it would hang with it."""
    release, returned = threading.Event(), threading.Event()

    def stuck() -> Any:
        release.wait(FOREVER_S)
        returned.set()
        return value_of("not awaited")

    try:
        settled = call([stuck, functools.partial(value_of, 1)], "all_settled", concurrency=2, timeout=0.05)
        assert ([one.value for one in settled], type(settled[0].error)) == ([None, 1], TimeoutError)
        assert not returned.is_set()
        assert abandoned_in_log(caplog) == [(0, "thread")]
    finally:
        release.set()
    assert returned.wait(FOREVER_S)


def test_a_coroutine_that_is_returned_at_the_moment_of_the_timeout_is_dropped() -> None:
    """Warnings are errors here: a coroutine that is not awaited would fail this test."""

    async def main() -> None:
        entered, release = threading.Event(), threading.Event()

        def work() -> Any:
            entered.set()
            assert release.wait(FOREVER_S)
            return value_of("not awaited")

        parallel = asyncio.create_task(execute_parallel([work], timeout=0.05))
        while not entered.is_set():
            await asyncio.sleep(0)
        release.set()
        threading.Event().wait(0.1)  # blocks the loop: the thread's reply and the timeout meet in its next iteration
        with pytest.raises(TimeoutError):
            await parallel

    asyncio.run(main())


def test_a_plain_task_that_ends_within_the_grace_is_awaited(call: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    """When the call returns, no task runs any more, if a short wait is enough for that."""
    entered, won, ended = threading.Event(), threading.Event(), []

    def loser() -> Any:
        entered.set()
        assert won.wait(FOREVER_S)
        threading.Event().wait(0.1)
        ended.append(1)
        return value_of("not awaited")

    async def winner() -> str:
        await asyncio.to_thread(entered.wait, FOREVER_S)
        won.set()
        return "won"

    assert call([loser, winner], "race") == "won"
    assert (ended, abandoned_in_log(caplog)) == ([1], [])


@pytest.mark.parametrize("limit", ["concurrency", "threads"])
def test_a_thread_keeps_its_place_until_it_ends(call: Callable[..., Any], limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit protects a service, or the process. A task that has timed out still uses both."""
    monkeypatch.setattr(parallel_group, "THREADS_MAX", 2)
    lock, at_work, most = threading.Lock(), 0, 0

    def work(pause_s: float) -> int:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        threading.Event().wait(pause_s)
        with lock:
            at_work -= 1
        return 1

    # Slow ones end after their task's timeout, and before that of the tasks that wait for their places.
    slow, quick = functools.partial(work, 0.45), functools.partial(work, 0.01)
    settled = call([slow, slow, quick, quick], "all_settled", concurrency=2 if limit == "concurrency" else None, timeout=0.3)
    assert [type(one.error) for one in settled] == [TimeoutError, TimeoutError, type(None), type(None)]
    assert most == 2


@pytest.mark.parametrize("mode", ["all_settled", pytest.param("any", marks=pytest.mark.slow)])
def test_tasks_for_which_no_thread_ever_ends_time_out_as_well(call: Callable[..., Any], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that waited for those threads would hang with them, and hold its run."""
    monkeypatch.setattr(parallel_group, "THREADS_MAX", 2)
    release, entered = threading.Event(), []

    def stuck() -> None:
        entered.append(1)
        release.wait(FOREVER_S)

    try:
        if mode == "any":
            with pytest.raises(ExceptionGroup) as raised:
                call([stuck] * 4, mode, timeout=0.05)
            errors = list(raised.value.exceptions)
        else:
            errors = [one.error for one in call([stuck] * 4, mode, concurrency=2, timeout=0.05)]
    finally:
        release.set()
    late = [f"tasks[{place}] took longer than its timeout of 0.05 s" for place in (0, 1)]
    unstarted = [
        f"tasks[{place}] could not start within its timeout of 0.05 s: every place is held by a thread that goes on" for place in (2, 3)
    ]
    assert [(type(error), str(error)) for error in errors] == [(TimeoutError, message) for message in late + unstarted]
    assert entered == [1, 1]


def test_a_call_in_which_every_place_is_held_ends_with_its_caller() -> None:
    """The timeout of a step cancels its handler."""
    release = threading.Event()

    async def main() -> float:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        with pytest.raises(TimeoutError, match=r"^$"):
            async with asyncio.timeout(0.3):
                await execute_parallel([lambda: release.wait(FOREVER_S)] * 3, "all_settled", concurrency=1, timeout=0.2)
        return loop.time() - begun

    try:
        assert asyncio.run(main()) < 5
    finally:
        release.set()


# --- tasks that do not end -------------------------------------------------------------------------------------------


def test_a_task_that_does_not_end_is_abandoned(call: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    """It must neither block the handler nor be destroyed in the middle."""
    release, ended = threading.Event(), threading.Event()

    async def stubborn() -> None:
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
        ended.set()

    async def main() -> Any:
        result = await execute_parallel([stubborn, lambda: value_of(1)], "race")
        assert not ended.is_set()
        release.set()
        while not ended.is_set():
            await asyncio.sleep(0.01)
        return result

    try:
        if call is execute_parallel_sync:
            assert call([stubborn, lambda: value_of(1)], "race") == 1
            assert not ended.is_set()
        else:
            assert asyncio.run(main()) == 1
    finally:
        release.set()
    assert abandoned_in_log(caplog) == [(0, "coroutine")]
    assert ended.wait(FOREVER_S)
    eventually(lambda: not abandoned_tasks)


def test_an_abandoned_task_is_not_garbage_collected() -> None:
    """An event loop holds its tasks weakly. A task that waits for a future which only the task refers to would vanish."""

    async def main() -> None:
        ended = asyncio.Event()
        waits: list[weakref.ref[asyncio.Future[None]]] = []

        async def stubborn() -> None:
            while not ended.is_set():
                future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                waits[:] = [weakref.ref(future)]
                with contextlib.suppress(asyncio.CancelledError):
                    await future
                    ended.set()

        assert await execute_parallel([stubborn, lambda: value_of(1)], "race") == 1
        gc.collect()
        future = waits[0]()
        assert future is not None
        future.set_result(None)
        await ended.wait()

    asyncio.run(main())


def test_a_task_that_ignores_its_timeout_counts_as_ended_after_the_grace(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> Any:
        release = asyncio.Event()

        async def stubborn() -> None:
            while not release.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await release.wait()

        try:
            return await execute_parallel([stubborn, functools.partial(value_of, 1)], "all_settled", concurrency=1, timeout=0.02)
        finally:
            release.set()

    settled = asyncio.run(main())
    assert [(type(one.error), one.value) for one in settled] == [(TimeoutError, None), (type(None), 1)]
    assert abandoned_in_log(caplog) == [(0, "coroutine")]


def test_a_task_that_loses_its_first_cancellation_is_stopped_by_the_next(
    call: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Drivers sometimes lose one (config/asyncio_tasks.py)."""
    ended: list[int] = []

    async def absent_minded() -> None:
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(FOREVER_S)
            await asyncio.sleep(FOREVER_S)
        finally:
            ended.append(1)

    assert call([absent_minded, lambda: value_of(1)], "race") == 1
    assert (ended, abandoned_in_log(caplog)) == ([1], [])
