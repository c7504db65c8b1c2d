"""What do the calls of a durable function cost, beside declared steps and beside the fastest way to write, and does a long one slow down?

One pool drives runs of ten no-op calls and runs of ten no-op declared steps by turns, with the raw writers of `throughput` between
them. Then this process drives one function of many calls: how long its first and its last hundred take, and what its replay costs.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from statistics import mean, median
from typing import Any

from streamline_pool import DurableContext, Streamline

from . import app as pool_app
from .common import Budget, Report, Server, add_pool_options, pool, report_progress, spread
from .raw import DRIVER_DEFAULT, raw_writers
from .turns import Turns

__all__ = ["add_options", "measure"]

_RUNS_PER_S_MAX = 1_000  # of ten steps each; a guess: twice the best rate seen
_HUNDRED = 100


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this question."""
    add_pool_options(parser, workers=2, concurrency=200)
    parser.add_argument("--rounds", type=int, default=12, help="turns of calls, declared steps and raw writers (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of one measurement (default: %(default)s)")
    parser.add_argument("--find", type=float, default=0.4, help="seconds of each measurement in the search for the limit; 0: no search")
    parser.add_argument("--settle", type=float, default=0.4, help="seconds that the pool works before each (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=2_000, help="calls of the long function (default: %(default)s)")
    parser.add_argument("--long-runs", type=int, default=3, help="how many long functions (default: %(default)s)")


def measure(server: Server, options: argparse.Namespace) -> Report:
    """Turns first, then the long functions."""
    figures = {**_turns(server, options), "long": _long(server, options)}
    settings = {
        **server.facts,
        "workers": options.workers,
        "concurrency": options.concurrency,
        "calls_per_run": pool_app.CALLS,
        "write_concern": "majority, journaled",
        "seconds_per_turn": options.seconds,
    }
    notes = [
        "ratio.of_declared_steps: the median, over the rounds, of calls/s divided by the mean of the declared steps/s before and after;"
        " ratio.of_the_limit: the same for the raw limit",
        "long: medians over the functions. last_to_first: the time of the last hundred calls by that of the first hundred;"
        " replay_us_per_call: processor time of this process from the entry to the last call whose result was stored",
    ]
    budgets = [
        Budget(key="ratio.of_declared_steps", limit=0.9, at_least=True),
        Budget(key="long.last_to_first", limit=1.3),
        Budget(key="long.replay_ms", limit=50),
    ]
    return Report(question="durable", settings=settings, figures=figures, budgets=budgets, notes=notes)


def _turns(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as stack:
        database = server.database()
        app = stack.enter_context(pool_app.client_app(server.uri, database, pool_app.ten_steps, pool_app.ten_calls))
        running = stack.enter_context(pool(server, database, "--workers", str(options.workers), "--concurrency", str(options.concurrency)))
        writers = stack.enter_context(raw_writers(server, server.database()))
        turns = Turns(server=server, app=app, running=running, seconds=options.seconds, settle_s=options.settle)
        turns.hold()
        runs = round(_RUNS_PER_S_MAX * (options.seconds + options.settle))
        limit = writers.find_limit(options.find)

        def declared() -> dict[str, Any]:
            return turns.inserted_before(pool_app.ten_steps.id, runs)

        def raw() -> float:
            return writers.rate(options.seconds, limit if options.find else DRIVER_DEFAULT)["per_second"]

        turns.inserted_before(pool_app.ten_calls.id, runs)  # warms up
        steps, raws, rows = [declared()], [raw()], []
        for number in range(options.rounds):
            called = turns.inserted_before(pool_app.ten_calls.id, runs)
            calls = called["steps_per_second"] * pool_app.CALLS / (pool_app.CALLS + 1)  # the function's own end is no call
            steps.append(declared())
            raws.append(raw())
            around = mean(row["steps_per_second"] for row in steps[-2:])
            cpu = {name: us * (pool_app.CALLS + 1) / pool_app.CALLS for name, us in called["cpu_us_per_step"].items()}
            rows.append({"calls": calls, "declared": calls / around, "limit": calls / mean(raws[-2:]), "cpu": cpu})
            report_progress(f"{number + 1}: {calls:.0f} calls/s, {around:.0f} steps/s, ratio {calls / around:.3f}")
    return {
        "ratio": {"of_declared_steps": median(row["declared"] for row in rows), "of_the_limit": median(row["limit"] for row in rows)},
        "calls_per_second": median(row["calls"] for row in rows),
        "steps_per_second": median(row["steps_per_second"] for row in steps),
        "raw_per_second": median(raws),
        "ratio_spread": spread([row["declared"] for row in rows]),
        "cpu_us_per_call": {name: median(row["cpu"][name] for row in rows) for name in rows[0]["cpu"]},
        "cpu_us_per_step": {name: median(row["cpu_us_per_step"][name] for row in steps) for name in steps[0]["cpu_us_per_step"]},
    }


def _long(server: Server, options: argparse.Namespace) -> dict[str, float]:
    marks: list[float] = []
    replay: list[float] = []
    database = server.database()

    async def noop() -> None:
        return None

    with Streamline(server.uri, database=database) as app:
        flow = app.workflow("long")

        @flow.main
        async def run(ctx: DurableContext) -> None:
            marks.append(time.monotonic())
            before = time.process_time()
            for _ in range(options.calls):
                await ctx.step("call", noop)
                marks.append(time.monotonic())
            replay.append(time.process_time() - before)
            await ctx.wait("go on")

        ratios, replays = [], []
        for number in range(options.long_runs):
            marks.clear()
            replay.clear()
            run_id = flow.start().id
            flow.execute(run_id)
            first = marks[_HUNDRED] - marks[0]
            last = marks[-1] - marks[-1 - _HUNDRED]
            flow.resume(run_id)
            flow.execute(run_id)
            ratios.append(last / first)
            replays.append(replay[-1])
            report_progress(f"long {number + 1}: first hundred {first:.3f} s, last {last:.3f} s; replay {replay[-1] * 1e3:.1f} ms")
    server.client.drop_database(database)
    return {
        "last_to_first": median(ratios),
        "replay_ms": median(replays) * 1e3,
        "replay_us_per_call": median(replays) / options.calls * 1e6,
    }
