"""What a step without waits sends to the database: nothing of waits, events or control operations, and no indexed field."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, cast

import pytest

from streamline_pool.domain import transitions
from streamline_pool.domain.definition import Definition, make_step
from streamline_pool.domain.document import RunDocument
from streamline_pool.protocol import commits
from streamline_pool.protocol.engine_indexes import RUN_INDEXES
from streamline_pool.protocol.operations import Fence

NOW = datetime(2030, 1, 1, tzinfo=UTC)
STEPS = tuple(make_step("w", name, lambda ctx: 1, {}) for name in ("a", "b"))
DEFINITION = Definition(workflow_id="w", version="1", queue="q", steps=STEPS, make_context=None)


def held(place: int) -> RunDocument:
    steps: list[dict[str, Any]] = [{"stepId": name, "status": "pending", "attempts": 0} for name in ("a", "b")]
    steps[place] = {"stepId": "ab"[place], "status": "running", "attempts": 1, "startedAt": NOW}
    run = {"_id": "r", "status": "running", "steps": steps, "currentStepId": "ab"[place], "context": {}, "waitGen": 3, "acts": 2}
    counts = {"rev": 4, "token": 1, "crashes": 0, "failures": 0, "inbox": [{"id": "e", "name": "n"}], "seen": ["e"]}
    return cast(RunDocument, {**run, **counts})  # as far as transitions read it


@pytest.mark.parametrize("place", [0, 1])
def test_a_step_without_waits_pays_nothing_for_waits(place: int) -> None:
    """Every step of every run sends this: a field more costs all of them, an indexed one costs an index entry each."""
    change = transitions.advance(held(place), place, "output", {"key": 1}, NOW)
    update = commits.commit(Fence("r", "claim", 4, 1), change, NOW, 0).update
    assert set(update["q"]) == {"_id", "lease.id", "rev", "paused"}
    assert set(update["u"]) == ({"$set"} if place == 0 else {"$set", "$unset"})
    common = {"rev", "updatedAt", "currentStepId", "context.key", f"steps.{place}"}
    ending = {"status", "output", "endedAt", "crashes", "failures"}
    assert set(update["u"]["$set"]) == common | ({"steps.1"} if place == 0 else ending)
    if place == 0:
        indexed = {path.split(".")[0] for index in RUN_INDEXES for path in (*index.key, *(index.partial or {}))}
        assert not {path.split(".")[0] for path in update["u"]["$set"]} & indexed
