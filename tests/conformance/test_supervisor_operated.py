"""A pool as its operator meets it: signals, recycling, refusals to start, the health port. Real processes, a real database."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from pool_application import APP, Start, begin, finish, gone, held_by, pool_starter
from pool_client import loaded_app
from pool_process import PoolProcess, running
from stored_runs import stored

from streamline_pool import Streamline
from streamline_pool.embedded import EmbeddedServer
from support import eventually


@pytest.fixture
def app(mongodb_uri: str, database: str, tmp_path: Path) -> Iterator[Streamline]:
    with loaded_app(APP, mongodb_uri, database) as app:
        yield app


@pytest.fixture
def start(mongodb_uri: str, database: str, tmp_path: Path) -> Start:
    return pool_starter(mongodb_uri, database, tmp_path)


# ---- signals ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_third_int_kills(app: Streamline, start: Start) -> None:
    with start("--workers", "2") as pool:
        pool.ready()
        held_by(app, begin(app, "stubborn", seconds=60))
        family = [child.pid for child in pool.children()]

        def interrupted(count: int) -> bool:
            return len(pool.logged("pool_ends")) >= count

        for count in (1, 2, 3):
            pool.signal(signal.SIGINT)
            eventually(partial(interrupted, count))
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


@pytest.mark.slow
def test_usr1_shows_the_stacks_of_every_process(start: Start) -> None:
    with start("--workers", "2") as pool:
        pool.ready()
        family = {pool.pid, *(child.pid for child in pool.children())}
        pool.signal(signal.SIGUSR1)
        eventually(lambda: {entry["of_pid"] for entry in pool.logged("stack_dump")} == family)


# ---- recycling --------------------------------------------------------------------------------------------------------


def test_a_worker_is_replaced_after_its_runs(app: Streamline, start: Start) -> None:
    with start("--workers", "1", "--max-runs-per-worker", "5") as pool:
        pool.ready()
        pids = {finish(app, begin(app, "quick")).steps[0].output for _ in range(12)}
        assert len(pids) >= 2
        assert not pool.logged("child_died")


@pytest.mark.slow
def test_a_worker_with_a_stuck_thread_is_replaced_and_exits(app: Streamline, start: Start) -> None:
    """The thread occupies a place of the worker for as long as it runs, and a normal exit would wait for it."""
    with start("--workers", "1") as pool:
        pool.ready()
        (worker,) = pool.workers()
        run = finish(app, begin(app, "stuck"))
        assert run.error is not None
        assert run.error["code"] == "STEP_TIMEOUT"
        eventually(lambda: gone(worker))
        assert finish(app, begin(app, "quick")).status == "done"


@pytest.mark.slow
def test_a_worker_above_its_memory_limit_is_replaced(start: Start) -> None:
    with start("--workers", "1", "--max-rss", "1MiB") as pool:
        pool.ready()
        (worker,) = pool.workers()
        eventually(lambda: gone(worker))
        assert "rss" in pool.logged("worker_leaves")[0]["reason"]


# ---- refusing to start ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_unreachable_database_at_the_start_is_exit_3(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"mongodb://127.0.0.1:{unused.getsockname()[1]}/?serverSelectionTimeoutMS=500"
        with running(tmp_path, APP, uri, "--workers", "2") as pool:
            assert pool.exit_code() == 3
            assert "is it running" in pool.log_text


def test_an_application_that_opens_a_client_at_import_is_refused(mongodb_uri: str, database: str, tmp_path: Path) -> None:
    """PyMongo's locks and sockets do not survive a fork: a child would hang later, now and then."""
    text = APP + "\nfrom pymongo import MongoClient\nclient = MongoClient(" + repr(mongodb_uri) + ")\nclient.admin.command('ping')\n"
    with running(tmp_path, text, mongodb_uri, database=database) as pool:
        assert pool.exit_code() == 2
        assert "not fork-safe" in pool.log_text


# ---- health -----------------------------------------------------------------------------------------------------------


