"""How late does a sleep end: in an idle pool, in a busy one, and in one whose workers always have due runs?

For each run that slept, the instant at which the next handler was entered is compared with the requested instant. Both are
by the clock of this machine, which is also that of the server. The runs that keep the pool busy are all due before the
sleeps, so a poller that takes the oldest due run first would come to the sleeps last.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import median
from typing import Any

from pymongo.write_concern import WriteConcern

from streamline_pool import Streamline

from . import app as pool_app
from .common import Budget, Report, Server, add_pool_options, percentile, pool, report_progress, until

__all__ = ["add_options", "measure"]

_SHARE = 0.7  # of the pool's capacity, for the stream of short runs
_FEED_PAUSE_S = 0.02
_POLL_PAUSE_S = 0.5  # between polls for the number of ended sleeps and of waiting runs
_STARTS = 10  # the sleeps begin in so many groups, so that they do not all begin or end at once
_TIMEOUT_S = 120.0
_LIMIT_MS = 100


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this question."""
    add_pool_options(parser, workers=2, concurrency=200)
    parser.add_argument("--sleeps", type=int, default=300, help="sleeps in each situation (default: %(default)s)")
    parser.add_argument("--shortest", type=float, default=0.5, help="seconds of the shortest sleep (default: %(default)s)")
    parser.add_argument("--longest", type=float, default=5.0, help="seconds of the longest (default: %(default)s)")
    parser.add_argument("--calibrate", type=float, default=4.0, help="seconds to measure the pool's capacity (default: %(default)s)")
    parser.add_argument("--standing", type=int, default=2_000, help="stored due runs that are kept as a backlog (default: %(default)s)")


