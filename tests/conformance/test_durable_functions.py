"""Durable functions: calls that return stored results, waits in the middle of a function, retries, patches, generations."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from kit_workflows import DAY, NOWHERE
from workers import run_until_idle

from streamline_pool import (
    BlockingDurableContext,
    Context,
    DurableContext,
    InvalidStateError,
    MaxRetriesExceededError,
    NonRetriableError,
    Run,
    Streamline,
    ValidationError,
    Workflow,
    current_step,
    is_timeout,
)
from streamline_pool.protocol.payloads import EXTERNAL_BYTES
from streamline_pool.testing import TestKit
from support import present


@pytest.fixture
def kit(mongodb_uri: str) -> Iterator[TestKit]:
    with TestKit(mongodb_uri) as kit:
        yield kit


@pytest.fixture
def app(kit: TestKit) -> Streamline:
    return kit.use(Streamline(NOWHERE))


MakeApp = Callable[..., Streamline]


class Calls:
    """What was entered, in order."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    def note(self, value: Any) -> Any:
        self.made.append(value)
        return value

    async def note_async(self, value: Any) -> Any:
        await asyncio.sleep(0)
        return self.note(value)


@pytest.fixture
def calls() -> Calls:
    return Calls()


def states(run: Run) -> dict[str, str]:
    return {step.step_id: str(step.status) for step in run.steps}


def kinds(run: Run) -> dict[str, str]:
    return {step["stepId"]: step["kind"] for step in run.document["steps"]}


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


# --- failures --------------------------------------------------------------------------------------------------------


def failing(times: int, made: list[int], error: type[Exception] = ValueError) -> Callable[[], str]:
    def work() -> str:
        made.append(current_step().attempt)
        if len(made) <= times:
            raise error("refused")
        return "done"

    return work


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


@pytest.mark.parametrize("kind", ["async", "thread"])
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

    fn: Callable[[], Any] = stubborn_async if kind == "async" else stubborn

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


# --- changes of the code ---------------------------------------------------------------------------------------------


def deployed(make_app: MakeApp, main: Callable[[DurableContext], Any]) -> Workflow:
    """The workflow with this code, as another deployment has it on the same database."""
    flow = make_app().workflow("flow")
    flow.main(main)
    return flow


def driven(flow: Workflow, run: Run | None = None) -> Run:
    """A run, new or the given one, after this deployment has driven it as far as it goes."""
    run = run or flow.start()
    run_until_idle(flow.app)
    return present(flow.get(run.id))


def test_patched_is_false_in_runs_that_had_passed_and_true_in_new_ones(make_app: MakeApp, calls: Calls) -> None:
    async def before(ctx: DurableContext) -> Any:
        await ctx.step("a", calls.note, "a")
        await ctx.wait("go on")
        return await ctx.step("b", calls.note, "b")

    async def after(ctx: DurableContext) -> Any:
        await ctx.step("a", calls.note, "a")
        checked = ctx.patched("check")
        if checked:
            await ctx.step("checked", calls.note, "checked")
        await ctx.wait("go on")
        return [checked, ctx.patched("later"), await ctx.step("b", calls.note, "b")]

    run = driven(deployed(make_app, before))
    new = deployed(make_app, after)
    young = driven(new)
    assert [driven(new, new.resume(each.id)).output for each in (run, young)] == [[False, True, "b"], [True, True, "b"]]


def test_a_stored_call_of_another_kind_is_reported(make_app: MakeApp, calls: Calls) -> None:
    async def before(ctx: DurableContext) -> None:
        await ctx.step("approve", calls.note, "a")
        await ctx.wait("go on")

    async def after(ctx: DurableContext) -> None:
        await ctx.wait("approve?", name="approve")
        await ctx.wait("go on")

    run = driven(deployed(make_app, before))
    new = deployed(make_app, after)
    error = present(driven(new, new.resume(run.id)).error)
    assert (error["code"], error["type"]) == ("NON_DETERMINISM", "NonDeterminismError")
    assert "'approve' is stored as a step, and the code calls it as a wait" in error["message"]


def test_stored_calls_that_are_not_made_again_are_kept_and_logged(
    make_app: MakeApp, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    async def before(ctx: DurableContext) -> None:
        await ctx.step("old", calls.note, "old")
        await ctx.wait("go on")

    async def after(ctx: DurableContext) -> None:
        await ctx.step("new", calls.note, "new")
        await ctx.wait("go on")

    run = driven(deployed(make_app, before))
    new = deployed(make_app, after)
    run = driven(new, new.resume(run.id))
    assert (run.status, states(run)["old"], calls.made) == ("done", "done", ["old", "new"])
    assert [vars(record)["calls"] for record in caplog.records if record.message == "calls_not_made_again"] == [["old"]]


def test_a_declared_run_does_not_fit_a_main(make_app: MakeApp, calls: Calls) -> None:
    run = driven(make_app().workflow("flow", steps={"main": lambda ctx: ctx.wait("go on")}))

    async def main(ctx: DurableContext) -> None:
        await ctx.step("a", calls.note, 1)

    new = deployed(make_app, main)
    error = present(driven(new, new.resume(run.id)).error)
    assert (error["code"], calls.made) == ("VERSION_MISMATCH", [])


# --- generations -----------------------------------------------------------------------------------------------------


def test_a_run_continues_as_new(kit: TestKit, app: Streamline, calls: Calls) -> None:
    flow, keys = app.workflow("flow"), []

    def work(page: int) -> None:
        keys.append(current_step().idempotency_key)
        calls.note(page)

    @flow.main
    async def run_flow(ctx: DurableContext) -> str:
        await ctx.step("page", work, ctx.input["page"])
        if ctx.input["page"] < 3:
            ctx.continue_as_new({"page": ctx.input["page"] + 1})
        return f"generation {ctx.generation}"

    run = kit.run(flow, {"page": 0})
    assert (run.status, run.output, run.generation, calls.made) == ("done", "generation 3", 3, [0, 1, 2, 3])
    assert list(kinds(run)) == ["main", "page"]
    assert run.input == {"page": 3}
    assert len(set(keys)) == 4, "a call of another generation is another call"


def test_what_has_arrived_stays_in_the_next_generation(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> Any:
        got = [*(ctx.input or []), await ctx.wait_for("item")]
        if len(got) < 3:
            ctx.continue_as_new(got)
        return got

    run = kit.run(flow)
    for number in range(3):
        app.send_event("item", number, run_id=run.id)
    kit.settle()
    run = present(flow.get(run.id))
    assert (run.status, run.output, run.generation) == ("done", [0, 1, 2], 2)


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
