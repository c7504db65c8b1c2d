"""A pool that is stopped except while it is measured, so that it can take turns with what it is compared with.

The speed of a shared machine drifts by more than the measured difference, so figures are compared only with their neighbours.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from streamline_pool import Streamline

from .common import Pool, Server, cpu_seconds, until

__all__ = ["Turns"]

_HELD_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """One pool, which is stopped (TSTP) except while it is measured."""

    server: Server
    app: Streamline
    running: Pool
    seconds: float  # of one measurement
    settle_s: float  # from CONT to the measured window, so that claims and group commits run steadily

    def inserted_before(self, workflow_id: str, runs: int) -> dict[str, Any]:
        """The pool's figures with so many runs that are stored before it continues."""
        missing = runs - self.waiting(workflow_id)
        if missing > 0:
            self.app.workflows[workflow_id].start_many([None] * missing)
        self.running.signal(signal.SIGCONT)
        time.sleep(self.settle_s)
        return self.window(lambda: time.sleep(self.seconds))

    def hold(self) -> None:
        """Stop the pool from claiming. Return when no run is active."""
        self.running.signal(signal.SIGTSTP)
        until(self._nothing_held, "the active runs end", _HELD_TIMEOUT_S, 0.01)

    def _nothing_held(self) -> bool:
        return self.app.runs.find_one({"lease.expiresAt": {"$exists": True}}, {"_id": 1}, hint="streamline_lease") is None

    def waiting(self, workflow_id: str) -> int:
        """How many runs of this workflow are stored and not claimed."""
        lane = self.app.workflows[workflow_id].definition.lane_of("default")
        waiting: int = self.app.runs.count_documents(
            {"queue": "default", "lane": lane, "wakeAt": {"$exists": True}}, hint="streamline_claimable"
        )
        return waiting

    def window(self, pass_time: Callable[[], None]) -> dict[str, Any]:
        """Count the steps that end within a period, and the processor time used."""
        since, before = datetime.now(UTC), self._usage()
        pass_time()
        to, after = datetime.now(UTC), self._usage()
        self.hold()
        steps = self._steps_ended(since, to)
        assert steps, "the pool works"
        return {
            "steps_per_second": steps / (to - since).total_seconds(),
            "cpu_us_per_step": {name: (after[name] - before[name]) / steps * 1e6 for name in before},
        }

    def _steps_ended(self, since: datetime, to: datetime) -> int:
        """Read while the pool is stopped. The runs of earlier turns are deleted first, so that this stays cheap."""
        self.app.runs.delete_many({"endedAt": {"$lt": since}})
        window = {"$gte": since, "$lt": to}
        stages: list[Mapping[str, Any]] = [
            {"$match": {"steps.endedAt": window}},
            {"$project": {"steps.endedAt": 1}},
            {"$unwind": "$steps"},
            {"$match": {"steps.endedAt": window}},
            {"$count": "steps"},
        ]
        found = list(self.app.runs.aggregate(stages))
        return int(found[0]["steps"]) if found else 0

    def _usage(self) -> dict[str, float]:
        return {
            "workers": cpu_seconds(self.running.worker_pids),
            "steward": cpu_seconds([self.running.steward_pid()]),
            "supervisor": cpu_seconds([self.running.pid]),
            "mongod": self.server.cpu_seconds(),
        }
