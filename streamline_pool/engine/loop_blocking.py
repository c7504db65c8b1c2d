"""How long the calls of handlers may block the event loop of their worker: all calls of one turn of the loop together.

While the loop's thread waits, no lease is renewed, no handler of this worker can be stopped, and the supervisor hears nothing. So the
time ends before the first lease does, and in a part of the silence after which the supervisor ends the worker.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterable

from streamline_pool.config.env import Env

__all__ = ["LoopBlocking"]

_MIN_S = 1.0  # after a handler that has computed beyond its lease without a pause: the lease may still be there
_MAX_S = 10.0  # a guess: a fail-over takes less
_SILENCE_SHARE = 1 / 3  # of the silence after which the supervisor ends a worker; a turn of the loop is followed by a beat


class LoopBlocking:
    """The time of one event loop. Threads of handlers have as much for each call, because they block no loop."""

    def __init__(self, env: Env, loop: asyncio.AbstractEventLoop, deadlines: Callable[[], Iterable[float]], silence_s: float) -> None:
        self._env = env
        self._loop = loop
        self._thread = threading.get_ident()
        self._deadlines = deadlines  # monotonic: when the leases end
        self._max_s = min(_MAX_S, silence_s * _SILENCE_SHARE)
        self._until: float | None = None  # monotonic; when the time of this turn is over; None: no call has blocked in it
        self._least_s = 0.0  # less is not worth a call

    @property
    def on_loop(self) -> bool:
        """Whether the calling thread is the loop's own."""
        return threading.get_ident() == self._thread

    def left_s(self) -> float:
        """How long the calling thread may wait from now on, in seconds; 0 if it may not."""
        now = self._env.clock.monotonic()
        if not self.on_loop:
            return self._longest_s(now)
        if self._until is None:
            longest_s = self._longest_s(now)
            self._until, self._least_s = now + longest_s, longest_s / 20
            # Behind the timers that are due, and what they wake: renewals, beats and self-fences come before the next call.
            self._loop.call_later(0, self._loop.call_soon, self._turned)
        left_s = self._until - now
        return left_s if left_s > self._least_s else 0.0

    def _longest_s(self, now: float) -> float:
        first = min(self._deadlines(), default=math.inf)
        return min(max(first - now, _MIN_S), self._max_s)

    def _turned(self) -> None:
        self._until = None
