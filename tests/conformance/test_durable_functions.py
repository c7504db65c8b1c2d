"""Durable functions: calls that return stored results, names, progress, rewind and retry, and how they are declared."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from durable_calls import Calls, failing, kinds, states
from kit_workflows import DAY, NOWHERE

from streamline_pool import (
    BlockingDurableContext,
    Context,
    DurableContext,
    InvalidStateError,
    Streamline,
    ValidationError,
    can_rewind_to,
    current_step,
    get_execution_path,
    get_step_ui_states,
    get_waiting_info,
    get_workflow_progress,
    is_timeout,
)
from streamline_pool.protocol.payloads import EXTERNAL_BYTES
from streamline_pool.testing import TestKit
from support import present


@pytest.fixture
def app(kit: TestKit) -> Streamline:
    return kit.use(Streamline(NOWHERE))


@pytest.fixture
def calls() -> Calls:
    return Calls()


# --- calls and replay ------------------------------------------------------------------------------------------------


def test_a_function_goes_on_after_a_wait_and_makes_no_call_twice(kit: TestKit, app: Streamline, calls: Calls) -> None:
    order = app.workflow("order")

    @order.main
    async def run_order(ctx: DurableContext) -> Any:
        first = await ctx.step("first", calls.note, ctx.input["a"])
        second = await ctx.step("second", calls.note_async, first + 1)
        answer = await ctx.wait("Please approve", {"price": second})
        await ctx.sleep(30 * DAY)
        event = await ctx.wait_for("paid")
        return [first, second, answer, event, await ctx.step("last", calls.note, "last")]

    run = kit.run(order, {"a": 1})
    assert (run.status, run.current_step_id) == ("waiting", "wait")
    assert present(run.step("wait").waiting_for)["data"] == {"price": 2}
    order.resume(run.id, {"ok": True})
    kit.settle()
    assert present(order.get(run.id)).current_step_id == "sleep"
    kit.jump(30 * DAY)
    assert app.send_event("paid", {"by": "card"}, run_id=run.id) == 1
    kit.settle()
    run = present(order.get(run.id))
    assert (run.status, run.output) == ("done", [1, 2, {"ok": True}, {"by": "card"}, "last"])
    assert calls.made == [1, 2, "last"]
    assert kinds(run) == {
        "main": "main", "first": "step", "second": "step", "wait": "wait", "sleep": "sleep", "event:paid": "event", "last": "step",
    }  # fmt: skip
    assert set(states(run).values()) == {"done"}
    assert run.current_step_id is None


def test_a_blocking_function_has_the_same_calls(kit: TestKit, app: Streamline, calls: Calls) -> None:
    flow = app.workflow("flow")

    @flow.main
    def run_flow(ctx: BlockingDurableContext) -> Any:
        first = ctx.step("first", calls.note, 1)
        second = ctx.step("second", calls.note_async, 2)
        mapped = ctx.map("each", calls.note_async, [10, 20, 30], concurrency=2)
        answer = ctx.wait("go?", timeout=DAY, name="approval")
        ctx.sleep(timedelta(hours=1))
        return [first, second, mapped, answer, ctx.patched("new"), ctx.wait_for("news", timeout=60)]

    run = kit.run(flow)
    flow.resume(run.id, "yes")
    kit.settle()
    kit.jump(3600)
    kit.jump(61)
    run = present(flow.get(run.id))
    assert run.status == "done"
    assert run.output[:5] == [1, 2, [10, 20, 30], "yes", True]
    assert is_timeout(run.output[5])
    assert sorted(calls.made) == [1, 2, 10, 20, 30]
    assert list(kinds(run)) == ["main", "first", "second", "each[0]", "each[1]", "each[2]", "approval", "sleep", "new", "event:news"]


def test_names_that_are_used_again_are_numbered(kit: TestKit, app: Streamline, calls: Calls) -> None:
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> Any:
        loop = [await ctx.step("page", calls.note, number) for number in range(3)]
        side_by_side = await asyncio.gather(*(ctx.step("side", calls.note_async, number) for number in range(3)))
        await ctx.wait("one")
        await ctx.wait("two")
        return loop + side_by_side

    run = kit.run(flow)
    for _ in range(2):
        flow.resume(run.id)
        kit.settle()
    run = present(flow.get(run.id))
    assert (run.status, run.output) == ("done", [0, 1, 2, 0, 1, 2])
    assert list(kinds(run)) == ["main", "page", "page#2", "page#3", "side", "side#2", "side#3", "wait", "wait#2"]
    assert len(calls.made) == 6


def test_what_a_call_returns_is_what_a_replay_returns(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")
    seen: list[Any] = []

    @flow.main
    async def run_flow(ctx: DurableContext) -> None:
        small: Any = await ctx.step("small", lambda: {"a": (1, 2)})
        large = await ctx.step("large", lambda: {"text": "x" * EXTERNAL_BYTES})
        seen.append((small, large))
        small["a"].append("changed by the function")
        await ctx.wait("go on")

    run = kit.run(flow)
    flow.resume(run.id)
    kit.settle()
    assert present(flow.get(run.id)).status == "done"
    assert seen[0][1] == seen[1][1] == {"text": "x" * EXTERNAL_BYTES}
    assert (seen[0][0], seen[1][0]) == ({"a": [1, 2, "changed by the function"]},) * 2


def test_many_outputs_beside_the_run_are_found_again(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> Any:
        pages = await ctx.map("page", lambda number: str(number) * EXTERNAL_BYTES, range(100), concurrency=10)
        await ctx.wait("go on")
        return [page[:1] for page in pages]

    run = kit.run(flow)
    flow.resume(run.id)
    kit.settle()
    assert present(flow.get(run.id)).output == [str(number)[:1] for number in range(100)]


def test_calls_side_by_side_are_stored_in_the_order_of_their_start(kit: TestKit, app: Streamline) -> None:
    flow, order = app.workflow("flow"), []

    async def work(seconds: float, name: str) -> str:
        await asyncio.sleep(seconds)
        order.append(name)
        return name

    @flow.main
    async def run_flow(ctx: DurableContext) -> Any:
        return await asyncio.gather(ctx.step("slow", work, 0.1, "slow"), ctx.step("quick", work, 0.0, "quick"))

    run = kit.run(flow)
    assert (run.output, order) == (["slow", "quick"], ["quick", "slow"])
    assert list(kinds(run)) == ["main", "slow", "quick"]


def test_the_context_is_set_with_the_next_result(kit: TestKit, app: Streamline, calls: Calls) -> None:
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> Any:
        ctx.set("stage", 1)
        await ctx.step("a", calls.note, 1)
        assert ctx.get_output("a") == 1
        await ctx.wait("go on")
        ctx.set("stage", 2)
        return ctx.context["stage"]

    run = kit.run(flow)
    assert run.context == {"stage": 1}
    flow.resume(run.id)
    kit.settle()
    run = present(flow.get(run.id))
    assert (run.output, run.context) == (2, {"stage": 2})


def test_an_awaitable_that_a_lambda_makes_is_awaited(kit: TestKit, app: Streamline, calls: Calls) -> None:
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> Any:
        return await ctx.step("a", lambda: calls.note_async("made"))

    assert kit.run(flow).output == "made"


def test_the_current_step_is_the_attempt_at_the_call(kit: TestKit, app: Streamline) -> None:
    flow, seen = app.workflow("flow"), []

    def work() -> str:
        step = current_step()
        assert isinstance(step, Context)
        seen.append((step.step_id, step.attempt, step.idempotency_key, step.get_checkpoint()))
        step.checkpoint({"attempt": step.attempt})
        step.heartbeat()
        step.log("working", on="it")
        if step.attempt == 1:
            raise ValueError("once")
        return "done"

    async def work_async() -> str:
        step = current_step()
        await step.checkpoint("first")
        return str(step.get_checkpoint())

    @flow.main
    async def run_flow(ctx: DurableContext) -> Any:
        return [await ctx.step("work", work, retry_delay=0.001), await ctx.step("async", work_async)]

    run = kit.run(flow)
    assert run.output == ["done", "first"]
    assert seen == [("work", 1, f"{run.id}:work", None), ("work", 2, f"{run.id}:work", {"attempt": 1})]
    assert "checkpoint" not in run.document["steps"][1]
    with pytest.raises(InvalidStateError, match="does not run within"):
        current_step()


# --- control ---------------------------------------------------------------------------------------------------------


def test_rewind_cuts_the_calls_from_a_name_on(kit: TestKit, app: Streamline, calls: Calls) -> None:
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> list[Any]:
        return [await ctx.step(name, calls.note, name) for name in "abc"]

    run = kit.run(flow)
    assert calls.made == ["a", "b", "c"]
    flow.rewind_to(run.id, "b")
    rewound = present(flow.get(run.id))
    assert (states(rewound), rewound.current_step_id) == ({"main": "pending", "a": "done"}, "main")
    kit.settle()
    assert calls.made == ["a", "b", "c", "b", "c"]
    flow.rewind_to(run.id, "main")
    kit.settle()
    assert calls.made[5:] == ["a", "b", "c"]
    assert present(flow.get(run.id)).output == ["a", "b", "c"]


def test_a_cancelled_function_makes_no_call_any_more(kit: TestKit, app: Streamline, calls: Calls) -> None:
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> None:
        await ctx.wait("go on")
        await ctx.step("after", calls.note, 1)

    run = kit.run(flow)
    flow.cancel(run.id)
    kit.settle()
    assert (present(flow.get(run.id)).status, calls.made) == ("cancelled", [])


def test_a_failed_function_goes_on_at_the_call_that_failed(kit: TestKit, app: Streamline, calls: Calls) -> None:
    flow = app.workflow("flow")
    broken = [True]

    def work() -> str:
        calls.note(current_step().attempt)
        if broken:
            raise ValueError("refused")
        return current_step().idempotency_key

    @flow.main
    async def run_flow(ctx: DurableContext) -> Any:
        await ctx.step("before", calls.note, "before")
        return await asyncio.gather(ctx.step("work", work, retries=2, retry_delay=0.001), ctx.step("beside", calls.note, "beside"))

    run = kit.run(flow)
    assert (run.status, present(run.error)["stepId"]) == ("failed", "work")
    broken.clear()
    retried = flow.retry(run.id)
    assert (states(retried), retried.error) == ({"main": "pending", "before": "done", "beside": "done"}, None)
    kit.settle()
    run = present(flow.get(run.id))
    assert (run.status, run.output) == ("done", [f"{run.id}:work", "beside"])
    assert sorted(map(str, calls.made)) == ["1", "1", "2", "before", "beside"]
    with pytest.raises(InvalidStateError, match="is done; only a failed run can be retried"):
        flow.retry(run.id)


def test_a_failed_run_of_declared_steps_goes_on_at_its_step(kit: TestKit, app: Streamline, calls: Calls) -> None:
    broken = [True]

    def work(ctx: Context) -> str:
        calls.note(ctx.get_checkpoint())
        ctx.checkpoint(calls.made)
        if broken:
            raise ValueError("refused")
        return ctx.idempotency_key

    flow = app.workflow("flow", steps={"a": lambda ctx: calls.note("a"), "b": (work, {"retries": 1}), "c": lambda ctx: ctx.get_output("b")})
    run = kit.run(flow)
    assert (run.status, calls.made) == ("failed", ["a", None])
    broken.clear()
    assert states(flow.retry(run.id)) == {"a": "done", "b": "pending", "c": "pending"}
    kit.settle()
    run = present(flow.get(run.id))
    assert (run.status, run.output, calls.made) == ("done", f"{run.id}:b", ["a", None, ["a", None]])


# --- progress --------------------------------------------------------------------------------------------------------


def test_the_progress_of_a_durable_function(kit: TestKit, app: Streamline, calls: Calls) -> None:
    flow = app.workflow("flow")
    work = failing(1, [])

    @flow.main
    async def run_flow(ctx: DurableContext) -> None:
        await ctx.step("before", calls.note, 1)
        await ctx.wait("please")
        await ctx.step("failing", work, retry_delay=600)

    run = kit.run(flow)
    assert present(get_waiting_info(run)).step_id == "wait"
    assert [(state.step.step_id, state.is_past, state.is_current) for state in get_step_ui_states(run)] == [
        ("main", False, False),
        ("before", True, False),
        ("wait", False, True),
    ]
    assert all(can_rewind_to(run, step.step_id) for step in run.steps)
    flow.resume(run.id)
    kit.settle()
    run = present(flow.get(run.id))
    info = present(get_waiting_info(run))
    assert (info.step_id, info.type, info.reason) == ("failing", "retry", "refused")
    kit.jump(900)
    run = present(flow.get(run.id))
    assert get_workflow_progress(run).percent == 100
    assert get_execution_path(run) == ("main", "before", "wait", "failing")


# --- declaration -----------------------------------------------------------------------------------------------------


def test_a_workflow_has_steps_or_a_main(app: Streamline) -> None:
    async def main(ctx: DurableContext) -> None:
        """Does nothing."""

    with_steps = app.workflow("a", steps={"x": lambda ctx: 1})
    with pytest.raises(ValidationError, match=r"has steps \(x\) and can have no main"):
        with_steps.main(main)
    with_main = app.workflow("b")
    with_main.main(main)
    with pytest.raises(ValidationError, match="it has a main, and takes no step 'x'"):
        with_main.step("x")(lambda ctx: 1)
    with pytest.raises(ValidationError, match="it has a main already"):
        with_main.main(main)
    for options, reason in (({"timeout": 3}, "unknown option 'timeout'"), ({"retries": 0}, "retries counts attempts")):
        with pytest.raises(ValidationError, match=reason):
            app.workflow(f"c-{len(app.workflows)}").main(**options)(main)
    with pytest.raises(ValidationError, match="is called with one argument"):
        app.workflow("d").main(lambda: None)  # type: ignore[type-var]
