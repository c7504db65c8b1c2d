"""Runs whose timers have fired, and the places that are reserved for them. Owns this bookkeeping; `Demand` decides when to claim.

A run that slept is younger in the queue than every run that became due meanwhile. Behind a backlog it would be late by
the time that the backlog takes. So it is claimed by name, ahead of the backlog, and a full worker has a few additional
places for such runs alone. Because these places are additional, neither kind of run can keep the other from its places.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Sequence
from typing import NamedTuple

__all__ = ["Batch", "TimerClaims"]

_NAMES_MAX = 1_000  # kept while no place is free; beyond it, polls find the others in their turn
_AHEAD_SHARE = 8  # one additional place for so many of a worker's `concurrency`; a guess
_CLAIM_MAX = 200  # run ids in one claim


class Batch(NamedTuple):
    """What one claim is to try."""

    run_ids: Sequence[str]
    spare: int  # so many of them take places that are free to all
    active_before: frozenset[str] = frozenset()  # those that were active before the claim: it may bring them a second time


class TimerClaims:
    """The run ids that wait to be claimed, and the active runs that were claimed ahead of their turn."""

    def __init__(self, concurrency: int) -> None:
        self.ahead_max = concurrency // _AHEAD_SHARE  # 0 for a worker whose setting allows only a few runs at a time
        self._names: deque[str] = deque()
        self._ahead: set[str] = set()  # active in additional places
        self._spare_promised = 0  # places that claims under way may take, of those that are free to all
        self._ahead_promised = 0  # ... of the additional ones

    def __bool__(self) -> bool:
        return bool(self._names)

    def places_taken(self, active_runs: int) -> int:
        """How many of the places that are free to all are taken, when so many runs are active."""
        return active_runs - len(self._ahead) + self._spare_promised

    def add(self, run_ids: Sequence[str]) -> bool:
        """Keep these run ids until they are claimed. False: there were too many, and only the first of them were kept."""
        room = _NAMES_MAX - len(self._names)
        self._names.extend(run_ids[:room])
        return len(run_ids) <= room

    def clear(self) -> None:
        """Forget all run ids. The caller leaves them to a poll."""
        self._names.clear()

    def take(self, spare: int, active_runs: Container[str]) -> Batch:
        """The run ids to claim now, at most one for each place: `spare` places that are free to all, then additional ones.

        Each batch must be passed to `claimed` once its claim is over.
        """
        places = min(spare + self.ahead_max - len(self._ahead) - self._ahead_promised, _CLAIM_MAX)
        run_ids: list[str] = []
        while self._names and len(run_ids) < places:
            run_ids.append(self._names.popleft())
        # What is active here is claimed, too: this worker may have lost it without knowing. Otherwise the claim does not match it.
        batch = Batch(run_ids, min(spare, len(run_ids)), frozenset(run_id for run_id in run_ids if run_id in active_runs))
        self._spare_promised += batch.spare
        self._ahead_promised += len(run_ids) - batch.spare
        return batch

    def claimed(self, batch: Batch, active_runs: Container[str]) -> None:
        """The claim of this batch is over, and what it has brought is active."""
        self._spare_promised -= batch.spare
        self._ahead_promised -= len(batch.run_ids) - batch.spare
        ahead = [run_id for run_id in batch.run_ids[batch.spare :] if run_id not in batch.active_before]
        self._ahead.update(run_id for run_id in ahead if run_id in active_runs)

    def finished(self, run_id: str) -> None:
        """A run is not active any more."""
        self._ahead.discard(run_id)
