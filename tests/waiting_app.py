"""An application whose runs wait in every way, as a pool runs it, and the same application in the test's own process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pool_process import PoolProcess, running
from pymongo.read_concern import ReadConcern

from streamline_pool import Run, Streamline
from support import eventually

__all__ = ["APP", "evidence", "step_of", "stored", "until_step", "waiting_app", "waiting_pool"]

APP = '''
import os, time
from streamline_pool import Streamline, create_hook, is_timeout

app = Streamline()


def tell(ctx, what, **more):
    """Evidence that outlives the process."""
    told = {"run": ctx.run_id, "step": ctx.step_id, "what": what, "pid": os.getpid(), "at": time.time(), **more}
    app.store().collection("evidence").insert_one(told)


approval = app.workflow("approval")

@approval.step
def ask(ctx):
    tell(ctx, "entered")
    ctx.wait("approve?", timeout=(ctx.input or {}).get("timeout"))

@approval.step
def act(ctx):
    tell(ctx, "entered")
    answer = ctx.get_output("ask")
    return "nobody" if is_timeout(answer) else answer


hooked = app.workflow("hooked")

@hooked.step
async def offer(ctx):
    hook = create_hook(ctx, "answer me")
    tell(ctx, "token", token=hook.token)
    ctx.wait("answer me")

@hooked.step
def use(ctx):
    return ctx.get_output("offer")


listener = app.workflow("listener")

@listener.step
def first(ctx):
    tell(ctx, "entered")
    ctx.wait_for("news")

@listener.step
async def second(ctx):
    ctx.wait_for("news")

@listener.step
def third(ctx):
    ctx.wait_for("news")

@listener.step
def heard(ctx):
    return [ctx.get_output(name) for name in ("first", "second", "third")]


single = app.workflow("single")

@single.step
def listen(ctx):
    tell(ctx, "entered")
    ctx.wait_for("news")


slow = app.workflow("slow", defaults={"retries": 1})

@slow.step
def work(ctx):
    """At work until it is told to end, by a document in the database or by its signal."""
    tell(ctx, "entered")
    go = app.store().collection("go")
    while not ctx.signal.wait(0.005) and go.find_one({"_id": ctx.run_id}) is None:
        pass
    tell(ctx, "left", reason=ctx.signal.reason)
    return "worked"

@slow.step
def rest(ctx):
    tell(ctx, "entered")
    return "rested"
'''


@contextmanager
def waiting_app(uri: str, database: str) -> Iterator[Streamline]:
    """The application as a second program on that database has it."""
    scope: dict[str, Any] = {}
    exec(compile(APP, "waiting_app", "exec"), scope)
    app: Streamline = scope["app"]
    app.mongodb_uri, app.database = uri, database
    with app:
        yield app


@contextmanager
def waiting_pool(folder: Path, uri: str, database: str, *options: str, environ: dict[str, str] | None = None) -> Iterator[PoolProcess]:
    """A pool of the application, ready; two workers unless the options say otherwise."""
    folder.mkdir(exist_ok=True)
    workers = () if "--workers" in options else ("--workers", "2")
    with running(folder, APP, uri, *workers, *options, database=database, environ=environ) as pool:
        yield pool.ready()


def stored(app: Streamline, run: Run) -> dict[str, Any]:
    """The run's document as every caller of the API sees it from now on, which a plain look sees some moments earlier."""
    document: dict[str, Any] = app.runs.with_options(read_concern=ReadConcern("majority")).find_one({"_id": run.id})
    return document


def step_of(app: Streamline, run: Run, step_id: str) -> dict[str, Any]:
    """One of its steps."""
    return next(step for step in stored(app, run)["steps"] if step["stepId"] == step_id)


def until_step(app: Streamline, run: Run, step_id: str, status: str, *, timeout: float = 20.0) -> dict[str, Any]:
    """The run once that step has that status, and (if it waits) nobody holds the run any more."""

    def reached() -> dict[str, Any] | None:
        document = stored(app, run)
        step = next(step for step in document["steps"] if step["stepId"] == step_id)
        return document if step["status"] == status and (status != "waiting" or "lease" not in document) else None

    return eventually(reached, timeout=timeout) or {}


def evidence(app: Streamline, what: str, **wanted: Any) -> list[dict[str, Any]]:
    """What the handlers have told, oldest first."""
    return list(app.store().collection("evidence").find({"what": what, **wanted}).sort("at", 1))
