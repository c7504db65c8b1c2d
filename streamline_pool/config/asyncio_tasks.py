"""How asyncio tasks are ended with certainty. Owns the repetition of a cancellation that was lost.

One `cancel` is not enough. A cancellation that arrives together with a result is lost in `asyncio.wait_for` (Python 3.11)
and in PyMongo's reads, and the task continues. Measured: about one in two hundred tasks that end in a database read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

__all__ = ["end_tasks"]

_TRIES = 25  # a task of other code that refuses to end must not delay a close for ever
_PATIENCE_S = 0.2  # for a task's own clean-up, before it is cancelled again


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they have ended, for five seconds at most. Their exceptions are retrieved and dropped."""
    left = set(tasks)
    for _ in range(_TRIES):
        if not left:
            return
        for task in left:
            task.cancel()
        ended, left = await asyncio.wait(left, timeout=_PATIENCE_S)
        for task in ended:
            if not task.cancelled():
                task.exception()
