"""How much memory does one more idle worker need, and how soon after the command is a pool ready?

Memory is PSS: a page that several processes share counts for each with its part. So the sum over the pool is the memory
that the pool really uses. Linux only.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

from .common import Budget, Pool, Report, Server, percentile, pool, report_progress, spread

__all__ = ["add_options", "measure"]

_MIB = 1024 * 1024


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this question."""
    parser.add_argument("--few", type=int, default=2, help="workers of the smaller pool (default: %(default)s)")
    parser.add_argument("--many", type=int, default=10, help="workers of the larger pool (default: %(default)s)")
    parser.add_argument("--ready-workers", type=int, default=8, help="workers of the pool that is timed (default: %(default)s)")
    parser.add_argument("--starts", type=int, default=9, help="how often the start is timed (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="how often memory is measured (default: %(default)s)")
    parser.add_argument("--settle", type=float, default=3.0, help="seconds between ready and reading memory (default: %(default)s)")


def measure(server: Server, options: argparse.Namespace) -> Report:
    """A small pool and a large one, in turn; then the starts."""
    rounds = []
    for number in range(options.repeat):
        few, many = (_pss(server, workers, options.settle) for workers in (options.few, options.many))
        added = (many["pool_mib"] - few["pool_mib"]) / (options.many - options.few)
        rounds.append({"added_mib": added, "few_mib": few["pool_mib"], "many_mib": many["pool_mib"], **many["parts"]})
        report_progress(f"memory {number + 1}: {added:.2f} MiB per added worker")
    database = server.database()
    starts = [_start(server, database, options.ready_workers) for _ in range(options.starts)]
    figures = {
        "pss_per_added_worker_mib": median(row["added_mib"] for row in rounds),
        "ready_s": median(starts),
        "pss_spread_mib": spread([row["added_mib"] for row in rounds]),
        "ready_spread_s": {**spread(starts), "p90": percentile(starts, 0.9)},
        "rounds": rounds,
        "starts_s": [round(start, 3) for start in starts],
    }
    settings = {
        **server.facts,
        "few_workers": options.few,
        "many_workers": options.many,
        "ready_workers": options.ready_workers,
        "pss": "smaps_rollup of supervisor, steward and workers, summed",
        "ready": "from starting the command to its ready line; the server is up",
        "settle_s": options.settle,
    }
    budgets = [Budget(key="pss_per_added_worker_mib", limit=15), Budget(key="ready_s", limit=1.5)]
    notes = ["each figure is the median of its repetitions; the first start also creates collections and indexes"]
    return Report(question="memory", settings=settings, figures=figures, budgets=budgets, notes=notes)


def _start(server: Server, database: str, workers: int) -> float:
    with pool(server, database, "--workers", str(workers)) as running:
        report_progress(f"ready after {running.ready_s:.2f} s")
        return running.ready_s


def _pss(server: Server, workers: int, settle_s: float) -> dict[str, Any]:
    with pool(server, server.database(), "--workers", str(workers)) as running:
        time.sleep(settle_s)
        parts = _parts(running)
        in_workers = sum(parts["workers"])
        return {
            "pool_mib": (parts["supervisor"] + parts["steward"] + in_workers) / _MIB,
            "parts": {
                "supervisor_mib": parts["supervisor"] / _MIB,
                "steward_mib": parts["steward"] / _MIB,
                "worker_mib": in_workers / len(parts["workers"]) / _MIB,
            },
        }


def _parts(running: Pool) -> dict[str, Any]:
    return {
        "supervisor": pss_bytes(running.pid),
        "steward": pss_bytes(running.steward_pid()),
        "workers": [pss_bytes(pid) for pid in running.worker_pids],
    }


def pss_bytes(pid: int) -> int:
    """Proportional set size of a process, in bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/{pid}/smaps_rollup has no Pss line")
