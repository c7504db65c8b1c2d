"""Timers in real pools: on time, across restarts, while many other runs are due, and far in the future."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pool_client import loaded_app
from pool_process import PoolProcess, running
from stored_runs import stored

from streamline_pool import Run, Streamline
from support import eventually

APP = """
import asyncio, os, time
from pathlib import Path
from streamline_pool import Streamline

app = Streamline()

quick = app.workflow("quick")

@quick.step
def only(ctx):
    return time.time()

busy = app.workflow("busy")

@busy.step
async def works(ctx):
    await asyncio.sleep(0.5)

napping = app.workflow("napping")

@napping.step
def nap(ctx):
    ctx.set("due_at", time.time() + ctx.input["seconds"])
    ctx.sleep(ctx.input["seconds"])

@napping.step
def awake(ctx):
    return time.time()

held = app.workflow("held")

@held.step
async def hold(ctx):
    Path(ctx.input["entered"]).write_text(str(os.getpid()))
    try:
        await asyncio.sleep(60)
    finally:
        Path(ctx.input["fired"]).write_text(f"{ctx.signal.reason} {time.time()}")

held_def = app.workflow("held-def")

@held_def.step
def hold_def(ctx):
    Path(ctx.input["entered"]).write_text(str(os.getpid()))
    ctx.signal.wait(60)
    Path(ctx.input["fired"]).write_text(f"{ctx.signal.reason} {time.time()}")
"""

Start = Callable[..., AbstractContextManager[PoolProcess]]
NO_SWEEP = ("--sweep-interval", "60")  # longer than the test: a run that is on time was not found by a sweep
ON_TIME_S = 0.7  # measured 0.02 s; sufficient on a busy machine, and less than the delay that a defect causes


@pytest.fixture
def app(mongodb_uri: str, database: str) -> Iterator[Streamline]:
    """The application of the pools in the test's own process, as a client."""
    with loaded_app(APP, mongodb_uri, database) as app:
        yield app


@pytest.fixture
def start(mongodb_uri: str, database: str, tmp_path: Path) -> Start:
    """`with start(name, *options) as pool:` a pool of APP on this test's database. Each name is a separate host."""

    def make(name: str, *options: str) -> AbstractContextManager[PoolProcess]:
        folder = tmp_path / name
        folder.mkdir()
        return running(folder, APP, mongodb_uri, *options, database=database)

    return make


def finish(app: Streamline, run: Run, timeout: float = 20.0) -> Run:
    return app.workflows[run.workflow_id].wait_for(run.id, timeout=timeout)


def asleep(app: Streamline, run: Run) -> dict[str, Any]:
    """The stored run, as soon as it sleeps."""
    eventually(lambda: stored(app, run)["status"] == "waiting")
    return stored(app, run)


def text_of(path: Path) -> str:
    """What the file contains; "" as long as it does not exist."""
    return path.read_text() if path.exists() else ""


def late_s(run: Run) -> float:
    """The delay of the handler after a nap: seconds between the due time and its entry."""
    return float(run.output - run.context["due_at"])


# ---- how far --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sleep_of_a_century_is_stored_as_such_and_fires_nothing(app: Streamline, start: Start) -> None:
    """In streamline.js long timers overflowed 32 bits of milliseconds (25 days) and fired at once."""
    with start("host", "--workers", "1", "--sweep-interval", "0.2") as pool:
        pool.ready()
        century_s = 100 * 365 * 86_400
        long = [app.workflows["napping"].start({"seconds": seconds}) for seconds in (2**31 / 1000 + 60, 366 * 86_400, century_s)]
        days = [(asleep(app, run)["wakeAt"] - datetime.now(UTC)) / timedelta(days=1) for run in long]
        assert days == pytest.approx([2**31 / 86_400_000, 366, 36_500], abs=0.01)
        # The steward's nearest timers are years away, and then one is near: it must still fire.
        short = finish(app, app.workflows["napping"].start({"seconds": 0.3}))
        assert 0 <= late_s(short) < ON_TIME_S
        pool.signal(signal.SIGTERM)
        assert pool.exit_code() == 0
    with start("later", "--workers", "1", "--burst") as pool:
        assert pool.exit_code() == 0, "a timer that is years away does not keep a burst from ending"
    for run in long:
        document = stored(app, run)
        assert (document["status"], document["rev"], document["crashes"]) == ("waiting", 1, 0), "no process has changed it since"


