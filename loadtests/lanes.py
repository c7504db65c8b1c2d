"""Does the number of workflows in the application matter: for steps per second, for single starts, and for an idle host?

Each row is a pool whose application has so many workflows. It works on runs of all of them, then on runs of the last one. Then the
ended runs are deleted. Then the pool is idle, and runs are started one by one. The rows take turns, and the figures of a row
are medians over its turns. No row may be more than 20 % worse than the first one.
"""

from __future__ import annotations

import argparse
import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import cycle, islice
from statistics import median
from typing import Any
from uuid import uuid4

from streamline_pool import Streamline, Workflow

from . import ballast
from .common import (
    Budget,
    Pool,
    Report,
    Server,
    UsageError,
    add_pool_options,
    cpu_seconds,
    percentile,
    pool,
    report_progress,
    serving,
    until,
)
from .lanes_app import WORKFLOWS_VARIABLE, add_workflows

__all__ = ["add_options", "measure"]

_TIMEOUT_S = 300.0  # for one burst; the slowest engine measured so far needed 60 s
_START_TIMEOUT_S = 60.0
_WARM_UP = 3  # single starts that are not counted
_PAUSE_S = (0.005, 0.045)  # before each single start, uniformly distributed, so that no phase of a timer is preferred
_WORSE_MAX = 0.2  # than the first row
_CPU_NOISE_PERCENT = 0.1
"""Added to both sides of each comparison of idle CPU, in percent of one processor. It is the noise of such small figures."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this question."""
    add_pool_options(parser, workers=2, concurrency=200)
    parser.add_argument(
        "--workflows",
        type=_numbers,
        default=[10, 50, 200, 1000],
        help="workflows of each row, such as 10,11,12,13 (default: 10,50,200,1000)",
    )
    parser.add_argument("--runs", type=int, default=4_000, help="runs in each burst (default: %(default)s)")
    parser.add_argument("--bursts", type=int, default=2, help="bursts of each kind in one turn of a row (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="turns of each row (default: %(default)s)")
    parser.add_argument("--starts", type=int, default=60, help="single starts in all turns of a row together (default: %(default)s)")
    parser.add_argument("--idle", type=float, default=10.0, help="seconds of each measurement of idle CPU (default: %(default)s)")
    parser.add_argument("--settle", type=float, default=3.0, help="seconds before that, after the deletion (default: %(default)s)")
    parser.add_argument("--ended", type=int, default=0, help="ended runs that are stored before (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="a private server of its own for each turn of a row")
    parser.add_argument(
        "--after-window",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="wait after the deletion, such as 360: the server then needs no index entries of the burst any more (default: %(default)s)",
    )


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise ValueError(f"{text}: an application has at least one workflow")
    return numbers


def measure(server: Server, options: argparse.Namespace) -> Report:
    """Every row in turn, and again."""
    if options.fresh and options.mongodb_uri:
        raise UsageError("--fresh starts private servers, so it cannot be combined with --mongodb-uri")
    rows = {workflows: _Row() for workflows in options.workflows}
    for number in range(options.turns):
        # Each turn begins with another row, because mongod's checkpoints come once a minute and would always meet the same one.
        for workflows, row in _rotated(list(rows.items()), number):
            with _server_for_row(server, options) as used:
                _take_turn(used, workflows, options, row)
            report_progress(f"turn {number + 1}: {_line(row.summary(workflows))}")
    table = [row.summary(workflows) for workflows, row in rows.items()]
    to_first = {str(row["workflows"]): _compared(row, table[0]) for row in table[1:]}
    settings = {
        **server.facts,
        "workers": options.workers,
        "concurrency": options.concurrency,
        "runs_per_burst": options.runs,
        "bursts_of_each_kind": options.bursts * options.turns,
        "single_starts": options.starts,
        "idle_s": options.idle,
        "ended_runs_before": options.ended,
        "fresh_server_per_turn": options.fresh,
        "after_window_s": options.after_window,
    }
    notes = [
        "spread_steps_s: steps per second with the runs spread over all workflows; last_steps_s: with all of them in the last workflow",
        "start_ms: from `start` to the return of `wait_for`, one at a time, in an idle pool after the runs of the bursts were deleted",
        "idle CPU is in percent of one processor, without any start; "
        f"{_CPU_NOISE_PERCENT} is added to both sides of a comparison, because noise is a large part of so little",
        "to_first: the row divided by the first row",
    ]
    return Report(
        question="lanes", settings=settings, figures={"rows": table, "to_first": to_first}, budgets=_budgets(to_first), notes=notes
    )


def _rotated(rows: list[tuple[int, _Row]], by: int) -> list[tuple[int, _Row]]:
    first = by % len(rows)
    return rows[first:] + rows[:first]


@contextmanager
def _server_for_row(server: Server, options: argparse.Namespace) -> Iterator[Server]:
    if not options.fresh:
        yield server
        return
    with serving(None) as fresh:
        yield fresh


@dataclass(slots=True)
class _Row:
    """What the turns of one row have measured."""

    spread: list[float] = field(default_factory=list)  # steps per second, of each burst
    last: list[float] = field(default_factory=list)
    starts_s: list[float] = field(default_factory=list)
    idle: list[dict[str, float]] = field(default_factory=list)  # percent of one processor, by process

    def summary(self, workflows: int) -> dict[str, Any]:
        """One line of the table."""
        return {
            "workflows": workflows,
            "spread_steps_s": round(median(self.spread)),
            "last_steps_s": round(median(self.last)),
            "start_p50_ms": round(percentile(self.starts_s, 0.5) * 1e3, 2),
            "start_p95_ms": round(percentile(self.starts_s, 0.95) * 1e3, 2),
            **{f"idle_{name}_percent": round(median(sample[name] for sample in self.idle), 3) for name in self.idle[0]},
        }


def _line(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items())


def _compared(row: dict[str, Any], first: dict[str, Any]) -> dict[str, float]:
    def idle(name: str) -> float:
        return float((row[name] + _CPU_NOISE_PERCENT) / (first[name] + _CPU_NOISE_PERCENT))

    plain = ("spread_steps_s", "last_steps_s", "start_p50_ms", "start_p95_ms")
    return {
        **{name: row[name] / first[name] for name in plain},
        **{name: idle(name) for name in ("idle_mongod_percent", "idle_pool_percent")},
    }


def _budgets(to_first: dict[str, Any]) -> list[Budget]:
    fast = ("spread_steps_s", "last_steps_s")
    small = ("start_p95_ms", "idle_mongod_percent", "idle_pool_percent")
    return [
        *(Budget(key=f"to_first.{row}.{name}", limit=1 - _WORSE_MAX, at_least=True) for row in to_first for name in fast),
        *(Budget(key=f"to_first.{row}.{name}", limit=1 + _WORSE_MAX) for row in to_first for name in small),
    ]


# --- one turn of a row ---------------------------------------------------------------------------------------------


def _take_turn(server: Server, workflows: int, options: argparse.Namespace, row: _Row) -> None:
    database = server.database()
    with ExitStack() as stack:
        app = stack.enter_context(add_workflows(Streamline(server.uri, database=database), workflows))
        app.init_db()
        flows = list(app.workflows.values())
        _insert_ended(server, database, flows, options.ended)
        sizes = ("--workers", str(options.workers), "--concurrency", str(options.concurrency))
        environment = {WORKFLOWS_VARIABLE: str(workflows)}
        running = stack.enter_context(pool(server, database, *sizes, app="loadtests.lanes_app:app", environment=environment))
        turn = _Turn(server=server, app=app, running=running, runs=options.runs)
        since = datetime.now(UTC)
        for _ in range(options.bursts):
            row.spread.append(turn.burst(flows))
            row.last.append(turn.burst(flows[-1:]))
        app.runs.delete_many({"endedAt": {"$gte": since}})
        time.sleep(options.after_window + options.settle)
        row.idle.append(turn.idle(options.idle))
        turn.start_one_by_one(islice(cycle(_far_apart(flows)), _WARM_UP))
        row.starts_s += turn.start_one_by_one(islice(cycle(_far_apart(flows)), _WARM_UP, _WARM_UP + -(-options.starts // options.turns)))
    server.client.drop_database(database)


def _insert_ended(server: Server, database: str, flows: Sequence[Workflow], count: int) -> None:
    """Insert ended runs of all workflows."""
    templates = [ballast.finished(flow) for flow in flows] if count else []
    ballast.insert(server, database, ({**template, "_id": uuid4().hex} for template in islice(cycle(templates), count)))
    server.client.admin.command("fsync")


def _far_apart(flows: Sequence[Workflow]) -> list[Workflow]:
    """The same workflows in an order in which the last one comes first, and neighbours are far apart."""
    shuffled = list(flows[:-1])
    random.Random(1).shuffle(shuffled)  # the same order in every row
    return [flows[-1], *shuffled]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """One pool on a database of its own."""

    server: Server
    app: Streamline
    running: Pool
    runs: int

    def burst(self, flows: Sequence[Workflow]) -> float:
        """Let the pool complete stored runs of these workflows. Returns steps per second."""
        holds = self.running.log_text().count(" pool_holds")
        self.running.signal(signal.SIGTSTP)
        until(lambda: self.running.log_text().count(" pool_holds") > holds, "the pool is held", _START_TIMEOUT_S, 0.01)
        time.sleep(0.1)  # the workers read the order, too; no run is due
        begun = datetime.now(UTC).replace(microsecond=0)
        due = (ballast.claimable(flow) for flow in islice(cycle(flows), self.runs))
        ballast.insert(self.server, self.app.where.database, due)
        started = datetime.now(UTC)
        self.running.signal(signal.SIGCONT)
        until(self._nothing_to_do, f"{self.runs} runs end", _TIMEOUT_S)
        ended = [row["endedAt"] for row in self.app.runs.find({"createdAt": {"$gte": begun}, "status": "done"}, {"endedAt": 1})]
        assert len(ended) >= self.runs, "each run is done"
        taken_s: float = (max(ended) - started).total_seconds()
        return self.runs * len(flows[0].steps) / taken_s

    def _nothing_to_do(self) -> bool:
        # In this order: a run that is claimed between the two queries is found by the second one.
        queries = (({"wakeAt": {"$exists": True}}, "streamline_claimable"), ({"lease.expiresAt": {"$exists": True}}, "streamline_lease"))
        return all(self.app.runs.find_one(query, {"_id": 1}, hint=hint) is None for query, hint in queries)

    def idle(self, seconds: float) -> dict[str, float]:
        """Percent of one processor that mongod and the processes of the pool use while nothing runs."""
        before, started = self._usage(), time.monotonic()
        time.sleep(seconds)
        after, taken_s = self._usage(), time.monotonic() - started
        return {name: (after[name] - before[name]) / taken_s * 100 for name in before}

    def _usage(self) -> dict[str, float]:
        parts = {
            "supervisor": cpu_seconds([self.running.pid]),
            "steward": cpu_seconds([self.running.steward_pid()]),
            "worker": cpu_seconds(self.running.worker_pids) / len(self.running.worker_pids),
        }
        return {"mongod": self.server.cpu_seconds(), "pool": cpu_seconds(self.running.pids()), **parts}

    def start_one_by_one(self, flows: Iterator[Workflow]) -> list[float]:
        """Seconds from `start` to the return of `wait_for`, of one run of each of these workflows."""
        taken = []
        for flow in flows:
            time.sleep(random.uniform(*_PAUSE_S))
            started = time.monotonic()
            ended = flow.wait_for(flow.start().id, timeout=_START_TIMEOUT_S)
            taken.append(time.monotonic() - started)
            assert ended.status == "done", ended.error
        return taken
