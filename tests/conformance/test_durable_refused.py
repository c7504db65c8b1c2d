"""What a durable function must not do: one clear error each, and nothing that was stored is lost."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from typing import Any

import pytest
from kit_workflows import NOWHERE

from streamline_pool import BlockingDurableContext, DurableContext, Run, Streamline, current_step
from streamline_pool.domain import journal
from streamline_pool.testing import TestKit
from support import present


@pytest.fixture
def app(kit: TestKit) -> Streamline:
    return kit.use(Streamline(NOWHERE))


async def work(value: Any = None) -> Any:
    return value


Main = Callable[[DurableContext], Any]


async def forgets_to_await(ctx: DurableContext) -> None:
    await ctx.step("before", work)
    ctx.step("forgotten", work)  # type: ignore[unused-coroutine]


async def ends_beside_a_call(ctx: DurableContext) -> None:
    async def slow() -> None:
        await asyncio.sleep(0.05)

    await ctx.step("before", work)
    task = asyncio.create_task(ctx.step("slow", slow))
    await asyncio.sleep(0.01)
    del task


async def names_a_call_by_a_number(ctx: DurableContext) -> None:
    await ctx.step("before", work)
    await ctx.step(7, work)  # type: ignore[call-overload]


async def uses_no_function(ctx: DurableContext) -> None:
    await ctx.step("before", work)
    await ctx.step("no", work())  # type: ignore[call-overload]


async def waits_twice_at_once(ctx: DurableContext) -> None:
    await ctx.step("before", work)
    await asyncio.gather(ctx.wait("one"), ctx.wait("two"))


async def sleeps_twice_at_once(ctx: DurableContext) -> None:
    await ctx.step("before", work)
    await asyncio.gather(ctx.sleep(0.01), ctx.sleep(0.01))


async def waits_in_a_call(ctx: DurableContext) -> None:
    async def fn() -> None:
        await ctx.wait("inside")

    await ctx.step("before", work)
    await ctx.step("outer", fn)


async def waits_by_the_current_step(ctx: DurableContext) -> None:
    await ctx.step("before", work)
    await ctx.step("outer", lambda: current_step().wait("inside"))


async def calls_in_a_call(ctx: DurableContext) -> None:
    async def fn() -> None:
        await ctx.step("inner", work)

    await ctx.step("before", work)
    await ctx.step("outer", fn)


async def returns_what_cannot_be_stored(ctx: DurableContext) -> None:
    await ctx.step("before", work)
    await ctx.step("set", work, {"items": [{1, 2}]})


async def shares_a_name_between_tasks(ctx: DurableContext) -> None:
    async def branch() -> None:
        await asyncio.sleep(0.01)
        await ctx.step("shared", work)

    await ctx.step("before", work)
    await asyncio.gather(branch(), branch())


async def has_a_retry_option_that_is_none(ctx: DurableContext) -> None:
    await ctx.step("before", work)
    await ctx.step("no", work, retries=0)


async def has_a_timeout_that_is_none(ctx: DurableContext) -> None:
    await ctx.step("before", work)
    await ctx.step("no", work, timeout=[])  # type: ignore[call-overload]


async def maps_over_text(ctx: DurableContext) -> None:
    await ctx.step("before", work)
    await ctx.map("letters", work, "text")


async def maps_by_no_places(ctx: DurableContext) -> None:
    await ctx.step("before", work)
    await ctx.map("each", work, [1], concurrency=0)


async def sleeps_for_a_text(ctx: DurableContext) -> None:
    await ctx.step("before", work)
    await ctx.sleep("long")  # type: ignore[arg-type]


async def returns_an_object(ctx: DurableContext) -> Any:
    await ctx.step("before", work)
    return object()


@pytest.mark.parametrize(
    ("main", "code", "words"),
    [
        (forgets_to_await, "INVALID_STATE", "its call 'forgotten' was never awaited; write `await` before each call"),
        (ends_beside_a_call, "INVALID_STATE", "its call 'slow' was under way; write `await` before each call"),
        (names_a_call_by_a_number, "VALIDATION_ERROR", "ctx.step: name: a name is text of 1 to 200 characters, not 7"),
        (uses_no_function, "VALIDATION_ERROR", "ctx.step: fn is a function, not <coroutine object work"),
        (waits_twice_at_once, "INVALID_STATE", "'wait#2' would be a second wait at the same time"),
        (sleeps_twice_at_once, "INVALID_STATE", "'sleep#2' would be a second wait at the same time"),
        (waits_in_a_call, "MAX_RETRIES_EXCEEDED", "the call 'wait' was made within the call 'outer'"),
        (waits_by_the_current_step, "MAX_RETRIES_EXCEEDED", "the call 'outer' cannot sleep or wait"),
        (calls_in_a_call, "MAX_RETRIES_EXCEEDED", "the call 'inner' was made within the call 'outer'"),
        (returns_what_cannot_be_stored, "MAX_RETRIES_EXCEEDED", "output of step set.items[0]: cannot store <class 'set'>"),
        (shares_a_name_between_tasks, "INVALID_STATE", "the name 'shared' is used by two tasks at once"),
        (has_a_retry_option_that_is_none, "VALIDATION_ERROR", "ctx.step: retries counts attempts"),
        (has_a_timeout_that_is_none, "VALIDATION_ERROR", "ctx.step: timeout"),
        (maps_over_text, "VALIDATION_ERROR", "ctx.map: items is a list"),
        (maps_by_no_places, "VALIDATION_ERROR", "ctx.map: concurrency is a whole number of at least 1"),
        (sleeps_for_a_text, "VALIDATION_ERROR", "ctx.sleep: a duration is a number"),
        (returns_an_object, "VALIDATION_ERROR", "output of step main: cannot store <class 'object'>"),
    ],
)
def test_what_cannot_be_is_one_error_and_the_results_before_it_are_kept(
    kit: TestKit, app: Streamline, main: Main, code: str, words: str
) -> None:
    flow = app.workflow("flow")
    flow.main(main)
    run = kit.run(flow)
    error = present(run.error)
    assert (run.status, error["code"]) == ("failed", code), error
    assert words in error["message"]
    assert run.step("before").status == "done"


@pytest.mark.parametrize("name", ["", "x" * 201, "a\0b", "main", "page#2", "page[0]"])
def test_names_that_a_call_cannot_have(kit: TestKit, app: Streamline, name: str) -> None:
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> None:
        await ctx.step(name, work)

    error = present(kit.run(flow).error)
    assert (error["code"], "ctx.step: name" in error["message"]) == ("VALIDATION_ERROR", True)


def test_more_calls_than_a_generation_may_make(kit: TestKit, app: Streamline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "CALLS_MAX", 20)  # 5 000 take half a minute
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> None:
        for number in range(21):
            await ctx.step("page", work, number)

    run = kit.run(flow)
    error = present(run.error)
    assert (run.status, error["code"], len(run.steps)) == ("failed", "PAYLOAD_TOO_LARGE", 21)
    assert "ctx.continue_as_new" in error["message"]


def test_the_ctx_of_another_run_is_refused(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")
    contexts: list[DurableContext] = []
    both = asyncio.Barrier(2)

    @flow.main
    async def run_flow(ctx: DurableContext) -> None:
        contexts.append(ctx)
        await both.wait()
        await contexts[0].step("mine", work)

    runs = flow.start_many([1, 2])
    kit.settle()
    found = [present(flow.get(run.id)) for run in runs]
    assert sorted(str(run.status) for run in found) == ["done", "failed"]
    failed = next(run for run in found if run.status == "failed")
    assert "its ctx was used for the call 'mine' by the durable function of another run" in present(failed.error)["message"]


def test_a_call_after_the_end_is_refused(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")
    errors: list[BaseException] = []
    contexts: list[DurableContext] = []

    @flow.main
    async def run_flow(ctx: DurableContext) -> str:
        contexts.append(ctx)
        return "done"

    run = kit.run(flow)

    async def late() -> None:
        await contexts[0].step("late", work)

    with pytest.raises(Exception, match=r"INVALID_STATE.*made by code that does not know its run"):
        asyncio.run(late())
    assert (run.status, errors, len(present(flow.get(run.id)).steps)) == ("done", [], 1)


def test_a_blocking_function_may_use_threads_with_names_of_their_own(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow")

    @flow.main
    def run_flow(ctx: BlockingDurableContext) -> list[int]:
        results: dict[int, int] = {}

        def part(n: int) -> None:
            results[n] = ctx.step(f"part-{n}", work, n)

        threads = [threading.Thread(target=contextvars.copy_context().run, args=(part, n)) for n in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[n] for n in range(5)]

    run = kit.run(flow)
    assert (run.status, run.output) == ("done", [0, 1, 2, 3, 4])


def test_a_large_history_ends_with_a_clear_error(kit: TestKit, app: Streamline) -> None:
    """Results up to 4 KiB are in the run's document, which ends at 12 MiB, so that it has room for what arrives."""
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> None:
        ctx.set("ballast", "x" * (11 * 1024 * 1024))
        await ctx.map("page", work, ["y" * 4000] * 500, concurrency=50, retries=1)

    run = kit.run(flow)
    assert (run.status, present(run.error)["code"]) == ("failed", "MAX_RETRIES_EXCEEDED")
    assert "PAYLOAD_TOO_LARGE" in present(run.error)["message"]
    assert "ctx.continue_as_new" in present(run.error)["message"]
    done: list[Any] = [step for step in run.steps if step.status == "done"]
    assert len(done) > 100


def states(run: Run) -> list[str]:
    return [str(step.status) for step in run.steps]
