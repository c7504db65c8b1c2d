"""The instants at which runs become due, as far as this host knows them: sorted, bounded, without duplicates. Pure.

Forgetting an instant is harmless: the steward's sweep finds every run that is due soon, again and again.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["DueLane", "Timers"]


class DueLane(NamedTuple):
    """What is due in one lane at one instant."""

    lane: str
    run_id: str | None  # when it is known to be one run
    runs: int  # at least this many; 1 when only the instant is known


class Timers:
    """A bounded set of (instant, lane), each with the runs known to be due then; the latest instants are dropped first.

    A sorted list, not a heap: eviction needs the other end too, and inserting into 10 000 entries moves 80 KB (~5 µs).
    """

    def __init__(self, size_max: int = 10_000) -> None:
        self._size_max = size_max
        self._order: list[tuple[int, str]] = []  # (epoch ms, lane), ascending
        self._runs: dict[tuple[int, str], set[str]] = {}  # empty: some worker parked a run there and did not say which

    def __len__(self) -> int:
        return len(self._order)

    def add(self, lane: str, at_ms: int, run_id: str | None = None) -> None:
        """Remember an instant. Told twice of the same run (by its worker and by a sweep), it is one."""
        key = (at_ms, lane)
        if key not in self._runs:
            if len(self._order) >= self._size_max:
                if key >= self._order[-1]:
                    return
                del self._runs[self._order.pop()]
            insort(self._order, key)
            self._runs[key] = set()
        if run_id is not None and len(self._runs[key]) < self._size_max:
            self._runs[key].add(run_id)

    def next_at_ms(self) -> int | None:
        """The earliest instant; None: nothing is known to become due."""
        return self._order[0][0] if self._order else None

    def pop_due(self, now_ms: int) -> Sequence[DueLane]:
        """Remove what is due by `now_ms`, earliest first."""
        count = bisect_right(self._order, now_ms, key=lambda key: key[0])
        due, self._order = self._order[:count], self._order[count:]
        return [_due_lane(key[1], self._runs.pop(key)) for key in due]


def _due_lane(lane: str, run_ids: set[str]) -> DueLane:
    return DueLane(lane, min(run_ids) if len(run_ids) == 1 else None, max(1, len(run_ids)))
