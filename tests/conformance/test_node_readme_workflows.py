"""The README of the Node library, version 1.0.0, in Python: its blocks on workflows, from "Architecture" to "Long-Running Steps".

Each test is one code block, as its user would write it here, run on a real MongoDB. test_node_readme.py lists the blocks.
"""

from __future__ import annotations

import asyncio
import shlex
import tomllib
from datetime import timedelta
from typing import Any

import pytest
from workers import Pool, run_until_idle

import streamline_pool
from streamline_pool import Context, Event, Run, Streamline, execute_parallel, is_timeout
from streamline_pool.testing import TestKit
from support import REPOSITORY, eventually, present

SITE = {"https://example.com": "<li>one</li><li>two</li>"}  # stands for the site of the README
SAVED: list[Any] = []


# --- Architecture --------------------------------------------------------------------------------------------------------


def test_each_part_of_the_layer_diagram(app: Streamline) -> None:
    """Retries, timeouts, claims and recovery below the application; events; stored runs, atomic updates, and a cache of 10 000."""
    seen: list[str] = []
    app.events.on("*", lambda event: seen.append(event.name))

    async def second_time_lucky(ctx: Context) -> str:
        if ctx.attempt == 1:
            await asyncio.sleep(60)
        return "done"

    workflow = app.workflow("layers", steps={"try": (second_time_lucky, {"timeout": 0.05, "retry_delay": 0})})
    run = workflow.start()
    (worker,) = run_until_idle(app)
    stored = present(app.runs.find_one({"_id": run.id}))
    assert (stored["status"], stored["steps"][0]["attempts"], app.runs.name) == ("done", 2, "workflow_runs")
    eventually(lambda: "workflow:completed" in seen)
    assert {"workflow:started", "step:started", "workflow:retry", "workflow:completed"} <= set(seen)
    assert worker.lru["capacity"] == 10_000


def test_the_state_machine(app: Streamline) -> None:
    """draft → running → waiting ↔ running → done, failed, cancelled."""

    def ask(ctx: Context) -> None:
        ctx.wait("go on?")

    def end(ctx: Context) -> None:
        if ctx.get_output("ask") != "yes":
            raise streamline_pool.NonRetriableError("refused")

    workflow = app.workflow("states", steps={"ask": ask, "end": end})
    assert workflow.start(start_at=3600).status == "draft"
    ends = {"yes": "done", "no": "failed"}
    for answer, status in ends.items():
        run = workflow.start()
        assert run.status == "running"
        assert workflow.execute(run.id).status == "waiting"
        assert workflow.resume(run.id, answer).status == "running"
        assert workflow.execute(run.id).status == status
    assert workflow.cancel(workflow.start().id).status == "cancelled"


# --- Installation --------------------------------------------------------------------------------------------------------


