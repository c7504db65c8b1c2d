"""Every transition, as data: what it stores, and that no run is left wedged (docs/architecture.md, section 5)."""

from __future__ import annotations

import copy
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from streamline_pool import is_timeout
from streamline_pool.domain import transitions, waits
from streamline_pool.domain.change import Change, apply
from streamline_pool.domain.definition import Definition, make_step
from streamline_pool.domain.document import RunDocument, WaitDocument
from streamline_pool.domain.errors import ErrorCode
from streamline_pool.domain.model import RUN_MOVES, STEP_MOVES, RunStatus, StepStatus
from streamline_pool.domain.transitions import Failure
from streamline_pool.protocol.run_document import validate_run_document
from support import present

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


def held(current: str = "a", **changes: Any) -> RunDocument:
    """The document of a run whose current step was granted."""
    running = {"status": "running", "attempts": 1, "startedAt": NOW - timedelta(seconds=2), "decided": True, "checkpoint": 7}
    steps = [
        {"stepId": "a", **(running if current == "a" else {"status": "done", "attempts": 1, "output": "A"})},
        {"stepId": "b", **(running if current == "b" else {"status": "pending", "attempts": 0})},
    ]
    document = {
        "_id": "r", "workflowId": "w", "version": "1", "status": "running", "steps": steps, "currentStepId": current, "context": {"old": 1},
        "lane": "q/w/1", "rev": 4, "token": 1, "crashes": 1, "failures": 0, "waitGen": 0, "createdAt": NOW - timedelta(hours=1), **changes,
    }  # fmt: skip
    return cast(RunDocument, document)  # as far as transitions read it


def waiting(waiting_for: WaitDocument | None = None, current: str = "a", **changes: Any) -> RunDocument:
    """A run whose current step waits, as a worker that has just claimed it reads it."""
    document = held(current, status="waiting", waitGen=3, **changes)
    step = next(step for step in document["steps"] if step["stepId"] == current)
    step.update({"status": "waiting", "waitingFor": waiting_for or TIMER, "gen": 3})
    return document


def hooked(current: str = "a", **changes: Any) -> RunDocument:
    """A run whose handler works and has created a hook that is not answered yet."""
    document = held(current, **changes)
    next(step for step in document["steps"] if step["stepId"] == current)["hooks"] = [
        {"hash": b"h", "gen": document["waitGen"] + 1, "reason": "approve?"}
    ]
    return document


TIMER: WaitDocument = {"type": "timer", "reason": "sleep", "resumeAt": LATER}
HUMAN: WaitDocument = {"type": "human", "reason": "approve?"}
WEBHOOK: WaitDocument = {"type": "webhook", "reason": "approve?"}
EVENT: WaitDocument = {"type": "event", "reason": "event paid", "eventName": "paid"}
PAID = {"id": "e1", "name": "paid", "data": 7}
ANSWER = {"id": "x1", "stepId": "a", "gen": 1, "data": "yes"}


def until_later(waiting_for: WaitDocument) -> WaitDocument:
    """The same wait with a deadline."""
    return {**waiting_for, "expiresAt": LATER}


def taken(document: RunDocument, place: int, waiting_for: WaitDocument) -> Change:
    """The change by which a wait takes an answer that is in the inbox already."""
    begin = waits.await_event if waiting_for["type"] == "event" else waits.wait
    change = waits.take(document, begin(document, place, waiting_for, {"k": 1}), NOW)
    assert change is not None
    return change


