"""The application that pools run in tests of the supervisor, and what a client does with its runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
from pool_process import PoolProcess, running
from stored_runs import stored

from streamline_pool import Run, Streamline
from support import eventually

__all__ = ["APP", "Start", "begin", "finish", "gone", "held_by", "pool_starter"]

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
    """As slow as its input says in the first attempt, quick in the next."""
    if ctx.attempt == 1:
        await asyncio.sleep(ctx.input["seconds"])
    return os.getpid()

@slow.step
def second(ctx):
    return os.getpid()

stubborn = app.workflow("stubborn")

@stubborn.step
def blocks_a_thread(ctx):
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
    """Leaves behind a process that inherited everything, and one that runs another program."""
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
"""`with start(*options) as pool:` a pool of APP on the test's database."""


def pool_starter(mongodb_uri: str, database: str, folder: Path) -> Start:
    return lambda *options: running(folder, APP, mongodb_uri, *options, database=database)


def begin(app: Streamline, workflow: str, **given: Any) -> Run:
    return app.workflows[workflow].start(given)


def finish(app: Streamline, run: Run, timeout: float = 20.0) -> Run:
    return app.workflows[run.workflow_id].wait_for(run.id, timeout=timeout)


ENTERED_AFTER = timedelta(seconds=0.3)  # a reply takes milliseconds; every step that tests wait for takes longer


def held_by(app: Streamline, run: Run) -> int:
    """Wait until a worker has entered the run's step; its pid.

    A test sees the claim before the worker has its reply, and an order in between finds no step entered.
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