def test_a_start_in_years_is_stored_as_such_and_starts_nothing(app: Streamline, start: Start) -> None:
    with start("host", "--workers", "1", "--sweep-interval", "0.2") as pool:
        pool.ready()
        run = app.workflows["quick"].start(start_at=timedelta(days=3650))
        assert finish(app, app.workflows["quick"].start()).status == "done"
        document = stored(app, run)
        assert document["status"] == "draft"
        assert (document["wakeAt"] - datetime.now(UTC)) / timedelta(days=1) == pytest.approx(3650, abs=0.01)


# ---- when -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_start_at_fires_in_an_idle_pool(app: Streamline, start: Start) -> None:
    """In streamline.js a future start never fired in an idle process, because nothing polled."""
    with start("host", "--workers", "2", *NO_SWEEP) as pool:
        pool.ready()
        due_at = datetime.now(UTC) + timedelta(seconds=1)
        run = app.workflows["quick"].start(start_at=due_at)
        assert stored(app, run)["status"] == "draft"
        assert 0 <= finish(app, run).output - due_at.timestamp() < ON_TIME_S


@pytest.mark.slow
def test_a_sleep_ends_on_time_behind_a_backlog(app: Streamline, start: Start) -> None:
    """The other due runs are older in the queue and every worker is full: without a timer the sleeper would be the last."""
    with start("host", "--workers", "1", "--concurrency", "8", *NO_SWEEP) as pool:
        pool.ready()
        run = app.workflows["napping"].start({"seconds": 2.0})
        asleep(app, run)
        backlog = [each.id for each in app.workflows["busy"].start_many([None] * 120)]  # seven seconds of work
        assert 0 <= late_s(finish(app, run)) < ON_TIME_S
        left = app.runs.count_documents({"_id": {"$in": backlog}, "wakeAt": {"$exists": True}})
        assert left > 0, "the backlog was still there"
        eventually(lambda: app.runs.count_documents({"_id": {"$in": backlog}, "status": "done"}) == len(backlog), timeout=40)


# ---- restarts -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sleep_that_ended_while_no_pool_was_there_ends_when_one_is(app: Streamline, start: Start) -> None:
    with start("before", "--workers", "1") as pool:
        pool.ready()
        run = app.workflows["napping"].start({"seconds": 1.5})
        asleep(app, run)
        pool.signal(signal.SIGTERM)
        assert pool.exit_code() == 0
    wake_at = stored(app, run)["wakeAt"]
    assert stored(app, run)["status"] == "waiting"
    eventually(lambda: datetime.now(UTC) > wake_at)
    with start("after", "--workers", "1", *NO_SWEEP) as pool:
        pool.ready()
        ready_at = time.time()
        assert finish(app, run).output - ready_at < ON_TIME_S, "at once"


@pytest.mark.slow
def test_a_sleep_from_before_a_restart_ends_on_time_behind_a_backlog_that_fills_the_sweep(app: Streamline, start: Start) -> None:
    """The worker that knew the due time has ended. Only the new steward's first sweep can find the run, beside a thousand due runs."""
    with start("before", "--workers", "1", "--concurrency", "8") as pool:
        pool.ready()
        run = app.workflows["napping"].start({"seconds": 6.0})
        asleep(app, run)
        pool.signal(signal.SIGTERM)
        assert pool.exit_code() == 0
    app.workflows["busy"].start_many([None] * 1_200)  # more than the sweep's limit, in a lane that it reads first
    with start("after", "--workers", "1", "--concurrency", "8", *NO_SWEEP) as pool:
        pool.ready()
        assert 0 <= late_s(finish(app, run)) < ON_TIME_S


# ---- cancel, from elsewhere -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workflow_id", ["held", "held-def"])
def test_a_cancel_reaches_a_handler_on_another_host_at_once(app: Streamline, start: Start, tmp_path: Path, workflow_id: str) -> None:
    """Without the signal a handler would continue until its lease is renewed: ten seconds here."""
    with start("one", "--workers", "1", "--concurrency", "1") as one, start("two", "--workers", "1", "--concurrency", "1") as two:
        one.ready()
        two.ready()
        fired, runs = [tmp_path / "fired0", tmp_path / "fired1"], []
        for number in (0, 1):  # each host has capacity for one
            entered = tmp_path / f"entered{number}"
            runs.append(app.workflows[workflow_id].start({"entered": str(entered), "fired": str(fired[number])}))
            eventually(partial(text_of, entered))
        holders = {int((tmp_path / f"entered{number}").read_text()) for number in (0, 1)}
        assert holders == {*one.workers(), *two.workers()}, "one on each host"
        for number, run in enumerate(runs):
            cancelled_at = time.time()
            assert app.workflows[workflow_id].cancel(run.id).status == "cancelled"
            reason, at = eventually(partial(text_of, fired[number])).split()
            assert reason == "cancelled"
            assert float(at) - cancelled_at < ON_TIME_S
