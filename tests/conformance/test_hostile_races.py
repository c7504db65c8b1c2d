"""Answers, events and control operations that meet another write between their read and their own write, or that arrive twice."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from parked_runs import Waiting, interrupted, recorded
from workers import check_invariants

from streamline_pool import Context, Streamline
from streamline_pool.client.beginning_again import rewinding_run
from streamline_pool.client.event_delivery import broadcasting, sending_event
from streamline_pool.client.run_control import answering_hook, cancelling_run, pausing_run, resuming_run
from streamline_pool.domain.errors import HookTokenError, InvalidStateError
from streamline_pool.protocol import durable_events
from streamline_pool.protocol.operations import Find
from streamline_pool.storage.procedures import Procedure
from support import present


def test_every_waiting_run_gets_an_event_although_some_have_gone_on(app: Streamline, waiting: Waiting) -> None:
    """A sender that stopped at the first batch without a woken run would count the event as delivered, and the runs after
    it would wait for ever. Here the batch holds two runs, and both have continued before the delivery."""
    run_ids = sorted(waiting.parked("event") for _ in range(6))
    app.store().run(durable_events.record_event("e1", "$go.now", 7, app.store().now()))
    (event,) = app.store().run(durable_events.read_event("e1"))
    gone_on: list[str] = []

    def racing() -> Procedure[int]:
        procedure = broadcasting(app.services, event)
        effect = next(procedure)
        try:
            while True:
                if isinstance(effect, Find) and effect.name == "find_waiters":
                    effect = Find(**{**{name: getattr(effect, name) for name in effect.__slots__}, "limit": 2})
                answer = yield effect
                if isinstance(effect, Find) and effect.name == "find_waiters" and not gone_on:
                    gone_on.extend(found["_id"] for found in answer)
                    for run_id in gone_on:
                        yield durable_events.deliver_event(run_id, f"other {run_id}", "$go.now", 1, 100)
                effect = procedure.send(answer)
        except StopIteration as stop:
            return int(stop.value)

    assert app.store().drive(racing()) == 4
    outputs = {run_id: present(waiting.workflow.get(run_id)).step("first").output for run_id in run_ids}
    assert outputs == {run_id: 1 if run_id in gone_on else 7 for run_id in run_ids}
    assert app.store().collection("events").find_one({"_id": "e1"})["pending"] is False


@pytest.mark.parametrize("others", [1, 2, 3, 6])
def test_an_operation_is_applied_although_others_come_between_its_read_and_its_write(
    app: Streamline, waiting: Waiting, others: int
) -> None:
    """If other operations kept the write from matching, the caller must not get the result of a rewind that never happened."""
    run_id = waiting.parked("human")

    def interfere() -> None:
        for number in range(others):
            waiting.workflow.pause(run_id) if number % 2 == 0 else waiting.workflow.resume(run_id)

    run = interrupted(app, rewinding_run(app.services, None, run_id, "first"), "rewind_run", interfere)
    assert run.step("first").status == "pending"
    assert run.to_dict()["rewinds"] == 1
    assert run.to_dict()["acts"] == others + 1


@pytest.mark.parametrize("others", [0, 1, 2, 5])
def test_an_operation_whose_reply_was_lost_is_recognised_by_its_id_after_any_number_of_others(
    app: Streamline, waiting: Waiting, others: int
) -> None:
    """If a rewind were decided and applied again, it would discard the results that came after the first."""
    run_id = waiting.parked("human")
    committed: list[Any] = []

    def rewound_and_changed() -> None:
        waiting.workflow.execute(run_id)
        committed.append(present(waiting.workflow.get(run_id)).to_dict())
        for number in range(others):
            waiting.workflow.pause(run_id) if number % 2 == 0 else waiting.workflow.resume(run_id)

    procedure = rewinding_run(app.services, None, run_id, "first")

    def lossy() -> Procedure[Any]:
        try:
            effect = next(procedure)
            while True:
                if getattr(effect, "name", None) == "rewind_run" and not committed:
                    yield effect  # this reply is lost, and the caller sends the operation again
                    rewound_and_changed()
                effect = procedure.send((yield effect))
        except StopIteration as stop:
            return stop.value

    app.store().drive(lossy())
    assert present(waiting.workflow.get(run_id)).to_dict()["rewinds"] == 1
    assert present(waiting.workflow.get(run_id)).step("first").status == "waiting"


@pytest.mark.parametrize("wrong_s", [-30.0, 30.0])
@pytest.mark.parametrize("way", ["waits now", "waits later"])
def test_whether_a_run_existed_when_an_event_was_sent_does_not_depend_on_clocks(
    app: Streamline, waiting: Waiting, wrong_s: float, way: str
) -> None:
    """If a starter's clock is ahead, later events must still reach the runs that it started; else these would wait for ever."""
    app.store().syncing_clock()
    old = waiting.workflow.start("event")
    clock = app.store().clock
    clock.read(clock.now() + timedelta(seconds=wrong_s), app.env.clock.monotonic(), app.env.clock.monotonic())
    run = waiting.workflow.start("event")
    app.runs.update_many({}, {"$set": {"wakeAt": datetime(2020, 1, 1, tzinfo=UTC)}})
    if way == "waits now":
        waiting.workflow.execute(old.id)
        waiting.workflow.execute(run.id)
    assert app.send_event("$go.now", 1) == (2 if way == "waits now" else 0)
    young = waiting.workflow.start("event")
    app.runs.update_one({"_id": young.id}, {"$set": {"wakeAt": datetime(2020, 1, 1, tzinfo=UTC)}})
    assert waiting.workflow.execute(run.id).status == "done"
    assert waiting.workflow.execute(old.id).status == "done"
    assert waiting.workflow.execute(young.id).status == "waiting", "an event from before its start reached a run"