CHANGES: dict[str, tuple[RunDocument, Change]] = {
    "advance": (held(), transitions.advance(held(), 0, "out", {"k": 1}, NOW)),
    "finish": (held("b"), transitions.advance(held("b"), 1, "out", {}, NOW)),
    "skip": (held(), transitions.skip(held(), 0, {}, NOW)),
    "skip the last": (held("b"), transitions.skip(held("b"), 1, {}, NOW)),
    "decide": (held(), transitions.decide_entry(held(), 0)),
    "sleep": (held(), waits.sleep(held(), 0, LATER, {"k": 1})),
    "wake": (waiting(), waits.wake(waiting(), 0, LATER)),
    "park": (waiting(), waits.park(waiting(), 0)),
    "wait": (held(), waits.wait(held(), 0, HUMAN, {"k": 1})),
    "wait until": (held(), waits.wait(held(), 0, until_later(HUMAN), {})),
    "wait with a hook": (hooked(), waits.wait(hooked(), 0, WEBHOOK, {})),
    "wait at the last": (held("b"), waits.wait(held("b"), 1, HUMAN, {})),
    "await": (held(), waits.await_event(held(), 0, EVENT, {"k": 1})),
    "await until": (held(), waits.await_event(held(), 0, until_later(EVENT), {})),
    "take an event": (held(inbox=[PAID]), taken(held(inbox=[PAID]), 0, EVENT)),
    "take an answer": (hooked(inbox=[ANSWER]), taken(hooked(inbox=[ANSWER]), 0, WEBHOOK)),
    "take at the last": (held("b", inbox=[PAID]), taken(held("b", inbox=[PAID]), 1, EVENT)),
    "search, inbox": (
        waiting(EVENT, awaits="paid", inbox=[PAID]),
        waits.wait_answered(waiting(EVENT, awaits="paid", inbox=[PAID]), 0, PAID, NOW),
    ),
    "search, broadcast": (
        waiting(EVENT, awaits="paid"),
        waits.wait_answered(waiting(EVENT, awaits="paid"), 0, {"_id": "e2", "name": "paid", "data": 8}, NOW),
    ),
    "search at the last": (
        waiting(EVENT, "b", awaits="paid", inbox=[PAID]),
        waits.wait_answered(waiting(EVENT, "b", awaits="paid", inbox=[PAID]), 1, PAID, NOW),
    ),
    "time out": (waiting(until_later(HUMAN)), waits.time_out(waiting(until_later(HUMAN)), 0, LATER)),
    "time out an event": (
        waiting(until_later(EVENT), awaits="paid"),
        waits.time_out(waiting(until_later(EVENT), awaits="paid"), 0, LATER),
    ),
    "park a wait": (waiting(HUMAN), waits.park(waiting(HUMAN), 0)),
    "park a wait until": (waiting(until_later(WEBHOOK)), waits.park(waiting(until_later(WEBHOOK)), 0)),
    "park an event": (waiting(EVENT, awaits="paid"), waits.park(waiting(EVENT, awaits="paid"), 0)),
    "park an event until": (
        waiting(until_later(EVENT), awaits="paid"),
        waits.park(waiting(until_later(EVENT), awaits="paid"), 0),
    ),
    "advance with a hook": (hooked(), transitions.advance(hooked(), 0, "out", {}, NOW)),
    "retry with a hook": (hooked(), transitions.step_failed(hooked(), STEP_A, 0, FAILURE, NOW, LATER)),
    "fail while awaiting": (
        held(failures=1, awaits="paid"),
        transitions.step_failed(held(failures=1, awaits="paid"), STEP_A, 0, FAILURE, NOW, LATER),
    ),
    "retry": (held(), transitions.step_failed(held(), STEP_A, 0, FAILURE, NOW, LATER)),
    "fail": (held(failures=1), transitions.step_failed(held(failures=1), STEP_A, 0, FAILURE, NOW, LATER)),
    "fail at once": (held(), transitions.step_failed(held(), STEP_A, 0, FAILURE._replace(retriable=False), NOW, LATER)),
    "release entered": (held(), transitions.release(held(), 0, NOW, was_entered=True)),
    "release": (held(), transitions.release(held(), 0, NOW, was_entered=False)),
}
every = pytest.mark.parametrize("name", CHANGES)


def applied(name: str) -> tuple[RunDocument, Change, RunDocument]:
    before, change = CHANGES[name]
    after = copy.deepcopy(before)
    apply(after, change)
    return before, change, after