def test_what_is_installed_and_imported() -> None:
    """`pip install streamline-pool` instead of `npm install`. tests/test_packaging.py installs it; the driver, PyMongo, comes with it."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["name"] == "streamline-pool"
    assert any(shlex.split(needed)[0].startswith("pymongo") for needed in project["dependencies"])
    assert {"Streamline", "execute_parallel", "create_hook", "global_event_bus", "ErrorCode"} <= set(streamline_pool.__all__)


# --- Quick Start ---------------------------------------------------------------------------------------------------------


def test_quick_start(app: Streamline) -> None:
    def fetch(ctx: Context) -> dict[str, Any]:
        return {"html": SITE[ctx.context["url"]]}

    async def parse(ctx: Context) -> dict[str, Any]:
        return {"data": ctx.get_output("fetch")["html"].count("<li>")}

    async def save(ctx: Context) -> dict[str, Any]:
        SAVED.append(ctx.get_output("parse")["data"])
        return {"saved": True}

    scraper = app.workflow(
        "web-scraper",
        steps={"fetch": fetch, "parse": parse, "save": save},
        context=lambda input: {"url": input["url"]},
        version="1.0.0",
    )
    run = scraper.start({"url": "https://example.com"})
    assert run.status == "running", "`start` stores the run; the workers of a pool execute it"
    run_until_idle(app)
    done = present(scraper.get(run.id))
    assert (done.status, done.output, SAVED.pop()) == ("done", {"saved": True}, 2)


# --- Core Features -------------------------------------------------------------------------------------------------------


def test_wait_for_human_input(app: Streamline) -> None:
    async def wait(ctx: Context) -> None:
        await ctx.wait("Please approve", {"request": ctx.context["data"]})  # `await` works, and is not needed

    async def execute(ctx: Context) -> dict[str, Any]:
        return {"done": True, "approved": ctx.get_output("wait")}

    approval = app.workflow(
        "approval-flow",
        steps={"submit": lambda ctx: {"submitted": True}, "wait": wait, "execute": execute},
        context=lambda input: {"data": input},
    )
    run = approval.start("a lamp")
    run_until_idle(app)
    waiting = present(approval.get(run.id)).step("wait").waiting_for
    assert (present(waiting)["reason"], present(waiting)["data"]) == ("Please approve", {"request": "a lamp"})

    approval.resume(run.id, {"approved": True, "by": "admin"})
    run_until_idle(app)
    assert present(approval.get(run.id)).output == {"done": True, "approved": {"approved": True, "by": "admin"}}


def test_sleep(mongodb_uri: str) -> None:
    """`ctx.sleep(3600000)` is 3600 here: every duration is in seconds. The TestKit lets the hour pass at once."""
    with TestKit(mongodb_uri) as kit:
        app = kit.use(Streamline())

        async def wait(ctx: Context) -> None:
            await ctx.sleep(3600)

        workflow = app.workflow(
            "delayed-task", steps={"start": lambda ctx: {"ready": True}, "wait": wait, "complete": lambda ctx: {"done": True}}
        )
        run = kit.run(workflow)
        assert (run.status, run.current_step_id) == ("waiting", "wait")
        kit.jump(timedelta(hours=1))
        assert present(workflow.get(run.id)).output == {"done": True}


@pytest.mark.parametrize(("mode", "results"), [("all", ["api1", "api2", "api3"]), ("race", "api1"), ("any", "api1")])
def test_parallel_execution(app: Streamline, mode: Any, results: Any) -> None:
    """`race` and `any` give the value itself. What a step returns must be data: the README returns `Response` objects."""

    async def call(name: str) -> str:
        await asyncio.sleep(0 if name == "api1" else 0.2)
        return name

    async def fetch_all(ctx: Context) -> dict[str, Any]:
        return {"results": await execute_parallel([lambda: call("api1"), lambda: call("api2"), lambda: call("api3")], mode=mode)}

    workflow = app.workflow("parallel-fetch", steps={"fetchAll": fetch_all})
    assert workflow.execute(workflow.start().id).output == {"results": results}


def test_conditional_steps(app: Streamline) -> None:
    def premium_feature(ctx: Context) -> dict[str, Any]:
        if ctx.context["tier"] != "premium":
            return {"skipped": True}
        return {"premium": True}

    def express_shipping(ctx: Context) -> dict[str, Any]:
        return {"shipping": "express" if ctx.context["priority"] == "express" else "standard"}

    workflow = app.workflow(
        "conditional-flow",
        steps={
            "check": lambda ctx: {"tier": ctx.context["tier"]},
            "premiumFeature": premium_feature,
            "expressShipping": express_shipping,
            # the engine can decide, too; then the step's status is `skipped`
            "gift": (lambda ctx: "wrapped", {"run_if": lambda ctx: ctx.context["tier"] == "premium"}),
        },
        context=lambda input: {"tier": input["tier"], "priority": input["priority"]},
    )
    premium = workflow.execute(workflow.start({"tier": "premium", "priority": "express"}).id)
    assert [step.output for step in premium.steps] == [{"tier": "premium"}, {"premium": True}, {"shipping": "express"}, "wrapped"]
    basic = workflow.execute(workflow.start({"tier": "basic", "priority": "none"}).id)
    assert [step.output for step in basic.steps] == [{"tier": "basic"}, {"skipped": True}, {"shipping": "standard"}, None]
    assert [step.status for step in basic.steps] == ["done", "done", "done", "skipped"]


def test_wait_for_completion(app: Streamline) -> None:
    """A timeout raises the built-in TimeoutError. `poll_interval` is a ceiling: the end of a run wakes the caller."""
    workflow = app.workflow(
        "data-pipeline",
        steps={
            "fetch": lambda ctx: SITE[ctx.input["url"]],
            "process": lambda ctx: ctx.get_output("fetch").count("<li>"),
            "save": lambda ctx: {"rows": ctx.get_output("process")},
        },
    )

    async def main() -> Run:
        async with Pool(app):
            run = await workflow.start_async({"url": "https://example.com"})
            return await workflow.wait_for_async(run.id, timeout=60, poll_interval=0.5)

    completed = asyncio.run(main())
    assert (completed.status, completed.output) == ("done", {"rows": 2})
    with pytest.raises(TimeoutError):
        workflow.wait_for(workflow.start({"url": "https://example.com"}).id, timeout=0.01)


def test_long_running_steps(app: Streamline) -> None:
    """No heartbeat is needed: the lease is renewed for as long as the worker lives. A checkpoint keeps what was done."""

    async def process(ctx: Context) -> dict[str, int]:
        data = ctx.input["data"]
        batches = [data[at : at + 1000] for at in range(0, len(data), 1000)]
        for batch in batches:
            assert len(batch) == 1000
            await ctx.heartbeat()
        return {"processed": len(batches)}

    workflow = app.workflow("large-dataset", steps={"process": process})
    assert workflow.execute(workflow.start({"data": list(range(3000))}).id).output == {"processed": 3}


# --- API Reference -------------------------------------------------------------------------------------------------------


def test_every_method_of_a_workflow(app: Streamline) -> None:
    """start, execute, resume, get, cancel, pause, rewindTo, waitFor, shutdown."""
    workflow = app.workflow("api", steps={"ask": lambda ctx: ctx.wait("?"), "end": lambda ctx: ctx.get_output("ask")})
    run = workflow.start({"input": 1}, {"meta": 2})
    assert workflow.execute(run.id).status == "waiting"
    assert workflow.pause(run.id).paused
    assert not workflow.resume(run.id).paused, "a paused run is un-paused, and its wait stays unanswered"
    workflow.resume(run.id, "payload")
    workflow.execute(run.id)
    assert workflow.wait_for(run.id, timeout=10).output == "payload"
    assert workflow.rewind_to(run.id, "ask").status == "running"
    assert workflow.cancel(run.id).status == "cancelled"
    assert present(workflow.get(run.id)).meta == {"meta": 2}
    workflow.shutdown()


def test_every_member_of_the_step_context(app: Streamline) -> None:
    """set, getOutput, wait, waitFor, sleep, heartbeat, emit, log, signal; in the README's way, with `await`."""
    emitted: list[Event] = []
    app.events.on("order:packed", emitted.append)

    async def work(ctx: Context) -> bool:
        await ctx.set("key", "value")
        await ctx.heartbeat()
        await ctx.emit("order:packed", {"boxes": 2})
        await ctx.log("packed", boxes=2)
        return ctx.signal.aborted

    async def nap(ctx: Context) -> None:
        await ctx.sleep(0)

    async def paid(ctx: Context) -> None:
        await ctx.wait_for("order:paid")

    async def ask(ctx: Context) -> None:
        await ctx.wait("Please approve", timeout=0.01)

    def end(ctx: Context) -> list[Any]:
        return [ctx.get_output("work"), ctx.get_output("paid"), is_timeout(ctx.get_output("ask")), ctx.context]

    workflow = app.workflow("context", steps={"work": work, "nap": nap, "paid": paid, "ask": ask, "end": end})
    run = workflow.start({})
    run_until_idle(app)
    assert app.send_event("order:paid", 5, run_id=run.id) == 1, "events that end waits are sent by `send_event`, not by `emit`"
    run_until_idle(app)
    assert present(workflow.get(run.id)).output == [False, 5, True, {"key": "value"}]
    assert [event.data for event in eventually(lambda: emitted)] == [{"boxes": 2}]
