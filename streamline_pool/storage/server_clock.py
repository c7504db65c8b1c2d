"""The server's clock, as one process knows it. Owns the estimate and its age; base.py makes the readings."""

from __future__ import annotations

from datetime import datetime, timedelta

from streamline_pool.config.env import Env

__all__ = ["ServerClock"]

_CLOCK_STALE_S = 300.0  # quartz drifts some 15 ms in this time


class ServerClock:
    """One reading of the server's clock, carried on by the monotonic clock of this host.

    A wrong or jumping clock of this host therefore reaches no stored instant. The error of a reading is at most half a
    round trip, and a run is never announced sooner than a round trip after its `wakeAt` was made.
    """

    def __init__(self, env: Env) -> None:
        self._env = env
        self._base: datetime | None = None
        self._read_at = 0.0
        self._shown_ms = -1
        self.offset_s = 0.0  # server minus host, at the last reading

    def now(self) -> datetime:
        """Aware UTC, whole milliseconds. Before the first reading: the clock of this host."""
        if self._base is None:
            return self._env.clock.now()
        elapsed_ms = int((self._env.clock.monotonic() - self._read_at) * 1000)
        if elapsed_ms != self._shown_ms:  # called several times per step; a `datetime` is made once per millisecond
            self._shown_ms = elapsed_ms
            self._shown = self._base + timedelta(milliseconds=elapsed_ms)
        return self._shown

    @property
    def stale(self) -> bool:
        """True if it is time for another reading."""
        return self._base is None or self._env.clock.monotonic() - self._read_at > _CLOCK_STALE_S

    def read(self, server_time: datetime, asked_at: float, arrived_at: float) -> None:
        """Take over a reading. The request was sent at `asked_at`, the reply came at `arrived_at` (monotonic seconds)."""
        self._base = server_time + timedelta(milliseconds=round((arrived_at - asked_at) * 500))
        self._read_at = arrived_at
        self._shown_ms = -1
        self.offset_s = (self.now() - self._env.clock.now()).total_seconds()
