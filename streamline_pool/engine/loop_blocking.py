"""How long the calls of handlers may block an event loop: all calls of one turn of the loop together.

While the loop's thread waits, no lease is renewed, no handler in this loop can be stopped, and the supervisor hears nothing. So a call
ends before the first lease does, and in a part of the silence after which the supervisor ends the worker. Only the time within calls
counts: what a handler computes between two calls is its own.
"""

from __future__ import annotations

import asyncio
import math
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from streamline_pool.config.env import Env
from streamline_pool.domain.errors import InvalidStateError, StoreUnavailableError

__all__ = ["LoopBlocking", "LoopsBlocking"]

_Deadlines = Callable[[], Iterable[float]]

_MIN_S = 1.0  # also for a handler that has computed beyond its lease without a pause: the lease may still be there
_OVERRUN_S = 0.5  # measured: PyMongo looks for a server in steps of so long, and may notice the end of a call's time so much later
_MAX_S = 10.0  # a guess: a fail-over takes less
_SILENCE_SHARE = 1 / 3  # of the supervisor's patience, for one call
_IN_VAIN_SHARE = 0.9  # of the time of a call that has failed: in less, the database has answered something
_TURN_SHARE = 2 / 3  # of the supervisor's patience, for the calls of one turn that were answered; it has a beat behind it


class LoopBlocking:
    """The blocking calls in one event loop, whose thread makes this. Threads of handlers have as much time for each call."""

    def __init__(self, env: Env, silence_s: float) -> None:
        self._env = env
        self._loop = weakref.ref(asyncio.get_running_loop())  # `LoopsBlocking` keeps this as long as the loop lives
        self._thread = threading.get_ident()
        self._deadlines: list[_Deadlines] = []
        self._max_s = min(_MAX_S, silence_s * _SILENCE_SHARE)
        self._turn_max_s = silence_s * _TURN_SHARE
        self._spent_s = 0.0  # within calls of this turn
        self._spent_by: defaultdict[str, float] = defaultdict(float)  # the same, by run
        self._in_vain = False  # a call of this turn has waited until its time was over
        self._turn_ends = False  # its end is planned

    def watch(self, deadlines: _Deadlines) -> None:
        """An engine begins in this loop. `deadlines`: when its leases end, monotonic seconds."""
        self._deadlines.append(deadlines)

    def forget(self, deadlines: _Deadlines) -> None:
        """That engine has ended."""
        if deadlines in self._deadlines:
            self._deadlines.remove(deadlines)

    @property
    def on_loop(self) -> bool:
        """Whether the calling thread is the loop's own."""
        return threading.get_ident() == self._thread

    def admit(self, run_id: str) -> None:
        """Raise if the calling thread must not wait for a call of this run: calls of this turn have blocked the loop for long enough.

        StoreUnavailableError: the handler is to be entered again. InvalidStateError: its own calls took most of that time, and were
        answered; it would come no further the next time.
        """
        if not self.on_loop:
            return
        is_over = self._spent_s >= self._turn_max_s or (self._spent_s >= _MIN_S and self._left_s() <= 0)
        if is_over and not self._in_vain and self._spent_by[run_id] > self._spent_s / 2:
            raise InvalidStateError(
                f"run {run_id}: the calls of this handler have blocked the event loop of its worker for {self._spent_by[run_id]:.1f} s "
                "without a pause; await something between them, for example asyncio.sleep(0.01)",
                run_id=run_id,
            )
        if is_over or self._in_vain:
            raise StoreUnavailableError("calls of handlers have blocked the event loop of this worker for long enough", transient=True)

    def _left_s(self) -> float:
        """Until the first lease ends."""
        now = self._env.clock.monotonic()
        return min((deadline - now for deadlines in self._deadlines for deadline in deadlines()), default=math.inf)

    @contextmanager
    def waiting(self, run_id: str) -> Iterator[float]:
        """While the calling thread waits for the database: for so many seconds at most. Raises as `admit` does."""
        self.admit(run_id)
        left_s = self._left_s() - _OVERRUN_S
        if not self.on_loop:
            yield _between(_MIN_S, left_s, self._max_s)
            return
        loop = self._loop()
        if not self._turn_ends and loop is not None:
            # Timers that are due begin in the first of three passes, what they wake runs in the second, the next calls in the third.
            self._turn_ends = True
            loop.call_later(0, loop.call_soon, loop.call_soon, self._turned)
        began = self._env.clock.monotonic()
        seconds = _between(_MIN_S, min(left_s, self._max_s - self._spent_s), self._max_s)
        try:
            yield seconds
        except StoreUnavailableError:
            self._in_vain = self._env.clock.monotonic() - began >= seconds * _IN_VAIN_SHARE
            raise
        finally:
            spent_s = self._env.clock.monotonic() - began
            self._spent_s += spent_s
            self._spent_by[run_id] += spent_s

    def _turned(self) -> None:
        self._spent_s, self._in_vain, self._turn_ends = 0.0, False, False
        self._spent_by.clear()


class LoopsBlocking:
    """Those of the event loops in which one application executes runs: a worker's, and those of `execute`."""

    def __init__(self, env: Env) -> None:
        self._env = env
        self._of: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopBlocking] = weakref.WeakKeyDictionary()

    def here(self, silence_s: float) -> LoopBlocking:
        """That of the running loop. `silence_s`: of a loop, after which the supervisor ends its worker."""
        loop = asyncio.get_running_loop()
        if loop not in self._of:
            self._of[loop] = LoopBlocking(self._env, silence_s)
        return self._of[loop]


def _between(least: float, value: float, most: float) -> float:
    return min(max(value, least), most)
