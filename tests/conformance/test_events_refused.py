"""Events to all that the server cannot store in a run: the other runs get theirs, and the event waits until there is room."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from stored_runs import stored

from streamline_pool import PayloadTooLargeError, Run, StoreUnavailableError, Streamline, ValidationError, Workflow
from streamline_pool.client.event_delivery import finishing_broadcasts
from streamline_pool.protocol import durable_events, inbox
from streamline_pool.protocol.server_codes import TOO_LARGE, TRANSIENT

DATA = "y" * 200_000
DOCUMENT_BYTES_MAX = 16 * 1024 * 1024


@pytest.fixture
def receiving(app: Streamline) -> Workflow:
    return app.workflow("receiving", steps={"receive": lambda ctx: ctx.wait_for("news"), "end": lambda ctx: ctx.get_output("receive")})


def begun(workflow: Workflow) -> Run:
    return workflow.execute(workflow.start().id)


def fill(app: Streamline, run: Run) -> None:
    """Leave the run's document no room for DATA. A run comes there by outputs and by `ctx.set`."""
    for place in range(4):  # a server with a small cache accepts no larger writes
        app.runs.update_one({"_id": run.id}, {"$set": {f"pad{place}": "x" * (DOCUMENT_BYTES_MAX // 4 - 25_000)}})


def make_room(app: Streamline, run: Run) -> None:
    app.runs.update_one({"_id": run.id}, {"$unset": dict.fromkeys(("pad0", "pad1"), "")})


def events(app: Streamline) -> Any:
    return app.store().collection("events")


def let_time_pass(app: Streamline, **more: Any) -> None:
    """As if all events were sent long ago, and each pause before a repetition were over."""
    long_ago = datetime.now(UTC) - timedelta(days=1)
    events(app).update_many({}, {"$set": {"at": long_ago, **more}})
    events(app).update_many({"retryAt": {"$exists": True}}, {"$set": {"retryAt": long_ago}})


def finish(app: Streamline) -> int:
    """What a steward does for events that are pending. Returns how many it has tried."""
    return app.store().drive(finishing_broadcasts(app.services))


def test_a_full_run_loses_no_event_to_all_and_the_other_runs_get_theirs(
    app: Streamline, receiving: Workflow, caplog: pytest.LogCaptureFixture
) -> None:
    """The full run would wait for ever, for an event that counts as delivered."""
    runs = [begun(receiving) for _ in range(5)]
    full = runs[2]
    fill(app, full)
    before = stored(app, full)
    assert app.send_event("news", DATA) == 4
    (refused,) = [record for record in caplog.records if record.message == "event_refused"]
    assert (refused.levelno, refused.__dict__["run_ids"]) == (logging.ERROR, [full.id])
    assert stored(app, full) == before
    assert events(app).find_one()["pending"] is True
    for run in runs:
        if run is not full:
            assert receiving.execute(run.id).output == DATA
    make_room(app, full)
    let_time_pass(app)
    assert finish(app) == 1
    assert receiving.execute(full.id).output == DATA
    assert events(app).find_one()["pending"] is False
    assert finish(app) == 0


def test_a_steward_repeats_a_refused_event_after_pauses_that_grow_to_an_hour(app: Streamline, receiving: Workflow) -> None:
    """A run that is never given room must not cost the database a delivery at every sweep."""
    fill(app, begun(receiving))
    pauses = []
    app.send_event("news", DATA)
    for _ in range(10):
        event = events(app).find_one()
        events(app).update_one({}, {"$set": {"at": datetime.now(UTC) - timedelta(days=1)}})
        pauses.append(round((event["retryAt"] - datetime.now(UTC)).total_seconds() / 30))
        assert finish(app) == 0, "the pause is not over"
        let_time_pass(app)
        assert finish(app) == 1
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 120, 120, 120]


@pytest.mark.parametrize("way", ["cancel", "rewind_to"])
def test_an_event_is_settled_when_the_full_run_waits_no_more(app: Streamline, receiving: Workflow, way: str) -> None:
    run = begun(receiving)
    fill(app, run)
    app.send_event("news", DATA)
    receiving.cancel(run.id) if way == "cancel" else receiving.rewind_to(run.id, "receive")
    let_time_pass(app)
    assert finish(app) == 1
    assert events(app).find_one()["pending"] is False
    if way == "rewind_to":
        make_room(app, run)
        assert receiving.execute(run.id).output == DATA, "the run finds the stored event when it waits again"


def test_many_refused_events_do_not_keep_a_dead_senders_event_from_being_finished(app: Streamline, receiving: Workflow) -> None:
    """A steward takes the oldest hundred. If those were the refused ones each time, no other event would ever be delivered."""
    full, other = begun(receiving), begun(app.workflow("other", steps={"receive": lambda ctx: ctx.wait_for("other news")}))
    fill(app, full)
    app.send_event("news", DATA)
    (refused,) = events(app).find()
    events(app).insert_many({**refused, "_id": f"refused-{number}"} for number in range(120))
    app.store().run(durable_events.record_event("last", "other news", "last words", app.store().now()))
    events(app).update_many({}, {"$set": {"at": datetime.now(UTC) - timedelta(days=1)}})
    events(app).update_one({"_id": "last"}, {"$set": {"at": datetime.now(UTC) - timedelta(hours=1)}})
    assert finish(app) == 1
    assert app.workflows["other"].execute(other.id).output == "last words"


def test_an_event_that_another_program_has_damaged_is_postponed_too(app: Streamline) -> None:
    """A hundred of them would keep all other events from being finished."""
    deep: Any = 1
    for _ in range(150):  # deeper than data may be
        deep = [deep]
    events(app).insert_one({"_id": "deep", "at": datetime.now(UTC) - timedelta(days=1), "pending": True, "name": "news", "data": deep})
    assert [finish(app), finish(app)] == [1, 0]


def test_a_full_inbox_does_not_concern_an_event_to_all(app: Streamline) -> None:
    """An event to all ends a wait or stays in its own collection. It is never put into an inbox."""
    workflow = app.workflow("w", steps={"receive": lambda ctx: ctx.wait_for("news"), "again": lambda ctx: ctx.wait_for("news")})
    waiting, later = begun(workflow), workflow.start()
    for run in (waiting, later):
        for number in range(inbox.INBOX_MAX):
            app.send_event("other", number, run_id=run.id)
    assert app.send_event("news", 1) == 1
    for run in (waiting, later):
        assert workflow.execute(run.id).step("receive").output == 1
    assert [event["pending"] for event in events(app).find()] == [False]


def test_an_event_to_one_full_run_is_an_error_for_its_sender(app: Streamline, receiving: Workflow) -> None:
    run = begun(receiving)
    fill(app, run)
    before = stored(app, run)
    with pytest.raises(PayloadTooLargeError):
        app.send_event("news", DATA, run_id=run.id)
    assert stored(app, run) == before


def test_a_delivery_that_a_fail_over_interrupts_is_repeated_and_not_taken_for_refused() -> None:
    """An answer to many updates names errors one by one, also those that pass."""
    delivery = durable_events.deliver_to_waiters({"_id": "e", "name": "news", "bornAt": None}, [{"_id": "run"}])
    refused = {"index": 0, "code": min(TOO_LARGE), "errmsg": "too large"}
    assert delivery.parse({"n": 0, "writeErrors": [refused]}) == [refused]
    assert delivery.parse({"n": 1}) == []
    for code in TRANSIENT:
        with pytest.raises(StoreUnavailableError) as caught:
            delivery.parse({"n": 0, "writeErrors": [refused, {"index": 1, "code": code, "errmsg": "stepping down"}]})
        assert caught.value.context["transient"] is True


def test_one_command_of_a_broadcast_is_never_too_large(app: Streamline) -> None:
    """With a long name and long ids it was, so the event stayed pending for ever and no run received it."""
    name = "\N{GRINNING FACE}" * 200
    flow = app.workflow("long", steps={"receive": lambda ctx: ctx.wait_for(name)})
    first = begun(flow)
    document = app.runs.find_one_and_delete({"_id": first.id})
    ids = [f"{number:03}{name[:97]}" for number in range(500)]
    app.runs.insert_many([{**document, "_id": run_id} for run_id in ids])
    assert app.send_event(name, b"x" * 30_500) == len(ids)
    assert events(app).find_one()["pending"] is False


def test_an_event_that_a_users_unique_index_refuses_is_not_sent(app: Streamline) -> None:
    """Any duplicate key counted as the same event, already stored: its sender was told that it is on its way."""
    events(app).create_index("name", name="one_each", unique=True)
    app.send_event("news", 1)
    with pytest.raises(ValidationError, match="one_each"):
        app.send_event("news", 2)
