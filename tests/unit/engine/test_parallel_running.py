"""Parallel calls: which tasks run at once, on which threads, and with which context variables."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
from parallel_tasks import FOREVER_S, value_of

from streamline_pool import ValidationError, execute_parallel, execute_parallel_sync
from streamline_pool.engine.parallel import THREADS_MAX

pytestmark = pytest.mark.usefixtures("nothing_is_left")

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


def test_plain_tasks_run_at_the_same_time_and_the_loop_goes_on(call: Callable[..., Any]) -> None:
    """A plain callable on the loop's own thread would block every run of the worker."""
    together = threading.Barrier(3)

    async def in_the_loop() -> None:
        while together.n_waiting < 2:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(together.wait, FOREVER_S)

    call([lambda: together.wait(FOREVER_S), lambda: together.wait(FOREVER_S), in_the_loop])


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_no_more_tasks_than_concurrency_run_at_once_and_they_start_in_order(call: Callable[..., Any], kind: str) -> None:
    """The limit protects a service that the tasks use."""
    lock, at_work, most, begun = threading.Lock(), 0, 0, []

    full = threading.Event()

    def enter(place: int) -> None:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
            begun.append(place)
            if at_work == 3:
                full.set()

    def leave(place: int) -> int:
        nonlocal at_work
        with lock:
            at_work -= 1
        return place

    def plain(place: int) -> int:
        enter(place)
        full.wait(5)  # on a busy machine the first task could end before the third one begins
        threading.Event().wait(0.005)
        return leave(place)

    async def work(place: int) -> int:
        enter(place)
        for _ in range(1_000):
            await asyncio.sleep(0.005)
            if full.is_set():
                break
        return leave(place)

    task = plain if kind == "def" else work
    assert call([functools.partial(task, place) for place in range(12)], concurrency=3) == list(range(12))
    assert most == 3
    assert sorted(begun[:3]) == [0, 1, 2]
    begun.clear()
    assert call([functools.partial(task, place) for place in range(4)], concurrency=1) == begun == [0, 1, 2, 3]


def test_without_a_limit_plain_tasks_do_not_use_up_all_threads(call: Callable[..., Any]) -> None:
    lock, at_work, most = threading.Lock(), 0, 0

    def work() -> None:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        threading.Event().wait(0.01)
        with lock:
            at_work -= 1

    call([work] * (2 * THREADS_MAX))
    assert 1 < most <= THREADS_MAX


def test_without_a_limit_all_coroutines_run_at_once_also_those_of_lambdas(call: Callable[..., Any]) -> None:
    """The bound on threads must not limit tasks that need no thread."""
    count, entered = THREADS_MAX + 20, 0

    async def work() -> None:
        nonlocal entered
        entered += 1
        while entered < 2 * count:
            await asyncio.sleep(0.001)

    call([*[work] * count, *[lambda: work()] * count])  # noqa: PLW0108 -- a plain callable that returns a coroutine


def test_a_concurrency_above_the_bound_on_threads_is_respected(call: Callable[..., Any]) -> None:
    together = threading.Barrier(THREADS_MAX + 1)
    call([lambda: together.wait(FOREVER_S)] * (THREADS_MAX + 1), concurrency=THREADS_MAX + 1)


def test_a_thread_that_cannot_be_started_fails_its_task(call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "streamline-parallel-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    settled = call([lambda: 0, lambda: 1, lambda: 2], "all_settled")
    assert [one.value for one in settled] == [0, None, 2]
    assert "can't start new thread" in str(settled[1].error)


@pytest.mark.parametrize("concurrency", [None, 1])
def test_tasks_see_the_callers_context_variables_and_keep_their_own_to_themselves(
    call: Callable[..., Any], concurrency: int | None
) -> None:
    """A tenant or trace id that is lost, or changed by another task, would end up in the wrong log or bill."""

    def plain() -> str:
        before = variable.get()
        variable.set("plain")
        return before

    async def work() -> str:
        before = variable.get()
        variable.set("work")
        await asyncio.sleep(0)
        return before

    token = variable.set("caller's")
    try:
        from_lambda = lambda: work()  # noqa: E731, PLW0108 -- a plain callable that returns a coroutine
        assert call([plain, work, from_lambda, plain], concurrency=concurrency) == ["caller's"] * 4
        assert variable.get() == "caller's"
    finally:
        variable.reset(token)


def test_tasks_that_had_to_wait_for_a_thread_see_the_callers_context_variables_too(call: Callable[..., Any]) -> None:
    """They are started at the end of another task's thread, in a callback without the caller's context."""
    token = variable.set("caller's")
    try:
        assert set(call([variable.get] * (3 * THREADS_MAX))) == {"caller's"}
    finally:
        variable.reset(token)


def test_calls_can_be_nested(call: Callable[..., Any]) -> None:
    async def inner() -> list[Any]:
        return list(await execute_parallel([lambda: 1, lambda: value_of(2)]))

    assert call([inner, lambda: execute_parallel_sync([lambda: 3, lambda: value_of(4)])]) == [[1, 2], [3, 4]]


def test_the_synchronous_call_refuses_to_block_an_event_loop() -> None:
    async def main() -> None:
        with pytest.raises(ValidationError, match="await execute_parallel"):
            execute_parallel_sync([lambda: 1])

    asyncio.run(main())
