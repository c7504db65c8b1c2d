"""Mistakes that used to pass in silence: each is refused, or said in the log, before it can do harm."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime
from typing import Any, cast

import pytest
from workers import run_until_idle

from streamline_pool import StepOptions, Streamline, ValidationError, create_hook
from support import present

NAIVE = datetime(2026, 1, 1, 12)  # noqa: DTZ001 -- what these tests are about


# --- a datetime without a time zone ----------------------------------------------------------------------------------


def test_a_naive_datetime_is_refused_where_runs_are_started_answered_and_sent_events(app: Streamline) -> None:
    """It was taken for UTC, which in New York is five hours from what was meant."""
    tokens: list[str] = []

    def ask(ctx: Any) -> None:
        tokens.append(create_hook(ctx, "?").token)
        ctx.wait("?")

    workflow = app.workflow("w", steps={"ask": ask})
    clocked = app.workflow("clocked", steps={"a": lambda ctx: 1}, context=lambda input: {"at": NAIVE})
    waiting = workflow.execute(workflow.start().id)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("input.at", lambda: workflow.start({"at": NAIVE})),
        ("input[0]", lambda: workflow.start_many([1, [NAIVE]])),
        ("meta.at", lambda: workflow.start(None, {"at": NAIVE})),
        ("context.at", clocked.start),
        ("resume: payload.at", lambda: workflow.resume(waiting.id, {"at": NAIVE})),
        ("resume_hook: payload.at", lambda: app.resume_hook(tokens[0], {"at": NAIVE})),
        ("send_event: data.at", lambda: app.send_event("e", {"at": NAIVE})),
        ("send_event: data", lambda: app.send_event("e", NAIVE, run_id=waiting.id)),
    ]
    for path, call in calls:
        with pytest.raises(ValidationError) as caught:
            call()
        assert caught.value.message.startswith(f"{path}: cannot store a datetime without a time zone"), path
        assert "datetime.now(timezone.utc)" in caught.value.message
    assert app.runs.count_documents({}) == 1, "nothing was stored"
    assert present(workflow.get(waiting.id)).status == "waiting", "and nothing was answered"


@pytest.mark.parametrize(
    ("handler", "path"),
    [
        (lambda ctx: {"at": NAIVE}, "output of step a.at"), (lambda ctx: ctx.set("at", NAIVE), "context.at"),
        (lambda ctx: ctx.checkpoint([NAIVE]), "checkpoint[0]"), (lambda ctx: ctx.wait("?", {"at": NAIVE}), "wait.data.at"),
        (lambda ctx: ctx.emit("mine", NAIVE), "emit('mine').data"),
    ],
)  # fmt: skip
def test_a_naive_datetime_in_a_handler_fails_the_step_and_is_not_retried(app: Streamline, handler: Any, path: str) -> None:
    workflow = app.workflow("w", steps={"a": (handler, {"retries": 5})})
    run = workflow.execute(workflow.start().id)
    assert (run.status, run.step("a").attempts, present(run.error)["code"]) == ("failed", 1, "VALIDATION_ERROR")
    assert present(run.error)["message"].startswith(f"{path}: cannot store a datetime without a time zone")


def test_what_was_read_back_can_be_stored_again(app: Streamline) -> None:
    """Inputs, outputs and documents read by `app.runs` hold aware datetimes; a step must be able to pass them on."""
    workflow = app.workflow("w", steps={"a": lambda ctx: app.runs.find_one({"_id": ctx.run_id}), "b": lambda ctx: ctx.get_output("a")})
    run = workflow.execute(workflow.start().id)
    assert (run.status, run.output["createdAt"]) == ("done", run.created_at)
    assert workflow.start(run.output).input == run.output


# --- changes of the context ------------------------------------------------------------------------------------------


def test_an_assignment_to_the_context_fails_the_step_and_names_ctx_set(app: Streamline) -> None:
    """The next step, perhaps on another host, would not see it."""

    def assign(ctx: Any) -> None:
        ctx.context["k"] = 1

    workflow = app.workflow("w", steps={"a": (assign, {"retries": 5})})
    run = workflow.execute(workflow.start({"k": 0}).id)
    assert (run.status, run.step("a").attempts, run.context) == ("failed", 1, {"k": 0})
    assert (present(run.error)["code"], "ctx.set('k', value)" in present(run.error)["message"]) == ("VALIDATION_ERROR", True)
    assert "assign" in present(run.error)["traceback"]


def _append(ctx: Any) -> None:
    ctx.context["items"].append(2)


def _append_what_bson_cannot_hold(ctx: Any) -> None:
    ctx.context["items"].append(object())  # stored with others, it would fail the writes of a whole batch


def _append_after_set(ctx: Any) -> None:
    ctx.set("items", [1])
    _append(ctx)


def _append_and_wait(ctx: Any) -> None:
    _append(ctx)
    ctx.wait("?")


@pytest.mark.parametrize("handler", [_append, _append_what_bson_cannot_hold, _append_after_set, _append_and_wait])
def test_a_change_inside_of_a_context_value_is_not_stored_and_logged(
    app: Streamline, handler: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The list may be scratch data of a working program, so the step does not fail."""
    workflow = app.workflow("w", steps={"a": (handler, {"retries": 5})})
    with caplog.at_level(logging.WARNING, "streamline_pool"):
        run = workflow.execute(workflow.start({"items": [1]}).id)
    assert (run.status, run.step("a").attempts, run.context) == ("waiting" if handler is _append_and_wait else "done", 1, {"items": [1]})
    (said,) = [record for record in caplog.records if record.getMessage().startswith("context_changed")]
    assert said.getMessage().startswith("context_changed: the handler changed ctx.context['items'] in place")
    assert "ctx.set('items'" in said.getMessage()
    assert vars(said)["run_id"] == run.id


