"""A worker's bounded memory of runs: what it knows of each run it has lately held.

Owns the bound and the counters. Shared by a worker's tasks and threads. A hint only: correctness never depends on
it (invariant 7); it saves look-ups in the database when signals name runs this worker has just had.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

__all__ = ["RunCache", "RunNote"]


class RunNote(NamedTuple):
    """What a worker knows of a run."""

    version: str  # of its workflow
    token: int  # the fencing token this worker held
    deadline: float  # monotonic seconds; when the lease ends unless renewed
    in_flight: bool  # False once this worker is through with it


class RunCache:
    """The `capacity` runs used last, O(1) each. Counts hits, misses and evictions."""

    def __init__(self, capacity: int = 10_000) -> None:
        self._capacity = capacity
        self._notes: OrderedDict[str, RunNote] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = 0
        self.misses = 0
        self.evictions = 0

    def get(self, run_id: str) -> RunNote | None:
        """The note on a run, which thereby becomes the one used last; None when there is none."""
        with self._lock:
            note = self._notes.get(run_id)
            if note is None:
                self.misses += 1
                return None
            self.hits += 1
            self._notes.move_to_end(run_id)
            return note

    def put(self, run_id: str, note: RunNote) -> None:
        """Store the note on a run; the run used longest ago is forgotten when there are too many."""
        with self._lock:
            self._notes[run_id] = note
            self._notes.move_to_end(run_id)
            if len(self._notes) > self._capacity:
                self._notes.popitem(last=False)
                self.evictions += 1

    def forget(self, run_id: str) -> None:
        """Drop the note on a run, if there is one."""
        with self._lock:
            self._notes.pop(run_id, None)

    def counters(self) -> dict[str, int]:
        """Size, bound, hits, misses and evictions so far."""
        with self._lock:
            size = len(self._notes)
        return {"size": size, "capacity": self._capacity, "hits": self.hits, "misses": self.misses, "evictions": self.evictions}

    def __len__(self) -> int:
        return len(self._notes)
