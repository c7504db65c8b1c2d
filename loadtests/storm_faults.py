"""What goes wrong during the storm: killed and frozen workers, a killed steward, a restarted pool, a lost primary. Samples memory.

The first pool (`struck`) has its processes killed and is restarted once. In the second pool (`spared`) workers are only frozen, so
that its processes live from the beginning to the end and show whether their memory grows.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from pymongo import MongoClient
from pymongo.errors import PyMongoError

from streamline_pool import embedded
from streamline_pool.chaos.hosts import APP
from streamline_pool.chaos.ledger import FOLDER_VARIABLE, real_monotonic
from streamline_pool.chaos.overlaps import Strike, Suspension
from streamline_pool.embedded import EmbeddedServer

from .common import Pool, Server, pool, report_progress, until

__all__ = ["CRASHES_MAX", "LEASE_S", "Faults", "Members", "Memory", "Pools", "replica_set", "wait_until_whole"]

LEASE_S = 5.0
CRASHES_MAX = 10
_FROZEN_S = LEASE_S + 2.0
_ELECTION_MS = 3_000
_CALM_S = 2.0  # between two faults, so that the child that was killed is replaced
_DOWN_S = 6.0  # between the kill of a primary and its restart
_OPTIONS = (
    *("--workers", "2", "--lease", f"{LEASE_S:g}", "--stall-timeout", "60"),
    *("--restart-budget", "1000", "--max-crashes", str(CRASHES_MAX)),
)
_MIB = 1024 * 1024


# --- the replica set -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Members(Server):
    """A replica set of three members on this machine."""

    members: list[EmbeddedServer]

    def primary(self) -> EmbeddedServer:
        """The member that is primary now. Waits for an election."""
        with MongoClient[dict[str, Any]](self.uri) as client:
            client.admin.command("ping")
            address = client.primary
        assert address is not None, "the ping was answered by a primary"
        return next(member for member in self.members if member.port == address[1])


@contextmanager
def replica_set() -> Iterator[Members]:
    """Three private servers, the TTL monitor of each at its shortest period of one second."""
    report_progress("starting a replica set of three")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="streamline-storm-mongod-"))
        program = _mongod_with_a_quick_ttl(Path(folder, "mongod"))
        members = [stack.enter_context(embedded.start(None, mongod=program, initiate=False)) for _ in range(3)]
        hosts = [f"127.0.0.1:{member.port}" for member in members]
        with MongoClient[dict[str, Any]](hosts[0], directConnection=True) as first:
            first.admin.command("replSetInitiate", _configuration(hosts))
        client = stack.enter_context(MongoClient[dict[str, Any]](f"mongodb://{','.join(hosts)}/?replicaSet=rs0", tz_aware=True))
        client.admin.command("ping")
        facts = {"mongodb": client.server_info()["version"], "replica_set": "rs0", "members": 3, "cpus": os.cpu_count()}
        uri = f"mongodb://{','.join(hosts)}/?replicaSet=rs0"
        yield Members(uri=uri, pid=None, client=client, facts=facts, databases=[], members=members)


def _mongod_with_a_quick_ttl(script: Path) -> Path:
    """A program that is mongod with one more parameter. When it is set later, it counts from the monitor's next turn on, in a minute."""
    script.write_text(f'#!/bin/sh\nexec "{embedded.find_mongod()}" "$@" --setParameter ttlMonitorSleepSecs=1\n')
    script.chmod(0o700)
    return script


def _configuration(hosts: list[str]) -> dict[str, Any]:
    members = [{"_id": number, "host": host} for number, host in enumerate(hosts)]
    return {"_id": "rs0", "members": members, "settings": {"electionTimeoutMillis": _ELECTION_MS}}


# --- the pools -----------------------------------------------------------------------------------------------------


