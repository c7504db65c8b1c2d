"""Every transition, as data: what it stores, and that invariant 4 holds where it is made."""

from __future__ import annotations

import copy
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from streamline_pool import transitions
from streamline_pool.definition import Definition, make_step
from streamline_pool.documents import misfit
from streamline_pool.errors import ErrorCode
from streamline_pool.model import RUN_MOVES, STEP_MOVES, RunStatus, StepStatus
from streamline_pool.transitions import Change, Failure

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(seconds=60)
DEFINITION = Definition(
    workflow_id="w",
    version="1",
    queue="q",
    steps=tuple(make_step("w", name, lambda ctx: 1, {"retries": 2}) for name in ("a", "b")),
    make_context=None,
)
STEP_A, STEP_B = DEFINITION.steps
FAILURE = Failure(ErrorCode.STEP_FAILED, "why", "ValueError", "trace", True)


def held(current: str = "a", **changes: Any) -> dict[str, Any]:
    """The document of a run whose current step has been granted."""
    running = {"status": "running", "attempts": 1, "startedAt": NOW - timedelta(seconds=2), "decided": True, "checkpoint": 7}
    steps = [
        {"stepId": "a", **(running if current == "a" else {"status": "done", "attempts": 1, "output": "A"})},
        {"stepId": "b", **(running if current == "b" else {"status": "pending", "attempts": 0})},
    ]
    return {
        "_id": "r", "workflowId": "w", "version": "1", "status": "running", "steps": steps, "currentStepId": current, "context": {"old": 1},
        "lane": "q/w/1", "rev": 4, "token": 1, "crashes": 1, "failures": 0, "waitGen": 0, "createdAt": NOW - timedelta(hours=1), **changes,
    }  # fmt: skip


def waiting() -> dict[str, Any]:
    document = held(status="waiting")
    document["steps"][0].update(status="waiting", waitingFor={"type": "timer", "reason": "sleep", "resumeAt": LATER})
    return document


CHANGES: dict[str, tuple[dict[str, Any], Change]] = {
    "advance": (held(), transitions.advance(held(), DEFINITION, 0, "out", {"k": 1}, NOW)),
    "finish": (held("b"), transitions.advance(held("b"), DEFINITION, 1, "out", {}, NOW)),
    "skip": (held(), transitions.skip(held(), DEFINITION, 0, {}, NOW)),
    "skip the last": (held("b"), transitions.skip(held("b"), DEFINITION, 1, {}, NOW)),
    "decide": (held(), transitions.decide_entry(held(), 0)),
    "sleep": (held(), transitions.sleep(held(), 0, LATER, {"k": 1}, NOW)),
    "wake": (waiting(), transitions.wake(waiting(), DEFINITION, 0, LATER)),
    "park": (waiting(), transitions.park(waiting(), 0)),
    "retry": (held(), transitions.step_failed(held(), STEP_A, 0, FAILURE, NOW, LATER)),
    "fail": (held(failures=1), transitions.step_failed(held(failures=1), STEP_A, 0, FAILURE, NOW, LATER)),
    "fail at once": (held(), transitions.step_failed(held(), STEP_A, 0, FAILURE._replace(retriable=False), NOW, LATER)),
    "release entered": (held(), transitions.give_back(held(), 0, NOW, entered=True)),
    "release": (held(), transitions.give_back(held(), 0, NOW, entered=False)),
}
every = pytest.mark.parametrize("name", CHANGES)


def applied(name: str) -> tuple[dict[str, Any], Change, dict[str, Any]]:
    before, change = CHANGES[name]
    after = copy.deepcopy(before)
    transitions.apply(after, change)
    return before, change, after


@every
def test_a_run_is_left_leased_or_due_or_ended(name: str) -> None:
    """The one place where a run could be wedged is where its next state is made."""
    _, change, after = applied(name)
    ended = after["status"] in ("done", "failed", "cancelled")
    assert (not change.releases) + (change.wake_at is not None) + ended == 1
    assert not ended or after["endedAt"] is not None


@every
def test_a_change_goes_only_where_the_tables_lead(name: str) -> None:
    before, _, after = applied(name)
    if before["status"] != after["status"]:
        assert RunStatus(after["status"]) in RUN_MOVES[RunStatus(before["status"])]
    for old, new in zip(before["steps"], after["steps"], strict=True):
        if old["status"] != new["status"]:
            assert StepStatus(new["status"]) in STEP_MOVES[StepStatus(old["status"])]


