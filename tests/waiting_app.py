"""An application whose runs wait in every way: run by a pool, and loaded in the test's own process as a client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pool_client import loaded_app
from pool_process import PoolProcess, running

from streamline_pool import Streamline

__all__ = ["APP", "evidence", "waiting_app", "waiting_pool"]

APP = '''
import os, time
from streamline_pool import Streamline, create_hook, is_timeout

app = Streamline()


def record(ctx, what, **more):
    """Evidence that survives the process."""
    entry = {"run": ctx.run_id, "step": ctx.step_id, "what": what, "pid": os.getpid(), "at": time.time(), **more}
    app.store().collection("evidence").insert_one(entry)


approval = app.workflow("approval")

@approval.step
def ask(ctx):
    record(ctx, "entered")
    ctx.wait("approve?", timeout=(ctx.input or {}).get("timeout"))

@approval.step
def act(ctx):
    record(ctx, "entered")
    answer = ctx.get_output("ask")
    return "no answer" if is_timeout(answer) else answer


hooked = app.workflow("hooked")

@hooked.step
async def offer(ctx):
    hook = create_hook(ctx, "answer me")
    record(ctx, "token", token=hook.token)
    ctx.wait("answer me")

@hooked.step
def use(ctx):
    return ctx.get_output("offer")


listener = app.workflow("listener")

@listener.step
def first(ctx):
    record(ctx, "entered")
    ctx.wait_for("news")

@listener.step
async def second(ctx):
    ctx.wait_for("news")

@listener.step
def third(ctx):
    ctx.wait_for("news")

@listener.step
def received(ctx):
    return [ctx.get_output(name) for name in ("first", "second", "third")]


single = app.workflow("single")

@single.step
def receive(ctx):
    record(ctx, "entered")
    ctx.wait_for("news")


slow = app.workflow("slow", defaults={"retries": 1})

@slow.step
def work(ctx):
    """Works until a document in the database, or its signal, ends it."""
    record(ctx, "entered")
    go = app.store().collection("go")
    while not ctx.signal.wait(0.005) and go.find_one({"_id": ctx.run_id}) is None:
        pass
    record(ctx, "left", reason=ctx.signal.reason)
    return "worked"

@slow.step
def rest(ctx):
    record(ctx, "entered")
    return "rested"
'''


@contextmanager
def waiting_app(uri: str, database: str) -> Iterator[Streamline]:
    """The application in the test's own process, on the pool's database."""
    with loaded_app(APP, uri, database) as app:
        yield app


@contextmanager
def waiting_pool(folder: Path, uri: str, database: str, *options: str, environ: dict[str, str] | None = None) -> Iterator[PoolProcess]:
    """A pool of the application that is ready. It has two workers unless `options` contain --workers."""
    folder.mkdir(exist_ok=True)
    workers = () if "--workers" in options else ("--workers", "2")
    with running(folder, APP, uri, *workers, *options, database=database, environ=environ) as pool:
        yield pool.ready()


def evidence(app: Streamline, what: str, **wanted: Any) -> list[dict[str, Any]]:
    """The records that the handlers have written, oldest first."""
    return list(app.store().collection("evidence").find({"what": what, **wanted}).sort("at", 1))