class Pools:
    """The two pools. `notes` is the folder of their ledger."""

    def __init__(self, server: Server, database: str, notes: str) -> None:
        self._server, self._database, self._notes = server, database, notes
        self._stacks = {"struck": ExitStack(), "spared": ExitStack()}
        self.running: dict[str, Pool] = {}
        self.stewards: dict[str, int] = {}  # their pids
        self.logs: list[str] = []  # of pools that have ended

    def __enter__(self) -> Pools:
        with ExitStack() as undo:
            undo.callback(self.end)
            for name in self._stacks:
                self.start(name)
            undo.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.end()

    def start(self, name: str) -> None:
        """Start a pool, and wait until it is ready."""
        context = pool(self._server, self._database, *_OPTIONS, app=APP, environment={FOLDER_VARIABLE: self._notes})
        running = self._stacks[name].enter_context(context)
        self.running[name], self.stewards[name] = running, running.steward_pid()

    def stop(self, name: str) -> None:
        """Drain a pool by SIGTERM, and keep its log."""
        running = self.running.pop(name, None)
        if running is not None:
            running.end()
            self.logs.append(running.log_text())
        self._stacks[name].close()

    def end(self) -> None:
        """Drain both."""
        for name in self._stacks:
            self.stop(name)

    def workers(self, name: str) -> list[int]:
        """The pids of a pool's workers now."""
        return [pid for pid in self.running[name].pids()[1:] if pid != self.stewards[name]]

    def log_text(self) -> str:
        """The logs so far, of all pools."""
        return "\n".join([*self.logs, *(running.log_text() for running in self.running.values())])


# --- the faults ----------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Faults:
    """Performs a plan of faults.

    On the main thread: the kernel kills a pool of the load tests when the thread that started it has ended (ending.py).
    """

    server: Members
    pools: Pools
    wait: Callable[[float], None]  # for so many seconds; raises what has failed meanwhile
    counts: Counter[str] = field(default_factory=Counter)
    failed_over_at: float = 0.0
    suspensions: list[Suspension] = field(default_factory=list)
    dead: set[int] = field(default_factory=set)  # pids that were killed
    strikes: list[Strike] = field(default_factory=list)

    def plan(self, seconds: float) -> list[tuple[float, Callable[[], None]]]:
        """Instants in seconds from the beginning, and what happens then."""
        every_s = min(20.0, seconds / 5)
        plan = [(every_s * (n + 1), self.kill_worker) for n in range(int((seconds - 2.0) / every_s))]
        plan += [(every_s * (1.5 + 3 * n), self.freeze_worker) for n in range(int(seconds / every_s / 3))]
        plan += [(0.3 * seconds, self.restart_pool), (0.4 * seconds, self.kill_steward), (0.5 * seconds, self.kill_primary)]
        if seconds >= 120:
            plan.append((0.75 * seconds, self.step_down))
        return sorted(plan, key=lambda item: item[0])

    def run(self, seconds: float) -> None:
        """Perform the plan, as far as there is time for it. Return after `seconds`, or when the last fault is over."""
        begun = time.monotonic()
        for at_s, happen in self.plan(seconds):
            self.wait(max(_CALM_S, begun + at_s - time.monotonic()))
            if time.monotonic() - begun > seconds:
                return
            report_progress(f"{time.monotonic() - begun:.0f} s: {happen.__name__}")
            happen()
        self.wait(begun + seconds - time.monotonic())

    def kill_worker(self) -> None:
        """SIGKILL one worker."""
        self._signal("workers killed", self.pools.workers("struck"), signal.SIGKILL)

    def kill_steward(self) -> None:
        """SIGKILL the steward, and wait until it is replaced."""
        running = self.pools.running["struck"]
        before = set(running.pids())
        self._signal("stewards killed", [self.pools.stewards["struck"]], signal.SIGKILL)
        until(lambda: bool(set(running.pids()) - before), "the steward is replaced", _CALM_S)
        self.pools.stewards["struck"] = (set(running.pids()) - before).pop()

    def freeze_worker(self) -> None:
        """SIGSTOP one worker for longer than its leases, then SIGCONT it."""
        pid = self._signal("workers frozen", self.pools.workers(random.choice(("struck", "spared"))), signal.SIGSTOP)
        if pid is not None:
            begun = real_monotonic()
            try:
                self.wait(_FROZEN_S)
            finally:
                self._signal("workers continued", [pid], signal.SIGCONT)
                self.suspensions.append(Suspension(pid, begun, real_monotonic()))
                self.strikes.append(Strike(frozenset({pid}), begun, real_monotonic()))

    def _signal(self, name: str, pids: list[int], signum: signal.Signals) -> int | None:
        if not pids:
            return None
        pid = random.choice(pids)
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            return None
        self.counts[name] += 1
        if signum == signal.SIGKILL:
            self.dead.add(pid)
        return pid

    def restart_pool(self) -> None:
        """SIGTERM a supervisor, wait for its end, and start it again."""
        self.pools.stop("struck")
        self.pools.start("struck")
        self.counts["pools restarted"] += 1

    def kill_primary(self) -> None:
        """SIGKILL the primary. Another member is elected; the dead one comes back as a secondary."""
        member = self.server.primary()
        self.strikes.append(Strike(None, real_monotonic(), real_monotonic() + 2 * _DOWN_S))
        member.kill()
        self.failed_over_at = time.monotonic()
        self.counts["primaries killed"] += 1
        self.wait(_DOWN_S)
        member.restart()

    def step_down(self) -> None:
        """Have the primary step down."""
        self.strikes.append(Strike(None, real_monotonic(), real_monotonic() + _DOWN_S))
        with MongoClient[dict[str, Any]](self.server.uri) as client:
            try:
                client.admin.command("replSetStepDown", 20, secondaryCatchUpPeriodSecs=5)
            except PyMongoError as exc:
                report_progress(f"replSetStepDown: {exc}")
        self.counts["primaries stepped down"] += 1