def waits_for_a_client(document: RunDocument) -> bool:
    step = next((step for step in document["steps"] if step["stepId"] == document["currentStepId"]), None)
    return step is not None and step["status"] == "waiting" and step["waitingFor"]["type"] in ("human", "webhook", "event")


@every
def test_a_run_is_left_leased_or_due_or_ended_or_waiting_for_a_client(name: str) -> None:
    """A run can only be wedged where its next state is made. A wait with a deadline has a due time."""
    _, change, after = applied(name)
    ended = after["status"] in ("done", "failed", "cancelled")
    without_owner = change.releases and change.wake_at is None and not ended
    assert (not change.releases) + (change.wake_at is not None) + ended + without_owner == 1
    assert not without_owner or waits_for_a_client(after)
    assert not ended or after["endedAt"] is not None


@every
def test_events_find_a_run_exactly_while_it_waits_for_one(name: str) -> None:
    """Events are delivered by `awaits`: without it they miss the run, and if it stays too long they end the wrong step."""
    _, _, after = applied(name)
    step = next((step for step in after["steps"] if step["stepId"] == after["currentStepId"]), None)
    waiting_for = step.get("waitingFor") if step is not None else None
    waits = after["status"] == "waiting" and waiting_for is not None and waiting_for["type"] == "event"
    assert after.get("awaits") == ("paid" if waits else None)


@every
def test_a_waiting_step_says_which_wait_it_is_and_no_other_step_does(name: str) -> None:
    """An answer names the wait that it answers: an old one must never fit a newer wait."""
    before, change, after = applied(name)
    began = [place for place, step in change.steps.items() if step["status"] == "waiting"]
    for place in began:
        assert after["steps"][place]["gen"] == after["waitGen"] == before["waitGen"] + 1
    for step in after["steps"]:
        assert ("gen" in step) == ("waitingFor" in step) == (step["status"] == "waiting")


@every
def test_a_change_makes_only_moves_that_the_tables_allow(name: str) -> None:
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
        assert validate_run_document(after) is None


@every
def test_a_change_counts_one_write_and_leaves_its_argument_alone(name: str) -> None:
    before, change, after = applied(name)
    assert after["rev"] == before["rev"] + 1
    assert "rev" not in change.fields, "the write's own fence states it"


@every
def test_under_pause_nothing_is_started_or_ended(name: str) -> None:
    """The same result for a run that no worker may continue; its due time is stored as `pausedWakeAt`."""
    before, change = CHANGES[name]
    paused = transitions.under_pause(before, change, NOW)
    after = copy.deepcopy(before)
    apply(after, paused)
    assert paused.releases
    assert after["status"] != "done"
    assert after["status"] == "failed" or paused.wake_at is not None or waits_for_a_client(after)
    started = [step for old, step in zip(before["steps"], after["steps"], strict=True) if step["attempts"] > old["attempts"]]
    assert not started
    if before["status"] == "waiting":
        assert after["steps"] == before["steps"], "pausing never ends a sleep or a wait"
        assert after.get("inbox") == before.get("inbox"), "and takes nothing for one"
        assert after.get("awaits") == before.get("awaits")


def test_under_pause_a_wait_keeps_its_deadline_and_an_event_wait_its_search() -> None:
    """An event that was sent to all before is found only by a search; a run parked without it would wait for ever."""
    instants = {name: transitions.under_pause(*CHANGES[name], LATER).wake_at for name in ("wait", "wait until", "await", "await until")}
    assert instants == {"wait": None, "wait until": LATER, "await": LATER, "await until": LATER}


def test_done_and_advance_are_one_write() -> None:
    _, change, after = applied("advance")
    assert set(change.steps) == {0, 1}
    assert after["steps"][0] == {
        "stepId": "a", "status": "done", "attempts": 1, "startedAt": NOW - timedelta(seconds=2), "endedAt": NOW, "durationMs": 2000,
        "output": "out",
    }  # fmt: skip
    assert after["steps"][1] == {"stepId": "b", "status": "running", "attempts": 1, "startedAt": NOW}
    assert (after["currentStepId"], after["context"], after["crashes"]) == ("b", {"old": 1, "k": 1}, 0)


