"""What user code may do to its worker and to its own run: as little as possible."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from workers import run_until_idle

from streamline_pool import Streamline
from streamline_pool.domain.errors import NonRetriableError, ValidationError
from support import present


def test_a_checkpoint_changed_in_memory_and_not_stored_is_not_stored_by_the_retry(app: Streamline) -> None:
    """The danger: the item noted as done just before the attempt failed on it is skipped by the next one, so it is never done."""
    seen: list[list[str]] = []

    def work(ctx: Any) -> None:
        state = ctx.get_checkpoint() or {"done": []}
        seen.append(list(state["done"]))
        if not state["done"]:
            ctx.checkpoint({"done": ["a"]})
            ctx.get_checkpoint()["done"].append("b")
            raise RuntimeError("while it did b")

    app.workflow("w", steps={"work": (work, {"retry_delay": 0.01})}).start()
    run_until_idle(app)
    assert seen == [[], ["a"]]


def test_what_a_handler_does_to_what_ctx_shows_is_seen_by_no_later_step(app: Streamline) -> None:
    """The danger: it is seen here and not after a crash; and what BSON cannot hold fails the writes of every run in the batch."""
    seen: list[Any] = []

    def first(ctx: Any) -> dict[str, Any]:
        ctx.set("set", {})
        for shown in (ctx.input["nested"], ctx.context["nested"], ctx.context["set"]):
            shown["object"] = object()
        ctx.set("dotted.key", 1)  # the context is then stored as a whole
        return {}

    def second(ctx: Any) -> None:
        ctx.get_output("first")["object"] = object()
        seen.extend([ctx.input["nested"], ctx.context["nested"], ctx.context["set"], ctx.get_output("first")])

    workflow = app.workflow("w", steps={"first": first, "second": second})
    runs = [workflow.start({"nested": {}}) for _ in range(3)]
    run_until_idle(app)
    assert {present(workflow.get(run.id)).status for run in runs} == {"done"}
    assert seen == [{}] * 12


class RaisesInStr(Exception):
    def __str__(self) -> str:
        raise SystemExit(9)


class RaisesInRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no text for you")


@pytest.mark.parametrize("is_async", [False, True])
def test_an_exception_that_cannot_be_told_fails_its_own_attempt_only(app: Streamline, is_async: bool) -> None:
    """The danger: the worker ends by it, thrice, and each time with it every run in flight."""
    raised = [RaisesInStr(), SystemExit(RaisesInRepr()), ValidationError("\ud800"), NonRetriableError("\ud800"), KeyboardInterrupt()]

    def work(ctx: Any) -> None:
        if ctx.input is not None:
            raise raised[ctx.input]

    async def work_async(ctx: Any) -> None:
        work(ctx)

    workflow = app.workflow("w", steps={"work": work_async if is_async else work}, defaults={"retries": 1})
    failing, innocent = workflow.start_many(range(len(raised))), workflow.start()
    run_until_idle(app)
    assert present(workflow.get(innocent.id)).status == "done"
    assert {present(workflow.get(run.id)).status for run in failing} == {"failed"}
    assert app.runs.count_documents({"crashes": {"$gt": 0}}) == 0


def test_a_signal_awaited_in_a_loop_of_the_handlers_own_fires_there_and_hurts_nobody_once_that_loop_is_closed(app: Streamline) -> None:
    """The danger: firing raises, so the attempt never ends, its lease is renewed for ever, and nothing fences the other runs."""
    heard: list[str] = []

    def listens(ctx: Any) -> None:
        async def wait() -> None:
            heard.append(await ctx.signal)

        asyncio.run(asyncio.wait_for(wait(), 5))

    def leaves(ctx: Any) -> None:
        async def wait() -> None:
            await ctx.signal

        loop = asyncio.new_event_loop()
        left.append(loop.create_task(wait()))
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()
        time.sleep(1)

    left: list[Any] = []
    options = {"timeout": 0.3, "retries": 1}
    runs = [app.workflow(name, steps={"s": (work, options)}).start() for name, work in (("listens", listens), ("leaves", leaves))]
    run_until_idle(app)
    assert [present(present(app.get_run(run.id)).error)["code"] for run in runs] == ["STEP_TIMEOUT", "STEP_TIMEOUT"]
    assert heard == ["timeout"]
