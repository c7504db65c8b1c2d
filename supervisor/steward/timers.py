"""The instants at which runs become due, as far as this host knows them: sorted, bounded, without duplicates. Pure.

Forgetting an instant is harmless: the steward's sweep finds every run that is due soon, again and again.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Due", "Timers"]


class Due(NamedTuple):
    """What is due: one run by its id, or some run of a lane."""

    lane: str
    run_id: str | None  # None: only the lane is known


class Timers:
    """A bounded set of (instant, lane, run); the latest instants are dropped first.

    A sorted list, not a heap: eviction needs the other end too, and inserting into 10 000 entries moves 80 KB (~5 µs).
    """

    def __init__(self, size_max: int = 10_000) -> None:
        self._size_max = size_max
        self._order: list[tuple[int, str, str]] = []  # (epoch ms, lane, run id or "" when only the lane is known), ascending

    def __len__(self) -> int:
        return len(self._order)

    def add(self, lane: str, at_ms: int, run_id: str | None = None) -> None:
        """Remember an instant. The same one, added by a worker and again by a sweep, is kept once."""
        entry = (at_ms, lane, run_id or "")
        place = bisect_left(self._order, entry)
        if place < len(self._order) and self._order[place] == entry:
            return
        if len(self._order) >= self._size_max:
            if place == len(self._order):
                return
            self._order.pop()
        self._order.insert(place, entry)

    def next_at_ms(self) -> int | None:
        """The earliest instant; None: no instant is known."""
        return self._order[0][0] if self._order else None

    def pop_due(self, now_ms: int) -> Sequence[Due]:
        """Remove what is due by `now_ms`, earliest first."""
        count = bisect_right(self._order, now_ms, key=lambda entry: entry[0])
        due, self._order = self._order[:count], self._order[count:]
        return [Due(lane, run_id or None) for _, lane, run_id in due]