def test_context_keys_that_cannot_be_paths_are_stored_with_the_whole_context() -> None:
    """MongoDB would read `context.a.b` as the key b within a."""
    for key in ("a.b", "$inc", "x.$y"):
        change = transitions.advance(held(), 0, 1, {key: 5}, NOW)
        assert change.fields["context"] == {"old": 1, key: 5}
        assert not [name for name in change.fields if name.startswith("context.")]
    assert transitions.advance(held(), 0, 1, {"plain": 5}, NOW).fields["context.plain"] == 5


def test_a_retry_keeps_the_checkpoint_and_a_result_drops_it() -> None:
    assert applied("retry")[2]["steps"][0]["checkpoint"] == 7
    assert "checkpoint" not in applied("advance")[2]["steps"][0]


def test_the_last_failure_ends_the_run_with_both_codes() -> None:
    _, change, after = applied("fail")
    error = present(after["error"])
    assert (error["code"], after["steps"][0]["error"]["code"]) == ("MAX_RETRIES_EXCEEDED", "STEP_FAILED")
    assert error["message"].startswith("step a failed 2 times, the last time with STEP_FAILED: ")
    assert error["message"].endswith("why")
    assert [name for name, _, _ in change.events] == ["step:failed", "workflow:failed"]


def test_an_attempt_that_did_not_take_place_is_not_counted() -> None:
    assert applied("release")[2]["steps"][0]["attempts"] == 0
    assert applied("release entered")[2]["steps"][0]["attempts"] == 1


def test_a_released_run_keeps_its_place_in_the_queue() -> None:
    assert CHANGES["release"][1].wake_at == NOW - timedelta(hours=1)


def test_without_a_grant_the_next_step_is_left_to_the_next_lease_holder() -> None:
    before, change = CHANGES["advance"]
    lone = transitions.without_next_start(before, change, NOW)
    after = copy.deepcopy(before)
    apply(after, lone)
    assert (after["steps"][1], after["currentStepId"], lone.releases) == ({"stepId": "b", "status": "pending", "attempts": 0}, "b", True)
    assert validate_run_document(after) is None


def test_a_sleep_is_ended_only_by_the_servers_clock() -> None:
    assert CHANGES["wake"][1].not_before == LATER
    assert CHANGES["park"][1].wake_at == LATER


def test_a_wait_is_not_begun_if_its_answer_has_arrived() -> None:
    """A client may answer between the hook and the wait; only the write itself can detect it."""
    assert CHANGES["wait with a hook"][1].unless_arrived == {"stepId": "a", "gen": 1}
    assert CHANGES["await"][1].unless_arrived == {"name": "paid"}
    assert CHANGES["wait"][1].unless_arrived is None, "a wait without a hook cannot be answered before it is stored"


def test_awaiting_keeps_the_lease_until_stored_events_were_searched() -> None:
    """If the lease were released before the search, the run would miss an event that was sent before its wait was stored."""
    assert not CHANGES["await"][1].releases
    assert CHANGES["wait"][1].releases


@pytest.mark.parametrize("name", ["take an event", "take an answer", "take at the last"])
def test_what_has_arrived_is_the_output_and_counts_as_a_wait(name: str) -> None:
    before, change, after = applied(name)
    place = 1 if name == "take at the last" else 0
    step, item = after["steps"][place], before["inbox"][0]
    assert (step["status"], step["output"], step["answer"]) == ("done", item["data"], item["id"])
    assert (after["waitGen"], after["context"], after["inbox"]) == (1, {"old": 1, "k": 1}, [])
    assert "step:waiting" not in [event for event, _, _ in change.events], "the run has not waited"
    assert after["output" if place else "currentStepId"] == (7 if place else "b")


