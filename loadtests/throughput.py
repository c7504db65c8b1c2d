"""How many steps per second does a pool store, and what part of the database's own limit is that?

One pool and the raw writers take turns every second or two, because the speed of a shared machine drifts by more than
the measured difference. While the writers write, the pool is stopped (TSTP); it continues (CONT) while they wait. Each
figure of the pool is compared with the mean of the raw figures just before and just after it. There are two raw figures: of the
driver's default way to write, and of the fastest way that was found (see raw.py).
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from . import app as pool_app
from .common import Budget, Report, Server, add_pool_options, pool, report_progress, spread
from .raw import DRIVER_DEFAULT, RawWriters, Way, raw_writers
from .turns import Turns

__all__ = ["add_options", "measure"]

_STEPS = 3
_LIVE_BATCH = 500
_RUNS_PER_S_MAX = 5_000  # stored runs per second of the pool's turn, so that it always has work; a guess: twice the best rate seen
_KINDS = ("default", "limit")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this question."""
    add_pool_options(parser, workers=2, concurrency=200)
    parser.add_argument("--rounds", type=int, default=12, help="turns of raw writers and pool (default: %(default)s)")
    parser.add_argument("--side-rounds", type=int, default=5, help="turns for each of the other figures (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of one measurement (default: %(default)s)")
    parser.add_argument(
        "--find",
        type=float,
        default=0.4,
        help="seconds of each measurement in the search for the limit; 0: no search (default: %(default)s)",
    )
    parser.add_argument("--settle", type=float, default=0.4, help="seconds that the pool works before each (default: %(default)s)")


def measure(server: Server, options: argparse.Namespace) -> Report:
    """Take turns: with runs inserted before; then with `def` handlers; then while this process starts runs."""
    with ExitStack() as stack:
        database = server.database()
        app = stack.enter_context(pool_app.client_app(server.uri, database, pool_app.noop, pool_app.noop_def))
        running = stack.enter_context(pool(server, database, "--workers", str(options.workers), "--concurrency", str(options.concurrency)))
        writers = stack.enter_context(raw_writers(server, server.database()))
        turns = Turns(server=server, app=app, running=running, seconds=options.seconds, settle_s=options.settle)
        turns.hold()
        runs = round(_RUNS_PER_S_MAX * (options.seconds + options.settle))
        turns.inserted_before(pool_app.noop.id, runs)  # warms up
        beside = _Beside(writers=writers, limit=writers.find_limit(options.find), seconds=options.seconds)
        main = beside.take(options.rounds, lambda: turns.inserted_before(pool_app.noop.id, runs), "inserted before")
        with_def = beside.take(options.side_rounds, lambda: turns.inserted_before(pool_app.noop_def.id, runs), "def handlers")
        live = beside.take(options.side_rounds, lambda: _started_live(turns), "start_many live")
    figures = {
        **main,
        "limit": str(beside.limit),
        "def_handlers": with_def,
        "start_many_live": live,
    }
    settings = {
        **server.facts,
        "workers": options.workers,
        "concurrency": options.concurrency,
        "steps_per_run": _STEPS,
        "write_concern": "majority, journaled",
        "seconds_per_turn": options.seconds,
        "raw_default": str(DRIVER_DEFAULT),
    }
    notes = [
        "ratio.of_the_drivers_default_way, ratio.of_the_limit: medians, over the rounds, of steps/s divided by the mean of the raw"
        " updates/s before and after; the limit is the fastest way that was found in this run",
        "cpu_ratio: processor time per raw update divided by that per step, all processes together; other programs disturb it least",
        "workers_cpu_in_raw_updates: processor time of the workers per step divided by all that of one raw update of the driver's way,"
        " client and mongod together",
    ]
    return Report(question="throughput", settings=settings, figures=figures, budgets=_budgets(), notes=notes)


