"""What follows each outcome of a write: every decision of `after_write`, as values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from streamline_pool.domain import transitions, waits
from streamline_pool.domain.change import Change, ChangeKind, apply
from streamline_pool.domain.definition import Definition, make_step
from streamline_pool.domain.document import RunDocument
from streamline_pool.domain.errors import PayloadTooLargeError, ValidationError
from streamline_pool.engine.outcomes import Moment
from streamline_pool.engine.write_outcome import (
    Action,
    Committed,
    FailMinimal,
    FindStored,
    Held,
    Lost,
    ReadFirst,
    Send,
    Write,
    WriteOutcome,
    after_reading,
    after_write,
    first_write,
    stored_form,
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
    assert decide(WriteOutcome.COMMITTED, advanced(held()), held()) == Committed(advanced(held()))


def test_of_several_forms_that_were_sent_the_stored_one_is_looked_for() -> None:
    """The run was paused and resumed meanwhile, and a late copy of an earlier form may be stored in the place of the last one."""
    one, change = held(), advanced(held())
    paused = decide(WriteOutcome.PAUSED, change, one)
    assert isinstance(paused, Send)
    assert after_write(WriteOutcome.FORM_COMMITTED, paused.write, one, AT) == FindStored()
    assert after_write(WriteOutcome.COMMITTED, paused.write, one, AT) == Committed(paused.write.change)


FORMS: dict[str, tuple[Callable[[], Held], Callable[[Held], Change]]] = {
    "advance": (held, advanced),
    "finish": (lambda: held(current="b"), advanced),
    "wake": (sleeping, lambda one: waits.wake(one.document, one.place, NOW)),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_stored_form_is_told_from_the_others(name: str) -> None:
    make, decided_by = FORMS[name]
    one = make()
    decided = decided_by(one)
    other_form = waits.park(one.document, one.place) if name == "wake" else transitions.under_pause(one.document, decided, NOW)
    forms = [decided, other_form]
    write = Write(decided, forms[-1], earlier=tuple(forms[:-1]))
    for form in forms:
        found = copy.deepcopy(one.document)
        apply(found, form)
        if not form.releases:
            found["lease"] = cast(Any, {"id": "l"})
        other = stored_form(write, one.document, found)
        assert other is not None
        assert (other.kind, other.releases, other.fields.get("status")) == (form.kind, form.releases, form.fields.get("status"))
        assert stored_form(write, one.document, cast(RunDocument, {**found, "token": found["token"] + 1})) is None, (
            "a claim or a cancel came since"
        )
        assert stored_form(write, one.document, cast(RunDocument, {**found, "rev": found["rev"] + 1})) is None, "another holder has written"


def test_a_fenced_writer_writes_nothing_more() -> None:
    assert decide(WriteOutcome.FENCED, advanced(held()), held()) == Lost()


def test_a_pause_sends_the_form_for_paused_runs_and_a_resume_sends_the_decision_again() -> None:
    """Each form must be derived from the decision. Derived from an earlier form, a result would lose the start of the next step."""
    one, change = held(), advanced(held())
    paused = decide(WriteOutcome.PAUSED, change, one)
    assert paused == Send(Write(change, transitions.under_pause(one.document, change, NOW), under_pause=True, earlier=(change,)))
    assert isinstance(paused, Send)
    assert not [step for step in paused.write.change.steps.values() if step["status"] == "running"], "nothing is started"
    assert after_write(WriteOutcome.RESUMED, paused.write, one, AT) == Send(Write(change, change, earlier=(change, paused.write.change)))


def test_a_timer_that_fired_too_early_returns_the_run_to_its_wait() -> None:
    one = sleeping()
    wake = waits.wake(one.document, 0, NOW)
    action = decide(WriteOutcome.NOT_YET, wake, one)
    assert action == Send(Write(waits.park(one.document, 0), waits.park(one.document, 0), earlier=(wake,)))


def test_what_arrived_before_the_wait_is_read_and_becomes_the_result() -> None:
    one = held()
    waiting = waits.await_event(one.document, 0, {"type": "event", "eventName": "paid"}, {})
    assert decide(WriteOutcome.ARRIVED, waiting, one) == ReadFirst()
    write = after_reading(Write(waiting, waiting), held(inbox=[PAID]), NOW)
    assert (write.change.kind, write.change.steps[0]["output"]) == (ChangeKind.ADVANCE, 7)
    assert write.earlier == (waiting,), "it was sent, and a late copy of it may be stored"
    assert after_reading(Write(waiting, waiting), held(), NOW).change == waiting, "the answer was removed again: wait as decided"
    stopping = after_reading(Write(waiting, waiting), held(inbox=[PAID], stopping=True), NOW)
    assert (list(stopping.change.steps), stopping.change.releases) == ([0], True), "a lease holder that stops starts no step"


def test_a_result_that_the_server_can_never_store_is_a_failed_attempt_also_under_a_pause() -> None:
    for under_pause in (False, True):
        action = decide(TOO_LARGE, advanced(held()), held(), under_pause=under_pause)
        assert isinstance(action, Send)
        assert (action.write.change.kind, action.write.under_pause) == (ChangeKind.FAIL, under_pause)
        assert action.write.change.fields["error"]["code"] == "PAYLOAD_TOO_LARGE"
        assert action.write.earlier == (advanced(held()),), "an earlier copy of it may still be on its way"


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
