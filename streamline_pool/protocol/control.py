"""What may be done to a run from outside, as data: cancel, pause, resume, rewind, answer, and the delivery of events.

Owns the filters and updates of outside acts and of the stored events; ops.py has those of the engine. Each is one
conditional update whose filter holds every precondition, so that none of them ever needs to read, decide and write back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamline_pool.domain.model import RunStatus, StepStatus

from .expressions import (
    INBOX,
    IS_PAUSED,
    NOT_PAUSED,
    STEPS,
    live_run,
    plus_one,
)
from .operations import Command, change_one

__all__ = ["CONTROL_IDS_KEPT", "cancel_run", "pause_run", "rewind_run", "unpause_run"]

Document = dict[str, Any]

CONTROL_IDS_KEPT = 8
"""Ids of the latest acts that a run keeps, so that a caller knows of its own for certain when others have acted after it."""


def cancel_run(workflow_id: str | None, run_id: str, reason: str | None, control_id: str) -> Command:
    """Cancel a run that has not ended, whoever holds it. Yields the cancelled document or None.

    Takes the lease away (token + 1), so the holder's next write misses: a cancel that won has won for good.
    """
    sets = {
        "status": RunStatus.CANCELLED.value,
        "cancelReason": {"$literal": reason},
        "paused": False,
        "pauseReason": "$$REMOVE",
        "endedAt": "$$NOW",
        "lease": "$$REMOVE",
        "wakeAt": "$$REMOVE",
        "pausedWakeAt": "$$REMOVE",
        "awaits": "$$REMOVE",
        "token": plus_one("$token"),
        **_act(control_id),
        "actIds": "$$REMOVE",  # no act follows
    }
    return change_one("cancel_run", live_run(workflow_id, run_id), [{"$set": sets}])


def pause_run(workflow_id: str | None, run_id: str, acts: object, reason: str | None, control_id: str) -> Command:
    """Keep a run from being claimed, as it was found with `acts`. Yields the paused document or None.

    A live lease is left alone: its holder finds the pause at its next write, stores its result and gives the run up.
    """
    query = {**live_run(workflow_id, run_id), "paused": NOT_PAUSED, "acts": {"$eq": acts}}
    sets = {"paused": True, "pauseReason": {"$literal": reason}, "pausedWakeAt": "$wakeAt", "wakeAt": "$$REMOVE", **_act(control_id)}
    return change_one("pause_run", query, [{"$set": sets}])


def unpause_run(workflow_id: str | None, run_id: str, acts: object, control_id: str) -> Command:
    """Let a paused run go on, as it was found with `acts`. Yields the document or None.

    Where a worker holds the run, nothing else changes: its next write simply succeeds.
    """
    query = {**live_run(workflow_id, run_id), "paused": True, "acts": {"$eq": acts}}
    free = {"$ne": [{"$type": "$lease"}, "object"]}
    sets = {
        "paused": False,
        "pauseReason": "$$REMOVE",
        "wakeAt": {"$cond": [free, {"$ifNull": ["$pausedWakeAt", "$$REMOVE"]}, "$$REMOVE"]},
        "pausedWakeAt": "$$REMOVE",
        **_act(control_id),
    }
    return change_one("unpause_run", query, [{"$set": sets}])


def rewind_run(
    workflow_id: str | None, run_id: str, acts: object, place: int, step_ids: Sequence[str], lane: str, slot: int, control_id: str
) -> Command:
    """Bring the step at `place` and all later ones, `step_ids`, back to pending, as the run was found with `acts`.

    Yields the document or None. Takes the lease away. Hooks go with the steps, and so do answers to them. A paused run
    stays paused. `lane` and `slot` are given to a run that has none any more, because it had no room for them.
    """
    query = {
        **live_run(workflow_id, run_id),
        "status": {"$ne": RunStatus.CANCELLED.value},
        "acts": {"$eq": acts},
        f"steps.{place}.stepId": step_ids[0],
    }
    tail = {"$literal": [{"stepId": step_id, "status": StepStatus.PENDING.value, "attempts": 0} for step_id in step_ids]}
    is_kept = {"$not": [{"$in": [{"$ifNull": ["$$item.stepId", None]}, {"$literal": list(step_ids)}]}]}
    sets = {
        "status": RunStatus.RUNNING.value,
        "steps": {"$concatArrays": [{"$slice": [STEPS, place]}, tail]} if place else tail,
        "currentStepId": {"$literal": step_ids[0]},
        "output": None,
        "error": None,
        "endedAt": None,
        "crashes": 0,
        "failures": 0,
        "rewinds": plus_one("$rewinds"),
        "inbox": {"$cond": [{"$isArray": ["$inbox"]}, {"$filter": {"input": INBOX, "as": "item", "cond": is_kept}}, "$$REMOVE"]},
        "awaits": "$$REMOVE",
        "lease": "$$REMOVE",
        "token": plus_one("$token"),
        "wakeAt": {"$cond": [IS_PAUSED, "$$REMOVE", "$$NOW"]},
        "pausedWakeAt": {"$cond": [IS_PAUSED, "$$NOW", "$$REMOVE"]},
        "lane": {"$ifNull": ["$lane", {"$literal": lane}]},
        "slot": {"$ifNull": ["$slot", slot]},
        **_act(control_id),
    }
    return change_one("rewind_run", query, [{"$set": sets}])


def _act(control_id: str) -> Document:
    earlier = {"$cond": [{"$isArray": ["$actIds"]}, "$actIds", []]}
    return {
        "acts": plus_one("$acts"),
        "lastAct": {"$literal": control_id},
        "actIds": {"$slice": [{"$concatArrays": [earlier, [{"$literal": control_id}]]}, -CONTROL_IDS_KEPT]},
        "updatedAt": "$$NOW",
    }