def test_only_what_is_waited_for_is_taken() -> None:
    others = [{"id": "e0", "name": "other", "data": 1}, {"id": "x0", "stepId": "b", "gen": 1, "data": 2}, "garbage", {}]
    assert waits.take(held(inbox=others), CHANGES["await"][1], NOW) is None
    assert waits.take(hooked(inbox=[{**ANSWER, "gen": 2}]), CHANGES["wait with a hook"][1], NOW) is None
    later = {**PAID, "id": "e9", "data": 99}
    document = held(inbox=[*others, PAID, later])
    change = taken(document, 0, EVENT)
    apply(document, change)
    assert (document["steps"][0]["output"], document["inbox"]) == (7, [*others, later]), "only the oldest"


def test_a_broadcast_that_was_taken_is_remembered_and_one_from_the_inbox_leaves_it() -> None:
    assert (CHANGES["search, broadcast"][1].seen, CHANGES["search, broadcast"][1].takes) == ("e2", ())
    assert (CHANGES["search, inbox"][1].seen, applied("search, inbox")[2]["inbox"]) == (None, [])
    for name, answer in (("search, broadcast", "e2"), ("search, inbox", "e1")):
        assert applied(name)[2]["steps"][0]["answer"] == answer


@pytest.mark.parametrize("name", ["search, inbox", "search, broadcast", "search at the last", "time out", "time out an event", "wake"])
def test_the_end_of_a_wait_is_published_in_order(name: str) -> None:
    published = [event for event, _, _ in CHANGES[name][1].events]
    assert published[:2] == ["step:completed", "workflow:resumed"]
    assert published[2:] == (["workflow:completed"] if name == "search at the last" else [])


@pytest.mark.parametrize("name", ["time out", "time out an event"])
def test_a_wait_times_out_only_by_the_servers_clock_and_says_so(name: str) -> None:
    _, change, after = applied(name)
    assert change.not_before == LATER
    assert is_timeout(after["steps"][0]["output"])
    assert after["steps"][0]["output"]["$timeout"]["type"] == ("event" if name == "time out an event" else "human")


@pytest.mark.parametrize(
    ("name", "due_at"),
    [("park", LATER), ("park a wait", None), ("park a wait until", LATER), ("park an event", None), ("park an event until", LATER)],
)
def test_a_parked_run_has_the_due_time_of_its_own_wait(name: str, due_at: datetime | None) -> None:
    before, change, after = applied(name)
    assert change.wake_at == due_at
    assert (after["steps"], after["waitGen"], after.get("awaits")) == (before["steps"], before["waitGen"], before.get("awaits"))


def test_hooks_live_through_a_retry_and_die_with_their_step() -> None:
    """A person may hold the token of the failed attempt; a step that has ended must not be answered."""
    assert applied("retry with a hook")[2]["steps"][0]["hooks"] == hooked()["steps"][0]["hooks"]
    assert "hooks" not in applied("advance with a hook")[2]["steps"][0]
    assert CHANGES["advance with a hook"][1].takes == ({"stepId": "a"},), "an answer without a wait is removed, too"


def test_a_wait_and_its_end_reset_the_counts_of_failures_and_lost_workers() -> None:
    for name in ("wait", "await", "take an event", "search, inbox", "time out"):
        _, _, after = applied(name)
        assert (after["crashes"], after["failures"]) == (0, 0), name


def test_a_run_that_fails_after_its_last_step_ended_keeps_that_result() -> None:
    """Every step has ended, but the stored steps do not fit the version: what was accepted stays readable."""
    document = held("b")
    document["steps"][1]["status"], document["steps"][1]["output"] = "done", "B"
    change = transitions.fail_run(document, 1, FAILURE, NOW, failures=0, code=ErrorCode.VERSION_MISMATCH)
    assert (change.steps, [name for name, _, _ in change.events]) == ({}, ["workflow:failed"])
    assert (change.fields["status"], change.fields["error"]["code"]) == ("failed", "VERSION_MISMATCH")
