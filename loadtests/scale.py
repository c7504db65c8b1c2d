"""Is claiming slower in a large collection, and do many workers claim without conflicts?

Claims are timed in turn in two databases of one server: one empty, one with hundreds of thousands of runs that no worker
can claim. Then sixteen workers of one pool work on a queue in the full one, and record what each claim won.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median
from typing import Any, Self

from streamline_pool import Streamline
from streamline_pool.protocol.claims import claim_runs, find_due, read_claimed
from streamline_pool.protocol.operations import Find
from streamline_pool.worker.poller import Poller

from . import ballast
from .app import CLAIMS_VARIABLE, client_app, noop
from .common import Budget, Report, Server, pool, report_progress, spread, until

__all__ = ["add_options", "measure"]

_CLAIM = 100  # runs in one claim, as a worker with the default concurrency asks for
_OWNER = "host:1:loadtest"
_LEASE_S = 600.0  # none expires during the measurement
_RUN_TIMEOUT_S = 120.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this question."""
    parser.add_argument("--finished", type=int, default=200_000, help="finished runs in the full collection (default: %(default)s)")
    parser.add_argument("--sleeping", type=int, default=200_000, help="sleeping runs in it (default: %(default)s)")
    parser.add_argument(
        "--absent", type=int, default=100_000, help="claimable runs of a workflow that the pool lacks (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=8, help="turns of the two collections (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3_000, help="runs claimed in a turn (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=16, help="workers that claim at once (default: %(default)s)")
    parser.add_argument("--queue", type=int, default=20_000, help="runs in the queue of these workers (default: %(default)s)")
    parser.add_argument("--single-starts", type=int, default=300, help="runs started one by one while they are idle (default: %(default)s)")


def measure(server: Server, options: argparse.Namespace) -> Report:
    """Fill one database, time claims in turn, then let many workers claim in the full one."""
    empty, full = server.database(), server.database()
    with ExitStack() as stack:
        apps = {name: stack.enter_context(client_app(server.uri, name, noop)) for name in (empty, full)}
        for app in apps.values():
            app.init_db()
        started = time.monotonic()
        ballast.fill(server, full, options.finished, options.sleeping, options.absent)
        report_progress(f"filled in {time.monotonic() - started:.0f} s")
        with _Claimer(apps[empty]) as in_empty, _Claimer(apps[full]) as in_full:
            rounds = _take_turns(server, in_empty, in_full, options)
        polls = {"empty": _examined(server, apps[empty], options.runs), "full": _examined(server, apps[full], options.runs)}
        efficiency = {"full": _efficiency(server, apps[full], options), "empty": _efficiency(server, apps[empty], options)}
    ratios = [row["ratio"] for row in rounds]
    figures = {
        "claim_time_ratio": median(ratios),
        "claim_efficiency": efficiency["full"]["inserted_before"]["efficiency"],
        "claim_us_per_run": {name: median(row[f"{name}_us"] for row in rounds) for name in ("empty", "full")},
        "claim_mongod_us_per_run": {name: median(row[f"{name}_mongod_us"] for row in rounds) for name in ("empty", "full")},
        "claim_time_ratio_spread": spread(ratios),
        "rounds": rounds,
        "one_poll": polls,
        "efficiency": efficiency,
    }
    settings = {
        **server.facts,
        "finished": options.finished,
        "sleeping": options.sleeping,
        "claimable_of_an_absent_workflow": options.absent,
        "claim": f"a worker's poll, claim_runs, read_claimed: {_CLAIM} runs at a time, majority",
        "runs_per_turn": options.runs,
        "workers": options.workers,
        "queue_for_efficiency": options.queue,
    }
    budgets = [Budget(key="claim_time_ratio", limit=1.2), Budget(key="claim_efficiency", limit=0.9, at_least=True)]
    notes = [
        "claim_time_ratio: over the rounds, the median of the time in the full collection divided by the mean of the empty ones beside it",
        "efficiency: runs won divided by runs tried, over every claim of every worker of the pool",
        "finished and sleeping runs are of the workflow that is claimed, so they would slow its claims down most",
    ]
    return Report(question="scale", settings=settings, figures=figures, budgets=budgets, notes=notes)


# --- the time of a claim -------------------------------------------------------------------------------------------


def _take_turns(server: Server, empty: _Claimer, full: _Claimer, options: argparse.Namespace) -> list[dict[str, float]]:
    """Empty, full, empty, full, …, empty."""
    for claimer in (empty, full):
        claimer.claim_all(server, options.runs)  # warms up
    blanks = [empty.claim_all(server, options.runs)]
    rows = []
    for number in range(options.rounds):
        measured = full.claim_all(server, options.runs)
        blanks.append(empty.claim_all(server, options.runs))
        beside = {key: mean(blank[key] for blank in blanks[-2:]) for key in measured}
        row = {
            "ratio": measured["us"] / beside["us"],
            "full_us": measured["us"],
            "empty_us": beside["us"],
            "full_mongod_us": measured["mongod_us"],
            "empty_mongod_us": beside["mongod_us"],
        }
        rows.append(row)
        times = f"{row['full_us']:.0f} us per run in the full one, {row['empty_us']:.0f} in the empty one"
        report_progress(f"claim {number + 1}: {times}, {row['ratio']:.3f}")
    return rows


class _Claimer:
    """Claims as one of two workers does. It lives as long as the measurement, because a worker remembers what it has polled."""

    def __init__(self, app: Streamline) -> None:
        self.app = app
        self._poller = Poller(app.lanes(), 0, 2, app.env)
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self.app.close_async())
        self._runner.close()

    def claim_all(self, server: Server, runs: int) -> dict[str, float]:
        """Insert runs and claim them: microseconds per run, and mongod's processor time in that."""
        ballast.insert(server, self.app.where.database, (ballast.claimable(noop) for _ in range(runs)))
        started, cpu = time.perf_counter(), server.cpu_seconds()
        self._runner.run(self._claim(runs))
        taken_s, cpu_s = time.perf_counter() - started, server.cpu_seconds() - cpu
        self.app.runs.delete_many({"lease.owner": _OWNER, "lease.expiresAt": {"$exists": True}})
        return {"us": taken_s / runs * 1e6, "mongod_us": cpu_s / runs * 1e6}

    async def _claim(self, runs: int) -> None:
        store, lanes, won = self.app.store_async(), self.app.lanes(), 0
        while won < runs:
            rows, _ = await self._poller.poll(store, _CLAIM, None)
            if not rows:  # an insert that took longer than polls look back; the steward would have announced these runs as overdue
                self._poller.forget()
                continue
            run_ids = [row["_id"] for row in rows]
            lease_id = self.app.env.new_id()
            won += await store.run(claim_runs(run_ids, lanes, lease_id, _OWNER, _LEASE_S))
            assert len(await store.run(read_claimed(run_ids, lease_id))) == len(run_ids), "no other process claims here"


def _examined(server: Server, app: Streamline, runs: int) -> dict[str, Any]:
    """What the server examines for one poll of a queue of so many runs, by `explain`: from the start, and where the last one began."""
    begun = app.store().now()
    ballast.insert(server, app.where.database, (ballast.claimable(noop) for _ in range(runs)))
    examined = {
        "full": _explained(app, find_due(app.lanes(), None, app.store().now(), _CLAIM, None)),
        "following": _explained(app, find_due(app.lanes(), None, app.store().now(), _CLAIM, None, since=begun)),
    }
    app.runs.delete_many({"lane": {"$in": list(app.lanes())}, "wakeAt": {"$lte": datetime.now(UTC)}})
    return examined


def _explained(app: Streamline, poll: Find) -> dict[str, Any]:
    command = {
        "find": app.runs.name,
        "filter": poll.filter,
        "projection": poll.projection,
        "sort": dict(poll.sort),
        "limit": poll.limit,
        "hint": poll.hint,
    }
    stats = app.runs.database.command("explain", command, verbosity="executionStats")["executionStats"]
    return {"returned": stats["nReturned"], "keys_examined": stats["totalKeysExamined"], "docs_examined": stats["totalDocsExamined"]}


# --- many workers --------------------------------------------------------------------------------------------------


def _efficiency(server: Server, app: Streamline, options: argparse.Namespace) -> dict[str, Any]:
    """Two queues: one that is full when the pool starts, and one that gets single runs while the workers are idle."""
    workflow = app.workflows[noop.id]
    with tempfile.TemporaryDirectory(prefix="streamline-loadtest-") as folder:
        claims = Path(folder, "claims")
        # `counted` is imported by the pool only, because importing it is what makes workers count.
        workflow.start_many([None] * options.queue)
        noted = {CLAIMS_VARIABLE: str(claims)}
        with pool(server, app.where.database, "--workers", str(options.workers), app="loadtests.counted:app", environment=noted):
            until(lambda: not _unfinished(app), f"{options.queue} runs", _RUN_TIMEOUT_S)
            inserted_before = _summary(claims.read_text().splitlines())
            lines_before = len(claims.read_text().splitlines())
            for _ in range(options.single_starts):
                workflow.wait_for(workflow.start().id, timeout=_RUN_TIMEOUT_S)
            one_by_one = _summary(claims.read_text().splitlines()[lines_before:])
    report_progress(f"efficiency {inserted_before['efficiency']:.3f}, one by one {one_by_one['efficiency']:.3f}")
    return {"inserted_before": inserted_before, "started_one_by_one": one_by_one}


def _unfinished(app: Streamline) -> bool:
    """True if any run is due or held."""
    due = {"lane": {"$in": list(app.lanes())}, "wakeAt": {"$lte": datetime.now(UTC)}}
    held = {"lease.expiresAt": {"$exists": True}}
    queries = ((due, "streamline_claimable"), (held, "streamline_lease"))
    return any(app.runs.find_one(query, {"_id": 1}, hint=hint) is not None for query, hint in queries)


def _summary(lines: list[str]) -> Mapping[str, float]:
    """Runs won divided by runs tried, over the recorded claims."""
    rows = [(kind, int(tried), int(won)) for kind, tried, won in (line.split() for line in lines)]
    tried, won = sum(row[1] for row in rows), sum(row[2] for row in rows)
    claims = [row for row in rows if row[0] != "empty"]
    return {
        "efficiency": won / tried if tried else 0.0,
        "runs_tried": tried,
        "runs_won": won,
        "claims": len(claims),
        "claims_that_won_nothing": sum(1 for row in claims if not row[2]),
        "polls_that_found_nothing": len(rows) - len(claims),
    }
