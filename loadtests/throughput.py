"""How many steps per second does a pool store, and what part of the database's own limit is that?

One pool and the raw writers take turns every second or two, because the speed of a shared machine drifts by more than
the measured difference. While the writers write, the pool is stopped (TSTP); it continues (CONT) while they wait. Each
figure of the pool is compared with the mean of the raw limits just before and just after it.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import mean, median
from typing import Any

from streamline_pool import Streamline

from . import app as pool_app
from .common import Budget, Pool, Report, Server, add_pool_options, cpu_seconds, pool, report_progress, spread, until
from .raw import BATCH, PROCESSES, RawWriters, raw_writers

__all__ = ["add_options", "measure"]

_STEPS = 3
_HELD_TIMEOUT_S = 30.0
_LIVE_BATCH = 500
_RUNS_PER_S_MAX = 5_000  # stored runs per second of the pool's turn, so that it always has work; a guess: twice the best rate seen


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this question."""
    add_pool_options(parser, workers=2, concurrency=200)
    parser.add_argument("--rounds", type=int, default=12, help="turns of raw limit and pool (default: %(default)s)")
    parser.add_argument("--side-rounds", type=int, default=4, help="turns for each of the other figures (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of one measurement (default: %(default)s)")
    parser.add_argument("--settle", type=float, default=0.4, help="seconds that the pool works before each (default: %(default)s)")


