"""A pool drives runs, and goes on when its processes or its database die: real processes, a real database."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from pool_application import APP, Start, begin, finish, gone, held_by, pool_starter
from pool_client import loaded_app
from stored_runs import stored

from streamline_pool import Streamline, embedded
from support import eventually


@pytest.fixture
def app(mongodb_uri: str, database: str, tmp_path: Path) -> Iterator[Streamline]:
    with loaded_app(APP, mongodb_uri, database) as app:
        yield app


@pytest.fixture
def start(mongodb_uri: str, database: str, tmp_path: Path) -> Start:
    return pool_starter(mongodb_uri, database, tmp_path)


# ---- working ----------------------------------------------------------------------------------------------------------


def test_a_started_run_is_driven_and_the_pool_is_recorded_in_the_database(app: Streamline, start: Start) -> None:
    with start("--workers", "2") as pool:
        pool.ready()
        run = finish(app, begin(app, "slow", seconds=0))
        assert run.status == "done"
        assert run.steps[0].output in pool.workers()
        (record,) = eventually(lambda: [host for host in app.workers() if len(host["workers"]) == 2])
        assert sorted(worker["pid"] for worker in record["workers"]) == sorted(pool.workers())
        pool.signal(signal.SIGTERM)
        assert pool.exit_code() == 0
        assert app.workers() == [], "the record is removed with the pool"


@pytest.mark.slow
def test_a_sleeping_run_wakes_on_time_in_an_idle_pool(app: Streamline, start: Start) -> None:
    """Only a timer can do that: a sweep comes every six seconds by default, and here every minute."""
    with start("--workers", "2", "--sweep-interval", "60") as pool:
        pool.ready()
        run = finish(app, begin(app, "napping", seconds=1.0))
        nap, awake = run.step("nap"), run.step("awake")
        assert nap.started_at is not None
        assert awake.started_at is not None
        late_s = (awake.started_at - nap.started_at).total_seconds() - 1.0
        assert 0 <= late_s < 0.5, "measured 0.02 s; ample for a busy machine"


def test_a_run_that_no_signal_announced_is_found_by_the_sweep(app: Streamline, start: Start) -> None:
    """Signals are hints: one may be lost with a connection, or overwritten in the capped collection."""
    with start("--workers", "1", "--sweep-interval", "0.3") as pool:
        pool.ready()
        run = app.workflows["quick"].start({}, start_at=datetime.now(UTC) + timedelta(hours=1))
        app.runs.update_one({"_id": run.id}, {"$set": {"wakeAt": datetime.now(UTC)}})
        assert finish(app, run).status == "done"


def test_burst_finishes_what_there_is_and_exits_0(app: Streamline, start: Start) -> None:
    runs = app.workflows["slow"].start_many([{"seconds": 0.01}] * 50)
    later = app.workflows["quick"].start({}, start_at=datetime.now(UTC) + timedelta(hours=1))
    with start("--workers", "2", "--burst") as pool:
        assert pool.exit_code() == 0, pool.log_text
    assert {stored(app, run)["status"] for run in runs} == {"done"}
    assert stored(app, later)["status"] == "draft"


# ---- children die -----------------------------------------------------------------------------------------------------


def test_the_runs_of_a_killed_worker_restart_at_once(app: Streamline, start: Start) -> None:
    """Without the steward they would wait half a minute for the lease to expire."""
    with start("--workers", "2") as pool:
        pool.ready()
        run = begin(app, "slow", seconds=60)
        victim = held_by(app, run)
        os.kill(victim, signal.SIGKILL)
        run = finish(app, run, timeout=5.0)
        assert run.status == "done"
        assert run.step("first").attempts == 2
        (died,) = pool.logged("child_died")
        assert (died["pid"], died["signal"]) == (victim, "SIGKILL")
        eventually(lambda: len(pool.children()) == 3)


@pytest.mark.slow
def test_a_run_that_kills_its_workers_fails_and_the_pool_lives(app: Streamline, start: Start) -> None:
    with start("--workers", "2", "--restart-budget", "10") as pool:
        pool.ready()
        run = finish(app, begin(app, "deadly"))
        assert run.error is not None
        assert run.error["code"] == "WORKER_CRASHED"
        assert "SIGKILL" in run.error["message"]
        assert finish(app, begin(app, "quick")).status == "done"


def test_a_killed_steward_is_replaced_and_releases_the_leases_of_the_dead(app: Streamline, start: Start) -> None:
    with start("--workers", "2") as pool:
        pool.ready()
        run = begin(app, "slow", seconds=60)
        victim = held_by(app, run)
        os.kill(pool.steward(), signal.SIGKILL)
        os.kill(victim, signal.SIGKILL)
        assert finish(app, run, timeout=10.0).status == "done"


@pytest.mark.slow
def test_no_child_outlives_a_killed_supervisor(app: Streamline, start: Start) -> None:
    """Orphans would go on claiming, and no operator could stop them; they release what they hold before they exit."""
    with start("--workers", "2") as pool:
        pool.ready()
        run = begin(app, "slow", seconds=60)
        held_by(app, run)
        family = [child.pid for child in pool.children()]
        pool.signal(signal.SIGKILL)
        eventually(lambda: all(gone(pid) for pid in family), timeout=2.5)
        document = stored(app, run)
        assert "lease" not in document
        assert document["wakeAt"] <= datetime.now(UTC) + timedelta(seconds=1)


@pytest.mark.slow
def test_no_child_with_a_blocked_loop_outlives_a_killed_supervisor(app: Streamline, start: Start) -> None:
    """A worker whose loop is blocked does not notice the closed pipe; the kernel ends it."""
    with start("--workers", "1") as pool:
        pool.ready()
        held_by(app, begin(app, "blocking", seconds=60))
        family = [child.pid for child in pool.children()]
        pool.signal(signal.SIGKILL)
        eventually(lambda: all(gone(pid) for pid in family), timeout=3.0)


def test_processes_that_handlers_leave_behind_hide_no_death(app: Streamline, start: Start) -> None:
    """They inherit the pipes: a closed pipe shows a death, and it would stay open as long as they live."""
    with start("--workers", "1") as pool:
        pool.ready()
        left = finish(app, begin(app, "forking")).step("fork").output
        try:
            assert psutil.Process(left["started"]).is_running()
            os.kill(pool.workers()[0], signal.SIGKILL)
            eventually(lambda: pool.logged("child_died"))
            assert finish(app, begin(app, "quick"), timeout=5.0).status == "done"
            family = [child.pid for child in pool.children()]
            pool.signal(signal.SIGKILL)
            eventually(lambda: all(gone(pid) for pid in family), timeout=2.5)
        finally:
            for pid in left.values():
                os.kill(pid, signal.SIGTERM)  # they must not have inherited that the pool ignores it
        eventually(lambda: all(gone(pid) for pid in left.values()))


@pytest.mark.slow
def test_a_stopped_worker_is_replaced(app: Streamline, start: Start) -> None:
    """It sends no heartbeat, and it would go on with an expired lease in the middle of a step."""
    with start("--workers", "2", "--stall-timeout", "1.5", "--beat-interval", "0.2") as pool:
        pool.ready()
        run = begin(app, "slow", seconds=60)
        victim = held_by(app, run)
        os.kill(victim, signal.SIGSTOP)
        assert finish(app, run, timeout=10.0).status == "done"
        assert [entry["pid"] for entry in pool.logged("child_stalled")] == [victim]
        eventually(lambda: gone(victim))


@pytest.mark.slow
def test_an_idle_worker_that_is_stopped_is_noticed_as_soon_as_a_busy_one(start: Start) -> None:
    """It beats less often while it has nothing to report, but the stall timeout counts from its last beat."""
    with start("--workers", "1", "--stall-timeout", "3") as pool:
        (victim,) = pool.ready().workers()
        stopped_at = time.monotonic()
        os.kill(victim, signal.SIGSTOP)
        eventually(lambda: pool.logged("child_stalled"))
        assert time.monotonic() - stopped_at < 4.5, "3 s; ample for a busy machine"


@pytest.mark.slow
def test_an_idle_worker_wakes_up_about_once_a_second(start: Start) -> None:
    """Sixteen idle workers once woke up a hundred times a second together, most of them for tasks of the driver."""
    with start("--workers", "1") as pool:
        pool.ready()
        worker = psutil.Process(pool.workers()[0])
        before, since = worker.num_ctx_switches().voluntary, time.monotonic()
        eventually(lambda: time.monotonic() - since > 6.0)
        assert (worker.num_ctx_switches().voluntary - before) / 6.0 < 3.0, "measured: 1.3, and 6.6 before"


@pytest.mark.slow
def test_a_worker_whose_loop_is_blocked_shows_where_and_is_replaced(app: Streamline, start: Start) -> None:
    with start("--workers", "1", "--stall-timeout", "1.5", "--beat-interval", "0.2") as pool:
        pool.ready()
        assert finish(app, begin(app, "blocking", seconds=60), timeout=10.0).status == "done"
        (dump,) = pool.logged("stack_dump")
        assert "blocks_the_loop" in dump["dump"]


# ---- the database goes away -------------------------------------------------------------------------------------------


@pytest.mark.chaos
@pytest.mark.parametrize("outage", ["kill", "suspend"])
def test_work_resumes_by_itself_after_an_outage(app: Streamline, start: Start, mongod: embedded.EmbeddedServer, outage: str) -> None:
    """No operator restarts anything, neither the pool nor a worker, and no run is lost."""
    with start("--workers", "2") as pool:
        pool.ready()
        before = begin(app, "slow", seconds=1.0)
        held_by(app, before)
        mongod.kill() if outage == "kill" else mongod.suspend()
        eventually(lambda: pool.logged("scheduler:circuit-open"), timeout=30)
        mongod.restart() if outage == "kill" else mongod.resume()
        assert finish(app, begin(app, "quick"), timeout=5.0).status == "done", "measured: under 2 s"
        eventually(lambda: pool.logged("scheduler:circuit-closed"))
        assert finish(app, before, timeout=45.0).status == "done"
        assert not pool.logged("child_died")


# ---- suspects, and runs that are rewound while they run ----------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_kills_its_worker_convicts_no_suspect_beside_it(app: Streamline, start: Start) -> None:
    """The suspect has lost two workers, each to an operator, and the next one is killed by a run that is no suspect."""
    with start("--workers", "1", "--restart-budget", "20") as pool:
        pool.ready()
        company = begin(app, "slow", seconds=3)
        held_by(app, company)
        suspect = app.workflows["slow"].start({"seconds": 0})
        app.runs.update_one({"_id": suspect.id}, {"$set": {"crashes": 2}})
        deadly = [begin(app, "deadly") for _ in range(3)]
        assert finish(app, suspect).status == "done"
        assert finish(app, company).status == "done"
        assert [(finish(app, run, timeout=60).error or {})["code"] for run in deadly] == ["WORKER_CRASHED"] * 3
        assert finish(app, begin(app, "quick")).status == "done"


def test_a_step_that_is_rewound_while_it_runs_begins_again_at_once(app: Streamline, start: Start) -> None:
    """Its wake-up often came while the run still counted as in progress in the worker, and the next sweep is seconds away."""
    with start("--workers", "1") as pool:
        pool.ready()
        run = begin(app, "slow", seconds=60)
        held_by(app, run)
        for _ in range(6):
            app.rewind_run(run.id, "first")
            eventually(lambda: stored(app, run)["steps"][0]["status"] == "running", timeout=1.5)
        assert (stored(app, run)["rewinds"], stored(app, run)["crashes"]) == (6, 0)
