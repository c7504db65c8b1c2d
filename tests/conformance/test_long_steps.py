"""Steps that last much longer than the lease: the worker renews it, they run once, and continue from their checkpoints."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pool_process import PoolProcess, running
from stored_runs import stored
from waiting_app import evidence
from workers import check_invariants

from streamline_pool import Streamline
from support import eventually, present

APP = """
import asyncio, os, time
from streamline_pool import Streamline

app = Streamline()

def record(ctx, what, **more):
    app.store().collection("evidence").insert_one({"run": ctx.run_id, "what": what, "pid": os.getpid(), "at": time.time(), **more})

def blocked(ctx):
    record(ctx, "entered")
    time.sleep(ctx.input)
    return "blocked"

async def asleep(ctx):
    record(ctx, "entered")
    await asyncio.sleep(ctx.input)
    return "asleep"

def busy(ctx):
    record(ctx, "entered")
    until = time.monotonic() + ctx.input
    while time.monotonic() < until:
        sum(range(1000))
    return "busy"

def counting(ctx):
    record(ctx, "entered", checkpoint=ctx.get_checkpoint())
    for number in range((ctx.get_checkpoint() or 0) + 1, 11):
        ctx.checkpoint(number)
        if number == 4 and ctx.attempt == 1:
            record(ctx, "at four")
            time.sleep(60)
    return ctx.get_checkpoint()

async def counting_async(ctx):
    record(ctx, "entered", checkpoint=ctx.get_checkpoint())
    for number in range((ctx.get_checkpoint() or 0) + 1, 11):
        await ctx.checkpoint(number)
        if number == 4 and ctx.attempt == 1:
            record(ctx, "at four")
            await asyncio.sleep(60)
    return ctx.get_checkpoint()

for handler in (blocked, asleep, busy, counting, counting_async):
    app.workflow(handler.__name__, steps={"long": (handler, {"retries": 1}), "next": lambda ctx: ctx.get_output("long")})
"""


@contextmanager
def pool_of(app: Streamline, folder: Path, *options: str) -> Iterator[PoolProcess]:
    """A pool of APP on the database of `app`. Afterwards `app` can start its runs and read them."""
    for name in ("blocked", "asleep", "busy", "counting", "counting_async"):
        app.workflow(name, steps={"long": lambda ctx: None, "next": lambda ctx: None})
    with running(folder, APP, app.where.uri, "--workers", "2", *options, database=app.where.database) as pool:
        yield pool.ready()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_step_of_more_than_ten_leases_runs_once(app: Streamline, tmp_path: Path) -> None:
    """A blocking thread, a coroutine and a thread that keeps the interpreter busy: their worker must renew the leases meanwhile."""
    with pool_of(app, tmp_path, "--lease", "0.5") as pool:
        runs = [app.workflows[name].start(5.5) for name in ("blocked", "asleep", "busy")]
        done = [app.workflows[run.workflow_id].wait_for(run.id, timeout=40) for run in runs]
        assert not pool.logged("run_fenced") + pool.logged("run_lost")
    assert [run.output for run in done] == ["blocked", "asleep", "busy"]
    for run in done:
        assert (run.step("long").attempts, run.document["crashes"], run.document["token"]) == (1, 0, 1), "claimed once"
        assert present(run.step("long").duration) >= 5.5
        assert len(evidence(app, "entered", run=run.id)) == 1
    check_invariants([run.to_dict() for run in done])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["counting", "counting_async"])
@pytest.mark.slow
def test_a_long_step_whose_worker_is_killed_continues_from_its_checkpoint(app: Streamline, tmp_path: Path, name: str) -> None:
    with pool_of(app, tmp_path):
        run = app.workflows[name].start()
        (at_four,) = eventually(lambda: evidence(app, "at four", run=run.id), timeout=20)
        assert stored(app, run)["steps"][0]["checkpoint"] == 4, "durable when `checkpoint` has returned"
        os.kill(at_four["pid"], signal.SIGKILL)
        done = app.workflows[name].wait_for(run.id, timeout=30)
    assert (done.output, done.step("long").attempts) == (10, 2)
    first, second = evidence(app, "entered", run=run.id)
    assert (first["checkpoint"], second["checkpoint"], first["pid"] != second["pid"]) == (None, 4, True)
    assert "checkpoint" not in done.document["steps"][0]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_worker_that_is_suspended_for_longer_than_its_lease_loses_the_step_and_its_result(app: Streamline, tmp_path: Path) -> None:
    """A suspended worker does not renew: another worker takes over, and the first worker's result must be refused."""
    with pool_of(app, tmp_path, "--lease", "1", "--stall-timeout", "30") as pool:
        run = app.workflows["asleep"].start(2.0)
        (first,) = eventually(lambda: evidence(app, "entered", run=run.id), timeout=20)
        os.kill(first["pid"], signal.SIGSTOP)
        stopped_at = datetime.now(UTC)
        try:
            done = app.workflows["asleep"].wait_for(run.id, timeout=30)
        finally:
            os.kill(first["pid"], signal.SIGCONT)
        eventually(lambda: [entry for name in ("run_fenced", "run_lost", "lease_lost") for entry in pool.logged(name)])
        assert stored(app, run) == done.document, "the worker that woke up has changed the run"
    second = evidence(app, "entered", run=run.id)[-1]
    assert (done.step("long").attempts, second["pid"] != first["pid"]) == (2, True)
    assert present(done.ended_at) > stopped_at


def test_a_heartbeat_is_allowed_and_never_needed(app: Streamline) -> None:
    def beat(ctx: Any) -> str:
        for _ in range(3):
            ctx.heartbeat()
        return "beaten"

    async def beat_async(ctx: Any) -> str:
        return beat(ctx)

    workflow = app.workflow("w", steps={"a": beat, "b": beat_async})
    done = workflow.execute(workflow.start().id)
    assert [step.output for step in done.steps] == ["beaten", "beaten"]
