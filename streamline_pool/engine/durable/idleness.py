"""When a durable function is left: every call that goes on waits for time or for others, and nothing else of the function is under way.

Owns the count of calls that work and the calls that wait. What the function's run then waits for is decided here, and stored by the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from datetime import datetime

from streamline_pool.engine.intents import Intents, ParkSuspension, ReleaseSuspension, Suspension

from .names import CallNames

__all__ = ["Idleness"]

_TURNS = 5  # of the event loop, in which a function that got a result begins its next call; a guess: some layers of `gather` take fewer
_SHARED_S = 0.5  # for a function of several tasks: what one of them awaits beside our calls is not ours to know. A guess


class _Idle:
    """One call that waits."""

    __slots__ = ("future", "is_beside", "suspension", "wake_at")

    def __init__(self, suspension: Suspension | None, wake_at: datetime | None, *, is_beside: bool) -> None:
        self.suspension = suspension  # that a wait is to begin with, or None
        self.wake_at = wake_at  # of a call that waits for its next attempt, or None
        self.is_beside = is_beside  # it waits in another task than the function's own; the task itself would lead back here: a circle
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Idleness:
    """The calls of one entry into a durable function. For the event loop's thread."""

    def __init__(self, intents: Intents, names: CallNames) -> None:
        self._intents = intents
        self._names = names  # which know of several tasks
        self._working = 0
        self._has_given_up = False
        self._has_ended = False
        self._idle: list[_Idle] = []
        self._settling: asyncio.Task[None] | None = None
        self._none_works = asyncio.Event()
        self._none_works.set()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Within this block a call works: the function is not left."""
        self._working += 1
        if not self._has_given_up:
            self._none_works.clear()
        try:
            yield
        finally:
            self._working -= 1
            if not self._working and not self._has_given_up:
                self._none_works.set()
                self._settle_soon()

    async def settled(self) -> None:
        """Return once no call works."""
        await self._none_works.wait()
        if self._settling is not None:
            self._settling.cancel()

    def give_up(self) -> None:
        """A call that works will not end: `settled` does not wait for it."""
        self._has_given_up = True
        self._none_works.set()

    @property
    def is_waiting(self) -> bool:
        """Whether a wait is about to begin."""
        return any(idle.suspension is not None for idle in self._idle)

    async def until_left(self, suspension: Suspension) -> None:
        """Wait until the function can be left by this suspension, or by another one; raises that one. Never returns."""
        await self._wait(_Idle(suspension, None, is_beside=self._names.is_called_beside))

    async def until(self, wake_at: datetime, seconds: float) -> None:
        """Wait for so many seconds, that is until `wake_at`; return then. Raises the suspension if the function is left before."""
        idle = _Idle(None, wake_at, is_beside=self._names.is_called_beside)
        timer = asyncio.get_running_loop().call_later(seconds, _resolve, idle.future)
        try:
            await self._wait(idle)
        finally:
            timer.cancel()

    def leave(self, suspension: Suspension) -> None:
        """The function is left now, unless it has ended: what waits raises the suspension."""
        if not self._has_ended:
            self._intents.suspension = self._intents.suspension or suspension
        for idle in self._idle:
            if not idle.future.done():
                idle.future.set_exception(self._intents.suspension or suspension)

    def end(self) -> None:
        """The function has ended: how is for itself to say. Calls that wait are given up."""
        self._has_ended = True
        self.leave(ReleaseSuspension())

    async def _wait(self, idle: _Idle) -> None:
        self._idle.append(idle)
        self._settle_soon()
        try:
            await idle.future
        finally:
            self._idle.remove(idle)

    def _settle_soon(self) -> None:
        if self._idle and not self._working and self._settling is None:
            self._settling = asyncio.get_running_loop().create_task(self._settle())

    async def _settle(self) -> None:
        try:
            turns = 0
            until = asyncio.get_running_loop().time() + self._grace_s()
            while turns < _TURNS or asyncio.get_running_loop().time() < until:
                turns += 1
                await asyncio.sleep(0 if turns < _TURNS else _SHARED_S / 10)
                if self._working or not self._idle:
                    return
            self.leave(self._decide())
        finally:
            self._settling = None

    def _grace_s(self) -> float:
        is_asked = any(isinstance(idle.suspension, ReleaseSuspension) for idle in self._idle)
        return _SHARED_S if not is_asked and (self._names.is_shared or any(idle.is_beside for idle in self._idle)) else 0.0

    def _decide(self) -> Suspension:
        """What the run waits for: another holder, else the earliest next attempt, else the wait."""
        suspensions = [idle.suspension for idle in self._idle if idle.suspension is not None]
        release = next((each for each in suspensions if isinstance(each, ReleaseSuspension)), None)
        if release is not None:
            return release
        attempts = [idle.wake_at for idle in self._idle if idle.wake_at is not None]
        return ParkSuspension(min(attempts)) if attempts else suspensions[0]


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