def test_of_two_answers_that_meet_only_one_is_reported_as_accepted(app: Streamline, waiting: Waiting) -> None:
    """Both callers have read that the run waits; only the caller whose answer was stored may get a success."""
    run_id = waiting.parked("human")
    second = resuming_run(app.services, None, run_id, "second")
    with pytest.raises(InvalidStateError, match="another answer"):
        interrupted(app, second, "answer_wait", lambda: waiting.workflow.resume(run_id, "first"))
    run_id = waiting.parked("hook")
    token = waiting.tokens[-1]
    with pytest.raises(HookTokenError):
        interrupted(app, answering_hook(app.services, token, "second"), "answer_hook", lambda: app.resume_hook(token, "first"))
    assert present(waiting.workflow.get(run_id)).step("first").output == "first"


def test_a_resume_that_has_read_a_pause_never_answers(app: Streamline, waiting: Waiting) -> None:
    """Another client resumes the run between the read and the write. If the call were decided again, it would answer the wait."""
    run_id = waiting.parked("human")
    waiting.workflow.pause(run_id)
    run = interrupted(app, resuming_run(app.services, None, run_id, None), "unpause_run", lambda: waiting.workflow.resume(run_id))
    assert not run.paused
    assert run.step("first").status == "waiting"


@pytest.mark.parametrize("last", [False, True])
def test_an_event_that_comes_between_the_handler_and_its_wait_is_taken(app: Streamline, last: bool) -> None:
    """The holder's copy of the run lacks the event. If the wait were stored, the run would wait for an event that it already has."""

    def asks(ctx: Context) -> None:
        assert app.send_event("go", {"$n": 1}, run_id=ctx.run_id) == 0
        ctx.set("sent", True)
        ctx.wait_for("go")

    steps = {"asks": asks} if last else {"asks": asks, "then": lambda ctx: ctx.get_output("asks")}
    workflow = app.workflow("meeting", steps=steps)
    run = workflow.execute(workflow.start().id)
    assert (run.status, run.output, run.context) == ("done", {"$n": 1}, {"sent": True})
    assert run.to_dict()["inbox"] == []
    check_invariants([run.to_dict()])


@pytest.mark.parametrize("last", [False, True])
def test_an_event_taken_from_the_inbox_under_pause_is_stored_once(app: Streamline, last: bool) -> None:
    """The event has arrived already, and the run was paused: the result must be stored once, and no step may start."""
    entered: list[str] = []

    def asks(ctx: Context) -> None:
        app.send_event("go", 1, run_id=ctx.run_id)
        app.pause_run(ctx.run_id)
        ctx.wait_for("go")

    steps = {"asks": asks} if last else {"asks": asks, "then": lambda ctx: entered.append(ctx.step_id)}
    workflow = app.workflow("meeting", steps=steps)
    run = workflow.execute(workflow.start().id)
    assert (run.paused, run.status, run.step("asks").output, entered) == (True, "running", 1, [])
    assert run.to_dict()["inbox"] == []
    check_invariants([run.to_dict()])
    workflow.resume(run.id)
    assert workflow.execute(run.id).status == "done"


