"""A worker's bounded cache of the runs that it has held recently.

Owns the bound and the counters. Shared by the tasks and threads of a worker. Correctness never depends on the cache. It
saves reads of the database when a signal names a run that this worker has just held.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

__all__ = ["RunCache", "RunNote"]


class RunNote(NamedTuple):
    """What a worker knows about one run."""

    version: str  # of its workflow; the definition's own text, so that ten thousand notes share it
    token: int  # the fencing token that this worker held
    deadline: float  # monotonic seconds: when the lease expires unless renewed
    in_flight: bool  # False once this worker has finished with the run


class RunCache:
    """The `capacity` most recently used runs; every operation is O(1). Counts hits, misses and evictions."""

    def __init__(self, capacity: int = 10_000) -> None:
        self._capacity = capacity
        self._notes: OrderedDict[str, RunNote] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = 0
        self.misses = 0
        self.evictions = 0

    def get(self, run_id: str) -> RunNote | None:
        """The note on a run, or None. The run becomes the most recently used."""
        with self._lock:
            note = self._notes.get(run_id)
            if note is None:
                self.misses += 1
                return None
            self.hits += 1
            self._notes.move_to_end(run_id)
            return note

    def put(self, run_id: str, note: RunNote) -> None:
        """Store the note on a run. Above the capacity, the least recently used run is evicted."""
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
        """`size`, `capacity`, `hits`, `misses` and `evictions` so far."""
        with self._lock:
            size = len(self._notes)
        return {"size": size, "capacity": self._capacity, "hits": self.hits, "misses": self.misses, "evictions": self.evictions}

    def __len__(self) -> int:
        return len(self._notes)
