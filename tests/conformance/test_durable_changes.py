"""Durable functions whose code changes under their runs: patches, kinds, calls that are made no more, generations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from durable_calls import Calls, kinds, states
from kit_workflows import NOWHERE
from workers import run_until_idle

from streamline_pool import (
    DurableContext,
    Run,
    Streamline,
    Workflow,
    current_step,
)
from streamline_pool.protocol import control
from streamline_pool.testing import TestKit
from support import present

MakeApp = Callable[..., Streamline]


@pytest.fixture
def app(kit: TestKit) -> Streamline:
    return kit.use(Streamline(NOWHERE))


@pytest.fixture
def calls() -> Calls:
    return Calls()


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


def test_a_rewind_that_comes_late_does_not_reach_the_next_generation(kit: TestKit, app: Streamline, calls: Calls) -> None:
    """There the same name is another call."""
    flow = app.workflow("flow")

    @flow.main
    async def run_flow(ctx: DurableContext) -> None:
        await ctx.step("work", calls.note, ctx.generation)
        await ctx.wait("go on")
        ctx.continue_as_new()

    run = kit.run(flow)
    names = ["work", "wait"]
    late = control.rewind_run("flow", run.id, 0, 1, names, run.document["lane"], 0, "late", is_durable=True, rewinds=0)
    flow.resume(run.id)
    kit.settle()
    assert (present(flow.get(run.id)).generation, calls.made) == (1, [0, 1])
    assert app.store().run(late) is None
    assert flow.rewind_to(run.id, "work").current_step_id == "main"
