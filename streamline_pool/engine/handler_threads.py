"""The threads on which `def` handlers run. Owns how many there are; attempt.py owns what runs on them.

A `ThreadPoolExecutor` never ends a thread, so one burst of handlers would leave its threads, and their memory, for as long as the
worker lives. Here the executor is replaced when a period has passed in which at most three quarters of its threads were in use at once.
The threads of the old one end when they have done what was submitted to them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

__all__ = ["PERIOD_S", "HandlerThreads"]

PERIOD_S = 60.0
"""How long threads are kept for a burst that may come again. A guess: to make a thread takes a tenth of a millisecond."""


class HandlerThreads:
    """At most `threads_max` threads. For one event loop: `submit` and `shutdown` are called by its thread only."""

    def __init__(self, threads_max: int, monotonic: Callable[[], float]) -> None:
        self._threads_max = threads_max
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._running = 0  # submitted, and not ended yet
        self._most_lately = 0  # that ran at once in this period
        self._most = 0  # … since the executor was made: it has no more threads than this
        self._period_ends = monotonic() + PERIOD_S
        self._executor = self._made()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """As `Executor.submit`. Raises RuntimeError if no thread can be started; a thread that becomes free may yet run it."""
        if self._monotonic() >= self._period_ends:
            self._end_period()
        with self._lock:
            self._running += 1
            self._most_lately = max(self._most_lately, self._running)
            self._most = max(self._most, self._running)
        try:
            future = self._executor.submit(function, *arguments)
        except RuntimeError:
            with self._lock:
                self._running -= 1
            raise
        future.add_done_callback(self._ended)
        return future

    def shutdown(self) -> None:
        """Submit nothing more. What has not begun is cancelled, and threads end with what they do."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _made(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=self._threads_max, thread_name_prefix="streamline-handler")

    def _end_period(self) -> None:
        self._period_ends = self._monotonic() + PERIOD_S
        with self._lock:
            has_surplus, self._most_lately = self._most_lately <= self._most * 3 // 4, self._running
            self._most = self._running if has_surplus else self._most
        if has_surplus:
            self._executor.shutdown(wait=False)
            self._executor = self._made()

    def _ended(self, _: Future[Any]) -> None:
        with self._lock:
            self._running -= 1
