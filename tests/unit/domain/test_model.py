"""States and their tables, durations, back-off, and the immutable view of a run."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamline_pool import RunStatus, StepNotFoundError, StepStatus, ValidationError
from streamline_pool.domain.model import ENDED_STEPS, NON_TERMINAL, REWINDABLE, RUN_MOVES, STEP_MOVES, TERMINAL, RetryPolicy, Run, seconds
from streamline_pool.protocol.run_document import parse_run

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_every_status_has_a_row_in_its_table() -> None:
    """A status without a row in the table would be missing from every filter that is derived from it."""
    assert set(RUN_MOVES) == set(RunStatus)
    assert set(STEP_MOVES) == set(StepStatus)
    assert set(RunStatus) == TERMINAL | NON_TERMINAL
    assert not TERMINAL & NON_TERMINAL


def test_cancelled_is_final() -> None:
    assert not RUN_MOVES[RunStatus.CANCELLED]
    assert RunStatus.CANCELLED not in REWINDABLE


def test_done_and_failed_are_left_by_rewind_only() -> None:
    assert RUN_MOVES[RunStatus.DONE] == RUN_MOVES[RunStatus.FAILED] == frozenset()
    assert {RunStatus.DONE, RunStatus.FAILED} < REWINDABLE


def test_the_sets_that_filters_use_are_those_of_the_tables() -> None:
    """If a filter misses a status, no worker, no clean-up and no recovery finds its runs."""
    assert {RunStatus.DONE, RunStatus.FAILED, RunStatus.CANCELLED} == TERMINAL
    assert {StepStatus.DONE, StepStatus.FAILED, StepStatus.SKIPPED} == ENDED_STEPS


def test_every_live_status_can_be_cancelled_and_can_fail() -> None:
    """A state that cannot fail would wedge its runs."""
    for status in NON_TERMINAL:
        assert {RunStatus.CANCELLED, RunStatus.FAILED} <= RUN_MOVES[status]


def test_every_status_can_be_reached() -> None:
    assert {target for targets in RUN_MOVES.values() for target in targets} == set(RunStatus) - {RunStatus.DRAFT}


# --- durations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "expected"), [(1, 1.0), (0.25, 0.25), (timedelta(minutes=2), 120.0)])
def test_a_duration_is_a_number_of_seconds_or_a_timedelta(value: Any, expected: float) -> None:
    assert seconds(value, "x") == expected


@pytest.mark.parametrize("value", [0, -1, -0.1, float("nan"), float("inf"), True, "5", None, timedelta(0), timedelta(seconds=-1), [1]])
def test_anything_else_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ValidationError, match=r"VALIDATION_ERROR: step w\.a: timeout"):
        seconds(value, "step w.a: timeout")


def test_zero_is_a_duration_where_it_has_a_meaning() -> None:
    assert seconds(0, "x", zero_ok=True) == 0
    with pytest.raises(ValidationError):
        seconds(-1, "x", zero_ok=True)


# --- back-off -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backoff", "delays"), [("exponential", [1, 2, 4, 8]), ("linear", [1, 2, 3, 4]), ("fixed", [1, 1, 1, 1]), (3, [1, 3, 9, 27])]
)
def test_each_backoff_grows_as_documented(backoff: str | float, delays: list[float]) -> None:
    policy = RetryPolicy(delay_s=1.0, backoff=backoff)
    assert [policy.delay_after(attempt, 0.5) for attempt in range(1, 5)] == pytest.approx(delays)


def test_the_cap_comes_before_the_jitter() -> None:
    policy = RetryPolicy(delay_s=50.0)
    assert policy.delay_after(20, 0.5) == pytest.approx(60.0)
    assert policy.delay_after(20, 0.0) == pytest.approx(42.0)
    assert policy.delay_after(20, 0.999999) == pytest.approx(78.0, abs=0.01)


@given(
    delay_s=st.floats(0, 1e12),
    backoff=st.sampled_from(["exponential", "linear", "fixed"]) | st.floats(1e-300, 1e300),
    attempt=st.integers(1, 20),
    chance=st.floats(0, 1, exclude_max=True),
)
def test_no_policy_can_make_a_delay_that_is_not_finite(delay_s: float, backoff: str | float, attempt: int, chance: float) -> None:
    """An overflow would crash the engine between a failure and the write that stores it."""
    assert 0 <= RetryPolicy(delay_s=delay_s, backoff=backoff).delay_after(attempt, chance) <= 60 * 1.3 + 1e-9


# --- the view -------------------------------------------------------------------------------------------------------


def a_run(**changes: Any) -> Run:
    document: dict[str, Any] = {
        "_id": "r1", "workflowId": "w", "version": "1", "status": "running", "currentStepId": "b", "context": {"k": 1}, "input": 5,
        "steps": [
            {"stepId": "a", "status": "done", "attempts": 2, "output": "x", "startedAt": NOW, "endedAt": NOW, "durationMs": 1500},
            {"stepId": "b", "status": "pending", "attempts": 0},
        ],
        "createdAt": NOW, "updatedAt": NOW, "queue": "q", "lane": "q/w/1", "slot": 3, "wakeAt": NOW, "tags": ["t"],
    }  # fmt: skip
    return parse_run({**document, **changes})


def test_a_run_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        a_run().status = RunStatus.DONE  # type: ignore[misc]


def test_a_run_shows_its_steps() -> None:
    run = a_run()
    assert run.steps[0] is run.step("a")
    assert (run.step("a").duration, run.step("a").output, run.step("b").attempts) == (1.5, "x", 0)
    assert isinstance(run.steps, tuple)
    assert run.tags == ("t",)


def test_an_unknown_step_is_answered_with_the_steps_there_are() -> None:
    with pytest.raises(StepNotFoundError, match="STEP_NOT_FOUND: run r1: no step 'c'; its steps are a, b"):
        a_run().step("c")


def test_to_dict_is_the_stored_document() -> None:
    run = a_run()
    copy = run.to_dict()
    copy["status"] = "mine"
    assert (run.to_dict()["status"], run.to_dict()["_id"]) == ("running", "r1")
