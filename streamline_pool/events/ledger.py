"""Which numbered events a stream has received from each publisher, and how many it has missed.

Owns the arithmetic only. Reading the signals is left to subscription.py.
"""

from __future__ import annotations

from collections import deque

__all__ = ["Ledger"]

_PUBLISHERS_MAX = 10_000
_HOLES_MAX = 100


class Ledger:
    """The numbers received from each publisher. Counts the events that are missing.

    A publisher numbers its events without gaps. The same batch may arrive twice, because a tail that was opened again
    overlaps. Batches that a program sends without waiting for an answer may arrive in another order.
    """

    def __init__(self) -> None:
        self.missed = 0
        self._next: dict[str, int] = {}  # publisher -> the number that comes next
        self._holes: dict[str, deque[range]] = {}  # publisher -> numbers that were skipped

    def begin(self) -> None:
        """Start to count here: events missed before do not count."""
        self.missed = 0
        self._holes.clear()

    def expect(self, publisher: str, number: int) -> None:
        """Expect every event of this publisher from `number` on. No effect if the publisher is known already."""
        if publisher not in self._next:
            if len(self._next) >= _PUBLISHERS_MAX:  # processes come and go; the one seen first has most likely ended
                oldest = next(iter(self._next))
                del self._next[oldest]
                self._holes.pop(oldest, None)
            self._next[publisher] = number

    def receive(self, publisher: str, first: int, count: int) -> list[int]:
        """Record a batch of `count` events numbered from `first`. Returns the places in it of the events that are new."""
        self.expect(publisher, first)
        following = self._next[publisher]
        if first > following:
            self.missed += first - following
            self._holes.setdefault(publisher, deque(maxlen=_HOLES_MAX)).append(range(following, first))
            following = first
        self._next[publisher] = max(following, first + count)
        late = [number for number in range(first, min(following, first + count)) if self._fill(publisher, number)]
        return [number - first for number in (*late, *range(max(first, following), first + count))]

    def _fill(self, publisher: str, number: int) -> bool:
        """Record a late event; True if it was missing until now."""
        holes = self._holes.get(publisher, ())
        for place, hole in enumerate(holes):
            if number in hole:
                rest = [part for part in (range(hole.start, number), range(number + 1, hole.stop)) if part]
                self._holes[publisher] = deque([*list(holes)[:place], *rest, *list(holes)[place + 1 :]], maxlen=_HOLES_MAX)
                self.missed -= 1
                return True
        return False
