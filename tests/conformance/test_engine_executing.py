"""Running steps: order, outputs, `ctx`, checkpoints, conditions, events and logs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import pytest
from workers import Pool, check_invariants, run_until_idle

from streamline_pool import InvalidStateError, StepOptions, Streamline, ValidationError, global_event_bus
from support import eventually, present


async def adding(ctx: Any) -> int:
    await asyncio.sleep(0)
    return int(ctx.get_output("first")) + 1


def test_steps_run_in_order_and_the_last_output_is_the_runs(app: Streamline) -> None:
    workflow = app.workflow("w", steps={"first": lambda ctx: 1, "second": adding, "third": lambda ctx: ctx.get_output("second") + 1})
    run = workflow.start()
    run_until_idle(app)
    run = present(workflow.get(run.id))
    assert (run.status, run.output, run.current_step_id, run.error) == ("done", 3, None, None)
    assert [(step.status, step.attempts, step.output) for step in run.steps] == [("done", 1, 1), ("done", 1, 2), ("done", 1, 3)]
    times = [run.created_at, run.started_at, run.steps[0].ended_at, run.steps[2].ended_at, run.ended_at]
    assert times == sorted(present(time) for time in times)
    assert all(step.duration is not None and step.duration >= 0 for step in run.steps)
    check_invariants([run.to_dict()])


def test_a_handler_that_returns_nothing_has_the_output_none(app: Streamline) -> None:
    workflow = app.workflow("w", steps={"a": lambda ctx: None})
    assert workflow.execute(workflow.start().id).output is None


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_ctx_shows_the_run(app: Streamline, kind: str) -> None:
    seen: dict[str, Any] = {}

    def read(ctx: Any) -> None:
        for name in ("run_id", "workflow_id", "step_id", "attempt", "input", "context", "idempotency_key"):
            seen[name] = getattr(ctx, name)
        seen["aborted"], seen["reason"], seen["unknown"] = ctx.signal.aborted, ctx.signal.reason, ctx.get_output("nope")

    async def read_async(ctx: Any) -> None:
        read(ctx)

    workflow = app.workflow("w", steps={"a": read if kind == "def" else read_async})
    run = workflow.execute(workflow.start({"x": 1}).id)
    assert seen == {
        "run_id": run.id, "workflow_id": "w", "step_id": "a", "attempt": 1, "input": {"x": 1}, "context": {"x": 1},
        "idempotency_key": f"{run.id}:a", "aborted": False, "reason": None, "unknown": None,
    }  # fmt: skip


def test_values_that_a_step_sets_are_visible_at_once_and_stored_with_its_result(app: Streamline) -> None:
    views: list[Any] = []

    def write(ctx: Any) -> None:
        ctx.set("plain", (1, 2))
        ctx.set("a.b", 1)
        ctx.set("$inc", {"$x": {"y.z": None}})
        ctx.set("0", "zero")
        views.append((dict(ctx.context), app.runs.find_one({"_id": ctx.run_id})["context"]))

    workflow = app.workflow("w", steps={"write": write, "read": lambda ctx: ctx.context})
    expected = {"old": 1, "plain": [1, 2], "a.b": 1, "$inc": {"$x": {"y.z": None}}, "0": "zero"}
    run = workflow.execute(workflow.start({"old": 1}).id)
    assert views == [(expected, {"old": 1})]
    assert run.output == run.context == expected


def test_values_that_a_failed_attempt_set_are_dropped(app: Streamline) -> None:
    def write(ctx: Any) -> None:
        if ctx.attempt == 1:
            ctx.set("k", "first")
            raise ValueError
        assert "k" not in ctx.context

    workflow = app.workflow("w", steps={"write": (write, {"retry_delay": 0})})
    run = workflow.start({})
    run_until_idle(app)
    assert (present(workflow.get(run.id)).status, present(workflow.get(run.id)).context) == ("done", {})


@pytest.mark.parametrize("key", ["", 5, None, "a\0b"])
def test_a_key_that_cannot_be_stored_is_refused_in_the_handler(app: Streamline, key: Any) -> None:
    workflow = app.workflow("w", steps={"a": (lambda ctx: ctx.set(key, 1), {"retries": 5})})
    run = workflow.execute(workflow.start().id)
    assert (run.status, present(run.error)["code"], run.step("a").attempts) == ("failed", "VALIDATION_ERROR", 1), "not retried"


def test_the_next_step_sees_outputs_as_the_database_has_them(app: Streamline) -> None:
    """Otherwise a workflow could work within one process and fail after a crash between the two steps."""
    kept: list[Any] = []

    def make(ctx: Any) -> Any:
        kept.append({"tuple": (1, 2), "list": []})
        return kept[0]

    def use(ctx: Any) -> str:
        kept[0]["list"].append("changed later")
        return repr(ctx.get_output("make"))

    workflow = app.workflow("w", steps={"make": make, "use": use})
    assert workflow.execute(workflow.start().id).output == "{'tuple': [1, 2], 'list': []}"


def test_a_closed_ctx_does_nothing_more(app: Streamline) -> None:
    """A thread that a handler left running could otherwise write into a later attempt."""
    left: list[Any] = []
    workflow = app.workflow("w", steps={"a": left.append, "b": lambda ctx: 1})
    workflow.execute(workflow.start().id)
    calls: list[Callable[[Any], Any]] = [
        lambda ctx: ctx.set("k", 1), lambda ctx: ctx.checkpoint(1), lambda ctx: ctx.sleep(1), lambda ctx: ctx.emit("x"),
        lambda ctx: ctx.heartbeat(),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(InvalidStateError, match="this attempt at step a is over"):
            call(left[0])


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["def", "async def", "threads of an async def"])
def test_a_checkpoint_is_durable_on_return_kept_across_attempts_and_dropped_at_the_end(app: Streamline, kind: str) -> None:
    stored: list[Any] = []

    def count(ctx: Any) -> Any:
        before = ctx.get_checkpoint()
        ctx.checkpoint((before or 0) + 1)
        stored.append((before, ctx.get_checkpoint(), app.runs.find_one({"_id": ctx.run_id})["steps"][0]["checkpoint"]))
        if ctx.attempt < 3:
            raise ValueError
        return stored[-1]

    async def count_async(ctx: Any) -> Any:
        return count(ctx) if kind == "async def" else await asyncio.to_thread(count, ctx)

    handler = count if kind == "def" else count_async
    workflow = app.workflow("w", steps={"count": (handler, {"retry_delay": 0}), "next": lambda ctx: ctx.get_checkpoint()})
    run = workflow.start()
    run_until_idle(app)
    assert stored == [(None, 1, 1), (1, 2, 2), (2, 3, 3)]
    assert (present(workflow.get(run.id)).output, "checkpoint" in app.runs.find_one({"_id": run.id})["steps"][0]) == (None, False)


def test_checkpoints_of_many_threads_of_one_handler_and_its_end_do_not_mix(app: Streamline) -> None:
    """A result that is sent while a checkpoint is being stored would carry the same `rev`, and one could be mistaken for the other."""

    def checkpoint(ctx: Any, number: int) -> None:
        with contextlib.suppress(InvalidStateError):  # the attempt had ended before this checkpoint was called
            ctx.checkpoint(number)

    async def busy(ctx: Any) -> int:
        loop = asyncio.get_running_loop()
        late = [loop.run_in_executor(None, checkpoint, ctx, number) for number in range(20)]
        await asyncio.sleep(0)
        ctx.checkpoint("here")
        await late[0]
        return 5

    workflow = app.workflow("w", steps={"busy": busy, "next": lambda ctx: ctx.get_output("busy")})
    runs = workflow.start_many([None] * 10)
    run_until_idle(app)
    for run in [workflow.get(run.id) for run in runs]:
        assert (present(run).status, present(run).output, present(run).step("busy").output, present(run).step("busy").attempts) == (
            "done",
            5,
            5,
            1,
        )


# --- conditions -----------------------------------------------------------------------------------------------------


async def no_async(ctx: Any) -> bool:
    return False


@pytest.mark.parametrize(
    ("options", "entered"),
    [
        ({"skip_if": lambda ctx: True}, False), ({"skip_if": lambda ctx: ctx.context["free"]}, True), ({"run_if": lambda ctx: []}, False),
        ({"run_if": no_async}, False), ({"condition": lambda ctx, run: run.step("a").status == "done"}, True),
        ({"condition": lambda ctx, run: False, "run_if": lambda ctx: 1 / 0}, False),
        ({"condition": lambda ctx, run: True, "skip_if": lambda ctx: True, "run_if": lambda ctx: 1 / 0}, False),
        ({"condition": lambda ctx, run: True, "skip_if": lambda ctx: None, "run_if": lambda ctx: "x"}, True),
    ],
)  # fmt: skip
def test_a_step_is_entered_or_skipped_as_its_conditions_say(app: Streamline, options: StepOptions, entered: bool) -> None:
    workflow = app.workflow("w", steps={"a": lambda ctx: 1, "b": (lambda ctx: "ran", options), "c": lambda ctx: ctx.get_output("b")})
    run = workflow.execute(workflow.start({"free": False}).id)
    step = run.step("b")
    assert (run.status, run.output) == ("done", "ran" if entered else None)
    assert (step.status, step.attempts) == (("done", 1) if entered else ("skipped", 0))


def test_a_condition_is_decided_once(app: Streamline) -> None:
    """If the condition were evaluated again, a retry could skip a step that was already entered."""
    asked: list[int] = []

    def fail_twice(ctx: Any) -> None:
        if ctx.attempt < 3:
            raise ValueError

    def run_if(ctx: Any) -> bool:
        asked.append(ctx.attempt)
        return len(asked) == 1

    workflow = app.workflow("w", steps={"a": (fail_twice, {"retry_delay": 0, "run_if": run_if})})
    run = workflow.start()
    run_until_idle(app)
    assert (present(workflow.get(run.id)).status, asked) == ("done", [1])


def _exit(*args: Any) -> Any:
    sys.exit(3)


def _interrupt(*args: Any) -> Any:
    raise KeyboardInterrupt


def _cancel(*args: Any) -> Any:
    raise asyncio.CancelledError


def _divide(*args: Any) -> Any:
    return 1 / 0


@pytest.mark.parametrize("name", ["condition", "skip_if", "run_if"])
@pytest.mark.parametrize("predicate", [_exit, _interrupt, _cancel, _divide])
def test_a_raising_condition_is_a_failed_attempt(app: Streamline, name: str, predicate: Callable[..., Any]) -> None:
    """The condition runs in the worker's event loop, and its exception must not end the worker."""
    options = cast(StepOptions, {name: predicate, "retries": 2, "retry_delay": 0})
    workflow = app.workflow("w", steps={"a": (lambda ctx: 1, options)})
    run, neighbour = workflow.start(), app.workflow("n", steps={"a": lambda ctx: 1}).start()
    run_until_idle(app)
    run = present(workflow.get(run.id))
    assert (run.status, present(run.error)["code"], present(run.step("a").error)["code"]) == (
        "failed",
        "MAX_RETRIES_EXCEEDED",
        "STEP_FAILED",
    )
    assert present(app.get_run(neighbour.id)).status == "done"


