"""Processes die at any moment: workers by SIGKILL, workers at each named point of the commit path, frozen workers."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos_app import APP, acceptances, assert_nothing_is_wedged, entries_overlap, log_line
from pool_client import loaded_app
from pool_process import PoolProcess, running

from streamline_pool import Streamline
from streamline_pool.config.env import PROBE_POINTS
from support import eventually

pytestmark = pytest.mark.chaos

KILLS = 50
RECOVERY_P99_S = 1.0


@pytest.fixture
def app(mongodb_uri: str, database: str) -> Iterator[Streamline]:
    """The application of the pool in the test's own process, as a client."""
    with loaded_app(APP, mongodb_uri, database) as app:
        yield app


def owner_pid(document: dict[str, Any]) -> int:
    return int(document["lease"]["owner"].split(":")[1])


def all_ended(app: Streamline, count: int) -> bool:
    return bool(app.runs.count_documents({"status": {"$in": ["done", "failed", "cancelled"]}}) == count)


@pytest.mark.timeout(500)
def test_fifty_killed_workers_lose_nothing_and_their_runs_are_recovered_within_a_second(
    app: Streamline, mongodb_uri: str, database: str, tmp_path: Path
) -> None:
    """A dead worker's runs must not wait until their leases expire, and none of their results may count twice."""
    options = ("--workers", "4", "--restart-budget", "1000", "--max-crashes", "100")
    recovered_s: list[float] = []
    with running(tmp_path, APP, mongodb_uri, *options, database=database) as pool:
        pool.ready()
        workflow = app.workflows["busy"]
        with acceptances(app) as accepted:
            runs = [run.id for run in workflow.start_many([{"seconds": 0.4}] * 200)]
            for _ in range(KILLS):
                eventually(lambda: is_whole(pool), timeout=30)
                if app.runs.count_documents({"status": "running"}) < 100:
                    runs += [run.id for run in workflow.start_many([{"seconds": 0.4}] * 100)]
                took_s = kill_one_worker(app)
                recovered_s += took_s
                log_line(f"{len(took_s)} runs recovered, the last after {max(took_s):.3f} s")
            eventually(lambda: all_ended(app, len(runs)), timeout=120)
        pool.signal(signal.SIGTERM)
        assert pool.exit_code() == 0
    quantiles = statistics.quantiles(recovered_s, n=100)
    log_line(
        f"{KILLS} kills, {len(recovered_s)} runs recovered: "
        f"p50 {quantiles[49]:.3f} s, p99 {quantiles[98]:.3f} s, max {max(recovered_s):.3f} s"
    )
    assert app.runs.count_documents({"status": "done"}) == len(runs)
    assert {key: n for key, n in accepted.items() if n != 1} == {}, "a step's result was accepted twice"
    assert len(accepted) == 3 * len(runs)
    assert_nothing_is_wedged(app)
    assert quantiles[98] < RECOVERY_P99_S


def is_whole(pool: PoolProcess) -> bool:
    """True if the steward and three workers are ready, so that the runs of a killed worker can be claimed."""
    children = pool.children()
    return sum(time.time() - child.create_time() > 1.0 for child in children) >= 4


def kill_one_worker(app: Streamline) -> list[float]:
    """Kill a worker that holds runs. Returns the seconds until each of its runs was claimed by another worker."""
    held: dict[int, list[dict[str, Any]]] = {}

    def holders() -> bool:
        held.clear()
        for document in app.runs.find({"lease.expiresAt": {"$exists": True}}, {"lease": 1, "token": 1}):
            held.setdefault(owner_pid(document), []).append(document)
        return any(len(documents) >= 3 for documents in held.values())

    eventually(holders, timeout=30)
    pid, documents = random.choice([item for item in held.items() if len(item[1]) >= 3])
    waiting = {document["_id"]: document["lease"]["id"] for document in documents}
    recovered: list[float] = []
    killed_at = time.monotonic()
    os.kill(pid, signal.SIGKILL)

    def moved_on() -> bool:
        now = time.monotonic()
        for document in app.runs.find({"_id": {"$in": list(waiting)}}, {"lease": 1, "status": 1}):
            lease = document.get("lease")
            if document["status"] in ("done", "failed") or (lease and lease["id"] != waiting[document["_id"]]):
                del waiting[document["_id"]]
                recovered.append(now - killed_at)
        return not waiting

    eventually(moved_on, timeout=30)
    return recovered


