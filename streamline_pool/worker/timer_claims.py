"""Runs whose timers have ended, and the places in a full worker that are theirs. Bookkeeping only: worker.py claims.

A run that slept is younger, as the queue counts, than everything that fell due meanwhile; behind a backlog it would be
late by as long as that takes. So it is claimed by name, ahead of the backlog, and a worker that is full has a few places
more for such runs alone. Because they are in addition, neither kind of run can keep the other from its places.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Container, Sequence
from typing import NamedTuple

__all__ = ["Batch", "TimerClaims"]

_NAMES_MAX = 1_000  # kept while no place is free; beyond it, looks for what is due find the others in their turn
_AHEAD_SHARE = 8  # one place in addition to so many of a worker's `concurrency`; a guess
_CLAIM_MAX = 200  # names in one claim


class Batch(NamedTuple):
    """What one claim is to try."""

    run_ids: Sequence[str]
    spare: int  # so many of them take places that are free to all


class TimerClaims:
    """The names that wait to be claimed, and the runs in flight that were claimed ahead of their turn."""

    def __init__(self, concurrency: int) -> None:
        self.ahead_max = concurrency // _AHEAD_SHARE  # none for a worker that is told to do only a few runs at a time
        self.wanted = asyncio.Event()  # there may be something to claim
        self._names: deque[str] = deque()
        self._ahead: set[str] = set()  # in flight, in addition to `concurrency`
        self._spare_promised = 0  # places that claims under way may take, of those that are free to all
        self._ahead_promised = 0  # ... of those in addition

    def __bool__(self) -> bool:
        return bool(self._names)

    def places_taken(self, in_flight: int) -> int:
        """How many of the places that are free to all are taken, when so many runs are in flight."""
        return in_flight - len(self._ahead) + self._spare_promised

    def add(self, run_ids: Sequence[str]) -> bool:
        """Keep these names, and have them claimed. False: there were too many."""
        room = _NAMES_MAX - len(self._names)
        self._names.extend(run_ids[:room])
        self.wanted.set()
        return len(run_ids) <= room

    def clear(self) -> None:
        """Nothing may be claimed now: leave them to a look."""
        self._names.clear()

    def take(self, spare: int, in_flight: Container[str]) -> Batch:
        """The names to claim now, at most as many as there are places: `spare` that are free to all, then those in addition.

        Each batch is `settle`d once its claim is through.
        """
        places = min(spare + self.ahead_max - len(self._ahead) - self._ahead_promised, _CLAIM_MAX)
        run_ids: list[str] = []
        while self._names and len(run_ids) < places:
            if (run_id := self._names.popleft()) not in in_flight:
                run_ids.append(run_id)
        batch = Batch(run_ids, min(spare, len(run_ids)))
        self._spare_promised += batch.spare
        self._ahead_promised += len(run_ids) - batch.spare
        return batch

    def claimed(self, batch: Batch, in_flight: Container[str]) -> None:
        """The claim is through; what it has brought is in flight."""
        self._spare_promised -= batch.spare
        self._ahead_promised -= len(batch.run_ids) - batch.spare
        self._ahead.update(run_id for run_id in batch.run_ids[batch.spare :] if run_id in in_flight)

    def finished(self, run_id: str) -> None:
        """A run is no longer in flight."""
        self._ahead.discard(run_id)
        if self._names:
            self.wanted.set()