def test_a_condition_cannot_sleep(app: Streamline) -> None:
    workflow = app.workflow("w", steps={"a": (lambda ctx: 1, {"skip_if": lambda ctx: ctx.sleep(1)})})
    run = workflow.execute(workflow.start().id)
    assert (run.status, present(run.error)["code"]) == ("failed", "VALIDATION_ERROR")


# --- events and logs ------------------------------------------------------------------------------------------------


def test_events_report_only_what_is_durable(app: Streamline) -> None:
    received: list[tuple[str, Any]] = []

    def record(event: Any) -> None:
        stored = app.runs.find_one({"_id": event.run_id}) or {}
        received.append((event.name, [step["status"] for step in stored.get("steps", [])]))

    app.events.on("*", record)
    workflow = app.workflow("w", steps={"a": lambda ctx: ctx.emit("mine", {"x": 1}), "b": lambda ctx: time.sleep(0.2)})
    workflow.execute(workflow.start().id)
    app.close()
    assert [name for name, _ in received] == [
        "workflow:started", "step:started", "mine", "step:completed", "step:started", "step:completed", "workflow:completed",
    ]  # fmt: skip
    assert dict(received[3:4]) == {"step:completed": ["done", "running"]}
    assert received[-1] == ("workflow:completed", ["done", "done"])


