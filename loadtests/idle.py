"""How many commands does an idle host send to the database, and how much processor time does it use, with one worker and with many?

The counters of the server are read before and after. Nothing is sent to it meanwhile, and our own commands are subtracted.
The profiler, which no counter counts, names the operations of the pool's database.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

from .common import Budget, Pool, Report, Server, cpu_seconds, pool, report_progress

__all__ = ["add_options", "measure"]

MONITORING = frozenset({"hello", "isMaster", "ping", "buildInfo"})
"""Commands that drivers send by themselves, to monitor the server."""

_OURS = "serverStatus"
_PROFILE_BYTES = 16 * 1024 * 1024


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this question."""
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 16], help="worker processes, pool by pool (default: 1 16)")
    parser.add_argument("--seconds", type=float, default=75.0, help="length of one measurement (default: %(default)s)")
    parser.add_argument("--settle", type=float, default=8.0, help="seconds between ready and the measurement (default: %(default)s)")


def measure(server: Server, options: argparse.Namespace) -> Report:
    """One pool after the other."""
    time.sleep(options.settle)  # a new server first runs its own start-up work
    without_pool = _commands(server, min(20.0, options.seconds))
    pools = {str(workers): _idle_pool(server, workers, options, without_pool) for workers in options.workers}
    figures = {
        "per_minute": {name: row["per_minute"] for name, row in pools.items()},
        "pool_cpu_percent": {name: row["cpu_percent"]["pool"] for name, row in pools.items()},
        "workers": pools,
        "without_a_pool": without_pool,
    }
    settings = {**server.facts, "seconds": options.seconds, "settle_s": options.settle, "monitoring": sorted(MONITORING)}
    budgets = [
        *(Budget(key=f"per_minute.{workers}", limit=40) for workers in options.workers),
        *(Budget(key=f"pool_cpu_percent.{workers}", limit=1.0) for workers in options.workers),
    ]
    notes = [
        "per_minute counts every command that the server has carried out except drivers' monitoring and our own serverStatus",
        "pool_cpu_percent: processor time of supervisor, steward and workers, in percent of one processor",
        "without_a_pool is the same count with no pool running; it is listed, not subtracted",
    ]
    return Report(question="idle", settings=settings, figures=figures, budgets=budgets, notes=notes)


def _idle_pool(server: Server, workers: int, options: argparse.Namespace, without_pool: dict[str, Any]) -> dict[str, Any]:
    database = server.database()
    with pool(server, database, "--workers", str(workers)) as running:
        time.sleep(options.settle)
        report_progress(f"{workers} idle workers: measuring for {options.seconds:g} s")
        profile = server.client[database]
        profile.create_collection("system.profile", capped=True, size=_PROFILE_BYTES)
        profile.command("profile", 2)
        before = _cpu(server, running)
        row = _commands(server, options.seconds)
        after = _cpu(server, running)
        row["cpu_percent"] = {name: (after[name] - before[name]) / options.seconds * 100 for name in before}
        profile.command("profile", 0)
        row["operations"] = _operations(server, database, options.seconds)
        return row


def _cpu(server: Server, running: Pool) -> dict[str, float]:
    parts = {"supervisor": [running.pid], "steward": [running.steward_pid()], "workers": running.worker_pids}
    seconds = {name: cpu_seconds(pids) for name, pids in parts.items()}
    return {"pool": sum(seconds.values()), **seconds, "mongod": server.cpu_seconds()}


def _commands(server: Server, seconds: float) -> dict[str, Any]:
    """Commands per minute by the server's counters, with monitoring counted separately."""
    before = _counters(server)
    started = time.monotonic()
    time.sleep(seconds)
    after = _counters(server)
    minutes = (time.monotonic() - started) / 60
    counted = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    counted[_OURS] = counted.get(_OURS, 1) - 1  # the second reading counts itself; the first was before
    rates = {name: round(count / minutes, 1) for name, count in sorted(counted.items()) if count}
    monitoring = {name: rate for name, rate in rates.items() if name in MONITORING}
    commands = {name: rate for name, rate in rates.items() if name not in MONITORING}
    return {
        "per_minute": round(sum(commands.values()), 1),
        "commands_per_minute": commands,
        "monitoring_per_minute": round(sum(monitoring.values()), 1),
        "monitoring_by_command": monitoring,
    }


def _counters(server: Server) -> dict[str, int]:
    status = server.client.admin.command(_OURS)
    commands = status["metrics"]["commands"]
    return {name: int(row["total"]) for name, row in commands.items() if isinstance(row, dict) and "total" in row}


def _operations(server: Server, database: str, seconds: float) -> dict[str, float]:
    """The operations of the pool in the profiler, by command and collection, per minute."""
    seen: Counter[str] = Counter()
    for entry in server.client[database]["system.profile"].find({"appName": "streamline-pool"}):
        command = entry.get("command", {})
        verb = "update" if entry["op"] == "update" else next(iter(command), entry["op"])
        seen[f"{verb} {entry['ns'].split('.', 1)[1]}"] += 1
    return {name: round(count * 60 / seconds, 1) for name, count in seen.most_common()}
