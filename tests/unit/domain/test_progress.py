"""What a user interface shows of a run: progress, time line, waits, and the steps to which it can be rewound."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamline_pool import (
    Run,
    RunStatus,
    StepNotFoundError,
    StepStatus,
    can_rewind_to,
    get_execution_path,
    get_step_timeline,
    get_step_ui_states,
    get_waiting_info,
    get_workflow_progress,
)
from streamline_pool.domain.model import TERMINAL
from streamline_pool.protocol.run_document import parse_run

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(seconds=90)
LEASE = {"id": "l", "owner": "h:1:x", "token": 1, "expiresAt": LATER}
COMPLETED = ("done", "skipped")


def a_run(*steps: str | dict[str, Any], status: str = "running", **fields: Any) -> Run:
    """A run with steps s0, s1, …, each given by its status or by its fields. The first step that has not ended is the current one."""
    made = []
    for place, step in enumerate(steps):
        made.append({"stepId": f"s{place}", "attempts": 0, **({"status": step} if isinstance(step, str) else step)})
    current = next((step["stepId"] for step in made if step["status"] not in COMPLETED), None)
    document: dict[str, Any] = {
        "_id": "r1", "workflowId": "w", "version": "1", "status": status, "currentStepId": current, "steps": made,
        "context": {}, "createdAt": NOW, "updatedAt": NOW, "queue": "q", "lane": "q/w/1", "slot": 3, "wakeAt": NOW,
    }  # fmt: skip
    return parse_run({**document, **fields})


@st.composite
def possible_runs(draw: st.DrawFn) -> Run:
    """Runs as the engine stores them: some steps completed, one current step, the others not reached."""
    completed = draw(st.lists(st.sampled_from(COMPLETED), max_size=12))
    rest = draw(st.integers(0 if completed else 1, 12))
    if not rest:
        status = draw(st.sampled_from(["done", "running"]))  # running: paused before it could be finished
        return a_run(*completed, status=status, paused=status == "running")
    current = draw(st.sampled_from(["pending", "running", "waiting", "failed"]))
    live = ["cancelled", "failed", {"pending": "draft", "running": "running", "waiting": "waiting", "failed": "failed"}[current]]
    status = "failed" if current == "failed" else draw(st.sampled_from([*live, "running"]))
    step: dict[str, Any] = {"status": current, "attempts": 1, "startedAt": NOW}
    if current == "waiting":
        step["waitingFor"] = {"type": draw(st.sampled_from(["human", "webhook", "timer", "event"])), "reason": "x", "resumeAt": LATER}
    return a_run(*completed, step, *["pending"] * (rest - 1), status=status, paused=draw(st.booleans()))


any_runs = possible_runs() | st.builds(
    lambda statuses, status: a_run(*statuses, status=status),
    st.lists(st.sampled_from([status.value for status in StepStatus]), min_size=1, max_size=300),
    st.sampled_from([status.value for status in RunStatus]),
)


# --- progress ----------------------------------------------------------------------------------------------------------


@given(any_runs)
def test_progress_is_a_percentage_and_100_only_at_the_end(run: Run) -> None:
    """Rounding up would show 100 % for a run at the last of 200 steps."""
    progress = get_workflow_progress(run)
    assert 0 <= progress.percent <= 100
    assert 0 <= progress.completed <= progress.total == len(run.steps)
    assert (progress.percent == 100) == all(step.status in COMPLETED for step in run.steps)


def test_199_of_200_steps_are_not_100_percent() -> None:
    assert get_workflow_progress(a_run(*["done"] * 199, "running")).percent == 99


def test_a_done_run_with_skipped_steps_is_at_100_percent() -> None:
    """streamline.js counted only done steps, so a run with a skipped step never reached 100 %."""
    progress = get_workflow_progress(a_run("done", "skipped", "done", status="done"))
    assert (progress.completed, progress.total, progress.percent) == (3, 3, 100)


def test_a_failed_run_stays_below_100_percent_even_at_its_last_step() -> None:
    assert get_workflow_progress(a_run("done", "failed", status="failed")).percent == 50


@given(any_runs, st.data())
def test_completing_a_step_never_reduces_progress(run: Run, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(run.steps) - 1))
    completed = dataclasses.replace(run.steps[place], status=StepStatus(data.draw(st.sampled_from(COMPLETED))))
    after = dataclasses.replace(run, steps=(*run.steps[:place], completed, *run.steps[place + 1 :]))
    assert get_workflow_progress(after).percent >= get_workflow_progress(run).percent


# --- path and rewind ---------------------------------------------------------------------------------------------------


@given(any_runs)
def test_the_path_keeps_the_order_of_the_steps(run: Run) -> None:
    path = get_execution_path(run)
    assert list(path) == [step.step_id for step in run.steps if step.step_id in path]
    assert all(run.step(step_id).status == "done" for step_id in path)


@given(possible_runs())
def test_the_path_and_the_skipped_steps_are_all_before_the_current_one(run: Run) -> None:
    past = {state.step.step_id for state in get_step_ui_states(run) if state.is_past}
    skipped = {step.step_id for step in run.steps if step.status == "skipped"}
    assert set(get_execution_path(run)) | skipped == past


@given(any_runs)
def test_a_run_can_be_rewound_to_every_step_it_has_reached_unless_cancelled(run: Run) -> None:
    """A user interface must neither offer a rewind that is refused nor hide one that would work."""
    for place, step in enumerate(run.steps):
        come_to = all(before.status in COMPLETED for before in run.steps[:place])
        assert can_rewind_to(run, step.step_id) == (come_to and run.status != "cancelled")


def test_asking_for_a_rewind_to_an_unknown_step_is_an_error() -> None:
    """The answer False would hide a misspelt id: the button would just never appear."""
    for status in ("running", "cancelled"):
        with pytest.raises(StepNotFoundError, match="'nope'; its steps are s0, s1"):
            can_rewind_to(a_run("done", "running", status=status), "nope")


# --- steps of a user interface -----------------------------------------------------------------------------------------


@given(any_runs)
def test_every_step_is_past_current_or_future_and_in_that_order(run: Run) -> None:
    states = get_step_ui_states(run)
    assert all([state.is_past, state.is_current, state.is_future].count(True) == 1 for state in states)
    order = [0 if state.is_past else 1 if state.is_current else 2 for state in states]
    assert order == sorted(order)
    assert order.count(1) == (0 if run.current_step_id is None else 1)
    assert [state.step for state in states] == list(run.steps)
    assert [state.can_rewind_to for state in states] == [can_rewind_to(run, step.step_id) for step in run.steps]


def test_all_steps_of_a_done_run_are_past() -> None:
    """streamline.js treated a run without a current step as one before its first step, so a done run had only future steps."""
    assert all(state.is_past for state in get_step_ui_states(a_run("done", "skipped", status="done")))


BACKING_OFF = {"status": "pending", "attempts": 2, "startedAt": NOW, "retryAfter": LATER, "error": {"code": "STEP_FAILED", "message": "no"}}
ASLEEP = {"status": "waiting", "attempts": 1, "startedAt": NOW, "waitingFor": {"type": "timer", "reason": "sleep", "resumeAt": LATER}}


@pytest.mark.parametrize(
    ("run", "shown"),
    [
        (a_run("pending", "pending", status="draft"), ["pending", "pending"]),
        (a_run("done", "running", lease=LEASE), ["done", "running"]),
        (a_run("skipped", BACKING_OFF, "pending", status="waiting"), ["skipped", "retrying", "pending"]),
        (a_run("done", ASLEEP, status="waiting"), ["done", "waiting"]),
        (a_run("done", "failed", "pending", status="failed"), ["done", "failed", "pending"]),
        (a_run("done", "running", "pending", status="cancelled"), ["done", "cancelled", "cancelled"]),
        (a_run("done", ASLEEP, "pending", status="cancelled"), ["done", "cancelled", "cancelled"]),
        (a_run("done", "pending", "pending", paused=True), ["done", "paused", "pending"]),
        (a_run("done", ASLEEP, "pending", status="waiting", paused=True), ["done", "paused", "pending"]),
        (a_run("done", BACKING_OFF, status="waiting", paused=True), ["done", "paused"]),
        (a_run("done", "running", "pending", paused=True, lease=LEASE), ["done", "running", "pending"]),
        (a_run("done", "done", paused=True), ["done", "done"]),
        (a_run("done", "running", status="cancelled", paused=True), ["done", "cancelled"]),
        (a_run("done", "failed", status="failed", paused=True), ["done", "failed"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else f"{value.status}{' paused' if value.paused else ''}",
)
def test_the_shown_state_of_a_step_depends_on_its_run(run: Run, shown: list[str]) -> None:
    """The step of a cancelled run is stored as running, and would be shown as running for ever."""
    assert [state.shown for state in get_step_ui_states(run)] == shown


# --- time line ---------------------------------------------------------------------------------------------------------


def test_a_time_line_gives_seconds() -> None:
    done = {"status": "done", "attempts": 3, "startedAt": NOW, "endedAt": LATER, "durationMs": 1500}
    [line] = get_step_timeline(a_run(done, status="done"))
    assert dataclasses.asdict(line) == {
        "step_id": "s0", "status": "done", "attempts": 3, "started_at": NOW, "ended_at": LATER, "duration": 1.5,
    }  # fmt: skip


def test_a_duration_that_was_not_stored_is_the_time_between_start_and_end() -> None:
    [line] = get_step_timeline(a_run({"status": "done", "startedAt": NOW, "endedAt": LATER}, status="done"))
    assert line.duration == 90.0


def test_a_skipped_or_unreached_step_has_no_duration() -> None:
    """A duration of 0 would look as if the step had run."""
    run = a_run({"status": "skipped", "endedAt": NOW}, "pending")
    assert [(line.started_at, line.duration) for line in get_step_timeline(run, now=LATER)] == [(None, None)] * 2


@pytest.mark.parametrize(
    ("step", "status", "duration"),
    [
        ({"status": "running", "startedAt": NOW}, "running", 90.0),
        (ASLEEP, "waiting", 90.0),
        (BACKING_OFF, "waiting", None),
        ({"status": "running", "startedAt": NOW}, "cancelled", None),
        (ASLEEP, "cancelled", None),
    ],
)
def test_a_running_step_lasts_until_now(step: dict[str, Any], status: str, duration: float | None) -> None:
    """The duration of a cancelled run's step, or of a step between two attempts, must not grow."""
    run = a_run(step, status=status)
    assert get_step_timeline(run, now=LATER)[0].duration == duration
    assert get_step_timeline(run)[0].duration is None


