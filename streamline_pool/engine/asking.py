"""The question whether a step is entered: its conditions, asked in a task of their own.

Owns their end. A condition is user code: it may take too long, and it may go on although it was cancelled. Then the driver goes
on without it, as without a handler that does not end (attempt.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from .abort_signal import AbortSignal, fire_signal

__all__ = ["Asking", "ConditionStuckError"]

_GRACE_S = (0.5, 0.5)  # after a cancellation, and after another one, because one can get lost (config/asyncio_tasks.py)

_left_behind: set[asyncio.Task[bool | BaseException]] = set()  # an event loop holds its tasks weakly


class ConditionStuckError(Exception):
    """A condition goes on although it was cancelled."""


class Asking:
    """One asking of a step's conditions."""

    __slots__ = ("_stopped", "_task", "is_late", "signal")

    def __init__(self, ask: Callable[[], Awaitable[bool]], signal: AbortSignal) -> None:
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(_outcome(ask))
        self._stopped: asyncio.Future[None] = loop.create_future()
        self.signal = signal
        self.is_late = False  # they took longer than they may

    def abort(self, reason: str) -> None:
        """Fire the signal, and cancel the condition that is waiting."""
        if not self._stopped.done():
            fire_signal(self.signal, reason)
            self._stopped.set_result(None)

    def call_when_returned(self, callback: Callable[[], None]) -> bool:
        """Have `callback` called in the loop when the conditions end. False: they have."""
        if self._task.done():
            return False
        self._task.add_done_callback(lambda _task: callback())
        return True

    async def answer(self, limit_s: float) -> bool:
        """Their answer. Raises what they raise, CancelledError if they were stopped, ConditionStuckError if they cannot be."""
        ends: set[asyncio.Future[Any]] = {self._task, self._stopped}
        try:
            await asyncio.wait(ends, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            self.is_late = not self._task.done() and not self._stopped.done()
            for grace_s in _GRACE_S:
                if not self._task.done():
                    self._task.cancel()
                    await asyncio.wait({self._task}, timeout=grace_s)
        finally:
            if not self._task.done():
                self._task.cancel()
                _left_behind.add(self._task)
                self._task.add_done_callback(_left_behind.discard)
        if not self._task.done():
            raise ConditionStuckError
        outcome = self._task.result()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


async def _outcome(ask: Callable[[], Awaitable[bool]]) -> bool | BaseException:
    """The answer, or what was raised in its place: a SystemExit that ends a task ends the event loop, too."""
    try:
        return await ask()
    except BaseException as exc:  # noqa: BLE001 - raised by `answer`
        return exc
