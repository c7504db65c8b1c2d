"""What do the outputs of steps cost: steps per second by their size, beside the fastest way to write as many bytes as often?

For each size, one pool and raw writers take turns. A raw writer stores the same output in a document of the same form, once for each
step, as durably as a worker (majority, journaled). The batch size and the number of connections are those that were the fastest.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from statistics import mean, median
from typing import Any

from streamline_pool import Streamline

from .common import Budget, Report, Server, add_pool_options, pool, report_progress, spread
from .outputs_app import OUTPUT_VARIABLE, WORKFLOW_ID, add_workflow
from .raw import DRIVER_DEFAULT, RawWriters, raw_writers
from .turns import Turns

__all__ = ["add_options", "measure"]

_KIB = 1024
_ENCODING_BYTES = 64  # room for what BSON adds, so that the largest output is not above the limit from which on it is stored elsewhere
_STEPS = 3
_DOCUMENTS_MAX = 3_000  # for each raw writer; one that has used all begins again
_BUDGETS = {16: 0.5, 100: 0.3}  # by KiB: the engine's part of the raw limit


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this question."""
    add_pool_options(parser, workers=2, concurrency=200)
    parser.add_argument(
        "--kib", type=int, nargs="+", default=[0, 1, 4, 16, 64, 100, 256], help="sizes of the outputs (default: 0 1 4 16 64 100 256)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of raw limit and pool, for each size (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of one measurement (default: %(default)s)")
    parser.add_argument(
        "--find",
        type=float,
        default=0.3,
        help="seconds of each measurement in the search for the limit; 0: no search (default: %(default)s)",
    )
    parser.add_argument("--settle", type=float, default=0.4, help="seconds that the pool works before each (default: %(default)s)")


def measure(server: Server, options: argparse.Namespace) -> Report:
    """One size after the other, each with a pool and a database of its own."""
    rows = {str(kib): _measure_size(server, kib, options) for kib in options.kib}
    figures = {"ratio": {kib: row["ratio"] for kib, row in rows.items()}, "kib": rows}
    settings = {
        **server.facts,
        "workers": options.workers,
        "concurrency": options.concurrency,
        "steps_per_run": _STEPS,
        "write_concern": "majority, journaled",
        "output": "a string that does not compress",
        "seconds_per_turn": options.seconds,
    }
    budgets = [Budget(key=f"ratio.{kib}", limit=limit, at_least=True) for kib, limit in _BUDGETS.items() if kib in options.kib]
    notes = [
        "ratio: the median, over the rounds, of steps/s divided by the mean of the raw limits before and after",
        "cpu_ratio: processor time per raw update divided by that per step, all processes together; other programs disturb it least",
        "the raw limit writes each output once; it does not claim runs, and it does not store the last output as that of the run, too",
    ]
    return Report(question="outputs", settings=settings, figures=figures, budgets=budgets, notes=notes)


def _measure_size(server: Server, kib: int, options: argparse.Namespace) -> dict[str, Any]:
    database, raw_database = server.database(), server.database()
    size = max(0, kib * _KIB - _ENCODING_BYTES)
    with ExitStack() as stack:
        app = stack.enter_context(add_workflow(Streamline(server.uri, database=database)))
        sizes = ("--workers", str(options.workers), "--concurrency", str(options.concurrency))
        environment = {OUTPUT_VARIABLE: str(size)}
        running = stack.enter_context(pool(server, database, *sizes, app="loadtests.outputs_app:app", environment=environment))
        turns = Turns(server=server, app=app, running=running, seconds=options.seconds, settle_s=options.settle)
        turns.hold()
        writers = stack.enter_context(raw_writers(server, raw_database, size))
        row = _take_turns(turns, writers, options)
    report_progress(f"{kib} KiB: {row['steps_per_second']:.0f} steps/s, raw {row['raw_per_second']:.0f}/s, ratio {row['ratio']:.3f}")
    server.client.drop_database(database)
    server.client.drop_database(raw_database)
    return row


def _take_turns(turns: Turns, writers: RawWriters, options: argparse.Namespace) -> dict[str, Any]:
    expected = writers.rate(options.find or 0.2, DRIVER_DEFAULT)["per_second"]
    way = writers.find_limit(options.find, _documents(expected, options.find))
    documents = _documents(expected, options.seconds)

    def raw() -> dict[str, float]:
        writers.prepare(documents)
        return writers.rate(options.seconds, way)

    limits = [raw()]
    rows = []
    for _ in range(options.rounds):
        runs = round(max(row["per_second"] for row in limits) * (options.seconds + options.settle) / _STEPS)
        worked = turns.inserted_before(WORKFLOW_ID, runs + options.workers * options.concurrency)
        limits.append(raw())
        ratio = worked["steps_per_second"] / mean(row["per_second"] for row in limits[-2:])
        raw_cpu_us = mean(row["mongod_us"] + row["clients_us"] for row in limits[-2:])
        rows.append({"ratio": ratio, "cpu_ratio": raw_cpu_us / sum(worked["cpu_us_per_step"].values()), **worked})
    return {
        "ratio": median(row["ratio"] for row in rows),
        "steps_per_second": median(row["steps_per_second"] for row in rows),
        "raw_per_second": median(row["per_second"] for row in limits),
        "raw_way": str(way),
        "cpu_ratio": median(row["cpu_ratio"] for row in rows),
        "ratio_spread": spread([row["ratio"] for row in rows]),
        "cpu_us_per_step": {name: median(row["cpu_us_per_step"][name] for row in rows) for name in rows[0]["cpu_us_per_step"]},
        "cpu_us_per_raw_update": {name: median(row[f"{name}_us"] for row in limits) for name in ("mongod", "clients")},
    }


def _documents(per_second: float, seconds: float) -> int:
    """For each writer: as many as it uses if it writes alone and twice as fast as expected."""
    return min(_DOCUMENTS_MAX, 50 + round(2 * per_second * seconds / _STEPS))
