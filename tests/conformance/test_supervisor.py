"""The pool as a user meets it: real processes, real signals, a real database."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from pool_process import PoolProcess, running

from streamline_pool import Run, Streamline, embedded
from support import eventually

APP = '''
import asyncio, os, subprocess, time
from streamline_pool import Streamline

app = Streamline()

quick = app.workflow("quick")

@quick.step
def only(ctx):
    return os.getpid()

slow = app.workflow("slow")

@slow.step("first", retries=1)
async def first(ctx):
    """As slow as it is told in its first attempt, quick in the next."""
    if ctx.attempt == 1:
        await asyncio.sleep(ctx.input["seconds"])
    return os.getpid()

@slow.step
def second(ctx):
    return os.getpid()

stubborn = app.workflow("stubborn")

@stubborn.step
def deaf(ctx):
    """A thread that no signal and no drain can stop."""
    time.sleep(ctx.input["seconds"])

stuck = app.workflow("stuck")

@stuck.step(timeout=0.3, retries=1)
def sticks(ctx):
    """Its thread goes on after the timeout: threads cannot be stopped."""
    time.sleep(60)

blocking = app.workflow("blocking")

@blocking.step(retries=1)
async def blocks_the_loop(ctx):
    if ctx.attempt == 1:
        time.sleep(ctx.input["seconds"])
    return os.getpid()

napping = app.workflow("napping")

@napping.step
def nap(ctx):
    ctx.sleep(ctx.input["seconds"])

@napping.step
def awake(ctx):
    return time.time()

forking = app.workflow("forking")

@forking.step
def fork(ctx):
    """Leaves behind a process that has inherited everything, and one that was started anew."""
    started = subprocess.Popen(["sleep", "60"])
    forked = os.fork()
    if forked == 0:
        while True:
            time.sleep(1)
    return {"forked": forked, "started": started.pid}

deadly = app.workflow("deadly")

@deadly.step
def die(ctx):
    os.kill(os.getpid(), 9)
'''

Start = Callable[..., AbstractContextManager[PoolProcess]]


@pytest.fixture
def app(mongodb_uri: str, database: str, tmp_path: Path) -> Iterator[Streamline]:
    """The same application in the test's own process, as a client."""
    (tmp_path / "client_app.py").write_text(APP)
    spec = importlib.util.spec_from_file_location("client_app", tmp_path / "client_app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app: Streamline = module.app
    app.mongodb_uri, app.database = mongodb_uri, database
    with app:
        yield app


@pytest.fixture
def start(mongodb_uri: str, database: str, tmp_path: Path) -> Start:
    """`with start(*options) as pool:` a pool of APP on this test's database."""
    return lambda *options: running(tmp_path, APP, mongodb_uri, *options, database=database)


def begin(app: Streamline, workflow: str, **given: Any) -> Run:
    return app.workflows[workflow].start(given)


def finish(app: Streamline, run: Run, timeout: float = 20.0) -> Run:
    return app.workflows[run.workflow_id].wait_for(run.id, timeout=timeout)


def stored(app: Streamline, run: Run) -> dict[str, Any]:
    document: dict[str, Any] = app.runs.find_one({"_id": run.id})
    return document


ENTERED_AFTER = timedelta(seconds=0.3)  # a reply takes milliseconds; every step that is waited for here takes longer


def held_by(app: Streamline, run: Run) -> int:
    """Wait until a worker has entered the run's step; its pid.

    The claim is seen here before its reply has reached the worker, and an order in between finds nothing entered.
    """

    def owner() -> str | None:
        document = stored(app, run)
        if not document.get("lease") or document["steps"][0]["status"] != "running":
            return None
        return document["lease"]["owner"] if datetime.now(UTC) - document["steps"][0]["startedAt"] > ENTERED_AFTER else None

    return int(str(eventually(owner)).split(":")[1])


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# ---- working -------------------------------------------------------------------------------------------------------


def test_a_started_run_is_driven_and_the_pool_is_seen_in_the_database(app: Streamline, start: Start) -> None:
    with start("--workers", "2") as pool:
        pool.ready()
        run = finish(app, begin(app, "slow", seconds=0))
        assert run.status == "done"
        assert run.steps[0].output in pool.workers()
        (record,) = eventually(lambda: [host for host in app.workers() if len(host["workers"]) == 2])
        assert sorted(worker["pid"] for worker in record["workers"]) == sorted(pool.workers())
        pool.signal(signal.SIGTERM)
        assert pool.exit_code() == 0
        assert app.workers() == [], "the record goes with the pool"


@pytest.mark.slow
def test_a_sleeping_run_wakes_on_time_in_an_idle_pool(app: Streamline, start: Start) -> None:
    """Only a timer can do that: the sweep comes by every six seconds."""
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


# ---- children die --------------------------------------------------------------------------------------------------


def test_the_runs_of_a_killed_worker_restart_at_once(app: Streamline, start: Start) -> None:
    """Without the steward's notice they would wait half a minute for the lease to expire."""
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
def test_a_run_that_kills_its_workers_is_convicted_and_the_pool_lives(app: Streamline, start: Start) -> None:
    with start("--workers", "2", "--restart-budget", "10") as pool:
        pool.ready()
        run = finish(app, begin(app, "deadly"))
        assert run.error is not None
        assert run.error["code"] == "WORKER_CRASHED"
        assert "SIGKILL" in run.error["message"]
        assert finish(app, begin(app, "quick")).status == "done"


def test_a_killed_steward_is_replaced_and_does_its_duty(app: Streamline, start: Start) -> None:
    with start("--workers", "2") as pool:
        pool.ready()
        run = begin(app, "slow", seconds=60)
        victim = held_by(app, run)
        os.kill(pool.steward(), signal.SIGKILL)
        os.kill(victim, signal.SIGKILL)
        assert finish(app, run, timeout=10.0).status == "done"


@pytest.mark.slow
def test_no_child_outlives_a_killed_supervisor(app: Streamline, start: Start) -> None:
    """Orphans would go on claiming, and nobody could stop them; what they hold is given back before they go."""
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
def test_not_even_one_whose_loop_is_blocked(app: Streamline, start: Start) -> None:
    """A handler that blocks the loop hears nothing from the pipe; the kernel ends it."""
    with start("--workers", "1") as pool:
        pool.ready()
        held_by(app, begin(app, "blocking", seconds=60))
        family = [child.pid for child in pool.children()]
        pool.signal(signal.SIGKILL)
        eventually(lambda: all(gone(pid) for pid in family), timeout=3.0)


def test_processes_that_handlers_leave_behind_hide_nobodys_death(app: Streamline, start: Start) -> None:
    """They inherit the pipes: a death is told by a pipe's end, which would stay open as long as they live."""
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
                os.kill(pid, signal.SIGTERM)  # which they must not have inherited our deafness to
        eventually(lambda: all(gone(pid) for pid in left.values()))


@pytest.mark.slow
def test_a_stopped_worker_is_replaced(app: Streamline, start: Start) -> None:
    """It beats no more, and it would wake up with an expired lease in the middle of a step."""
    with start("--workers", "2", "--stall-timeout", "1.5", "--beat-interval", "0.2") as pool:
        pool.ready()
        run = begin(app, "slow", seconds=60)
        victim = held_by(app, run)
        os.kill(victim, signal.SIGSTOP)
        assert finish(app, run, timeout=10.0).status == "done"
        assert [entry["pid"] for entry in pool.logged("child_stalled")] == [victim]
        eventually(lambda: gone(victim))


@pytest.mark.slow
def test_a_worker_whose_loop_is_blocked_shows_where_and_is_replaced(app: Streamline, start: Start) -> None:
    with start("--workers", "1", "--stall-timeout", "1.5", "--beat-interval", "0.2") as pool:
        pool.ready()
        assert finish(app, begin(app, "blocking", seconds=60), timeout=10.0).status == "done"
        (dump,) = pool.logged("stack_dump")
        assert "blocks_the_loop" in dump["dump"]


# ---- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_term_finishes_the_step_and_releases_the_run(app: Streamline, start: Start) -> None:
    with start("--workers", "2") as pool:
        pool.ready()
        run = begin(app, "slow", seconds=1.0)
        held_by(app, run)
        pool.signal(signal.SIGTERM)
        assert pool.exit_code() == 0
        document = stored(app, run)
        assert [step["status"] for step in document["steps"]] == ["done", "pending"]
        assert "lease" not in document
        assert "wakeAt" in document


@pytest.mark.slow
def test_a_drain_that_takes_too_long_exits_4_and_loses_nothing(app: Streamline, start: Start) -> None:
    with start("--workers", "1", "--drain-timeout", "0.3") as pool:
        pool.ready()
        run = begin(app, "stubborn", seconds=60)
        held_by(app, run)
        pool.signal(signal.SIGTERM)
        assert pool.exit_code() == 4
        assert "lease" not in stored(app, run)


def test_the_second_int_cancels_now(app: Streamline, start: Start) -> None:
    with start("--workers", "1") as pool:
        pool.ready()
        run = begin(app, "slow", seconds=60)
        held_by(app, run)
        pool.signal(signal.SIGINT)
        eventually(lambda: pool.logged("pool_ends"))
        pool.signal(signal.SIGINT)
        assert pool.exit_code(timeout=10) == 4
        assert "lease" not in stored(app, run)


def test_the_third_int_kills(app: Streamline, start: Start) -> None:
    with start("--workers", "2") as pool:
        pool.ready()
        held_by(app, begin(app, "stubborn", seconds=60))
        family = [child.pid for child in pool.children()]
        for count in (1, 2, 3):
            pool.signal(signal.SIGINT)
            eventually(lambda count=count: len(pool.logged("pool_ends")) >= count)
        assert pool.exit_code(timeout=5) == 137
        assert all(gone(pid) for pid in family)


def test_hup_replaces_every_worker_and_drops_no_work(app: Streamline, start: Start) -> None:
    with start("--workers", "2") as pool:
        pool.ready()
        old = set(pool.workers())
        runs = app.workflows["slow"].start_many([{"seconds": 0.5}] * 10)
        pool.signal(signal.SIGHUP)
        eventually(lambda: all(map(gone, old)))
        assert {finish(app, run).status for run in runs} == {"done"}
        assert not pool.logged("child_died")
        eventually(lambda: len(pool.children()) == 3)


def test_ttin_and_ttou_change_the_number_of_workers(start: Start) -> None:
    with start("--workers", "1") as pool:
        pool.ready()
        pool.signal(signal.SIGTTIN)
        eventually(lambda: len(pool.children()) == 3)
        pool.signal(signal.SIGTTOU)
        eventually(lambda: len(pool.children()) == 2)
        pool.signal(signal.SIGTTOU)
        eventually(lambda: len(pool.logged("pool_resized")) == 3)
        assert len(pool.children()) == 2


@pytest.mark.slow
def test_tstp_stops_claiming_and_cont_resumes(app: Streamline, start: Start) -> None:
    with start("--workers", "1", "--sweep-interval", "0.2") as pool:
        pool.ready()
        pool.signal(signal.SIGTSTP)
        eventually(lambda: any(worker["state"] == "holding" for host in app.workers() for worker in host["workers"]))
        run = begin(app, "quick")
        with pytest.raises(TimeoutError):
            finish(app, run, timeout=1.0)
        pool.signal(signal.SIGCONT)
        assert finish(app, run).status == "done"


def test_usr1_shows_the_stacks_of_all(start: Start) -> None:
    with start("--workers", "2") as pool:
        pool.ready()
        family = {pool.pid, *(child.pid for child in pool.children())}
        pool.signal(signal.SIGUSR1)
        eventually(lambda: {entry["of_pid"] for entry in pool.logged("stack_dump")} == family)


# ---- recycling -----------------------------------------------------------------------------------------------------


def test_a_worker_is_replaced_after_its_runs(app: Streamline, start: Start) -> None:
    with start("--workers", "1", "--max-runs-per-worker", "5") as pool:
        pool.ready()
        pids = {finish(app, begin(app, "quick")).steps[0].output for _ in range(12)}
        assert len(pids) >= 2
        assert not pool.logged("child_died")


@pytest.mark.slow
def test_a_worker_with_a_stuck_thread_is_replaced_and_goes(app: Streamline, start: Start) -> None:
    """The thread holds a place in the worker's pool for as long as it likes; a normal exit would wait for it."""
    with start("--workers", "1") as pool:
        pool.ready()
        (worker,) = pool.workers()
        run = finish(app, begin(app, "stuck"))
        assert run.error is not None
        assert run.error["code"] == "STEP_TIMEOUT"
        eventually(lambda: gone(worker))
        assert finish(app, begin(app, "quick")).status == "done"


def test_a_worker_above_its_memory_is_replaced(start: Start) -> None:
    with start("--workers", "1", "--max-rss", "1MiB") as pool:
        pool.ready()
        (worker,) = pool.workers()
        eventually(lambda: gone(worker))
        assert "rss" in pool.logged("worker_leaves")[0]["reason"]


# ---- refusing to start ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_unreachable_database_at_the_start_is_exit_3(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"mongodb://127.0.0.1:{unused.getsockname()[1]}/?serverSelectionTimeoutMS=500"
        with running(tmp_path, APP, uri, "--workers", "2") as pool:
            assert pool.exit_code() == 3
            assert "is it running" in pool.log_text


def test_an_application_that_opens_a_client_at_import_is_refused(mongodb_uri: str, database: str, tmp_path: Path) -> None:
    """PyMongo's locks and sockets do not survive a fork: it would hang later, in a child, now and then."""
    text = APP + "\nfrom pymongo import MongoClient\nclient = MongoClient(" + repr(mongodb_uri) + ")\nclient.admin.command('ping')\n"
    with running(tmp_path, text, mongodb_uri, database=database) as pool:
        assert pool.exit_code() == 2
        assert "not fork-safe" in pool.log_text


# ---- health --------------------------------------------------------------------------------------------------------


def ask(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as exc:
        return exc.code, exc.read().decode()


@pytest.mark.slow
def test_the_health_port_tells_of_the_pool(app: Streamline, start: Start) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with start("--workers", "2", "--health-port", str(port)) as pool:
        pool.ready()
        eventually(lambda: ask(port, "/readyz") == (200, "ready\n"))
        assert ask(port, "/healthz") == (200, "ok\n")
        assert ask(port, "/nothing")[0] == 404
        finish(app, begin(app, "quick"))
        eventually(lambda: "streamline_runs_total 1\n" in ask(port, "/metrics")[1])
        pool.signal(signal.SIGTSTP)
        eventually(lambda: ask(port, "/readyz")[0] == 503)


def test_logs_are_json_to_the_last_line(start: Start) -> None:
    """Stack dumps, too: a log collector drops or mangles what is not an object."""
    with start("--workers", "1") as pool:
        pool.ready()
        pool.signal(signal.SIGUSR1)
        eventually(lambda: len(pool.logged("stack_dump")) == 3)
        pool.signal(signal.SIGTERM)
        assert pool.exit_code() == 0
        for line in pool.log_text.splitlines():
            assert "event" in json.loads(line)


# ---- the database goes away ----------------------------------------------------------------------------------------


@pytest.mark.chaos
@pytest.mark.parametrize("outage", ["kill", "suspend"])
def test_work_resumes_by_itself_after_an_outage(app: Streamline, start: Start, mongod: embedded.EmbeddedServer, outage: str) -> None:
    """Nobody restarts anything: not the pool, not a worker, and no run is lost."""
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