def measure(server: Server, options: argparse.Namespace) -> Report:
    """Take turns: with runs inserted before; then with `def` handlers; then while this process starts runs."""
    with ExitStack() as stack:
        database = server.database()
        app = stack.enter_context(pool_app.client_app(server.uri, database, pool_app.noop, pool_app.noop_def))
        running = stack.enter_context(pool(server, database, "--workers", str(options.workers), "--concurrency", str(options.concurrency)))
        writers = stack.enter_context(raw_writers(server, server.database()))
        turns = _Turns(server=server, app=app, running=running, writers=writers, seconds=options.seconds, settle_s=options.settle)
        turns.hold()
        turns.inserted_before(pool_app.noop.id)  # warms up
        main = turns.take(options.rounds, lambda: turns.inserted_before(pool_app.noop.id), "inserted before")
        with_def = turns.take(options.side_rounds, lambda: turns.inserted_before(pool_app.noop_def.id), "def handlers")
        live = turns.take(options.side_rounds, turns.started_live, "start_many live")
        plain = [writers.rate(options.seconds, retryable=retryable) for _ in range(options.side_rounds) for retryable in (True, False)]
    figures = {
        "ratio_to_raw": main["ratio"],
        "steps_per_second": main["steps_per_second"],
        "raw_per_second": main["raw_per_second"],
        **{name: main[name] for name in ("ratio_spread", "cpu_ratio", "cpu_us_per_step", "cpu_us_per_raw_update", "rounds")},
        "def_handlers": with_def,
        "start_many_live": live,
        "raw_without_retryable_writes": {
            "per_second": median(row["per_second"] for row in plain[1::2]),
            "with_them_at_the_same_time": median(row["per_second"] for row in plain[0::2]),
        },
    }
    settings = {
        **server.facts,
        "workers": options.workers,
        "concurrency": options.concurrency,
        "steps_per_run": _STEPS,
        "write_concern": "majority",
        "seconds_per_turn": options.seconds,
        "raw": f"{PROCESSES} processes, bulk_write of {BATCH} fenced update_one each, PyMongo's defaults (retryable writes, ordered)",
    }
    notes = [
        "cpu_ratio: processor time per raw update divided by that per step, all processes together; other programs disturb it least",
        "ratio_to_raw: the median, over the rounds, of steps/s divided by the mean of the raw limits before and after",
        "ratio_to_raw compares with PyMongo's defaults; raw_without_retryable_writes is for information only",
    ]
    budgets = [Budget(key="ratio_to_raw", limit=0.6, at_least=True)]
    return Report(question="throughput", settings=settings, figures=figures, budgets=budgets, notes=notes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turns:
    """One pool, which is stopped except while it is measured, and the raw writers."""

    server: Server
    app: Streamline
    running: Pool
    writers: RawWriters
    seconds: float
    settle_s: float  # from CONT to the measured window, so that claims and group commits run steadily

    def take(self, rounds: int, work: Callable[[], dict[str, Any]], name: str) -> dict[str, Any]:
        """Raw, pool, raw, pool, …, raw: each round's figures and their medians."""
        raw = [self.writers.rate(self.seconds)]
        rows = []
        for number in range(rounds):
            worked = work()
            raw.append(self.writers.rate(self.seconds))
            raw_per_second = mean(row["per_second"] for row in raw[-2:])
            rows.append({"ratio": worked["steps_per_second"] / raw_per_second, "raw_per_second": raw_per_second, **worked})
            raw_cpu_us = mean(row["mongod_us"] + row["clients_us"] for row in raw[-2:])
            rows[-1]["cpu_ratio"] = raw_cpu_us / sum(worked["cpu_us_per_step"].values())
            report_progress(
                f"{name} {number + 1}: {worked['steps_per_second']:.0f} steps/s, raw {raw_per_second:.0f}/s, ratio {rows[-1]['ratio']:.3f}"
            )
        return {
            "ratio": median(row["ratio"] for row in rows),
            "steps_per_second": median(row["steps_per_second"] for row in rows),
            "raw_per_second": median(row["per_second"] for row in raw),
            "ratio_spread": spread([row["ratio"] for row in rows]),
            "cpu_us_per_step": {name: median(row["cpu_us_per_step"][name] for row in rows) for name in rows[0]["cpu_us_per_step"]},
            "cpu_us_per_raw_update": {name: median(row[f"{name}_us"] for row in raw) for name in ("mongod", "clients")},
            "cpu_ratio": median(row["cpu_ratio"] for row in rows),
            "rounds": [{name: row[name] for name in ("ratio", "steps_per_second", "raw_per_second", "cpu_ratio")} for row in rows],
        }

    def inserted_before(self, workflow_id: str) -> dict[str, Any]:
        """The pool's figures with runs that are stored before it continues."""
        self._fill(workflow_id)
        self.running.signal(signal.SIGCONT)
        time.sleep(self.settle_s)
        return self._window(lambda: time.sleep(self.seconds))

    def started_live(self) -> dict[str, Any]:
        """The pool's figures while this process starts runs, in batches."""
        self.app.runs.delete_many({"wakeAt": {"$exists": True}})  # runs that are left from other turns
        self.running.signal(signal.SIGCONT)
        self._start_for(self.settle_s)
        return self._window(lambda: self._start_for(self.seconds))

    def hold(self) -> None:
        """Stop the pool from claiming. Return when no run is active."""
        self.running.signal(signal.SIGTSTP)
        until(self._nothing_held, "the active runs end", _HELD_TIMEOUT_S, 0.01)

    def _nothing_held(self) -> bool:
        return self.app.runs.find_one({"lease.expiresAt": {"$exists": True}}, {"_id": 1}, hint="streamline_lease") is None

    def _fill(self, workflow_id: str) -> None:
        """Start as many runs as one turn can use."""
        wanted = round(_RUNS_PER_S_MAX * (self.seconds + self.settle_s))
        missing = wanted - self._waiting(workflow_id)
        if missing > 0:
            self.app.workflows[workflow_id].start_many([None] * missing)

    def _start_for(self, seconds: float) -> None:
        """Start batches as fast as the pool completes them: there is always work, and the backlog does not grow."""
        until_at = time.monotonic() + seconds
        while time.monotonic() < until_at:
            if self._waiting(pool_app.noop.id) > 2 * _LIVE_BATCH:
                time.sleep(0.01)
            else:
                self.app.workflows[pool_app.noop.id].start_many([None] * _LIVE_BATCH)

    def _waiting(self, workflow_id: str) -> int:
        lane = self.app.workflows[workflow_id].definition.lane_of("default")
        waiting: int = self.app.runs.count_documents(
            {"queue": "default", "lane": lane, "wakeAt": {"$exists": True}}, hint="streamline_claimable"
        )
        return waiting

    def _window(self, pass_time: Callable[[], None]) -> dict[str, Any]:
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
