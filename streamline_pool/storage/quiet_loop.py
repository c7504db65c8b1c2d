"""An event loop in which the driver's periodic tasks seldom wake the process up, and all together.

PyMongo has, in each client, a task that looks for unused cursors, and for each server one that measures its round trip and, while a
reply is awaited, one that looks whether it was cancelled. Each wakes up every half second to find that there is nothing to do. In an
idle worker these were six of seven wake-ups, and most of the processor time. Other timers are exact, also those of handlers.
"""

from __future__ import annotations

import asyncio
import math
import os
import selectors
from collections.abc import Callable
from contextvars import Context
from typing import Any, TypeVarTuple

__all__ = ["QuietEventLoop"]

_Ts = TypeVarTuple("_Ts")

_GOLDEN = (5**0.5 - 1) / 2
_LEAST_S = 0.4  # shorter pauses are no periodic task's
_PERIODS_S = {  # by the name of the task, or of its coroutine
    "pymongo_kill_cursors_thread": 5.0,  # an unused cursor is closed so late; every cursor here is closed when it is left
    "pymongo_server_rtt_task": 5.0,  # it measures every ten seconds
    "_poll_cancellation": 1.0,  # a cancelled command is noticed so late: one whose server does not answer
}
# Not "pymongo_server_monitor_task": while the server is away, its pause decides how soon the server's return is noticed.


class QuietEventLoop(asyncio.SelectorEventLoop):
    """A selector event loop that rounds the pauses of these tasks up, to common instants. Of tasks with other names it rounds none."""

    def __init__(self, selector: selectors.BaseSelector | None = None) -> None:
        super().__init__(selector)
        # Of its own for each process, so that the processes of a pool do not all wake up at once; neighbours are far apart.
        self._phase_s = os.getpid() * _GOLDEN % 1.0

    def call_at(self, when: float, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None) -> asyncio.TimerHandle:
        """See asyncio."""
        if when - self.time() >= _LEAST_S and (period_s := _period_s(asyncio.current_task(self))) is not None:
            when = math.ceil((when - self._phase_s) / period_s) * period_s + self._phase_s
        return super().call_at(when, callback, *args, context=context)


def _period_s(task: asyncio.Task[Any] | None) -> float | None:
    if task is None:
        return None
    return _PERIODS_S.get(task.get_name()) or _PERIODS_S.get(getattr(task.get_coro(), "__name__", ""))