def _budgets() -> list[Budget]:
    return [
        Budget(key="ratio.of_the_drivers_default_way", limit=0.6, at_least=True),
        Budget(key="ratio.of_the_limit", limit=0.45, at_least=True),
        Budget(key="def_handlers.ratio.of_the_limit", limit=0.25, at_least=True),
        Budget(key="start_many_live.ratio.of_the_limit", limit=0.3, at_least=True),
        Budget(key="workers_cpu_in_raw_updates", limit=0.7),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Beside:
    """Raw writers that take turns with a pool."""

    writers: RawWriters
    limit: Way
    seconds: float

    def take(self, rounds: int, work: Callable[[], dict[str, Any]], name: str) -> dict[str, Any]:
        """Raw, pool, raw, pool, …, raw: each round's figures and their medians."""
        raw = [self._raw()]
        rows = []
        for number in range(rounds):
            worked = work()
            raw.append(self._raw())
            per_second = {kind: mean(row[kind]["per_second"] for row in raw[-2:]) for kind in _KINDS}
            ratio = {kind: worked["steps_per_second"] / per_second[kind] for kind in _KINDS}
            raw_us = {kind: mean(row[kind]["mongod_us"] + row[kind]["clients_us"] for row in raw[-2:]) for kind in _KINDS}
            used_us = worked["cpu_us_per_step"]
            cpu_ratio = {kind: raw_us[kind] / sum(used_us.values()) for kind in _KINDS}
            rows.append({**worked, "ratio": ratio, "cpu_ratio": cpu_ratio, "workers_cpu": used_us["workers"] / raw_us["default"]})
            report_progress(
                f"{name} {number + 1}: {worked['steps_per_second']:.0f} steps/s; raw {per_second['default']:.0f}/s, ratio"
                f" {ratio['default']:.3f}; limit {per_second['limit']:.0f}/s, ratio {ratio['limit']:.3f}"
            )
        return _summary(rows, raw)

    def _raw(self) -> dict[str, dict[str, float]]:
        return {"default": self.writers.rate(self.seconds, DRIVER_DEFAULT), "limit": self.writers.rate(self.seconds, self.limit)}


def _summary(rows: list[dict[str, Any]], raw: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    names = {"default": "of_the_drivers_default_way", "limit": "of_the_limit"}
    return {
        "ratio": {name: median(row["ratio"][kind] for row in rows) for kind, name in names.items()},
        "steps_per_second": median(row["steps_per_second"] for row in rows),
        "raw_per_second": {kind: median(row[kind]["per_second"] for row in raw) for kind in _KINDS},
        "cpu_ratio": {name: median(row["cpu_ratio"][kind] for row in rows) for kind, name in names.items()},
        "ratio_spread": {name: spread([row["ratio"][kind] for row in rows]) for kind, name in names.items()},
        "workers_cpu_in_raw_updates": median(row["workers_cpu"] for row in rows),
        "cpu_us_per_step": {name: median(row["cpu_us_per_step"][name] for row in rows) for name in rows[0]["cpu_us_per_step"]},
        "cpu_us_per_raw_update": {
            kind: {name: median(row[kind][f"{name}_us"] for row in raw) for name in ("mongod", "clients")} for kind in _KINDS
        },
    }


def _started_live(turns: Turns) -> dict[str, Any]:
    """The pool's figures while this process starts runs, in batches."""
    turns.app.runs.delete_many({"wakeAt": {"$exists": True}})  # runs that are left from other turns
    turns.running.signal(signal.SIGCONT)
    _start_for(turns, turns.settle_s)
    return turns.window(lambda: _start_for(turns, turns.seconds))


def _start_for(turns: Turns, seconds: float) -> None:
    """Start batches as fast as the pool completes them: there is always work, and the backlog does not grow."""
    until_at = time.monotonic() + seconds
    while time.monotonic() < until_at:
        if turns.waiting(pool_app.noop.id) > 2 * _LIVE_BATCH:
            time.sleep(0.01)
        else:
            turns.app.workflows[pool_app.noop.id].start_many([None] * _LIVE_BATCH)
