"""Ending asyncio tasks for certain.

One `cancel` is not enough: a cancellation that arrives together with a result is lost in `asyncio.wait_for` (Python
3.11) and in PyMongo's reads, and the task goes on. Measured: about one in two hundred tasks that end in a database read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

__all__ = ["end_tasks"]

_TRIES = 25  # then they are left alone: a task of somebody else's that refuses must not hold up a close for ever
_PATIENCE_S = 0.2  # for a task's own clean-up, before it is cancelled once more


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they have ended, for some seconds at most. What they raise is taken note of, and nobody's business any more."""
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
