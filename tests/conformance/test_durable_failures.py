"""Calls of durable functions that fail, take too long, or do not end, and functions that do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from durable_calls import Calls, failing, states
from kit_workflows import NOWHERE

from streamline_pool import (
    BlockingDurableContext,
    DurableContext,
    MaxRetriesExceededError,
    NonRetriableError,
    Streamline,
    current_step,
)
from streamline_pool.testing import TestKit
from support import present


@pytest.fixture
def app(kit: TestKit) -> Streamline:
    return kit.use(Streamline(NOWHERE))


@pytest.fixture
def calls() -> Calls:
    return Calls()


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0.001, 600])
def test_a_call_is_attempted_again_in_memory_or_after_a_stop(kit: TestKit, app: Streamline, delay: float) -> None:
    flow = app.workflow("flow")
    made: list[Any] = []

    @flow.main
    async def run_flow(ctx: DurableContext) -> Any:
        return await ctx.step("work", failing(2, made), retry_delay=delay, retry_backoff="fixed")

    run = kit.run(flow)
    if delay > 1:
        assert (run.status, run.step("work").status, run.step("main").status) == ("waiting", "pending", "pending")
        assert present(run.step("work").error)["message"] == "refused"
        for _ in range(2):
            kit.jump(2 * delay)
        run = present(flow.get(run.id))
    assert (run.status, run.output, made) == ("done", "done", [1, 2, 3])
    assert (run.step("work").attempts, run.step("work").error) == (3, None)


def test_a_call_without_attempts_left_raises_and_the_function_may_go_on(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")
    made: list[Any] = []

    @flow.main
    async def run_flow(ctx: DurableContext) -> Any:
        try:
            await ctx.step("work", failing(9, made), retries=2, retry_delay=0.001)
        except MaxRetriesExceededError as exc:
            caught = exc.context["error"]
        await ctx.wait("go on")
        return caught

    run = kit.run(flow)
    flow.resume(run.id)
    kit.settle()
    run = present(flow.get(run.id))
    assert (run.status, run.output["message"], made) == ("done", "refused", [1, 2])
    assert run.step("work").status == "failed"


def test_the_failure_of_a_call_fails_the_run_and_names_the_call(kit: TestKit, app: Streamline, calls: Calls) -> None:
    flow = app.workflow("flow")

    @flow.main(retries=3)
    async def run_flow(ctx: DurableContext) -> None:
        await ctx.step("before", calls.note, 1)
        await ctx.step("work", failing(9, [], NonRetriableError))

    run = kit.run(flow)
    error = present(run.error)
    assert (run.status, error["code"], error["stepId"]) == ("failed", "MAX_RETRIES_EXCEEDED", "work")
    assert "step work failed 1 times, the last time with STEP_FAILED: NonRetriableError: refused" in error["message"]
    assert states(run) == {"main": "failed", "before": "done", "work": "failed"}


def test_an_exception_of_the_function_is_an_attempt_of_the_function(kit: TestKit, app: Streamline, calls: Calls) -> None:
    flow, entered = app.workflow("flow"), []

    @flow.main(retries=3, retry_delay=60)
    async def run_flow(ctx: DurableContext) -> str:
        await ctx.step("a", calls.note, 1)
        entered.append(ctx.attempt)
        if len(entered) < 3:
            raise ValueError("not yet")
        return "done"

    run = kit.run(flow)
    assert run.status == "waiting"
    for _ in range(2):
        kit.jump(300)
    run = present(flow.get(run.id))
    assert (run.status, run.output, entered, calls.made) == ("done", "done", [1, 2, 3], [1])


def test_calls_under_way_end_and_are_stored_when_another_one_fails_the_function(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")
    made: list[Any] = []

    async def slow() -> str:
        await asyncio.sleep(0.1)
        made.append("slow")
        return "slow"

    @flow.main
    async def run_flow(ctx: DurableContext) -> None:
        await asyncio.gather(ctx.step("bad", failing(9, [], NonRetriableError)), ctx.step("slow", slow))

    run = kit.run(flow)
    assert (run.status, made, run.step("slow").status) == ("failed", ["slow"], "done")


def test_a_call_that_takes_too_long_fails_its_attempt(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")
    made: list[Any] = []

    async def slow() -> str:
        made.append(current_step().attempt)
        if len(made) == 1:
            await asyncio.sleep(60)
        return "in time"

    @flow.main
    async def run_flow(ctx: DurableContext) -> Any:
        return await ctx.step("slow", slow, timeout=0.05, retry_delay=0.001)

    run = kit.run(flow)
    assert (run.status, run.output, made) == ("done", "in time", [1, 2])


def test_a_function_may_limit_the_time_of_its_calls(kit: TestKit, app: Streamline, calls: Calls) -> None:
    """The cancellation by the function's own time-out is no failed attempt, and reaches the function."""
    flow = app.workflow("flow")

    async def endless() -> None:
        await asyncio.sleep(60)

    @flow.main
    async def run_flow(ctx: DurableContext) -> Any:
        try:
            async with asyncio.timeout(0.05):
                await ctx.step("endless", endless)
        except TimeoutError:
            return await ctx.step("instead", calls.note, "instead")

    run = kit.run(flow)
    assert (run.status, run.output) == ("done", "instead")


@pytest.mark.parametrize("kind", ["async", "thread", "lambda"])
@pytest.mark.parametrize("is_blocking", [False, True])
def test_a_call_that_does_not_end_is_left(kit: TestKit, app: Streamline, kind: str, is_blocking: bool) -> None:
    """A handler that ignores its time-out must not hold up the run: another entry into the function goes on without it."""
    flow = app.workflow("flow")
    made: list[int] = []
    free: list[bool] = []

    async def stubborn_async() -> str:
        made.append(current_step().attempt)
        if len(made) == 1:
            while not free:
                try:
                    await asyncio.sleep(0.05)
                except asyncio.CancelledError:
                    continue
        return "after all"

    def stubborn() -> str:
        made.append(current_step().attempt)
        while len(made) == 1 and not free:
            time.sleep(0.05)
        return "after all"

    fns: dict[str, Callable[[], Any]] = {"async": stubborn_async, "thread": stubborn, "lambda": lambda: stubborn_async()}  # noqa: PLW0108
    fn = fns[kind]

    async def run_async(ctx: DurableContext) -> Any:
        return await ctx.step("stubborn", fn, timeout=0.05, retry_delay=0.001)

    def run_blocking(ctx: BlockingDurableContext) -> Any:
        return ctx.step("stubborn", fn, timeout=0.05, retry_delay=0.001)

    flow.main(run_blocking if is_blocking else run_async)
    run = flow.start()
    kit.settle()
    kit.jump(1)
    run = present(flow.get(run.id))
    free.append(True)
    assert (run.status, run.output, made[:2]) == ("done", "after all", [1, 2])
