"""What follows each outcome of a write: every decision of `after_write`, as values."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from streamline_pool.domain import transitions, waits
from streamline_pool.domain.change import Change, ChangeKind
from streamline_pool.domain.definition import Definition, make_step
from streamline_pool.domain.document import RunDocument
from streamline_pool.domain.errors import PayloadTooLargeError, ValidationError
from streamline_pool.engine.outcomes import Moment
from streamline_pool.engine.write_outcome import (
    Action,
    Committed,
    FailMinimal,
    Held,
    Lost,
    ReadFirst,
    Send,
    Write,
    WriteOutcome,
    after_reading,
    after_write,
    first_write,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(seconds=60)
AT = Moment(NOW, 0.5, lambda: "file")
DEFINITION = Definition(
    workflow_id="w",
    version="1",
    queue="q",
    steps=tuple(make_step("w", name, lambda ctx: 1, {"retries": 2}) for name in ("a", "b")),
    make_context=None,
)
PAID = {"id": "e1", "name": "paid", "data": 7}
TOO_LARGE = PayloadTooLargeError("it does not fit")


def held(*, stopping: bool = False, current: str = "a", **changes: Any) -> Held:
    steps = [
        {"stepId": "a", "status": "running" if current == "a" else "done", "attempts": 1, "startedAt": NOW},
        {"stepId": "b", "status": "running" if current == "b" else "pending", "attempts": int(current == "b")},
    ]
    document = {
        "_id": "r", "status": "running", "steps": steps, "currentStepId": current, "context": {}, "rev": 4, "token": 1, "crashes": 0,
        "failures": 0, "waitGen": 0, "createdAt": NOW - timedelta(hours=1), **changes,
    }  # fmt: skip
    place = 0 if current == "a" else 1
    return Held(cast(RunDocument, document), DEFINITION.steps[place], place, stopping)


def sleeping() -> Held:
    one = held(status="waiting")
    one.document["steps"][0].update({"status": "waiting", "waitingFor": {"type": "timer", "resumeAt": LATER}, "gen": 1})
    return one


def advanced(one: Held) -> Change:
    return transitions.advance(one.document, one.place, "out", {}, NOW)


def decide(result: WriteOutcome | ValidationError, change: Change, one: Held, *, under_pause: bool = False) -> Action:
    return after_write(result, Write(change, change, under_pause), one, AT)


def test_a_committed_write_is_applied_from_memory() -> None:
    assert decide(WriteOutcome.COMMITTED, advanced(held()), held()) == Committed(advanced(held()), reread=False)


def test_a_write_known_from_a_read_is_read_again_unless_it_released_the_run() -> None:
    """After a lost reply only the document shows the state; a released run must not be read, as another worker may hold it."""
    assert decide(WriteOutcome.COMMITTED_BY_READ, advanced(held()), held()) == Committed(advanced(held()), reread=True)
    finish = advanced(held(current="b"))
    assert decide(WriteOutcome.COMMITTED_BY_READ, finish, held(current="b")) == Committed(finish, reread=False)


def test_a_late_copy_of_an_earlier_form_that_has_kept_the_lease_is_what_is_stored() -> None:
    """The run was resumed, and the result stored by the form for a run that is not paused. Its holder goes on, and publishes the result."""
    one, change = held(), advanced(held())
    paused = Write(change, transitions.under_pause(one.document, change, NOW), under_pause=True)
    assert paused.change.releases
    assert after_write(WriteOutcome.KEPT, paused, one, AT) == Committed(change, reread=True)


def test_a_fenced_writer_writes_nothing_more() -> None:
    assert decide(WriteOutcome.FENCED, advanced(held()), held()) == Lost()


def test_a_pause_sends_the_form_for_paused_runs_and_a_resume_sends_the_decision_again() -> None:
    """Each form must be derived from the decision. Derived from an earlier form, a result would lose the start of the next step."""
    one, change = held(), advanced(held())
    paused = decide(WriteOutcome.PAUSED, change, one)
    assert paused == Send(Write(change, transitions.under_pause(one.document, change, NOW), under_pause=True))
    assert isinstance(paused, Send)
    assert not [step for step in paused.write.change.steps.values() if step["status"] == "running"], "nothing is started"
    assert after_write(WriteOutcome.RESUMED, paused.write, one, AT) == Send(Write(change, change))


def test_a_timer_that_fired_too_early_returns_the_run_to_its_wait() -> None:
    one = sleeping()
    action = decide(WriteOutcome.NOT_YET, waits.wake(one.document, 0, NOW), one)
    assert action == Send(Write(waits.park(one.document, 0), waits.park(one.document, 0)))


def test_what_arrived_before_the_wait_is_read_and_becomes_the_result() -> None:
    one = held()
    waiting = waits.await_event(one.document, 0, {"type": "event", "eventName": "paid"}, {})
    assert decide(WriteOutcome.ARRIVED, waiting, one) == ReadFirst()
    write = after_reading(Write(waiting, waiting), held(inbox=[PAID]), NOW)
    assert (write.change.kind, write.change.steps[0]["output"]) == (ChangeKind.ADVANCE, 7)
    assert after_reading(Write(waiting, waiting), held(), NOW).change == waiting, "the answer was removed again: wait as decided"
    stopping = after_reading(Write(waiting, waiting), held(inbox=[PAID], stopping=True), NOW)
    assert (list(stopping.change.steps), stopping.change.releases) == ([0], True), "a lease holder that stops starts no step"


def test_a_result_that_the_server_can_never_store_is_a_failed_attempt_also_under_a_pause() -> None:
    for under_pause in (False, True):
        action = decide(TOO_LARGE, advanced(held()), held(), under_pause=under_pause)
        assert isinstance(action, Send)
        assert (action.write.change.kind, action.write.under_pause) == (ChangeKind.FAIL, under_pause)
        assert action.write.change.fields["error"]["code"] == "PAYLOAD_TOO_LARGE"


def test_a_failure_that_cannot_be_stored_is_stored_in_few_bytes() -> None:
    """Otherwise the write would be repeated for ever, and the run would never end."""
    one = held()
    action = decide(TOO_LARGE, advanced(one), one)
    assert isinstance(action, Send)
    assert after_write(TOO_LARGE, action.write, one, AT) == FailMinimal(TOO_LARGE)


@pytest.mark.parametrize("stopping", [False, True])
def test_a_lease_holder_that_stops_leaves_the_next_step_to_the_next_one(stopping: bool) -> None:
    write = first_write(advanced(held()), held(stopping=stopping), NOW)
    assert write.change.releases is stopping
    assert list(write.change.steps) == ([0] if stopping else [0, 1])


@pytest.mark.parametrize("under_pause", [False, True])
@pytest.mark.parametrize("result", [*WriteOutcome, TOO_LARGE], ids=str)
def test_every_outcome_has_an_action(result: WriteOutcome | ValidationError, under_pause: bool) -> None:
    """An outcome without an action would keep the task, and with it the run, in its loop for ever."""
    one = sleeping() if result is WriteOutcome.NOT_YET else held()
    assert isinstance(decide(result, advanced(held()), one, under_pause=under_pause), Action)
