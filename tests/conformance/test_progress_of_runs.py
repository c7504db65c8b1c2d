"""The progress helpers on runs that the engine has stored: they must describe what the engine then does."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from streamline_pool import (
    Context,
    InvalidStateError,
    NonRetriableError,
    Run,
    Streamline,
    Workflow,
    can_rewind_to,
    create_hook,
    get_execution_path,
    get_step_timeline,
    get_step_ui_states,
    get_waiting_info,
    get_workflow_progress,
)


def middle(ctx: Context) -> Any:
    """A handler that ends in the way that the run's input names."""
    match ctx.input:
        case "sleep":
            ctx.sleep(3600)
        case "human":
            ctx.wait("please approve", {"total": 5}, timeout=7200)
        case "hook":
            create_hook(ctx, "paid")
            ctx.wait("payment")
        case "event":
            ctx.wait_for("paid")
        case "retry":
            raise ValueError("not yet")
        case "fail":
            raise NonRetriableError("never")
    return "done"


def last(ctx: Context) -> str:
    return "end"


@pytest.fixture
def flow(app: Streamline) -> Workflow:
    return app.workflow(
        "flow",
        steps={
            "first": lambda ctx: 1,
            "maybe": (lambda ctx: 2, {"skip_if": lambda ctx: True}),
            "middle": (middle, {"retry_delay": 60}),
            "last": last,
        },
    )


def arrive(flow: Workflow, at: str) -> Run:
    """A stored run in the state `at`."""
    if at == "draft":
        return flow.start(at, start_at=3600)
    run = flow.start(at)
    if at == "started":
        return run
    if at == "paused":
        return flow.pause(run.id)
    if at == "cancelled":
        return flow.cancel(run.id)
    run = flow.execute(run.id)
    stored = flow.get(run.id)
    assert stored is not None
    return stored


STATES = ["draft", "started", "paused", "cancelled", "done", "fail", "retry", "sleep", "human", "hook", "event"]


@pytest.mark.parametrize("at", STATES)
def test_rewind_accepts_exactly_the_steps_that_can_be_rewound_to(flow: Workflow, at: str) -> None:
    """A user interface must neither offer a rewind that is refused nor hide one that would work."""
    for step_id in flow.steps:
        run = arrive(flow, at)
        if can_rewind_to(run, step_id):
            assert flow.rewind_to(run.id, step_id).current_step_id == step_id
        else:
            with pytest.raises(InvalidStateError):
                flow.rewind_to(run.id, step_id)


@pytest.mark.parametrize(
    ("at", "percent", "shown", "wait"),
    [
        ("draft", 0, "pending pending pending pending", "start"),
        ("started", 0, "pending pending pending pending", None),
        ("paused", 0, "paused pending pending pending", None),
        ("cancelled", 0, "cancelled cancelled cancelled cancelled", None),
        ("done", 100, "done skipped done done", None),
        ("fail", 50, "done skipped failed pending", None),
        ("retry", 50, "done skipped retrying pending", "retry"),
        ("sleep", 50, "done skipped waiting pending", "timer"),
        ("human", 50, "done skipped waiting pending", "human"),
        ("hook", 50, "done skipped waiting pending", "webhook"),
        ("event", 50, "done skipped waiting pending", "event"),
    ],
)
def test_every_state_of_a_run_is_described(flow: Workflow, at: str, percent: int, shown: str, wait: str | None) -> None:
    """A state without a description would be an empty place in a user interface."""
    run = arrive(flow, at)
    assert get_workflow_progress(run).percent == percent
    assert " ".join(state.shown for state in get_step_ui_states(run)) == shown
    info = get_waiting_info(run)
    assert (info and info.type) == wait
    if info is not None:
        assert (info.resume_at is not None) == (wait in ("start", "retry", "timer"))
        assert (info.expires_at is not None) == (wait == "human")


def test_the_reason_and_data_of_a_wait_are_shown(flow: Workflow) -> None:
    human, event, retry = (get_waiting_info(arrive(flow, at)) for at in ("human", "event", "retry"))
    assert human is not None and (human.step_id, human.reason, human.data) == ("middle", "please approve", {"total": 5})
    assert event is not None and event.event_name == "paid"
    assert retry is not None and retry.reason == "not yet"


def test_after_an_answer_the_helpers_show_the_next_step(flow: Workflow) -> None:
    run = flow.execute(flow.resume(arrive(flow, "human").id, "yes").id)
    assert (get_workflow_progress(run).percent, get_waiting_info(run)) == (100, None)
    assert get_execution_path(run) == ("first", "middle", "last")


def test_a_cancelled_sleep_shows_no_wait_and_no_growing_duration(flow: Workflow) -> None:
    run = flow.cancel(arrive(flow, "sleep").id)
    assert get_waiting_info(run) is None
    assert [line.duration for line in get_step_timeline(run, now=datetime.now(UTC))][2:] == [None, None]


def test_durations_are_those_stored_in_seconds(flow: Workflow) -> None:
    run = arrive(flow, "done")
    for line, stored in zip(get_step_timeline(run), run.to_dict()["steps"], strict=True):
        assert line.duration == (stored["durationMs"] / 1000 if "durationMs" in stored else None)