@pytest.mark.timeout(120)
@pytest.mark.parametrize("action", ["kill", "stop"])
@pytest.mark.parametrize("point", PROBE_POINTS)
def test_a_crash_or_a_freeze_at_a_named_point_wedges_nothing(
    app: Streamline, mongodb_uri: str, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, action: str
) -> None:
    """A process may die, or be suspended for longer than its lease, between any two instructions of the commit path."""
    once = tmp_path / "happened"
    options = ("--workers", "2", "--concurrency", "5", "--lease", "2", "--stall-timeout", "6")
    with running(tmp_path, APP, mongodb_uri, *options, database=database, environ={"STREAMLINE_PROBE": f"{point}={action}@{once}"}) as pool:
        pool.ready()
        with acceptances(app) as accepted:
            runs = [run.id for run in app.workflows["busy"].start_many([{"seconds": 0.02}] * 20)]
            eventually(lambda: all_ended(app, len(runs)), timeout=60)
        assert once.exists(), "the crash point was never reached"
        pool.signal(signal.SIGTERM)
        pool.exit_code()
    assert app.runs.count_documents({"status": "done"}) == len(runs)
    assert {key: n for key, n in accepted.items() if n != 1} == {}
    assert_nothing_is_wedged(app)


@pytest.mark.timeout(120)
def test_a_worker_frozen_past_its_lease_changes_nothing_when_it_wakes(
    app: Streamline, mongodb_uri: str, database: str, tmp_path: Path
) -> None:
    """A worker that was frozen still believes that it holds the lease: its handler ends, and its write must be refused."""
    options = ("--workers", "2", "--lease", "2", "--stall-timeout", "60")
    with running(tmp_path, APP, mongodb_uri, *options, database=database) as pool:
        pool.ready()
        run = app.workflows["witness"].start({"seconds": 1.0})
        document = eventually(lambda: app.runs.find_one({"_id": run.id, "lease.expiresAt": {"$exists": True}}))
        zombie = owner_pid(document)
        os.kill(zombie, signal.SIGSTOP)
        try:
            done = app.workflows["witness"].wait_for(run.id, timeout=30)
            stored = app.runs.find_one({"_id": run.id})
        finally:
            os.kill(zombie, signal.SIGCONT)
        eventually(lambda: any(entry.get("run_id") == run.id for entry in pool.logged("run_fenced") + pool.logged("run_lost")))
        assert app.runs.find_one({"_id": run.id}) == stored, "the frozen worker changed a run whose lease it had lost"
        assert done.status == "done"
        assert done.step("alone").output != zombie
        assert_the_zombie_is_of_use_again(app, pool)


def assert_the_zombie_is_of_use_again(app: Streamline, pool: PoolProcess) -> None:
    runs = app.workflows["witness"].start_many([{"seconds": 0.0}] * 20)
    for run in runs:
        assert app.workflows["witness"].wait_for(run.id, timeout=30).status == "done"
    assert not pool.logged("child_died")


@pytest.mark.timeout(120)
def test_two_workers_never_run_one_run_at_once(app: Streamline, mongodb_uri: str, database: str, tmp_path: Path) -> None:
    """Eight workers of two pools compete for every run; two handlers of one run must never work at the same time."""
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    options = ("--workers", "4", "--concurrency", "8", "--lease", "3")
    with (
        running(first, APP, mongodb_uri, *options, database=database) as pool,
        running(second, APP, mongodb_uri, *options, database=database) as other,
    ):
        pool.ready()
        other.ready()
        workflow = app.workflows["witness"]
        with acceptances(app) as accepted:
            runs = [run for _ in range(60) for run in [workflow.start({"seconds": 0.02})]]
            runs += workflow.start_many([{"seconds": 0.02}] * 240)
            eventually(lambda: all_ended(app, len(runs)), timeout=60)
    assert entries_overlap(app) == []
    assert app.store().collection("evidence").count_documents({}) == 2 * len(runs), "every handler was entered exactly once"
    assert set(accepted.values()) == {1}


@pytest.mark.timeout(120)
def test_a_sleep_ends_within_a_tenth_of_a_second_of_its_time_in_an_idle_pool(
    app: Streamline, mongodb_uri: str, database: str, tmp_path: Path
) -> None:
    """No other event wakes the workers: only the steward's timer can."""
    late_s = []
    with running(tmp_path, APP, mongodb_uri, "--workers", "2", database=database) as pool:
        pool.ready()
        for seconds in (0.3, 0.7, 1.1, 2.0, 3.0, 8.0):  # the last one is longer than the sweep's horizon
            run = app.workflows["napper"].start({"seconds": seconds})
            done = app.workflows["napper"].wait_for(run.id, timeout=30)
            woken = done.step("woken").started_at
            asleep_until = app.runs.find_one({"_id": run.id})
            assert woken is not None and asleep_until is not None
            slept = done.step("nap")
            assert slept.started_at is not None
            late_s.append((woken - slept.started_at).total_seconds() - seconds)
    log_line(f"late by {', '.join(f'{late * 1000:.0f} ms' for late in late_s)}")
    assert max(late_s) < 0.1
    assert min(late_s) >= 0