def test_an_entry_that_a_pause_has_prevented_is_not_counted(app: Streamline) -> None:
    """`attempts` counts entries into the handler. A step whose entry a pause prevents after its condition was decided must not count."""
    paused: list[Any] = []

    def pause_once(ctx: Context) -> bool:
        if not paused:
            paused.append(app.pause_run(ctx.run_id))
        return True

    workflow = app.workflow("conditional", steps={"one": (lambda ctx: ctx.attempt, {"run_if": pause_once})})
    run = workflow.execute(workflow.start().id)
    assert run.paused
    check_invariants([run.to_dict()])
    assert run.step("one").status == "pending"
    assert run.step("one").attempts == 0
    workflow.resume(run.id)
    assert workflow.execute(run.id).output == 1


def test_an_answer_to_an_older_wait_answers_no_newer_one(app: Streamline, waiting: Waiting) -> None:
    """A caller that read the run before its rewind must not answer the new wait."""
    run_id = waiting.parked("human")

    def rewind_and_wait_again() -> None:
        waiting.workflow.rewind_to(run_id, "first")
        assert waiting.workflow.execute(run_id).step("first").status == "waiting"

    with pytest.raises(InvalidStateError):
        interrupted(app, resuming_run(app.services, None, run_id, "old"), "answer_wait", rewind_and_wait_again)
    assert present(waiting.workflow.get(run_id)).step("first").status == "waiting"
    run_id = waiting.parked("hook")
    old = waiting.tokens[-1]
    with pytest.raises(HookTokenError):
        interrupted(app, answering_hook(app.services, old, "old"), "answer_hook", rewind_and_wait_again)
    with pytest.raises(HookTokenError):
        app.resume_hook(old, "old")
    assert present(waiting.workflow.get(run_id)).step("first").status == "waiting"


LATE: dict[str, tuple[str, Callable[[Streamline, str, str], Procedure[Any]], tuple[str, ...]]] = {
    "pause": ("human", lambda app, run_id, token: pausing_run(app.services, None, run_id, None), ("resume",)),
    "resume": ("human", lambda app, run_id, token: resuming_run(app.services, None, run_id, None), ("pause",)),
    "rewind": ("human", lambda app, run_id, token: rewinding_run(app.services, None, run_id, "first"), ("execute",)),
    "answer": ("human", lambda app, run_id, token: resuming_run(app.services, None, run_id, "late"), ("rewind", "execute")),
    "hook": ("hook", lambda app, run_id, token: answering_hook(app.services, token, "late"), ("rewind", "execute")),
    "event": ("event", lambda app, run_id, token: sending_event(app.services, "$go.now", "late", run_id), ("rewind", "execute")),
    "to all": ("event", lambda app, run_id, token: sending_event(app.services, "$go.now", "late", None), ("rewind", "execute")),
}
"""By name: what the run waits for, the call, and what happens to the run before a copy of the call arrives."""


@pytest.mark.parametrize("name", LATE)
def test_a_late_copy_of_a_call_that_is_over_changes_nothing(app: Streamline, waiting: Waiting, name: str) -> None:
    """If a network delivers a write again, it must not pause a resumed run again, and must not answer a later wait."""
    how, call, then = LATE[name]
    run_id = waiting.parked(how)
    if name == "resume":
        waiting.workflow.pause(run_id)
    sent = recorded(app, call(app, run_id, waiting.tokens[-1] if waiting.tokens else ""))
    for operation in then:
        match operation:
            case "pause":
                waiting.workflow.pause(run_id)
            case "resume":
                waiting.workflow.resume(run_id)
            case "rewind":
                waiting.workflow.rewind_to(run_id, "first")
            case "execute":
                waiting.workflow.execute(run_id)
    before = app.runs.find_one({"_id": run_id})
    assert before["steps"][0]["status"] == "waiting"
    for op in sent:
        app.store().run(op)
    assert app.runs.find_one({"_id": run_id}) == before


def test_a_late_copy_of_a_cancel_that_came_too_late_does_not_cancel_a_later_life(app: Streamline, waiting: Waiting) -> None:
    """The run ended before the cancel, whose caller was told so. Then the run was rewound, which that caller may not even know."""
    run_id = waiting.parked("human")
    sent = recorded(app, cancelling_run(app.services, None, run_id, None), lambda: finish(waiting, run_id))
    assert present(waiting.workflow.get(run_id)).status == "done"
    waiting.workflow.rewind_to(run_id, "first")
    before = app.runs.find_one({"_id": run_id})
    for op in sent:
        app.store().run(op)
    assert app.runs.find_one({"_id": run_id}) == before


def finish(waiting: Waiting, run_id: str) -> None:
    """Answer the run's wait, and take it to its end."""
    waiting.workflow.resume(run_id, "answer")
    assert waiting.workflow.execute(run_id).status == "done"