def ask(url: str) -> tuple[int, str]:
    """Status and text. An answer that takes a second or more is an error: probes of orchestrators wait no longer."""
    try:
        with urllib.request.urlopen(url, timeout=1) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as exc:
        return exc.code, exc.read().decode()


def health_url(pool: PoolProcess) -> str:
    """Where the health port of a pool that was started with `--health-port 0` listens."""
    return str(eventually(lambda: pool.logged("health_port"), timeout=30)[0]["url"])


@pytest.mark.slow
def test_the_health_port_reports_the_pool(app: Streamline, start: Start) -> None:
    with start("--workers", "2", "--health-port", "0") as pool:
        url = health_url(pool)
        assert url.startswith("http://127.0.0.1:"), "the answers need no password, so other machines must be allowed by name"
        pool.ready()
        eventually(lambda: ask(f"{url}/readyz") == (200, "ready\n"))
        for path in ("livez", "healthz"):
            assert ask(f"{url}/{path}") == (200, "ok\n")
        assert ask(f"{url}/nothing")[0] == 404
        finish(app, begin(app, "quick"))
        eventually(lambda: "streamline_runs_total 1.0\n" in ask(f"{url}/metrics")[1])
        pool.signal(signal.SIGTSTP)
        eventually(lambda: ask(f"{url}/readyz")[0] == 503)


@pytest.mark.slow
def test_the_health_port_answers_while_the_database_hangs_and_slow_clients_hold_it(
    mongod: EmbeddedServer, app: Streamline, start: Start
) -> None:
    """An orchestrator that gets no answer kills the pool, in the middle of an outage that the pool would survive."""
    with start("--workers", "1", "--health-port", "0") as pool:
        url = health_url(pool)
        pool.ready()
        host, port = url.removeprefix("http://").split(":")
        with contextlib.ExitStack() as slow:
            for _ in range(100):
                slow.enter_context(socket.create_connection((host, int(port))))
            finish(app, begin(app, "quick"))  # the steward goes on with its duties meanwhile
            mongod.suspend()
            try:
                for _ in range(20):
                    assert ask(f"{url}/livez") == (200, "ok\n")
                eventually(lambda: ask(f"{url}/readyz")[0] == 503, timeout=30)
                assert ask(f"{url}/livez") == (200, "ok\n")
            finally:
                mongod.resume()
        eventually(lambda: ask(f"{url}/readyz")[0] == 200, timeout=30)


@pytest.mark.slow
def test_without_the_extra_metrics_a_pool_says_so_once_and_answers_probes(start: Start, tmp_path: Path) -> None:
    (tmp_path / "prometheus_client.py").write_text("raise ModuleNotFoundError(name='prometheus_client')\n")  # as if it were not installed
    with start("--workers", "1", "--health-port", "0") as pool:
        url = health_url(pool)
        pool.ready()
        assert len(pool.logged("metrics_unavailable")) == 1
        status, text = ask(f"{url}/metrics")
        assert status == 501
        assert "pip install 'streamline-pool[metrics]'" in text
        assert ask(f"{url}/livez") == (200, "ok\n")


@pytest.mark.slow
def test_a_health_address_that_is_not_this_machines_is_refused_at_the_start(start: Start) -> None:
    with start("--workers", "1", "--health-port", "0", "--health-host", "192.0.2.1") as pool:
        assert pool.exit_code() == 78
        assert "192.0.2.1:0: Cannot assign requested address; choose others with --health-host and --health-port" in pool.log_text


@pytest.mark.slow
def test_logs_are_json_to_the_last_line(start: Start) -> None:
    """Stack dumps, too: a log collector drops or damages what is not an object."""
    with start("--workers", "1") as pool:
        pool.ready()
        pool.signal(signal.SIGUSR1)
        eventually(lambda: len(pool.logged("stack_dump")) == 3)
        pool.signal(signal.SIGTERM)
        assert pool.exit_code() == 0
        for line in pool.log_text.splitlines():
            assert "event" in json.loads(line)
