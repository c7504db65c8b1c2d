"""User code that changes shared objects, raises odd exceptions or uses its own event loop: it affects only its own attempt."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from workers import run_until_idle

from streamline_pool import StepOptions, Streamline
from streamline_pool.domain.errors import NonRetriableError, ValidationError
from support import present


def test_a_checkpoint_changed_in_memory_and_not_stored_is_not_stored_by_the_retry(app: Streamline) -> None:
    """An item that the failed attempt marked as done in memory must not be skipped by the next attempt: it would never be done."""
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


def test_changes_to_the_objects_that_ctx_returns_are_not_visible_to_later_steps(app: Streamline) -> None:
    """A change would be visible here and not after a crash, and a value that BSON cannot hold would fail the writes of the whole batch."""
    seen: list[Any] = []

    def first(ctx: Any) -> dict[str, Any]:
        ctx.set("set", {})
        ctx.input["nested"]["object"] = object()
        ctx.set("dotted.key", 1)  # then the context is stored as a whole
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
def test_an_exception_that_cannot_be_printed_fails_only_its_own_attempt(app: Streamline, is_async: bool) -> None:
    """Such an exception must not end the worker and with it every run that the worker holds."""
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


def test_a_signal_awaited_in_the_handlers_own_loop_fires_there_and_is_harmless_after_that_loop_was_closed(app: Streamline) -> None:
    """If firing raised an error, the attempt would never end, its lease would be renewed for ever, and no other run would be fenced."""
    received: list[str] = []

    def waits(ctx: Any) -> None:
        async def wait() -> None:
            received.append(await ctx.signal)

        asyncio.run(asyncio.wait_for(wait(), 5))

    def leaves(ctx: Any) -> None:
        async def begin_to_wait() -> None:
            left.append(waiting := ctx.signal.__await__())
            next(waiting)  # as a task does; but a task that never ends would be reported when it is destroyed

        loop = asyncio.new_event_loop()
        loop.run_until_complete(begin_to_wait())
        loop.close()
        time.sleep(1)

    left: list[Any] = []
    options: StepOptions = {"timeout": 0.3, "retries": 1}
    runs = [app.workflow(name, steps={"s": (work, options)}).start() for name, work in (("waits", waits), ("leaves", leaves))]
    run_until_idle(app)
    assert [present(present(app.get_run(run.id)).error)["code"] for run in runs] == ["STEP_TIMEOUT", "STEP_TIMEOUT"]
    assert received == ["timeout"]
