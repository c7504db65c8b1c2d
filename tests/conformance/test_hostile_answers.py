"""Answers, hook tokens and events with unusual content: data that looks like an expression, large or nested data, old tokens."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from parked_runs import Waiting

from streamline_pool import Context, Streamline, create_hook
from streamline_pool.domain.errors import HookTokenError, PayloadTooLargeError
from support import eventually, present

NASTY: list[Any] = [
    "$$NOW",
    "$_id",
    "$$ROOT",
    {"$add": [1]},
    {"$literal": {"$add": [1, 2]}},
    {"a.b": 1, "$x": {"$y": "$z"}, "": 2},
    [["$steps"], {"$set": {"status": "done"}}],
    None,
    {},
    [],
    False,
    "",
    0,
]
"""Values that an update pipeline would interpret, or that careless code takes for no value."""


@pytest.mark.parametrize("way", ["resume", "hook", "event", "to all", "early event", "broadcast before the wait"])
def test_what_a_caller_sends_is_data_and_never_an_expression(app: Streamline, waiting: Waiting, way: str) -> None:
    """Answers and events pass through update pipelines, in which text that begins with `$` is a field of the run."""
    for number, data in enumerate(NASTY):
        run_id = f"$x.{number}"
        match way:
            case "resume":
                waiting.parked("human", run_id=run_id)
                waiting.workflow.resume(run_id, data)
            case "hook":
                waiting.parked("hook", run_id=run_id)
                app.resume_hook(waiting.tokens[-1], data)
            case "event":
                waiting.parked("event", run_id=run_id)
                assert app.send_event("$go.now", data, run_id=run_id) == 1
            case "to all":
                waiting.parked("event", run_id=run_id)
                assert app.send_event("$go.now", data) == 1
            case "early event":
                waiting.workflow.start("event", run_id=run_id)
                assert app.send_event("$go.now", data, run_id=run_id) == 0
            case "broadcast before the wait":
                waiting.workflow.start("event", run_id=run_id)
                assert app.send_event("$go.now", data) == 0
        run = waiting.workflow.execute(run_id)
        assert run.status == "done"
        assert run.output == ["passed on", data]
        assert type(run.step("first").output) is type(data)
        assert not {"_item", "_hit"} & set(run.to_dict())


def test_the_reasons_of_control_operations_are_text_and_never_expressions(app: Streamline, waiting: Waiting) -> None:
    run_id = waiting.parked("human", run_id="$$NOW")
    assert waiting.workflow.pause(run_id, reason="$$NOW").to_dict()["pauseReason"] == "$$NOW"
    assert waiting.workflow.rewind_to(run_id, "first").paused
    assert waiting.workflow.cancel(run_id, reason="$status").to_dict()["cancelReason"] == "$status"


def test_a_hook_accepts_an_answer_as_large_as_resume_accepts(app: Streamline, waiting: Waiting) -> None:
    """A command may have 16 MiB: if it contained the answer twice, answers above 8 MiB would be refused."""
    large = "x" * (11 * 1024 * 1024)
    waiting.parked("hook")
    assert app.resume_hook(waiting.tokens[-1], large).run.step("first").output == large


@pytest.mark.parametrize("how", ["hook, then sleep", "hook, then event"])
def test_a_hook_ends_no_sleep_and_no_wait_for_an_event(app: Streamline, waiting: Waiting, how: str) -> None:
    """The token belongs to a `ctx.wait` that the handler did not call; if it were accepted, the step would end too early."""
    run_id = waiting.parked(how)
    with pytest.raises(HookTokenError):
        app.resume_hook(waiting.tokens[-1], "too soon")
    assert present(waiting.workflow.get(run_id)).step("first").status == "waiting"


@pytest.mark.parametrize("early", [True, False])
def test_an_expired_hook_is_refused_and_its_wait_goes_on(app: Streamline, early: bool) -> None:
    tokens: list[str] = []

    def asks(ctx: Context) -> None:
        tokens.append(create_hook(ctx, "?", expires_in=0.001).token)
        if early:
            eventually(lambda: app.store().now() > ctx._document["steps"][0]["hooks"][0]["expiresAt"])
            with pytest.raises(HookTokenError):
                app.resume_hook(tokens[0], "too late")
        ctx.wait("?")

    workflow = app.workflow("asks", steps={"asks": asks})
    run = workflow.execute(workflow.start().id)
    assert run.step("asks").status == "waiting"
    with pytest.raises(HookTokenError):
        app.resume_hook(tokens[0], "too late")
    assert workflow.resume(run.id, "by its name").step("asks").output == "by its name"


def test_one_hook_is_answered_once_early_or_not(app: Streamline) -> None:
    """The first answer is kept. A second answer is refused after the wait has begun, so it must be refused before it as well."""
    tokens: list[str] = []

    def asks(ctx: Context) -> None:
        tokens.append(create_hook(ctx, "?").token)
        app.resume_hook(tokens[0], "first")
        with pytest.raises(HookTokenError):
            app.resume_hook(tokens[0], "second")
        ctx.wait("?")

    workflow = app.workflow("asks", steps={"asks": asks})
    run = workflow.execute(workflow.start().id)
    assert (run.status, run.output, run.to_dict()["inbox"]) == ("done", "first", [])


def test_an_event_can_be_sent_to_a_database_without_our_indexes(app: Streamline) -> None:
    """Another program may have created the runs' collection without indexes, and a query with a hint fails without its index."""
    app.runs.insert_one({"_id": "foreign"})
    app.runs.delete_one({"_id": "foreign"})
    assert app.send_event("go") == 0


def test_a_nested_event_for_a_busy_run_is_not_refused_for_its_depth(app: Streamline, waiting: Waiting) -> None:
    """A payload of the greatest legal depth lies some levels deeper in the inbox; it must not make later events impossible to store."""
    deep: Any = 1
    for _ in range(99):
        deep = [deep]
    run_id = waiting.workflow.start("event").id
    app.send_event("other", deep, run_id=run_id)
    large = "x" * (250 * 1024)
    for _ in range(8):
        app.send_event("other", large, run_id=run_id)
    with pytest.raises(PayloadTooLargeError, match="its inbox is full"):
        app.send_event("other", large, run_id=run_id)


def test_an_event_is_deleted_when_no_older_run_is_left(app: Streamline, waiting: Waiting) -> None:
    """By the clock of its starter, a run that may still wait for the event could seem younger than the event."""
    run = waiting.workflow.start("event")
    app.send_event("$go.now", 1)
    events = app.store().collection("events")
    hours_ago = datetime.now(UTC) - timedelta(hours=2)
    events.update_many({}, {"$set": {"at": hours_ago}})
    app.cleanup_old_runs(30)
    assert events.count_documents({}) == 1
    assert waiting.workflow.execute(run.id).status == "done"
    app.cleanup_old_runs(30)
    assert events.count_documents({}) == 1, "the run can be rewound"
    app.cleanup_old_runs(0)
    assert events.count_documents({}) == 0