def test_a_clock_that_runs_behind_the_workers_makes_no_negative_duration() -> None:
    [line] = get_step_timeline(a_run({"status": "running", "startedAt": LATER}), now=NOW)
    assert line.duration == 0.0


# --- waits -------------------------------------------------------------------------------------------------------------


def waiting(**waiting_for: Any) -> Run:
    return a_run("done", {"status": "waiting", "attempts": 1, "startedAt": NOW, "waitingFor": waiting_for}, "pending", status="waiting")


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (
            waiting(type="human", reason="approve", data={"total": 5}, expiresAt=LATER),
            {"type": "human", "reason": "approve", "data": {"total": 5}, "expires_at": LATER},
        ),
        (waiting(type="webhook", reason="paid?"), {"type": "webhook", "reason": "paid?"}),
        (waiting(type="event", reason="event", eventName="paid"), {"type": "event", "reason": "event", "event_name": "paid"}),
        (waiting(type="timer", reason="sleep", resumeAt=LATER), {"type": "timer", "reason": "sleep", "resume_at": LATER}),
        (a_run("done", BACKING_OFF, status="waiting"), {"type": "retry", "reason": "no", "resume_at": LATER}),
        (a_run("done", ASLEEP, status="waiting", paused=True), {"type": "timer", "reason": "sleep", "resume_at": LATER, "paused": True}),
        (a_run("pending", status="draft", wakeAt=LATER), {"step_id": "s0", "type": "start", "resume_at": LATER}),
        (
            a_run("pending", status="draft", wakeAt=None, paused=True, pausedWakeAt=LATER),
            {"step_id": "s0", "type": "start", "resume_at": LATER, "paused": True},
        ),
    ],
    ids=lambda value: value["type"] + value.get("paused", False) * " paused" if isinstance(value, dict) else "",
)
def test_a_wait_is_shown_with_what_ends_it(run: Run, expected: dict[str, Any]) -> None:
    info = get_waiting_info(run)
    assert info is not None
    absent = {"reason": None, "event_name": None, "data": None, "resume_at": None, "expires_at": None, "paused": False}
    assert dataclasses.asdict(info) == {"step_id": "s1", **absent, **expected}