@every
def test_a_live_run_stays_sound(name: str) -> None:
    _, _, after = applied(name)
    if after["status"] not in ("done", "failed"):
        assert misfit(after) is None


@every
def test_a_change_counts_one_write_and_leaves_its_argument_alone(name: str) -> None:
    before, change, after = applied(name)
    assert after["rev"] == before["rev"] + 1
    assert "rev" not in change.fields, "the write's own fence says it"


@every
def test_under_pause_nothing_is_started_or_ended(name: str) -> None:
    """The same result, but for a run that nobody may go on with; what is left goes to `pausedWakeAt`."""
    before, change = CHANGES[name]
    paused = transitions.under_pause(before, change, NOW)
    after = copy.deepcopy(before)
    transitions.apply(after, paused)
    assert paused.releases
    assert after["status"] != "done"
    assert after["status"] == "failed" or paused.wake_at is not None
    started = [step for old, step in zip(before["steps"], after["steps"], strict=True) if step["attempts"] > old["attempts"]]
    assert not started
    if name == "wake":
        assert after["steps"][0]["status"] == "waiting", "pausing never ends a sleep"


def test_done_and_advance_are_one_write() -> None:
    _, change, after = applied("advance")
    assert set(change.steps) == {0, 1}
    assert after["steps"][0] == {
        "stepId": "a", "status": "done", "attempts": 1, "startedAt": NOW - timedelta(seconds=2), "endedAt": NOW, "durationMs": 2000,
        "output": "out",
    }  # fmt: skip
    assert after["steps"][1] == {"stepId": "b", "status": "running", "attempts": 1, "startedAt": NOW}
    assert (after["currentStepId"], after["context"], after["crashes"]) == ("b", {"old": 1, "k": 1}, 0)


def test_context_keys_that_are_no_path_are_stored_with_the_whole_context() -> None:
    """`context.a.b` would be read as a key b within a."""
    for key in ("a.b", "$inc", "x.$y"):
        change = transitions.advance(held(), DEFINITION, 0, 1, {key: 5}, NOW)
        assert change.fields["context"] == {"old": 1, key: 5}
        assert not [name for name in change.fields if name.startswith("context.")]
    assert transitions.advance(held(), DEFINITION, 0, 1, {"plain": 5}, NOW).fields["context.plain"] == 5


def test_a_retry_keeps_the_checkpoint_and_a_result_drops_it() -> None:
    assert applied("retry")[2]["steps"][0]["checkpoint"] == 7
    assert "checkpoint" not in applied("advance")[2]["steps"][0]


def test_the_last_failure_ends_the_run_with_both_codes() -> None:
    _, change, after = applied("fail")
    assert (after["error"]["code"], after["steps"][0]["error"]["code"]) == ("MAX_RETRIES_EXCEEDED", "STEP_FAILED")
    assert after["error"]["message"].startswith("step a failed 2 times, the last time with STEP_FAILED: ")
    assert after["error"]["message"].endswith("why")
    assert [name for name, _, _ in change.events] == ["step:failed", "workflow:failed"]


def test_an_attempt_that_did_not_take_place_is_not_counted() -> None:
    assert applied("release")[2]["steps"][0]["attempts"] == 0
    assert applied("release entered")[2]["steps"][0]["attempts"] == 1


def test_a_run_given_back_keeps_its_place_in_the_queue() -> None:
    assert CHANGES["release"][1].wake_at == NOW - timedelta(hours=1)


def test_without_a_grant_the_next_step_is_left_to_the_next_holder() -> None:
    before, change = CHANGES["advance"]
    lone = transitions.without_grant(before, change, NOW)
    after = copy.deepcopy(before)
    transitions.apply(after, lone)
    assert (after["steps"][1], after["currentStepId"], lone.releases) == ({"stepId": "b", "status": "pending", "attempts": 0}, "b", True)
    assert misfit(after) is None


def test_a_sleep_is_ended_only_by_the_servers_clock() -> None:
    assert CHANGES["wake"][1].not_before == LATER
    assert CHANGES["park"][1].wake_at == LATER