def test_the_global_bus_gets_the_events_of_every_app_and_a_raising_subscriber_disturbs_no_other(
    make_app: Callable[..., Streamline], caplog: pytest.LogCaptureFixture
) -> None:
    received: list[str] = []

    def raising(event: Any) -> None:
        received.append(event.workflow_id)
        raise ValueError("a subscriber of this test")

    global_event_bus.on("workflow:completed", raising)
    try:
        for name in ("one", "two"):
            workflow = make_app(collection_prefix=f"{name}_").workflow(name, steps={"a": lambda ctx: 1})
            assert workflow.execute(workflow.start().id).status == "done"
        eventually(lambda: received == ["one", "two"])
    finally:
        global_event_bus.off("workflow:completed", raising)


@pytest.mark.parametrize("name", ["workflow:completed", "step:failed", "*", "", 5])
def test_engine_names_cannot_be_emitted(app: Streamline, name: Any) -> None:
    workflow = app.workflow("w", steps={"a": lambda ctx: ctx.emit(name)})
    assert present(workflow.execute(workflow.start().id).error)["code"] == ValidationError.fixed_code


def test_a_log_line_names_run_step_and_attempt(app: Streamline, caplog: pytest.LogCaptureFixture) -> None:
    workflow = app.workflow("w", steps={"a": lambda ctx: ctx.log("half way", percent=50)})
    with caplog.at_level(logging.INFO, "streamline_pool.handler"):
        run = workflow.execute(workflow.start().id)
    record = next(record for record in caplog.records if record.message == "half way")
    assert (record.run_id, record.step_id, record.attempt, record.data) == (run.id, "a", 1, {"percent": 50})  # type: ignore[attr-defined]


def test_workers_share_the_runs_and_each_is_run_once(app: Streamline) -> None:
    entered: list[str] = []

    def first(ctx: Any) -> int:
        entered.append(ctx.run_id)
        return 1

    workflow = app.workflow("w", steps={"first": first, "b": adding})
    runs = workflow.start_many(range(300))

    async def work() -> list[int]:
        async with Pool(app, workers=3) as pool:
            await pool.until_idle()
        return [status.runs_total for status in pool.statuses()]

    totals = asyncio.run(work())
    assert sorted(entered) == sorted(run.id for run in runs)
    assert sum(totals) == 300
    assert app.runs.count_documents({"status": "done"}) == 300
