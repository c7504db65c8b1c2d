"""Shared parts of the load tests: a server, the pool as the real command, processor time, and the report.

Every process that is started here is ended here, by its process id, also after a failure or an interrupt. If this process
is killed, its pool and its private mongod end by themselves.
"""

from __future__ import annotations

import argparse
import ipaddress
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from uuid import uuid4

import psutil
from pymongo import MongoClient
from pymongo.uri_parser import parse_uri

from streamline_pool import embedded

__all__ = [
    "Budget",
    "NotLoopbackError",
    "Pool",
    "Report",
    "Server",
    "UsageError",
    "cpu_seconds",
    "percentile",
    "pool",
    "report_progress",
    "serving",
    "spread",
    "until",
]

ROOT = Path(__file__).resolve().parents[1]
COMMAND = (sys.executable, "-m", "loadtests.pool_process", str(os.getpid()))
READY_TIMEOUT_S = 60.0
END_TIMEOUT_S = 20.0

_HAS_PROCESS_CLOCKS = sys.platform.startswith("linux")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The limit of a figure. `key` is the path of the figure in the report, such as `workers.16.per_minute`."""

    key: str
    limit: float
    at_least: bool = False  # True: the figure must reach the limit; False: it must not exceed it

    def figure(self, figures: Mapping[str, Any]) -> float:
        """The figure at `key`."""
        found: Any = figures
        for name in self.key.split("."):
            found = found[name]
        return float(found)

    def holds(self, figures: Mapping[str, Any]) -> bool:
        """True if the budget is met."""
        figure = self.figure(figures)
        return figure >= self.limit if self.at_least else figure <= self.limit


@dataclass(slots=True, kw_only=True)
class Report:
    """The answer to one question."""

    question: str
    settings: dict[str, Any]  # how it was measured
    figures: dict[str, Any]  # measured values; nested for detail
    budgets: Sequence[Budget] = ()
    notes: list[str] = field(default_factory=list)  # for readers of the text form

    @property
    def met(self) -> bool:
        """True if all budgets are met."""
        return all(budget.holds(self.figures) for budget in self.budgets)

    def document(self) -> dict[str, Any]:
        """The JSON document: the figures, with their settings, budgets and notes."""
        budgets = [
            {
                "key": b.key,
                "figure": b.figure(self.figures),
                "limit": b.limit,
                "wanted": ">=" if b.at_least else "<=",
                "met": b.holds(self.figures),
            }
            for b in self.budgets
        ]
        return {
            "question": self.question,
            **self.figures,
            "settings": self.settings,
            "budgets": budgets,
            "met": self.met,
            "notes": self.notes,
        }

    def text(self) -> str:
        """The same as text for people."""
        lines = [f"{self.question}", "  settings"]
        lines += [f"    {name}: {_shown(value)}" for name, value in self.settings.items()]
        lines += ["  figures", *_outline(self.figures, "    ")]
        for budget in self.budgets:
            result = "met" if budget.holds(self.figures) else "MISSED"
            wanted = "at least" if budget.at_least else "at most"
            lines.append(f"  budget {budget.key}: {budget.figure(self.figures):.4g}, wanted {wanted} {budget.limit:g}: {result}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def _outline(figures: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}:"
            yield from _outline(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield f"{indent}{name}:"
            yield from (f"{indent}  " + ", ".join(f"{key} {_shown(item)}" for key, item in row.items()) for row in value)
        else:
            yield f"{indent}{name}: {_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"
    if isinstance(value, list):
        return ", ".join(_shown(item) for item in value)
    return str(value)


def report_progress(text: str) -> None:
    """Print progress on standard error. Standard output is for the report."""
    print(text, file=sys.stderr, flush=True)


# --- figures -------------------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which that share of the values lies (nearest rank)."""
    ordered = sorted(values)
    return ordered[
        max(0, math.ceil(share * len(ordered) - 1e-9) - 1)
    ]  # the margin is for shares such as 0.29, which are rounded up in binary


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum of repeated measurements."""
    return {"min": min(values), "median": median(values), "max": max(values)}


def cpu_seconds(pids: Sequence[int]) -> float:
    """Seconds of processor time that these processes have used so far; 0 for a process that has ended."""
    return sum(_cpu_seconds(pid) for pid in pids)


def _cpu_seconds(pid: int) -> float:
    try:
        if _HAS_PROCESS_CLOCKS:
            return time.clock_gettime((~pid << 3) | 2)  # the process's clock, by the ABI of clock_getcpuclockid, in ns
        times = psutil.Process(pid).cpu_times()  # in ticks of 10 ms
        return float(times.user + times.system)
    except (OSError, psutil.NoSuchProcess):
        return 0.0


def until(holds: Callable[[], bool], what: str, timeout_s: float, poll_s: float = 0.1) -> None:
    """Poll until `holds()` is true; TimeoutError that names `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(poll_s)


# --- the server ----------------------------------------------------------------------------------------------------


class UsageError(Exception):
    """The options cannot be used together or on this server. The command ends with status 2."""


class NotLoopbackError(UsageError):
    """The URI names a server on another machine. Load tests fill databases, so they use a local server only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The MongoDB under test. The databases that `database` names are dropped at the end."""

    uri: str
    pid: int | None  # of mongod, to read its processor time; None if it was not started here
    client: MongoClient[dict[str, Any]]
    facts: Mapping[str, Any]
    databases: list[str]

    def database(self) -> str:
        """The name of a new database."""
        self.databases.append(f"streamline_loadtest_{uuid4().hex[:12]}")
        return self.databases[-1]

    def cpu_seconds(self) -> float:
        """Seconds of processor time of mongod so far; 0 if it was not started here."""
        return cpu_seconds([self.pid]) if self.pid is not None else 0.0


@contextmanager
def serving(uri: str | None) -> Iterator[Server]:
    """A private mongod in a temporary folder, or the server at `uri`, which must be on this machine."""
    if uri is not None:
        refuse_unless_loopback(uri)
        with _connected(uri, None) as server:
            yield server
        return
    report_progress("starting a private mongod")
    with embedded.start(None) as mongod, _connected(mongod.uri, mongod.pid) as server:
        yield server


@contextmanager
def _connected(uri: str, pid: int | None) -> Iterator[Server]:
    with MongoClient[dict[str, Any]](uri, tz_aware=True) as client:
        version = client.server_info()["version"]
        hello = client.admin.command("hello")
        for address in [*hello.get("hosts", ()), *hello.get("passives", ())]:
            _refuse_host(address.rsplit(":", 1)[0].strip("[]"), address)
        facts = {"mongodb": version, "replica_set": hello.get("setName"), "started_here": pid is not None, "cpus": os.cpu_count()}
        server = Server(uri=uri, pid=pid, client=client, facts=facts, databases=[])
        try:
            yield server
        finally:
            for name in server.databases:
                client.drop_database(name)


def refuse_unless_loopback(uri: str) -> None:
    """NotLoopbackError if any host of the URI is not a loopback address."""
    if uri.startswith("mongodb+srv:"):
        raise NotLoopbackError("a mongodb+srv: address names its hosts in DNS; load tests run on a server of this machine only")
    for host, _port in parse_uri(uri, warn=False)["nodelist"]:
        _refuse_host(host, host)


def _refuse_host(host: str, shown: str) -> None:
    if host == "localhost" or host.startswith("/"):  # a path is a Unix socket
        return
    try:
        if ipaddress.ip_address(host).is_loopback:
            return
    except ValueError:
        pass
    raise NotLoopbackError(f"{shown} is not a loopback address; load tests run on a server of this machine only")


# --- the pool ------------------------------------------------------------------------------------------------------


class Pool:
    """A running pool, started by the real command; see `pool`."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, started_at: float) -> None:
        self.pid = process.pid  # of the supervisor
        self.ready_s = 0.0  # from the command to its ready line
        self.worker_pids: list[int] = []
        self._process = process
        self._log = log
        self._started_at = started_at

    def log_text(self) -> str:
        """The log so far."""
        return self._log.read_text(errors="replace")

    def wait_ready(self) -> None:
        """Return when the log has its ready line. The log is read every millisecond, which limits the precision of `ready_s`."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not (ready := re.search(r"\bready workers=\d+ pids=\[([\d, ]*)\]", self.log_text())):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the pool did not become ready:\n{self.log_text()}")
            time.sleep(0.001)
        self.ready_s = time.monotonic() - self._started_at
        self.worker_pids = [int(pid) for pid in ready[1].split(",") if pid.strip()]

    def pids(self) -> list[int]:
        """Supervisor, steward and workers."""
        try:
            return [self.pid, *(child.pid for child in psutil.Process(self.pid).children())]
        except psutil.NoSuchProcess:
            return []

    def steward_pid(self) -> int:
        """The child process that is no worker."""
        return next(pid for pid in self.pids() if pid != self.pid and pid not in self.worker_pids)

    def signal(self, signum: signal.Signals) -> None:
        """Send the supervisor a signal."""
        self._process.send_signal(signum)

    def end(self) -> None:
        """Drain the pool. Kill its processes that do not end."""
        pids = self.pids() if self._process.poll() is None else []
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                report_progress("the pool does not end and is killed")
        for pid in pids[::-1]:
            if pid == self.pid or _is_alive_in_group(pid, self.pid):
                _kill(pid)
        self._process.wait()


def _is_alive_in_group(pid: int, group: int) -> bool:
    """The pid may belong to another program by now. The processes of the pool are those of its own session."""
    try:
        return os.getsid(pid) == group
    except ProcessLookupError:
        return False


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


@contextmanager
def pool(
    server: Server, database: str, *options: str, app: str = "loadtests.app:app", environment: Mapping[str, str] | None = None
) -> Iterator[Pool]:
    """The real command on that database. Yields when it is ready; ends it with the block."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("STREAMLINE_")}
    arguments = [*COMMAND, "--app", app, "--mongodb-uri", server.uri, "--database", database, *options]
    with tempfile.TemporaryDirectory(prefix="streamline-loadtest-") as folder:
        log = Path(folder, "pool.log")
        with log.open("wb") as stderr:
            started_at = time.monotonic()
            # A session of its own, so that ^C reaches this process only, which then drains the pool.
            process = subprocess.Popen(
                arguments, cwd=ROOT, env={**inherited, **(environment or {})}, stdout=stderr, stderr=stderr, start_new_session=True
            )
        running = Pool(process, log, started_at)
        try:
            running.wait_ready()
            yield running
        finally:
            running.end()


def add_pool_options(parser: argparse.ArgumentParser, *, workers: int, concurrency: int) -> None:
    """The options of the questions that run a pool."""
    parser.add_argument("--workers", type=int, default=workers, help="worker processes (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=concurrency, help="active runs per worker (default: %(default)s)")