def test_a_value_that_is_changed_and_then_set_is_stored(app: Streamline) -> None:
    """Read, change, set is how such a change is meant to be made."""

    def change(ctx: Any) -> None:
        items = ctx.context.get("items")
        items.append(2)
        ctx.set("items", items)
        new = ctx.context.get("new", [])
        new.append(3)
        ctx.set("new", new)

    workflow = app.workflow("w", steps={"a": change, "b": lambda ctx: ctx.context})
    run = workflow.execute(workflow.start({"items": [1]}).id)
    assert run.output == run.context == {"items": [1, 2], "new": [3]}


@pytest.mark.parametrize("name", ["skip_if", "run_if", "condition"])
def test_a_condition_that_changes_the_context_is_logged(app: Streamline, name: str, caplog: pytest.LogCaptureFixture) -> None:
    def condition(ctx: Any, *run: Any) -> bool:
        _append(ctx)
        return name != "skip_if"

    workflow = app.workflow("w", steps={"a": (lambda ctx: 1, cast(StepOptions, {name: condition, "retries": 5}))})
    with caplog.at_level(logging.WARNING, "streamline_pool"):
        run = workflow.execute(workflow.start({"items": [1]}).id)
    assert (run.status, run.context) == ("done", {"items": [1]})
    assert any(record.getMessage().startswith("context_changed: a condition changed ctx.context['items']") for record in caplog.records)


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_misspelt_step_gives_none_and_a_warning_with_the_run(app: Streamline, caplog: pytest.LogCaptureFixture) -> None:
    workflow = app.workflow(
        "w", steps={"reserve": lambda ctx: 1, "ship": lambda ctx: [ctx.get_output(name) for name in ("reserv", "ship")]}
    )
    with caplog.at_level(logging.WARNING, "streamline_pool"):
        run = workflow.execute(workflow.start().id)
    assert run.output == [None, None]
    (said,) = [record for record in caplog.records if record.getMessage().startswith("unknown_step")]
    assert "ctx.get_output('reserv')" in said.getMessage()
    assert "did you mean 'reserve'?" in said.getMessage()
    assert (said.run_id, said.step_id) == (run.id, "ship")  # type: ignore[attr-defined]


# --- awaiting --------------------------------------------------------------------------------------------------------


def test_a_handler_may_await_every_call(app: Streamline) -> None:
    """As handlers of the Node library do."""

    async def work(ctx: Any) -> str:
        await ctx.set("k", 1)
        await ctx.log("text", percent=50)
        await ctx.emit("mine")
        await ctx.heartbeat()
        await ctx.checkpoint({"page": 1})
        return f"{ctx.context['k']} {ctx.get_checkpoint()}"

    async def nap(ctx: Any) -> None:
        await ctx.sleep(0)

    async def ask(ctx: Any) -> None:
        await ctx.wait("?")

    async def receive(ctx: Any) -> None:
        await ctx.wait_for("paid")

    workflow = app.workflow(
        "w", steps={"work": work, "nap": nap, "ask": ask, "receive": receive, "end": lambda ctx: ctx.get_output("work")}
    )
    run = workflow.start()
    run_until_idle(app)
    workflow.resume(run.id, "yes")
    app.send_event("paid", 5, run_id=run.id)
    run_until_idle(app)
    done = present(workflow.get(run.id))
    assert (done.status, done.output, done.context) == ("done", "1 {'page': 1}", {"k": 1})
    assert (done.step("ask").output, done.step("receive").output) == ("yes", 5)


def test_a_handler_that_returns_the_result_of_such_a_call_has_no_output(app: Streamline) -> None:
    steps: dict[str, Any] = {
        "a": lambda ctx: ctx.set("k", 1),
        "b": lambda ctx: (ctx.log("x"), ctx.emit("mine")),
        "c": lambda ctx: ctx.heartbeat() or 5,
    }
    workflow = app.workflow("w", steps=steps)
    run = workflow.execute(workflow.start().id)
    assert (run.status, [step.output for step in run.steps]) == ("done", [None, [None, None], 5])
