"""How long does it take from `cancel` in one process until the signal fires in a handler of a pool on another host?

Two pools on one database, each with its own supervisor, stand for two hosts: the cancellation reaches the pool that holds
the run through the database only. This process starts a run, waits until its handler is entered, and cancels it.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from streamline_pool import Streamline

from . import app as pool_app
from .common import Budget, Report, Server, add_pool_options, percentile, pool, report_progress, until

__all__ = ["add_options", "measure"]

_POOLS = 2
_PAUSE_S = (0.005, 0.045)  # before each cancel, uniformly distributed, so that no phase of a timer is preferred
_BACKLOG = 1_000  # due runs that are kept stored to keep the pools busy
_TIMEOUT_S = 60.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this question."""
    add_pool_options(parser, workers=1, concurrency=200)
    parser.add_argument(
        "--cancels", type=int, default=60, help="runs cancelled, of each kind of handler, per situation (default: %(default)s)"
    )


def measure(server: Server, options: argparse.Namespace) -> Report:
    """An `async def` and a `def` handler in turn, in idle pools and then in pools that always have due runs."""
    database = server.database()
    with ExitStack() as stack:
        marks = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="streamline-loadtest-")), "marks")
        marks.touch()
        sizes = ("--workers", str(options.workers), "--concurrency", str(options.concurrency))
        for _ in range(_POOLS):
            stack.enter_context(pool(server, database, *sizes, environment={pool_app.MARKS_VARIABLE: str(marks)}))
        workflows = (pool_app.held, pool_app.held_def, pool_app.noop)
        app = stack.enter_context(pool_app.client_app(server.uri, database, *workflows))
        figures = {}
        for situation in ("idle", "busy"):
            report_progress(f"{options.cancels} cancels of each kind: {situation}")
            taken: dict[str, list[float]] = {pool_app.held.id: [], pool_app.held_def.id: []}
            for _ in range(options.cancels):
                for workflow_id, times in taken.items():
                    if situation == "busy":
                        _top_up(app)
                    times.append(_cancel_one(app, workflow_id, marks))
            figures[situation] = {"async_def": _figures(taken[pool_app.held.id]), "def": _figures(taken[pool_app.held_def.id])}
    settings = {
        **server.facts,
        "pools": _POOLS,
        "workers_per_pool": options.workers,
        "concurrency": options.concurrency,
        "cancels": options.cancels,
        "busy": f"at least {_BACKLOG} stored due runs of {len(pool_app.noop.steps)} steps before each cancel",
    }
    budgets = [Budget(key=f"{situation}.{kind}.p99_ms", limit=100) for situation in figures for kind in figures[situation]]
    notes = [
        "from the call of `cancel` to the first statement of the handler after its signal has fired; both on this machine's monotonic clock"
    ]
    return Report(question="cancel", settings=settings, figures=figures, budgets=budgets, notes=notes)


def _figures(times: list[float]) -> dict[str, float]:
    return {f"{name}_ms": percentile(times, share) * 1e3 for name, share in {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}.items()}


def _top_up(app: Streamline) -> None:
    lane = app.workflows[pool_app.noop.id].definition.lane_of("default")
    missing = _BACKLOG - app.runs.count_documents(
        {"queue": "default", "lane": lane, "wakeAt": {"$exists": True}}, hint="streamline_claimable"
    )
    if missing > 0:
        app.workflows[pool_app.noop.id].start_many([None] * (missing + _BACKLOG // 2))


def _cancel_one(app: Streamline, workflow_id: str, marks: Path) -> float:
    """Seconds from the call of `cancel` until the signal fires."""
    workflow = app.workflows[workflow_id]
    run = workflow.start(priority=1)  # before the runs that keep the pools busy
    until(lambda: "entered" in _noted(marks, run.id), "the handler is entered", _TIMEOUT_S, 0.005)
    time.sleep(random.uniform(*_PAUSE_S))
    started = time.monotonic()
    workflow.cancel(run.id)
    until(lambda: "cancelled" in _noted(marks, run.id), "the signal fires", _TIMEOUT_S, 0.005)
    return _noted(marks, run.id)["cancelled"] - started


def _noted(marks: Path, run_id: str) -> dict[str, float]:
    lines = (line.split() for line in marks.read_text().splitlines() if line.startswith(run_id))
    return {what: float(at) for _, what, at in lines}
