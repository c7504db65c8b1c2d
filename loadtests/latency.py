"""How long does an idle pool take from `start` to the first step, and to the end of the run as `wait_for` sees it?

The starter is a process of its own that acts like a user's: `start`, then `wait_for`, then a pause. Between runs it times
single majority writes. These are the unit, because a durable engine needs at least one of them for every change.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import tempfile
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from pymongo import MongoClient
from pymongo.write_concern import WriteConcern

from streamline_pool import Streamline
from streamline_pool.chaos.ending import end_with_parent

from . import app as pool_app
from .common import Budget, Report, Server, add_pool_options, percentile, pool, report_progress, until

__all__ = ["add_options", "measure"]

_WRITES_PER_SAMPLE = 3
_WARM_UP = 20  # runs that are not counted: connections, caches, the first claim
_PAUSE_S = (0.005, 0.045)  # between the end of a run and the next start, uniformly distributed, so that no phase of a timer is preferred
_TIMEOUT_S = 30.0

Timing = tuple[str, float, float, float]
"""Of one run: its id, and the monotonic instants of the call of `start`, of its return, and of the return of `wait_for`."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this question."""
    add_pool_options(parser, workers=2, concurrency=200)
    parser.add_argument("--samples", type=int, default=400, help="runs of each workflow (default: %(default)s)")


def measure(server: Server, options: argparse.Namespace) -> Report:
    """A run of three steps and a run of one step, in turn."""
    database = server.database()
    with ExitStack() as stack:
        marks = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="streamline-loadtest-")), "marks")
        arguments = ("--workers", str(options.workers), "--concurrency", str(options.concurrency))
        stack.enter_context(pool(server, database, *arguments, environment={pool_app.MARKS_VARIABLE: str(marks)}))
        report_progress(f"{options.samples} samples of each of two workflows")
        timings, writes = _in_a_process(stack, server.uri, database, options.samples)
        until(lambda: len(marks.read_text().splitlines()) >= 2 * (options.samples + _WARM_UP), "every first step is marked", _TIMEOUT_S)
        entered = {run_id: float(at) for run_id, at in (line.split() for line in marks.read_text().splitlines())}
    unit_s = median(writes)
    three, one = (_figures(timings[flow.id], entered, unit_s) for flow in (pool_app.marked, pool_app.marked_short))
    figures = {
        "first_step": three["first_step"],
        "done": three["done"],
        "start_call": three["start_call"],
        "majority_write": {"p50_ms": unit_s * 1e3, "p99_ms": percentile(writes, 0.99) * 1e3, "samples": len(writes)},
        "one_step_workflow": one,
    }
    settings = {
        **server.facts,
        "workers": options.workers,
        "concurrency": options.concurrency,
        "samples": options.samples,
        "steps_per_run": len(pool_app.marked.steps),
        "pause_between_runs_s": list(_PAUSE_S),
        "majority_write": f"update_one by _id, PyMongo, {_WRITES_PER_SAMPLE} in a row before each start, in the starter's process",
    }
    budgets = [
        Budget(key="first_step.p50_x", limit=3),
        Budget(key="first_step.p99_x", limit=10),
        Budget(key="done.p50_x", limit=8),
    ]
    notes = ["`_x` figures are multiples of majority_write.p50_ms; first_step and done are of the workflow with three steps"]
    return Report(question="latency", settings=settings, figures=figures, budgets=budgets, notes=notes)


def _figures(timings: list[Timing], entered: dict[str, float], unit_s: float) -> dict[str, Any]:
    spans = {
        "first_step": [entered[run_id] - started for run_id, started, _, _ in timings],
        "start_call": [returned - started for _, started, returned, _ in timings],
        "done": [done - started for _, started, _, done in timings],
    }
    return {name: _distribution(values, unit_s) for name, values in spans.items()}


def _distribution(values: list[float], unit_s: float) -> dict[str, float]:
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    in_units = {f"{name}_x": percentile(values, share) / unit_s for name, share in shares.items()}
    return {**in_units, **{f"{name}_ms": percentile(values, share) * 1e3 for name, share in shares.items()}}


def _in_a_process(stack: ExitStack, uri: str, database: str, samples: int) -> tuple[dict[str, list[Timing]], list[float]]:
    """Run the starter. Returns its timings by workflow, and the seconds of each write."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_starter, args=(os.getpid(), uri, database, samples, theirs), daemon=True)
    process.start()
    theirs.close()
    stack.callback(_end, process, ours)
    answer = ours.recv()  # EOFError when the starter has failed; it has printed the reason
    assert isinstance(answer, tuple), "the starter sends one pair"
    return answer


def _end(process: Any, pipe: Connection) -> None:
    pipe.close()
    process.kill()
    process.join()


def _starter(parent_pid: int, uri: str, database: str, samples: int, pipe: Connection) -> None:
    """The starter process."""
    end_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles ^C, and ends this process
    writes: list[float] = []
    timings: dict[str, list[Timing]] = {pool_app.marked.id: [], pool_app.marked_short.id: []}
    with pool_app.client_app(uri, database, pool_app.marked, pool_app.marked_short) as app, MongoClient[dict[str, Any]](uri) as client:
        target = client[database].get_collection("majority_writes", write_concern=WriteConcern("majority"))
        target.insert_one({"_id": os.getpid(), "n": 0})
        for number in range(samples + _WARM_UP):
            for workflow_id, timed in timings.items():
                taken = [_write(target) for _ in range(_WRITES_PER_SAMPLE)]
                timing = _run_once(app, workflow_id)
                if number >= _WARM_UP:
                    writes += taken
                    timed.append(timing)
                time.sleep(random.uniform(*_PAUSE_S))
    pipe.send((timings, writes))


def _write(target: Any) -> float:
    started = time.monotonic()
    target.update_one({"_id": os.getpid()}, {"$inc": {"n": 1}})
    return time.monotonic() - started


def _run_once(app: Streamline, workflow_id: str) -> Timing:
    workflow = app.workflows[workflow_id]
    started = time.monotonic()
    run = workflow.start()
    returned = time.monotonic()
    ended = workflow.wait_for(run.id, timeout=_TIMEOUT_S)
    done = time.monotonic()
    assert ended.status == "done", ended.error
    return run.id, started, returned, done
