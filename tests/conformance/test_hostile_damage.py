"""Waiting runs and events that another program has damaged: each call works or raises an error of ours, and other runs continue."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from parked_runs import Waiting
from workers import run_until_idle

from streamline_pool import Streamline
from streamline_pool.client.event_delivery import finishing_broadcasts
from streamline_pool.domain.errors import DataCorruptionError, InvalidStateError, WorkflowError
from streamline_pool.protocol import commits
from streamline_pool.protocol.codec import SERVER_TICK
from streamline_pool.protocol.operations import Fence
from support import present, shown


def test_a_damaged_waiter_keeps_an_event_from_nobody_else(app: Streamline, waiting: Waiting) -> None:
    """The danger: one run whose steps or counters another program has spoilt ends the sender, for all who wait behind it."""
    run_ids = sorted(waiting.parked("event") for _ in range(4))
    app.runs.update_one({"_id": run_ids[0]}, {"$unset": {"waitGen": ""}, "$set": {"steps": {"stepId": "first"}}})
    app.runs.update_one({"_id": run_ids[1]}, {"$set": {"steps": ["garbage", 5, None]}})
    app.runs.update_one({"_id": run_ids[2]}, {"$unset": {"waitGen": ""}, "$set": {"seen": "garbage", "inbox": 7}})
    assert app.send_event("$go.now", 1) == 2
    assert app.runs.find_one({"_id": run_ids[2]})["seen"] != "garbage"
    assert waiting.workflow.execute(run_ids[3]).status == "done"


def test_a_run_whose_step_does_not_wait_is_not_resolved_by_a_leftover(app: Streamline, waiting: Waiting) -> None:
    """`awaits` is an index's field; that a step waits is what its step says. A handler at work must not be overtaken."""
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
    {"waitGen": "garbage"},
    {"currentStepId": {"first": 1}},
    {"status": "no such status"},
    {"token": "garbage"},
    {"lease": "garbage"},
    {"wakeAt": "garbage", "pausedWakeAt": "garbage"},
    {"lastAct": {"$x": 1}},
]


@pytest.mark.parametrize("how", ["hook", "event"])
def test_damage_by_another_program_is_told_and_breaks_nothing(app: Streamline, waiting: Waiting, how: str) -> None:
    """Every call from outside either works or raises an error of ours; whatever it stores, the run's neighbours go on."""
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


def test_a_damaged_event_holds_up_no_other_and_no_steward(app: Streamline, waiting: Waiting) -> None:
    """A steward that stumbles over one stored event would finish none of those that come after it, ever."""
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
            {"_id": "no data", "at": long_ago, "pending": True, "name": "nobody waits for it"},
            {"_id": "deep", "at": long_ago, "pending": True, "name": "nor for this", "data": deep},
            {"_id": 5, "at": "no date", "pending": True, "name": "$go.now"},
        ]
    )
    assert app.send_event("$go.now", 1) == 1
    app.store().drive(finishing_broadcasts(app))
    assert events.find_one({"_id": "no data"})["pending"] is False
    assert waiting.workflow.execute(run_id).output == ["passed on", 1]


def test_a_look_finds_an_event_without_data(app: Streamline, waiting: Waiting) -> None:
    """A driver that stumbles over it loses the run's lease, again and again, until its worker is convicted of killing it."""
    run = waiting.workflow.start("event")
    app.store().collection("events").insert_one(
        {"_id": "e", "name": "$go.now", "at": run.created_at, "bornAt": SERVER_TICK, "pending": False}
    )
    assert waiting.workflow.execute(run.id).output == ["passed on", None]


def test_a_run_that_ends_for_want_of_room_awaits_nothing(app: Streamline, waiting: Waiting) -> None:
    """Its entry in the index of those who wait would be found by every sender from then on."""
    run_id = waiting.parked("event")
    fence = Fence(run_id, "lease", 1, 1)
    app.runs.update_one({"_id": run_id}, {"$set": {"lease": {"id": "lease"}, "rev": 1}, "$unset": {"wakeAt": ""}})
    error = InvalidStateError("full")
    app.store().run(commits.write_statements([commits.fail_minimal(fence, 0, error.code, "full", app.store().now())]))
    document = app.runs.find_one({"_id": run_id})
    assert document["status"] == "failed"
    assert "awaits" not in document
