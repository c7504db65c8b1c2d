"""Waiting runs and events that another program has damaged: each call works or raises an error of ours, and other runs continue."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from bson import Binary, Decimal128
from bson.binary import UUID_SUBTYPE
from parked_runs import Waiting
from workers import run_until_idle

from streamline_pool import Streamline
from streamline_pool.client.event_delivery import finishing_broadcasts
from streamline_pool.domain.errors import DataCorruptionError, InvalidStateError, WorkflowError
from streamline_pool.protocol import commits
from streamline_pool.protocol.codec import SERVER_TICK
from streamline_pool.protocol.operations import Fence
from support import present, shown


def test_a_damaged_waiting_run_keeps_an_event_from_no_other_run(app: Streamline, waiting: Waiting) -> None:
    """One run whose steps or counters another program has damaged must not stop the delivery to the runs after it."""
    run_ids = sorted(waiting.parked("event") for _ in range(4))
    app.runs.update_one({"_id": run_ids[0]}, {"$unset": {"waitGen": ""}, "$set": {"steps": {"stepId": "first"}}})
    app.runs.update_one({"_id": run_ids[1]}, {"$set": {"steps": ["garbage", 5, None]}})
    app.runs.update_one({"_id": run_ids[2]}, {"$unset": {"waitGen": ""}, "$set": {"seen": "garbage", "inbox": 7}})
    assert app.send_event("$go.now", 1) == 2
    assert app.runs.find_one({"_id": run_ids[2]})["seen"] != "garbage"
    assert waiting.workflow.execute(run_ids[3]).status == "done"


def test_a_leftover_awaits_field_does_not_resolve_a_step_that_does_not_wait(app: Streamline, waiting: Waiting) -> None:
    """`awaits` only serves the index; the step itself says whether it waits. An event must not end a step whose handler works."""
    run = waiting.workflow.start("human")
    app.runs.update_one({"_id": run.id}, {"$set": {"awaits": "$go.now"}})
    assert app.send_event("$go.now", 1) == 0
    assert present(waiting.workflow.get(run.id)).step("first").status == "pending"


DAMAGE: list[dict[str, Any]] = [
    {"inbox": "garbage"},
    {"seen": 5},
    {"steps.0.hooks": "garbage"},
    {"steps.0.hooks": [5]},
    {"steps.0.hooks": [{"hash": "text", "gen": 1}]},
    {"steps.0.gen": "garbage"},
    {"steps.0.waitingFor": "garbage"},
    {"steps.0.waitingFor": {"type": "no such thing"}},
    {"steps.0.waitingFor": {}},
    {"steps.0.waitingFor.expiresAt": "$$NOW"},
    {"steps": {"stepId": "first"}},
    {"steps": [5]},
    {"acts": "garbage"},
    {"acts": None},
    {"acts": {"gt": 0}},
    {"acts": [7]},
    {"acts": Binary(b"no UUID", UUID_SUBTYPE)},
    {"acts": Decimal128("2.5")},
    {"acts": float("nan")},
    {"acts": float("inf")},
    {"acts": 2.0**53},
    {"waitGen": "garbage"},
    {"currentStepId": {"first": 1}},
    {"status": "no such status"},
    {"token": "garbage"},
    {"lease": "garbage"},
    {"wakeAt": "garbage", "pausedWakeAt": "garbage"},
    {"lastAct": {"$x": 1}},
]


@pytest.mark.parametrize("how", ["hook", "event"])
def test_damage_by_another_program_is_reported_and_affects_no_other_run(app: Streamline, waiting: Waiting, how: str) -> None:
    """Every client call on a damaged run must work or raise an error of ours, and the other runs must continue."""
    neighbour = waiting.parked("human")
    for damage in DAMAGE:
        run_id = waiting.parked(how)
        token = waiting.tokens[-1] if waiting.tokens else f"{run_id}.{'x' * 32}"
        app.runs.update_one({"_id": run_id}, {"$set": damage})
        calls: list[Callable[[], Any]] = [
            partial(app.send_event, "$go.now", 1, run_id=run_id),
            partial(app.send_event, "$go.now", 1),
            partial(app.resume_hook, token, 1),
            partial(waiting.workflow.resume, run_id, 1),
            partial(waiting.workflow.pause, run_id),
            partial(waiting.workflow.resume, run_id),
            partial(waiting.workflow.rewind_to, run_id, "first"),
            partial(waiting.workflow.cancel, run_id),
        ]
        for call in calls:
            try:
                call()
            except WorkflowError as exc:
                assert not exc.context.get("transient"), (damage, exc)
    waiting.workflow.resume(neighbour, 1)
    run_until_idle(app)
    assert present(waiting.workflow.get(neighbour)).status == "done"


@pytest.mark.parametrize("damage", [{"steps.0.gen": "x"}, {"steps.0.waitingFor": {"type": "?"}}, {"steps.0.hooks": [5]}], ids=shown)
def test_an_answer_to_a_damaged_wait_says_what_is_wrong(app: Streamline, waiting: Waiting, damage: dict[str, Any]) -> None:
    run_id = waiting.parked("hook")
    app.runs.update_one({"_id": run_id}, {"$set": damage})
    with pytest.raises(DataCorruptionError, match=run_id):
        waiting.workflow.resume(run_id, 1)
    with pytest.raises(DataCorruptionError, match=run_id):
        app.resume_hook(waiting.tokens[-1], 1)


def test_a_damaged_event_stops_no_other_event_and_no_steward(app: Streamline, waiting: Waiting) -> None:
    """A steward that fails at one stored event would never finish the events after it."""
    events = app.store().collection("events")
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    run_id = waiting.parked("event")
    deep: Any = 1
    for _ in range(150):
        deep = [deep]
    events.insert_many(
        [
            {"_id": "no name", "at": long_ago, "pending": True, "data": 1},
            {"_id": "odd name", "at": long_ago, "pending": True, "data": 1, "name": {"$gt": ""}},
            {"_id": "no data", "at": long_ago, "pending": True, "name": "no run waits for it"},
            {"_id": "deep", "at": long_ago, "pending": True, "name": "nor for this one", "data": deep},
            {"_id": 5, "at": "no date", "pending": True, "name": "$go.now"},
        ]
    )
    assert app.send_event("$go.now", 1) == 1
    app.store().drive(finishing_broadcasts(app.services))
    assert events.find_one({"_id": "no data"})["pending"] is False
    assert waiting.workflow.execute(run_id).output == ["passed on", 1]


def test_the_search_for_events_accepts_an_event_without_data(app: Streamline, waiting: Waiting) -> None:
    """A worker that fails at such an event would lose the run's lease again and again, until the run fails as WORKER_CRASHED."""
    run = waiting.workflow.start("event")
    app.store().collection("events").insert_one(
        {"_id": "e", "name": "$go.now", "at": run.created_at, "bornAt": SERVER_TICK, "pending": False}
    )
    assert waiting.workflow.execute(run.id).output == ["passed on", None]


def test_a_run_that_fails_because_its_document_is_full_awaits_nothing(app: Streamline, waiting: Waiting) -> None:
    """Its entry in the index of waiting runs would be found by every later sender."""
    run_id = waiting.parked("event")
    fence = Fence(run_id, "lease", 1, 1)
    app.runs.update_one({"_id": run_id}, {"$set": {"lease": {"id": "lease"}, "rev": 1}, "$unset": {"wakeAt": ""}})
    error = InvalidStateError("full")
    app.store().run(commits.write_statements([commits.fail_minimal(fence, 0, error.code, "full", app.store().now())]))
    document = app.runs.find_one({"_id": run_id})
    assert document["status"] == "failed"
    assert "awaits" not in document
