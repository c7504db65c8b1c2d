"""How late does a sleep end: in an idle pool, in one that is busy, and in one whose workers are never without due work?

Of each run that slept, the instant at which the handler after the sleep was entered is compared with the instant that
was asked for, both by the clock of this machine, which is the server's. What keeps the pool busy goes on all the while,
and all of it is due before the sleeps are: whatever looks for the longest due first comes to them last.
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
from .common import Budget, Report, Server, add_pool_options, percentile, pool, say, until

__all__ = ["add_options", "measure"]

_SHARE = 0.7  # of the pool's capacity, for the stream of short runs
_FEED_PAUSE_S = 0.02
_LOOK_PAUSE_S = 0.5  # between looks at how many sleeps have ended, and at how much work is waiting
_STARTS = 10  # the sleeps begin in so many groups, so that they neither begin nor end all at once
_TIMEOUT_S = 120.0
_LIMIT_MS = 100


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this question."""
    add_pool_options(parser, workers=2, concurrency=200)
    parser.add_argument("--sleeps", type=int, default=300, help="sleeps in each situation (default: %(default)s)")
    parser.add_argument("--shortest", type=float, default=0.5, help="seconds of the shortest sleep (default: %(default)s)")
    parser.add_argument("--longest", type=float, default=5.0, help="seconds of the longest (default: %(default)s)")
    parser.add_argument("--calibrate", type=float, default=4.0, help="seconds to measure the pool's capacity (default: %(default)s)")
    parser.add_argument("--standing", type=int, default=2_000, help="due runs kept in store as a backlog (default: %(default)s)")


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
        "backlog": f"at least {options.standing} due runs of {len(pool_app.noop.steps)} steps in store, always",
        "full": f"at least {options.standing} due runs in store, of one step that takes {pool_app.BUSY_S:g} s on no processor",
    }
    budgets = [Budget(key=f"{name}.p99_ms", limit=_LIMIT_MS) for name in figures]
    notes = [
        "lateness: entry into the handler after the sleep, minus the instant asked for: the clock at `ctx.sleep`, plus the delay",
        "majority_write: update_one by _id, PyMongo, in the measuring process; the end of a sleep takes two, one after the other",
        "waiting_runs: due runs in store while the sleeps ended, looked at twice a second; runs_per_s: other runs that ended meanwhile",
    ]
    return Report(question="timers", settings=settings, figures=figures, budgets=budgets, notes=notes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Situation:
    """One pool, and what keeps it busy."""

    app: Streamline
    options: argparse.Namespace
    waiting: list[int] = field(default_factory=list)
    writes: list[float] = field(default_factory=list)  # seconds that single majority writes took meanwhile

    def measure(self, feed: Callable[[], None]) -> dict[str, Any]:
        """Begin the sleeps in groups, and keep the pool busy until all have ended; how late they were."""
        delays = [random.uniform(self.options.shortest, self.options.longest) for _ in range(self.options.sleeps)]
        groups = [group for start in range(_STARTS) if (group := delays[start::_STARTS])]
        naps = self.app.workflows[pool_app.nap.id]
        run_ids: list[str] = []
        self._feed_for(feed, _LOOK_PAUSE_S)
        since = datetime.now(UTC)
        for group in groups:
            run_ids += [run.id for run in naps.start_many([{"seconds": delay} for delay in group])]
            self._feed_for(feed, self.options.longest / _STARTS)
        deadline = time.monotonic() + _TIMEOUT_S
        while not (late := self._lateness(run_ids)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the sleeps do not end within {_TIMEOUT_S:g} s")
            self._feed_for(feed, _LOOK_PAUSE_S)
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
        """In seconds, once all have ended."""
        found = list(self.app.runs.find({"_id": {"$in": run_ids}, "status": "done"}, {"output": 1, "context": 1}))
        return [run["output"] - run["context"]["due_at"] for run in found] if len(found) == len(run_ids) else []

    def _others_ended(self, since: datetime) -> int:
        ended: int = self.app.runs.count_documents({"workflowId": {"$ne": pool_app.nap.id}, "endedAt": {"$gte": since}})
        return ended

    def _waiting_runs(self) -> int:
        lanes = [workflow.definition.lane_of("default") for workflow in (pool_app.noop, pool_app.busy)]
        waiting: int = self.app.runs.count_documents({"lane": {"$in": lanes}, "wakeAt": {"$exists": True}}, hint="streamline_due")
        return waiting

    def top_up(self, workflow_id: str) -> None:
        """See to it that there are due runs, and older ones than any sleep that ends from now on."""
        missing = self.options.standing - self._waiting_runs()
        if missing > 0:
            self.app.workflows[workflow_id].start_many([None] * (missing + self.options.standing // 4))

    def stream_of(self, runs_per_s: float) -> Callable[[], None]:
        """Start short runs at that rate."""
        begun, started = time.monotonic(), 0

        def feed() -> None:
            nonlocal started
            wanted = round((time.monotonic() - begun) * runs_per_s)
            if wanted > started:
                self.app.workflows[pool_app.noop.id].start_many([None] * (wanted - started))
                started = wanted

        return feed

    def capacity(self, seconds: float) -> float:
        """Short runs that the pool ends in a second when it always has some, while they are started."""
        feed: Callable[[], None] = lambda: self.top_up(pool_app.noop.id)  # noqa: E731
        self._feed_for(feed, seconds / 4)
        since = datetime.now(UTC)
        self._feed_for(feed, seconds)
        per_second = self._others_ended(since) / (datetime.now(UTC) - since).total_seconds()
        until(lambda: self._waiting_runs() == 0, "the pool works off its backlog", _TIMEOUT_S)
        self.waiting.clear()
        self.writes.clear()
        return per_second


@contextmanager
def _situation(server: Server, options: argparse.Namespace, name: str) -> Iterator[_Situation]:
    say(f"{options.sleeps} sleeps: {name}")
    database = server.database()
    sizes = ("--workers", str(options.workers), "--concurrency", str(options.concurrency))
    workflows = (pool_app.noop, pool_app.busy, pool_app.nap)
    with pool_app.client_app(server.uri, database, *workflows) as app, pool(server, database, *sizes):
        yield _Situation(app=app, options=options)
    server.client.drop_database(database)  # a hundred thousand ended runs would slow down what comes after