def measure(server: Server, options: argparse.Namespace) -> Report:
    """Each situation with a pool and a database of its own."""
    figures: dict[str, Any] = {}
    with _situation(server, options, "idle") as situation:
        figures["idle"] = situation.measure(lambda: None)
    with _situation(server, options, "loaded") as situation:
        capacity = situation.capacity(options.calibrate)
        figures["loaded"] = {**situation.measure(situation.stream_of(_SHARE * capacity)), "capacity_runs_per_s": capacity}
    with _situation(server, options, "backlog") as situation:
        figures["backlog"] = situation.measure(lambda: situation.top_up(pool_app.noop.id))
    with _situation(server, options, "full") as situation:
        figures["full"] = situation.measure(lambda: situation.top_up(pool_app.busy.id))
    settings = {
        **server.facts,
        "workers": options.workers,
        "concurrency": options.concurrency,
        "sleeps": options.sleeps,
        "sleep_s": [options.shortest, options.longest],
        "loaded": f"runs of {len(pool_app.noop.steps)} steps, started at {_SHARE:.0%} of what the pool ended in {options.calibrate:g} s",
        "backlog": f"at least {options.standing} due runs of {len(pool_app.noop.steps)} steps stored, always",
        "full": f"at least {options.standing} due runs stored, of one step that waits {pool_app.BUSY_S:g} s without using a processor",
    }
    budgets = [Budget(key=f"{name}.p99_ms", limit=_LIMIT_MS) for name in figures]
    notes = [
        "lateness: entry into the handler after the sleep, minus the requested instant: the clock at `ctx.sleep`, plus the delay",
        "majority_write: update_one by _id, PyMongo, in the measuring process; the end of a sleep takes two, one after the other",
        "waiting_runs: stored due runs while the sleeps ended, read twice a second; runs_per_s: other runs that ended meanwhile",
    ]
    return Report(question="timers", settings=settings, figures=figures, budgets=budgets, notes=notes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Situation:
    """One pool, and the runs that keep it busy."""

    app: Streamline
    options: argparse.Namespace
    waiting: list[int] = field(default_factory=list)
    writes: list[float] = field(default_factory=list)  # seconds of single majority writes meanwhile

    def measure(self, feed: Callable[[], None]) -> dict[str, Any]:
        """Begin the sleeps in groups, and keep the pool busy until all have ended. Returns how late they were."""
        delays = [random.uniform(self.options.shortest, self.options.longest) for _ in range(self.options.sleeps)]
        groups = [group for start in range(_STARTS) if (group := delays[start::_STARTS])]
        naps = self.app.workflows[pool_app.nap.id]
        run_ids: list[str] = []
        self._feed_for(feed, _POLL_PAUSE_S)
        since = datetime.now(UTC)
        for group in groups:
            run_ids += [run.id for run in naps.start_many([{"seconds": delay} for delay in group])]
            self._feed_for(feed, self.options.longest / _STARTS)
        deadline = time.monotonic() + _TIMEOUT_S
        while not (late := self._lateness(run_ids)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the sleeps do not end within {_TIMEOUT_S:g} s")
            self._feed_for(feed, _POLL_PAUSE_S)
        ended = self._others_ended(since) / (datetime.now(UTC) - since).total_seconds()
        return {
            **{f"{name}_ms": percentile(late, share) * 1e3 for name, share in {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}.items()},
            "min_ms": min(late) * 1e3,
            "waiting_runs": median(self.waiting),
            "runs_per_s": ended,
            "majority_write_p50_ms": percentile(self.writes, 0.5) * 1e3,
            "majority_write_p99_ms": percentile(self.writes, 0.99) * 1e3,
        }

    def _feed_for(self, feed: Callable[[], None], seconds: float) -> None:
        until_at = time.monotonic() + seconds
        while time.monotonic() < until_at:
            feed()
            time.sleep(_FEED_PAUSE_S)
            self._time_a_write()
        self.waiting.append(self._waiting_runs())

    def _time_a_write(self) -> None:
        target = self.app.runs.database.get_collection("majority_writes", write_concern=WriteConcern("majority"))
        begun = time.monotonic()
        target.update_one({"_id": 0}, {"$inc": {"n": 1}}, upsert=True)
        self.writes.append(time.monotonic() - begun)

    def _lateness(self, run_ids: list[str]) -> list[float]:
        """The lateness of each sleep in seconds; empty until all have ended."""
        found = list(self.app.runs.find({"_id": {"$in": run_ids}, "status": "done"}, {"output": 1, "context": 1}))
        return [run["output"] - run["context"]["due_at"] for run in found] if len(found) == len(run_ids) else []

    def _others_ended(self, since: datetime) -> int:
        ended: int = self.app.runs.count_documents({"workflowId": {"$ne": pool_app.nap.id}, "endedAt": {"$gte": since}})
        return ended

    def _waiting_runs(self) -> int:
        lanes = [workflow.definition.lane_of("default") for workflow in (pool_app.noop, pool_app.busy)]
        waiting: int = self.app.runs.count_documents(
            {"queue": "default", "lane": {"$in": lanes}, "wakeAt": {"$exists": True}}, hint="streamline_claimable"
        )
        return waiting

    def top_up(self, workflow_id: str) -> None:
        """Keep due runs stored that are older than any sleep that ends from now on."""
        missing = self.options.standing - self._waiting_runs()
        if missing > 0:
            self.app.workflows[workflow_id].start_many([None] * (missing + self.options.standing // 4))

    def stream_of(self, runs_per_s: float) -> Callable[[], None]:
        """A function that starts short runs at that rate."""
        begun, started = time.monotonic(), 0

        def feed() -> None:
            nonlocal started
            wanted = round((time.monotonic() - begun) * runs_per_s)
            if wanted > started:
                self.app.workflows[pool_app.noop.id].start_many([None] * (wanted - started))
                started = wanted

        return feed

    def capacity(self, seconds: float) -> float:
        """Short runs per second that the pool completes when it always has due ones, while this process starts them."""
        feed: Callable[[], None] = lambda: self.top_up(pool_app.noop.id)  # noqa: E731
        self._feed_for(feed, seconds / 4)
        since = datetime.now(UTC)
        self._feed_for(feed, seconds)
        per_second = self._others_ended(since) / (datetime.now(UTC) - since).total_seconds()
        until(lambda: self._waiting_runs() == 0, "the pool completes its backlog", _TIMEOUT_S)
        self.waiting.clear()
        self.writes.clear()
        return per_second


@contextmanager
def _situation(server: Server, options: argparse.Namespace, name: str) -> Iterator[_Situation]:
    report_progress(f"{options.sleeps} sleeps: {name}")
    database = server.database()
    sizes = ("--workers", str(options.workers), "--concurrency", str(options.concurrency))
    workflows = (pool_app.noop, pool_app.busy, pool_app.nap)
    with pool_app.client_app(server.uri, database, *workflows) as app, pool(server, database, *sizes):
        yield _Situation(app=app, options=options)
    server.client.drop_database(database)  # a hundred thousand ended runs would slow down the next situation