# --- memory --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Memory:
    """Resident memory of every process of both pools, sampled on a thread of its own."""

    pools: Pools
    period_s: float = 2.0
    samples: dict[tuple[str, str, int], list[tuple[float, float]]] = field(default_factory=dict)  # (pool, role, pid) → (seconds, MiB)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Sample until `stop`."""
        begun = time.monotonic()
        while not self._stop.wait(self.period_s):
            for name, running in list(self.pools.running.items()):
                for place, pid in enumerate(running.pids()):
                    role = "supervisor" if place == 0 else "steward" if pid == self.pools.stewards[name] else "worker"
                    try:
                        rss = psutil.Process(pid).memory_info().rss / _MIB
                    except psutil.NoSuchProcess:
                        continue
                    self.samples.setdefault((name, role, pid), []).append((time.monotonic() - begun, rss))

    def stop(self) -> None:
        """End `run`."""
        self._stop.set()

    def rows(self, settle_s: float, window_s: float, limit_mib: float, limit_share: float) -> list[dict[str, Any]]:
        """One row for each process that lived long enough: quartiles, and growth from the window after `settle_s` to its last window."""
        rows = []
        for (name, role, pid), series in self.samples.items():
            born_s, last_s = series[0][0], series[-1][0]
            kept = [(at, rss) for at, rss in series if at >= born_s + settle_s]
            if last_s - born_s < settle_s + 2 * window_s or len(kept) < 4:
                continue
            first = statistics.median([rss for at, rss in kept if at <= born_s + settle_s + window_s])
            last = statistics.median([rss for at, rss in kept if at >= last_s - window_s])
            low, middle, high = statistics.quantiles([rss for _, rss in kept], n=4)
            rows.append(
                {
                    **{"pool": name, "role": role, "pid": pid, "lived_s": last_s - born_s, "first_mib": first, "last_mib": last},
                    **{"grown_mib": last - first, "p25_mib": low, "p50_mib": middle, "p75_mib": high},
                    "flat": last - first <= max(limit_mib, limit_share * first),
                }
            )
        return rows


def wait_until_whole(server: Members, timeout_s: float = 120.0) -> None:
    """Return when every member of the set is primary or secondary."""

    def whole() -> bool:
        try:
            members = server.client.admin.command("replSetGetStatus")["members"]
        except PyMongoError:
            return False
        return all(member["stateStr"] in ("PRIMARY", "SECONDARY") for member in members)

    until(whole, "every member of the replica set is back", timeout_s)
