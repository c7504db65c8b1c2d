"""Durable functions that do what hostile or careless code does: each ends, keeps its results apart, and leaves no run behind."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from kit_workflows import NOWHERE
from workers import Pool, run_until_idle

from streamline_pool import BlockingDurableContext, DurableContext, NonRetriableError, Run, Streamline, Workflow, current_step
from streamline_pool.domain import journal
from streamline_pool.engine.group_outputs import GroupOutputs
from streamline_pool.protocol.payloads import EXTERNAL_BYTES
from streamline_pool.testing import TestKit
from support import present


@pytest.fixture
def app(kit: TestKit) -> Streamline:
    return kit.use(Streamline(NOWHERE))


async def give(value: Any) -> Any:
    return value


def refuse() -> None:
    raise NonRetriableError("refused")


def failure_of(run: Run) -> str:
    assert run.status == "failed", run
    return str(present(run.error)["message"])


def resumed(kit: TestKit, flow: Workflow, run: Run, answer: Any = None) -> Run:
    flow.resume(run.id, answer)
    kit.settle()
    return present(flow.get(run.id))


# --- cancellations ---------------------------------------------------------------------------------------------------


async def cancels_itself() -> None:
    current_step().log("in")
    sleeping = asyncio.ensure_future(asyncio.sleep(9))
    sleeping.cancel()
    await sleeping


@pytest.mark.parametrize("is_blocking", [False, True])
def test_a_cancellation_by_the_calls_own_code_is_a_failed_attempt(kit: TestKit, app: Streamline, is_blocking: bool) -> None:
    """It is no cancellation by the function: the run would be released, and claimed again without end."""
    flow = app.workflow("flow")

    async def run_async(ctx: DurableContext) -> None:
        await ctx.step("work", cancels_itself, retries=2, retry_delay=0.001)

    def run_blocking(ctx: BlockingDurableContext) -> None:
        ctx.step("work", cancels_itself, retries=2, retry_delay=0.001)

    flow.main(run_blocking if is_blocking else run_async)
    run = kit.run(flow)
    assert "step work failed 2 times" in failure_of(run)


def test_a_call_that_is_cancelled_before_it_begins_is_no_forgotten_call(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> str:
        task = asyncio.create_task(ctx.step("never", give, 1))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return "done"

    assert kit.run(flow).output == "done"


def test_the_thread_of_a_call_that_the_function_gives_up_is_told(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")
    told: list[Any] = []

    def work() -> None:
        signal = current_step().signal
        signal.wait(10)
        told.append(signal.reason)

    @flow.main
    async def run_flow(ctx: DurableContext) -> str:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await ctx.step("work", work)
        return "done"

    assert kit.run(flow).output == "done"
    assert told == ["cancelled"]


# --- calls within calls ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wait", "sleep", "step", "continue"])
@pytest.mark.parametrize("form", ["coroutine", "lambda", "thread"])
def test_a_call_within_a_call_is_refused_however_it_is_made(kit: TestKit, app: Streamline, kind: str, form: str) -> None:
    """Allowed, a wait would wait for the call that it is in: the run would be held for ever."""
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> None:
        async def inner() -> None:
            if kind == "wait":
                await ctx.wait("inside")
            elif kind == "sleep":
                await ctx.sleep(30)
            elif kind == "step":
                await ctx.step("inner", give, 1)
            else:
                ctx.continue_as_new()

        def from_a_thread() -> None:
            errors: list[BaseException] = []
            loop = asyncio.new_event_loop()

            def run() -> None:
                try:
                    loop.run_until_complete(inner())
                except BaseException as exc:  # noqa: BLE001 -- carried to the call
                    errors.append(exc)

            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            loop.close()
            raise errors[0]

        fn: Callable[[], Any] = {"coroutine": inner, "lambda": lambda: inner(), "thread": from_a_thread}[form]  # noqa: PLW0108 -- no coroutine function
        await ctx.step("outer", fn)

    text = failure_of(kit.run(flow))
    assert "INVALID_STATE" in text
    assert "step outer failed 1 times" in text


def test_a_blocking_ctx_is_refused_in_an_event_loop(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")

    @flow.main
    def run_flow(ctx: BlockingDurableContext) -> None:
        async def inner() -> None:
            ctx.step("inner", give, 1)

        ctx.step("outer", lambda: inner())  # noqa: PLW0108 -- no coroutine function

    assert "INVALID_STATE" in failure_of(kit.run(flow))


def test_the_current_step_is_known_in_what_a_lambda_makes(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")

    async def work() -> str:
        return current_step().step_id

    @flow.main
    async def run_flow(ctx: DurableContext) -> Any:
        return await ctx.step("work", lambda: work())  # noqa: PLW0108 -- no coroutine function

    assert kit.run(flow).output == "work"


# --- names -----------------------------------------------------------------------------------------------------------


def test_names_that_look_alike_keep_their_results_apart(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> Any:
        mapped = [await ctx.map("a[]b", give, ["first"]), await ctx.map("ab[]", give, ["second"]), await ctx.map("a[]b", give, ["third"])]
        stepped = [await ctx.step("a[]b", give, 4), await ctx.step("x", give, 5), await ctx.map("x", give, [6])]
        events = [await ctx.wait_for("order"), await ctx.wait_for("order#2"), await ctx.wait_for("order")]
        return [mapped, stepped, events]

    run = kit.run(flow)
    for name, data in (("order", 1), ("order#2", 2), ("order", 3)):
        app.send_event(name, data, run_id=run.id)
        kit.settle()
    run = present(flow.get(run.id))
    assert run.output == [[["first"], ["second"], ["third"]], [4, 5, [6]], [1, 2, 3]]


def test_a_step_and_a_map_of_one_name_side_by_side(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> Any:
        return await asyncio.gather(ctx.step("x", give, 1), ctx.map("x", give, [2]))

    assert kit.run(flow).output == [1, [2]]


@pytest.mark.parametrize("warms_up", [False, True])
def test_tasks_that_share_a_name_are_refused_also_after_one_that_has_ended(kit: TestKit, app: Streamline, warms_up: bool) -> None:
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> None:
        async def branch() -> None:
            await asyncio.sleep(0.01)
            await ctx.step("shared", give, 1)

        if warms_up:
            await asyncio.create_task(branch())
        await asyncio.gather(branch(), branch())

    assert "the name 'shared' is used by two tasks at once" in failure_of(kit.run(flow))


def test_a_name_that_cannot_be_stored_is_refused_before_its_call(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")
    entered: list[int] = []

    @flow.main
    async def run_flow(ctx: DurableContext) -> Any:
        try:
            await ctx.step("\ud800", lambda: entered.append(1))
        except Exception:  # noqa: BLE001 -- the function goes on
            return await ctx.step("after", give, "after")

    assert (kit.run(flow).output, entered) == ("after", [])


def test_a_map_of_too_many_items_is_refused_before_its_calls(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")
    entered: list[int] = []

    @flow.main
    async def run_flow(ctx: DurableContext) -> None:
        await ctx.map("each", entered.append, range(journal.CALLS_MAX + 1))

    assert "ctx.continue_as_new" in failure_of(kit.run(flow))
    assert not entered


# --- patches ---------------------------------------------------------------------------------------------------------


def test_a_patch_is_asked_for_by_the_function_alone(kit: TestKit, app: Streamline) -> None:
    """Within tasks, which calls were passed before is a matter of chance."""
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> None:
        async def branch() -> bool:
            return ctx.patched("p")

        await asyncio.gather(branch(), ctx.step("b", give, 1))

    assert "in a task beside others would be answered by chance" in failure_of(kit.run(flow))


# --- control ---------------------------------------------------------------------------------------------------------


def test_a_rewind_behind_a_wait_that_began_first(kit: TestKit, app: Streamline) -> None:
    """Calls are stored in the order of their first start, so one that waits may be in front of the target."""
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> Any:
        return await asyncio.gather(ctx.wait("go on"), ctx.step("work", give, 1))

    run = kit.run(flow)
    assert run.current_step_id == "wait"
    flow.rewind_to(run.id, "work")
    kit.settle()
    run = present(flow.get(run.id))
    assert (run.status, run.current_step_id) == ("waiting", "wait")
    assert resumed(kit, flow, run, "yes").output == ["yes", 1]


def test_a_wait_whose_answer_could_not_be_stored_begins_again(kit: TestKit, app: Streamline) -> None:
    """The state after such an answer, if the function has attempts left: the call is pending, and the run is still at it."""
    flow = app.workflow("flow")

    @flow.main(retries=2)
    async def run_flow(ctx: DurableContext) -> Any:
        await ctx.step("before", give, 1)
        return await ctx.wait("go on")

    run = kit.run(flow)
    now = present(app.runs.find_one({"_id": run.id}))["updatedAt"]
    app.runs.update_one({"_id": run.id}, {"$set": {"steps.2.status": "pending", "wakeAt": now}, "$unset": {"steps.2.waitingFor": ""}})
    kit.settle()
    run = present(flow.get(run.id))
    assert (run.status, run.step("wait").status, run.current_step_id) == ("waiting", "waiting", "wait")
    assert resumed(kit, flow, run, "yes").output == "yes"


def test_a_paused_run_begins_no_generation(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")
    entered: list[int] = []

    @flow.main
    async def run_flow(ctx: DurableContext) -> str:
        if ctx.generation == 0:
            await asyncio.to_thread(flow.pause, ctx.run_id)
            ctx.continue_as_new()
        await ctx.step("work", lambda: entered.append(1))
        return "done"

    run = kit.run(flow)
    assert (run.paused, run.generation, entered) == (True, 1, [])
    assert (resumed(kit, flow, run).output, entered) == ("done", [1])


def test_a_checkpoint_does_not_clear_a_suspicion(app: Streamline, kit: TestKit) -> None:
    """A call that stores a checkpoint and then kills its worker must be convicted in the end."""
    flow = app.workflow("flow")
    seen: list[Any] = []

    def work() -> None:
        step = current_step()
        step.checkpoint(1)
        seen.append(present(app.runs.find_one({"_id": step.run_id}))["crashes"])

    @flow.main
    async def run_flow(ctx: DurableContext) -> None:
        await ctx.step("work", work)

    run = flow.start()
    app.runs.update_one({"_id": run.id}, {"$set": {"crashes": 1}})  # before the claim, as recovery does
    kit.settle()
    assert (seen, present(app.runs.find_one({"_id": run.id}))["crashes"]) == ([1], 0)


# --- calls that do not end, threads, failures ------------------------------------------------------------------------


def test_a_function_that_has_failed_is_not_entered_again_because_a_call_does_not_end(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")
    entered: list[int] = []
    free: list[bool] = []

    async def stubborn() -> None:
        while not free:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.02)

    @flow.main
    async def run_flow(ctx: DurableContext) -> None:
        entered.append(1)
        await asyncio.gather(ctx.step("stubborn", stubborn, timeout=0.1), ctx.step("bad", refuse))

    run = kit.run(flow)
    free.append(True)
    assert "step bad failed" in failure_of(run)
    assert entered == [1]


def test_the_time_of_a_def_counts_from_its_entry(make_app: Callable[..., Streamline]) -> None:
    """A call that waits for a thread takes no time of its own."""
    app = make_app(concurrency=2)
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> int:
        return len(await ctx.map("each", lambda _: time.sleep(0.05), range(40), timeout=0.5, retries=1))

    run = flow.start()
    run_until_idle(app, timeout=30)
    assert present(flow.get(run.id)).output == 40


@pytest.mark.slow
def test_the_calls_of_one_run_leave_threads_to_other_runs(make_app: Callable[..., Streamline]) -> None:
    app = make_app(concurrency=2)
    flow = app.workflow("flow")
    declared = app.workflow("declared", steps={"work": (lambda ctx: time.monotonic(), {"timeout": 5, "retries": 1})})

    @flow.main
    async def run_flow(ctx: DurableContext) -> float:
        await ctx.map("each", lambda _: time.sleep(0.1), range(60))
        return time.monotonic()

    async def play() -> tuple[Any, Any]:
        async with Pool(app) as pool:
            long = await flow.start_async()
            await asyncio.sleep(0.5)
            short = await declared.start_async()
            await pool.until_idle(timeout=30)
            return present(await flow.get_async(long.id)).output, present(await declared.get_async(short.id)).output

    long_ended, short_ended = asyncio.run(play())
    assert short_ended < long_ended


def test_a_branch_that_works_beside_a_wait_makes_its_call(kit: TestKit, app: Streamline) -> None:
    """The function must not be left before the branch has asked: the run would wait for an answer to a question that was never sent."""
    flow = app.workflow("flow")
    sent: list[str] = []

    @flow.main
    async def run_flow(ctx: DurableContext) -> Any:
        async def ask() -> None:
            await asyncio.sleep(0.1)
            await ctx.step("send the question", lambda: sent.append("sent"))

        return await asyncio.gather(ctx.wait("answer?"), ask())

    run = kit.run(flow)
    assert (run.status, sent) == ("waiting", ["sent"])
    assert resumed(kit, flow, run, 42).output == [42, None]


def test_a_sleep_beside_a_call_that_is_tried_again_keeps_its_time(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")
    tried: list[int] = []

    def work() -> None:
        tried.append(1)
        if len(tried) < 3:
            raise ValueError("again")

    @flow.main
    async def run_flow(ctx: DurableContext) -> str:
        await asyncio.gather(ctx.sleep(3600), ctx.step("work", work, retry_delay=1000, retry_backoff="fixed"))
        return "done"

    run = kit.run(flow)
    for _ in range(3):
        kit.jump(1400)
    run = present(flow.get(run.id))
    assert (run.status, len(tried)) == ("done", 3)


def test_an_output_beside_the_run_that_is_gone_is_damage_and_not_a_failure(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> Any:
        await ctx.step("large", give, "x" * EXTERNAL_BYTES)
        await ctx.wait("go on")
        return "done"

    run = kit.run(flow)
    app.runs.database["workflow_outputs"].delete_many({"runId": run.id})
    flow.resume(run.id)
    kit.settle()
    stored = present(app.runs.find_one({"_id": run.id}))
    assert (stored["status"], stored["error"]["code"]) == ("failed", "DATA_CORRUPTION")


def test_a_replay_reads_each_output_beside_the_run_once(kit: TestKit, app: Streamline, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = app.workflow("flow")
    reads: list[str] = []
    read = GroupOutputs.read

    def counted(self: GroupOutputs, wanted: Any) -> Any:
        reads.append(wanted.id)
        return read(self, wanted)

    monkeypatch.setattr(GroupOutputs, "read", counted)

    @flow.main
    async def run_flow(ctx: DurableContext) -> int:
        made = await ctx.map("large", give, ["x" * EXTERNAL_BYTES] * 100)
        await ctx.wait("go on")
        return len(made)

    run = kit.run(flow)
    assert resumed(kit, flow, run).output == 100
    assert (len(reads), len(set(reads))) == (100, 100)


def test_a_thread_in_a_copy_of_the_context_may_make_calls(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")

    @flow.main
    def run_flow(ctx: BlockingDurableContext) -> Any:
        results: list[Any] = []
        thread = threading.Thread(target=contextvars.copy_context().run, args=(lambda: results.append(ctx.step("work", give, 1)),))
        thread.start()
        thread.join()
        return results

    assert kit.run(flow).output == [1]
