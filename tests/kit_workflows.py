"""Steps and constants of the tests of the testing kit."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from streamline_pool import Context

__all__ = ["DAY", "NOWHERE", "fine", "nap"]

DAY = timedelta(days=1)
NOWHERE = "mongodb://127.0.0.1:1/nowhere"  # the address of the apps of these tests, at which no server listens


def fine(ctx: Context) -> str:
    return "fine"


def nap(length: float | timedelta) -> Callable[[Context], None]:
    return lambda ctx: ctx.sleep(length)
