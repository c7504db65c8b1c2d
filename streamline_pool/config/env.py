"""Clock, ids, randomness and named crash points, as arguments.

Owns every read of a clock or of entropy in this package, so that tests can jump in time and repeat random numbers. An entry
point makes one `Env` and passes it down (River's `baseservice` does the same).
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

__all__ = ["PROBE_POINTS", "Clock", "Env", "system_env"]

PROBE_POINTS = ("claim.before", "claim.after", "handler.after", "commit.before", "commit.after")
"""The named points of the commit path at which a test may stop the process (DBOS calls these debug triggers)."""


class Clock(Protocol):
    """Wall and monotonic time of this host."""

    def now(self) -> datetime:
        """Aware UTC, whole milliseconds. BSON holds no more, so a stored time is read back unchanged."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back. Deadlines within a process use it."""
        ...


_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class SystemClock:
    """The clock of the operating system."""

    def now(self) -> datetime:
        moment = datetime.now(UTC)
        return moment.replace(microsecond=moment.microsecond // 1000 * 1000)

    def monotonic(self) -> float:
        # Continues while the host is suspended, as leases do. Linux's CLOCK_MONOTONIC stops.
        return time.clock_gettime(_CLOCK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Env:
    """Everything that is not determined by the program and its input."""

    clock: Clock
    new_id: Callable[[], str]  # 32 hex digits: 48 bits of time, 80 random bits
    new_secret: Callable[[], str]  # 32 characters of `A-Z a-z 0-9 _ -`: 192 random bits
    random: Callable[[], float]  # uniform in [0, 1)
    sleep: Callable[[float], None]  # seconds
    async_sleep: Callable[[float], Awaitable[None]]  # seconds
    probe: Callable[[str], None]  # called at each of PROBE_POINTS; does nothing unless a test has armed it


def _time_ordered_id() -> str:
    """Later ids sort later, as in UUID version 7, so that inserts change only the right edge of the `_id` index."""
    return f"{time.time_ns() // 1_000_000:012x}{os.urandom(10).hex()}"


def _no_probe(_point: str) -> None:
    return None


def _armed_probe(spec: str) -> Callable[[str], None]:
    """A probe from text: `point=kill` or `point=stop`, optionally with `@FILE`. It sends SIGKILL or SIGSTOP to the process.

    With a file, this happens in one process only: the one that creates the file.
    """
    point, _, rest = spec.partition("=")
    action, _, once_path = rest.partition("@")
    signum = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[action]

    def probe(reached: str) -> None:
        if reached != point:
            return
        if once_path:
            try:
                os.close(os.open(once_path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                return
        os.kill(os.getpid(), signum)

    return probe


def system_env() -> Env:
    """The environment of a real process. `STREAMLINE_PROBE=point=kill@FILE` arms a crash point, for tests of recovery only."""
    spec = os.environ.get("STREAMLINE_PROBE", "")
    return Env(
        clock=SystemClock(),
        new_id=_time_ordered_id,
        new_secret=lambda: secrets.token_urlsafe(24),
        random=random.SystemRandom().random,
        sleep=time.sleep,
        async_sleep=asyncio.sleep,
        probe=_armed_probe(spec) if spec else _no_probe,
    )
