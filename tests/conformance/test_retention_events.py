"""How long events to all are kept: for each run that may still receive them, also one that has ended and can be rewound."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import Timestamp
from old_runs import ids

from streamline_pool import Streamline
from streamline_pool.protocol import durable_events, retention
from streamline_pool.storage.retention import forgetting_events
from support import present


def ended_run(app: Streamline, status: str = "done") -> Any:
    """A workflow and the id of its only run, which has ended. A rewind makes it wait for the event "news"."""

    workflow = app.workflow(
        "w",
        steps={
            "receive": (lambda ctx: ctx.wait_for("news"), {"skip_if": lambda ctx: not rewound}),
            "end": lambda ctx: ctx.get_output("receive"),
        },
    )
    rewound: list[bool] = []
    run = workflow.start()
    if status == "cancelled":
        workflow.cancel(run.id)
    elif status == "failed":
        app.runs.update_one({"_id": run.id}, {"$set": {"status": "failed", "endedAt": datetime.now(UTC)}, "$unset": {"wakeAt": ""}})
    elif status == "done":
        workflow.execute(run.id)
    rewound.append(True)
    assert present(workflow.get(run.id)).status == ("running" if status == "live" else status)
    return workflow, run.id


def send_long_ago(app: Streamline, data: Any = None) -> None:
    """Send an event to all, and make it two hours old: younger ones are always kept."""
    app.send_event("news", data)
    events(app).update_many({}, {"$set": {"at": datetime.now(UTC) - timedelta(hours=2)}})


def events(app: Streamline) -> Any:
    return app.store().collection("events")


@pytest.mark.parametrize("status", ["done", "failed", "live"])
def test_an_event_stays_for_every_run_that_may_still_receive_it(app: Streamline, status: str) -> None:
    """A run that has ended and is rewound would wait for ever for an event that was sent to it."""
    workflow, run_id = ended_run(app, status)
    send_long_ago(app, "for you")
    for clean_up in (app.cleanup_old_runs, app.archive_old_runs, app.cleanup_expired):
        clean_up()
    if status != "live":
        workflow.rewind_to(run_id, "receive")
    assert workflow.execute(run_id).step("receive").output == "for you"


REMOVALS: dict[str, Callable[[Streamline], object]] = {
    "cleaned up": lambda app: app.cleanup_old_runs(0),
    "expired": lambda app: (app.runs.update_many({}, {"$set": {"context.expireAt": datetime.now(UTC)}}), app.cleanup_expired()),
    "archived": lambda app: app.archive_old_runs(0),
    "removed by the TTL": lambda app: (app.runs.delete_many({}), app.cleanup_old_runs()),  # the TTL removes run documents only
}


@pytest.mark.parametrize("removal", REMOVALS)
def test_an_event_goes_with_the_last_run_that_may_receive_it(app: Streamline, removal: str) -> None:
    """The events of a year would fill the disk. An archived run cannot be rewound."""
    ended_run(app)
    send_long_ago(app)
    ended_run_is_younger = app.workflow("other", steps={"a": lambda ctx: 1}).start()
    app.send_event("news", "young")
    app.runs.delete_one({"_id": ended_run_is_younger.id})
    REMOVALS[removal](app)
    assert ids(app.runs) == set()
    assert [event["data"] for event in events(app).find()] == ["young"], "less than an hour old"


def test_a_cancelled_run_keeps_no_event(app: Streamline) -> None:
    ended_run(app, "cancelled")
    send_long_ago(app)
    app.cleanup_old_runs()
    assert ids(events(app)) == set()


def test_the_oldest_run_decides_and_events_that_are_older_go(app: Streamline) -> None:
    send_long_ago(app, "older than the run")
    ended_run(app)
    send_long_ago(app, "younger than the run")
    app.runs.insert_one(
        {"_id": "of another program", "status": "running", "endedAt": None}
    )  # it has no `bornAt`, and receives no event to all
    app.cleanup_old_runs(dry_run=True)
    assert events(app).count_documents({}) == 2, "a dry run changes nothing"
    app.cleanup_old_runs()
    assert [event["data"] for event in events(app).find()] == ["younger than the run"]


def test_the_search_for_the_oldest_run_reads_few_runs_and_few_events(app: Streamline, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a million ended runs a scan of the collection would take minutes, at every clean-up."""
    monkeypatch.setattr(retention, "SLICE", 7)
    ended_run(app)
    long_ago = datetime.now(UTC) - timedelta(days=9)
    app.runs.insert_many({"_id": f"done-{n}", "status": "done", "endedAt": long_ago, "bornAt": Timestamp(90, n)} for n in range(1, 3_000))
    app.runs.insert_many({"_id": f"cut-{n}", "status": "cancelled", "endedAt": long_ago, "bornAt": Timestamp(80, n)} for n in range(1, 300))
    events(app).insert_many(
        {"_id": f"{second}-{n}", "name": "news", "at": long_ago, "pending": False, "bornAt": Timestamp(second, n)}
        for second in (70, 90, 99)
        for n in range(1, 51)
    )
    for find in (durable_events.oldest_runs(), durable_events.find_outdated(Timestamp(90, 1), 7)):
        ran = app.store().cursor(find, None).explain()["executionStats"]
        assert (ran["totalDocsExamined"], ran["totalKeysExamined"]) <= (100, 101), ran
    # Behind a hundred cancelled runs the search ends: what it has found so far are the events older than the last of them.
    assert app.store().drive(forgetting_events()) == 50
    app.runs.delete_many({"status": "cancelled"})
    assert app.store().drive(forgetting_events()) == 0
    app.runs.delete_many({"bornAt": {"$lt": Timestamp(90, 31)}})
    assert app.store().drive(forgetting_events()) == 30
    assert events(app).count_documents({}) == 70


def test_a_pending_event_is_kept(app: Streamline) -> None:
    """Its sender has died before it reached all runs. The steward still delivers it."""
    send_long_ago(app)
    events(app).update_many({}, {"$set": {"pending": True}})
    app.cleanup_old_runs()
    assert events(app).count_documents({}) == 1


def test_without_its_index_a_clean_up_keeps_all_events_and_does_the_rest(app: Streamline, make_app: Callable[..., Streamline]) -> None:
    """A clean-up of a new version may come before the first pool of that version, which makes the index."""
    ended_run(app)
    send_long_ago(app)
    app.runs.drop_index("streamline_born")
    assert app.cleanup_old_runs(0) == 1
    assert events(app).count_documents({}) == 1
    make_app().init_db()
    app.cleanup_old_runs(0)
    assert events(app).count_documents({}) == 0
