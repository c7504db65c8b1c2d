"""Durable functions that wait in the middle, for people, events and time, or because their run is paused."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from durable_calls import Calls, kinds
from kit_workflows import DAY, NOWHERE

from streamline_pool import (
    DurableContext,
    Streamline,
    is_timeout,
)
from streamline_pool.testing import TestKit
from support import present


@pytest.fixture
def app(kit: TestKit) -> Streamline:
    return kit.use(Streamline(NOWHERE))


@pytest.fixture
def calls() -> Calls:
    return Calls()


# --- waits -----------------------------------------------------------------------------------------------------------


def test_except_exception_around_a_wait_does_not_catch_the_stop(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> Any:
        try:
            return await ctx.wait("go on")
        except Exception:  # noqa: BLE001 -- what users write
            return "caught"

    run = kit.run(flow)
    assert run.status == "waiting"
    flow.resume(run.id, "answer")
    kit.settle()
    assert present(flow.get(run.id)).output == "answer"


def test_a_function_that_swallows_the_stop_is_left_all_the_same(kit: TestKit, app: Streamline, calls: Calls) -> None:
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> Any:
        answer = None
        with contextlib.suppress(BaseException):  # what users should not write
            answer = await ctx.wait("go on")
        with contextlib.suppress(BaseException):
            await ctx.step("after", calls.note, answer)
        return answer

    run = kit.run(flow)
    assert (run.status, calls.made) == ("waiting", [])
    flow.resume(run.id, "answer")
    kit.settle()
    run = present(flow.get(run.id))
    assert (run.output, calls.made) == ("answer", ["answer"])


def test_a_wait_begins_when_the_calls_beside_it_have_ended(kit: TestKit, app: Streamline, calls: Calls) -> None:
    flow = app.workflow("flow")

    async def branch(ctx: DurableContext) -> list[Any]:
        results = []
        for number in range(3):
            await asyncio.sleep(0.01)
            results.append(await ctx.step(f"part-{number}", calls.note_async, number))
        return results

    @flow.main
    async def run_flow(ctx: DurableContext) -> Any:
        return await asyncio.gather(ctx.wait("go on"), branch(ctx))

    run = kit.run(flow)
    assert run.current_step_id == "wait"
    flow.resume(run.id, "yes")
    kit.settle()
    run = present(flow.get(run.id))
    assert (run.status, run.output, sorted(calls.made)) == ("done", ["yes", [0, 1, 2]], [0, 1, 2])


def test_an_event_that_came_before_its_wait_is_not_missed(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> Any:
        await ctx.wait("first")
        return await ctx.wait_for("news")

    run = kit.run(flow)
    app.send_event("news", 1, run_id=run.id)
    flow.resume(run.id)
    kit.settle()
    run = present(flow.get(run.id))
    assert (run.status, run.output, kinds(run)["event:news"]) == ("done", 1, "event")


def test_an_answer_that_does_not_come_in_time(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> str:
        return "late" if is_timeout(await ctx.wait("go on", timeout=DAY)) else "answered"

    run = kit.run(flow)
    kit.jump(DAY)
    assert present(flow.get(run.id)).output == "late"


def test_a_paused_function_begins_no_call(kit: TestKit, app: Streamline, calls: Calls) -> None:
    flow = app.workflow("flow")

    def pause(run_id: str) -> None:
        flow.pause(run_id)

    @flow.main
    async def run_flow(ctx: DurableContext) -> str:
        await ctx.step("pause", pause, ctx.run_id)
        await ctx.step("after", calls.note, 1)
        return "done"

    run = kit.run(flow)
    assert (run.paused, run.document.get("lease"), calls.made) == (True, None, [])
    assert run.step("pause").status == "done"
    flow.resume(run.id)
    kit.settle()
    run = present(flow.get(run.id))
    assert (run.status, calls.made) == ("done", [1])


def test_a_pause_between_calls_is_seen_before_the_next_one(kit: TestKit, app: Streamline, calls: Calls) -> None:
    """A function that works for long between two calls writes nothing meanwhile; it must look before it begins the next one."""
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> str:
        await ctx.step("before", calls.note, 0)
        if len(calls.made) == 1:
            calls.note("paused")
            await asyncio.to_thread(flow.pause, ctx.run_id)
            await asyncio.sleep(0.6)
        await ctx.step("after", calls.note, 1)
        return "done"

    run = kit.run(flow)
    assert (run.paused, calls.made) == (True, [0, "paused"])
    flow.resume(run.id)
    kit.settle()
    assert (present(flow.get(run.id)).status, calls.made) == ("done", [0, "paused", 1])