@pytest.mark.parametrize(
    "run",
    [
        a_run("done", "running", lease=LEASE),
        a_run("done", "pending"),
        a_run("done", BACKING_OFF, status="running"),  # claimed again, or released by a drain: the run waits only for a worker
        a_run("done", "pending", paused=True),
        a_run("done", "done", status="done"),
        a_run("done", "failed", status="failed"),
        a_run("done", ASLEEP, status="cancelled"),
        a_run("done", BACKING_OFF, status="cancelled"),
        a_run("done", "done", paused=True),
    ],
    ids=lambda run: f"{run.status} {run.steps[-1].status}{' paused' if run.paused else ''}",
)
def test_a_run_that_waits_for_nothing_says_so(run: Run) -> None:
    """A cancelled run keeps its step's wait; an interface that showed it would ask a person for an answer that is refused."""
    assert get_waiting_info(run) is None


@given(any_runs.filter(lambda run: run.status in TERMINAL))
def test_no_run_that_has_ended_waits(run: Run) -> None:
    assert get_waiting_info(run) is None


# --- all ---------------------------------------------------------------------------------------------------------------


@given(any_runs)
def test_every_record_becomes_json(run: Run) -> None:
    records: list[Any] = [get_workflow_progress(run), *get_step_timeline(run, now=NOW), *get_step_ui_states(run)]
    info = get_waiting_info(run)
    for record in [*records, *([info] if info else [])]:
        json.dumps(dataclasses.asdict(record), default=datetime.isoformat)


def test_a_current_step_that_does_not_exist_raises_no_error() -> None:
    """A list of runs must be shown although another program has changed one of them."""
    run = a_run("done", "pending", currentStepId="gone")
    assert get_waiting_info(run) is None
    assert all(state.is_past for state in get_step_ui_states(run))
