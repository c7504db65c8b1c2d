"""Threads of handlers: as many as run at once, and no more than that for long."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import pytest

from streamline_pool.engine.handler_threads import PERIOD_S, HandlerThreads
from support import eventually


class Burst:
    """Handlers that run at the same time until `end`."""

    def __init__(self, threads: HandlerThreads, count: int) -> None:
        self._over = threading.Event()
        self.begun = threading.Semaphore(0)
        self.futures: list[Future[Any]] = [threads.submit(self._run) for _ in range(count)]

    def _run(self) -> str:
        self.begun.release()
        self._over.wait(30)
        return threading.current_thread().name

    def end(self) -> None:
        self._over.set()
        for future in self.futures:
            future.result(30)


class Clock:
    """A monotonic clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def alive() -> int:
    return sum(thread.name.startswith("streamline-handler") for thread in threading.enumerate())


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_threads_of_a_burst_end_after_a_period_without_one(clock: Clock) -> None:
    """A worker that had 200 handlers at once for one second kept 200 threads for weeks."""
    threads = HandlerThreads(50, clock)
    Burst(threads, 20).end()
    assert alive() > 1

    for _ in range(2):  # the burst was in the first period, so the second is the first without it
        clock.now += PERIOD_S
        Burst(threads, 1).end()

    eventually(lambda: alive() == 1)
    threads.shutdown()
    eventually(lambda: alive() == 0)


def test_threads_that_are_in_use_are_kept(clock: Clock) -> None:
    """New threads for a steady load would cost each period as much as the first."""
    threads = HandlerThreads(50, clock)
    first = Burst(threads, 3)
    first.end()
    for _ in range(3):
        clock.now += PERIOD_S
        again = Burst(threads, 3)
        again.end()
        assert {future.result() for future in again.futures} <= {future.result() for future in first.futures}
    threads.shutdown()


def test_what_runs_or_waits_when_threads_are_given_up_is_done(clock: Clock) -> None:
    """A handler that lost its thread would keep its run until the lease ends."""
    threads = HandlerThreads(2, clock)
    Burst(threads, 2).end()
    clock.now += PERIOD_S
    Burst(threads, 1).end()
    long = Burst(threads, 1)
    clock.now += PERIOD_S
    waiting = Burst(threads, 4)  # more than there are threads

    waiting.end()
    long.end()

    assert all(future.done() for future in [*long.futures, *waiting.futures])
    threads.shutdown()


def test_handlers_that_have_not_begun_are_cancelled_at_the_end(clock: Clock) -> None:
    threads = HandlerThreads(1, clock)
    burst = Burst(threads, 2)
    assert burst.begun.acquire(timeout=30)
    threads.shutdown()
    assert burst.futures[1].cancelled()
    burst.futures.pop()
    burst.end()
