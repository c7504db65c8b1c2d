"""The soak: very many short runs over every capability, while each process is watched. Owns the experiment; flatness.py judges it.

A real pool (supervisor, steward, workers) on a private mongod, and one client process (soak_client.py). The readings of each process
become series over the number of ended runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import psutil

from loadtests.common import Pool, Server, pool, report_progress, serving

from .flatness import JUDGED_RUNS, MEMORY_SLOPE_MAX_MIB, WARM_UP_SHARE, Point, judge_all
from .sampler import QUANTITIES, read_connections, read_process

__all__ = ["CONNECTIONS", "Options", "measure"]

APPLICATION = "tests.reliability.soak_app:app"
CONNECTIONS = "server connections"
_ROOT = Path(__file__).resolve().parents[2]
_POINTS_MAX = 120  # of a series in the result: enough for the plot


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How the soak is made."""

    runs: int = 1_000_000
    seconds: int = 86_400  # after which no more runs are started
    workers: int = 2
    open_max: int = 4000  # runs that are started and not deleted yet
    interval_s: float = 2.0  # between two readings
    seed: int = 1


@dataclass(slots=True)
class _Client:
    """The client process and its latest report."""

    process: subprocess.Popen[str]
    report: dict[str, Any] = field(default_factory=lambda: {"ended": 0, "seen": {}, "wrong": []})

    def read(self) -> None:
        """A thread: keep the latest report."""
        assert self.process.stdout is not None, "it was started with a pipe"
        for line in self.process.stdout:
            self.report = json.loads(line)


def measure(options: Options) -> dict[str, Any]:
    """The result: figures, verdicts, and the series by name. RuntimeError if a process ends before its time."""
    with serving(None) as server:
        database = server.database()
        arguments = ("--workers", str(options.workers), "--log-level", "warning")
        with pool(server, database, *arguments, app=APPLICATION) as running, _client(server, database, options) as client:
            started_at = time.monotonic()
            series = _watch(running, server, client, options)
            seconds = time.monotonic() - started_at
    ended = client.report["ended"]
    verdicts = judge_all(series) if ended >= JUDGED_RUNS else []
    return {
        "runs": ended,
        "seconds": round(seconds, 1),
        "runs_per_second": round(ended / seconds, 1),
        "workers": options.workers,
        "seen": client.report["seen"],
        "wrong": client.report["wrong"],
        "is_judged": ended >= JUDGED_RUNS,
        "warm_up_share": WARM_UP_SHARE,
        "memory_slope_max_mib": MEMORY_SLOPE_MAX_MIB,
        "verdicts": [verdict.document() for verdict in verdicts],
        "not_flat": [verdict.name for verdict in verdicts if not verdict.flat],
        "series": {name: _thinned(points) for name, points in series.items()},
    }


@contextmanager
def _client(server: Server, database: str, options: Options) -> Iterator[_Client]:
    """The client process. It is killed at the end of the block if it has not ended."""
    numbers = [str(number) for number in (options.runs, options.seconds, options.open_max, options.seed)]
    command = [sys.executable, "-m", "tests.reliability.soak_client", str(os.getpid()), server.uri, database, *numbers]
    process = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    client = _Client(process)
    reader = Thread(target=client.read, name="client reports")
    reader.start()
    try:
        yield client
    finally:
        process.kill()
        process.wait()
        reader.join()
        if process.stdout is not None:
            process.stdout.close()


def _watch(running: Pool, server: Server, client: _Client, options: Options) -> dict[str, list[Point]]:
    """Read all processes at the interval, until the client has ended."""
    processes = _processes(running, client.process.pid)
    series: dict[str, list[Point]] = {f"{name} {quantity}": [] for name in processes for quantity in QUANTITIES}
    series[CONNECTIONS] = []
    shown_at = time.monotonic()
    while client.process.poll() is None:
        ended = float(client.report["ended"])
        try:
            readings = {name: read_process(process) for name, process in processes.items()}
        except psutil.NoSuchProcess as exc:
            if client.process.poll() is not None:
                break
            raise RuntimeError(f"process {exc.pid} of {processes} ended during the soak:\n{running.log_text()[-4000:]}") from None
        for name, quantities in readings.items():
            for quantity, value in quantities.items():
                series[f"{name} {quantity}"].append((ended, value))
        series[CONNECTIONS].append((ended, read_connections(server.client)))
        if time.monotonic() - shown_at > 10:
            shown_at = time.monotonic()
            report_progress(_progress(ended, options.runs, readings))
        try:
            client.process.wait(options.interval_s)
        except subprocess.TimeoutExpired:
            continue
    if client.process.returncode != 0:
        raise RuntimeError(f"the client ended with status {client.process.returncode}")
    return {name: points[:-1] for name, points in series.items()}  # the last reading may be of a client that was closing its connections


def _processes(running: Pool, client_pid: int) -> dict[str, psutil.Process]:
    workers = {f"worker {number}": pid for number, pid in enumerate(sorted(running.worker_pids), 1)}
    pids = {**workers, "steward": running.steward_pid(), "supervisor": running.pid, "client": client_pid}
    return {name: psutil.Process(pid) for name, pid in pids.items()}


def _progress(ended: float, runs: int, readings: Mapping[str, Mapping[str, float]]) -> str:
    memory = ", ".join(f"{name} {values['uss_mib']:.2f}" for name, values in readings.items())
    return f"soak: {ended:.0f} of {runs} runs; USS in MiB: {memory}"


def _thinned(points: list[Point]) -> list[list[float]]:
    """At most 120 points, evenly chosen, for the plot."""
    step = max(1, -(-len(points) // _POINTS_MAX))
    return [[runs, round(value, 2)] for runs, value in points[::step]]
