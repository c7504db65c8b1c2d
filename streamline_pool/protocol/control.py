"""Control operations on a run, as data: cancel, pause, resume, rewind.

Owns their filters and updates. Each is one conditional update whose filter holds every precondition, so that none of them
needs to read, decide and write back. Answers are in answers.py, events in durable_events.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamline_pool.domain.definition import MAIN
from streamline_pool.domain.model import RunStatus, StepStatus

from .expressions import (
    INBOX,
    IS_PAUSED,
    NOT_PAUSED,
    NOT_REWINDABLE_TEXTS,
    STEPS,
    live_run,
    map_steps,
    plus_one,
)
from .operations import Command, Expression, Query, change_one

__all__ = ["CONTROL_IDS_KEPT", "cancel_run", "control_count", "pause_run", "retry_run", "rewind_run", "unpause_run"]

_COUNTS_MAX = 2**53  # beyond it a double does not grow by 1
_COUNTS = [{"$in": [{"$type": "$acts"}, ["int", "long", "double"]]}, {"$gte": ["$acts", 0]}, {"$lt": ["$acts", _COUNTS_MAX]}]
_COUNT: Expression = {"$cond": [{"$and": _COUNTS}, "$acts", 0]}
"""The count of control operations, as `control_count` reads it: what is no such number, and what cannot grow, counts as 0."""

CONTROL_IDS_KEPT = 8
"""Ids of the latest control operations that a run keeps. A caller whose reply was lost finds its own id there, also after others."""


def control_count(document: Mapping[str, Any]) -> float:
    """The count of control operations of a stored run. 0 if another program has stored what is no number there."""
    count = document.get("acts")
    return count if isinstance(count, int | float) and not isinstance(count, bool) and 0 <= count < _COUNTS_MAX else 0


def cancel_run(workflow_id: str | None, run_id: str, acts: float, reason: str | None, control_id: str) -> Command:
    """Cancel a run that has not ended, also while it is leased. Yields the cancelled document or None.

    `acts` as in `pause_run`: a late copy of a cancel that met an ended run must not cancel it after a rewind. Removes the
    lease (token + 1), so the next write of the lease holder misses: a cancel is final.
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
        **_control_fields(control_id),
        # As it was: callers whose replies were lost ask for their ids, and a full run has no room for one more.
        "actIds": {"$ifNull": ["$actIds", "$$REMOVE"]},
    }
    return change_one("cancel_run", {**live_run(workflow_id, run_id), **_unchanged_since(acts)}, [{"$set": sets}])


def pause_run(workflow_id: str | None, run_id: str, acts: float, reason: str | None, control_id: str) -> Command:
    """Keep a run from being claimed. Yields the paused document or None.

    `acts` is the count of control operations with which the caller read the run; the update misses after another one.
    A live lease stays: its holder finds the pause at its next write, stores the result and releases the run.
    """
    query = {**live_run(workflow_id, run_id), "paused": NOT_PAUSED, **_unchanged_since(acts)}
    sets = {
        "paused": True,
        "pauseReason": {"$literal": reason},
        "pausedWakeAt": "$wakeAt",
        "wakeAt": "$$REMOVE",
        **_control_fields(control_id),
    }
    return change_one("pause_run", query, [{"$set": sets}])


def unpause_run(workflow_id: str | None, run_id: str, acts: float, control_id: str) -> Command:
    """Let a paused run continue. Yields the document or None. `acts`: as in `pause_run`.

    If a worker holds the run, nothing else changes: its next write succeeds.
    """
    query = {**live_run(workflow_id, run_id), "paused": True, **_unchanged_since(acts)}
    free = {"$ne": [{"$type": "$lease"}, "object"]}
    sets = {
        "paused": False,
        "pauseReason": "$$REMOVE",
        "wakeAt": {"$cond": [free, {"$ifNull": ["$pausedWakeAt", "$$REMOVE"]}, "$$REMOVE"]},
        "pausedWakeAt": "$$REMOVE",
        **_control_fields(control_id),
    }
    return change_one("unpause_run", query, [{"$set": sets}])


def rewind_run(
    workflow_id: str | None,
    run_id: str,
    acts: float,
    place: int,
    step_ids: Sequence[str],
    lane: str,
    slot: int,
    control_id: str,
    *,
    is_durable: bool = False,
    rewinds: int = 0,
) -> Command:
    """Set the step at `place` and all later ones, `step_ids`, back to pending. Yields the document or None.

    In the run of a durable function these are calls: they are removed, and the function is called again. `rewinds` is what the caller has
    read: in another generation the same name is another call.

    `acts`: as in `pause_run`. Removes the lease, the hooks of these steps, and the answers to them. A paused run stays
    paused. `lane` and `slot` are for a run that has lost its own, because its document had no room for them.
    """
    query = {
        **live_run(workflow_id, run_id),
        "status": {"$nin": NOT_REWINDABLE_TEXTS},  # a status that another program made up passes: rewind repairs such a run
        **_unchanged_since(acts),
        f"steps.{place}.stepId": step_ids[0],
    }
    if is_durable:
        query["rewinds"] = rewinds if rewinds else {"$in": [0, None]}
    tail = {"$literal": [_fresh(step_id) for step_id in step_ids]}
    steps: Expression = {"$concatArrays": [{"$slice": [STEPS, place]}, tail]} if place else tail
    current = step_ids[0]
    if is_durable:
        # A call that waits is made again, too: calls are in the order of their first start, and this one may be in front of the target.
        waits = {"$eq": ["$$step.status", StepStatus.WAITING.value]}
        before = {"$filter": {"input": {"$slice": [STEPS, 1, place - 1]}, "as": "step", "cond": {"$not": [waits]}}}
        steps = {"$concatArrays": [_FRESH_MAIN, before]} if place > 1 else _FRESH_MAIN
        current = MAIN
    sets = _begin_again(steps, current, step_ids, lane, slot, control_id)
    return change_one("rewind_run", query, [{"$set": {**sets, "rewinds": plus_one("$rewinds")}}])


def retry_run(
    workflow_id: str | None, run_id: str, acts: float, step_id: str, lane: str, slot: int, control_id: str, *, is_durable: bool
) -> Command:
    """Let a failed run go on at the step, or the call, `step_id` with fresh attempts. Yields the document or None.

    The other parameters are those of `rewind_run`. The step keeps its checkpoint and its idempotency key.
    """
    query = {**live_run(workflow_id, run_id), "status": RunStatus.FAILED.value, **_unchanged_since(acts), "steps.stepId": step_id}
    is_it = {"$eq": ["$$step.stepId", {"$literal": step_id}]}
    kept = {"checkpoint": "$$step.checkpoint", "decided": "$$step.decided"}
    steps: Expression = map_steps({"$cond": [is_it, {"$mergeObjects": [{"$literal": _fresh(step_id)}, kept]}, "$$step"]})
    if is_durable:
        calls = {"$filter": {"input": {"$slice": [STEPS, 1, _ALL]}, "as": "step", "cond": {"$not": [is_it]}}}
        steps = {"$concatArrays": [_FRESH_MAIN, calls]}
    current = MAIN if is_durable else step_id
    return change_one("retry_run", query, [{"$set": _begin_again(steps, current, [step_id], lane, slot, control_id)}])


_ALL = 1_000_000
"""More than a run has steps."""


def _fresh(step_id: str) -> dict[str, Any]:
    return {"stepId": step_id, "status": StepStatus.PENDING.value, "attempts": 0}


_FRESH_MAIN: Expression = {"$literal": [{**_fresh(MAIN), "kind": MAIN}]}


def _begin_again(steps: Expression, current: str, step_ids: Sequence[str], lane: str, slot: int, control_id: str) -> Expression:
    """The fields of a run that goes on at `current`. Answers to the hooks of `step_ids` are dropped."""
    is_kept = {"$not": [{"$in": [{"$ifNull": ["$$item.stepId", None]}, {"$literal": list(step_ids)}]}]}
    return {
        "status": RunStatus.RUNNING.value,
        "steps": steps,
        "currentStepId": {"$literal": current},
        "output": None,
        "error": None,
        "endedAt": None,
        "crashes": 0,
        "failures": 0,
        "inbox": {"$cond": [{"$isArray": ["$inbox"]}, {"$filter": {"input": INBOX, "as": "item", "cond": is_kept}}, "$$REMOVE"]},
        "awaits": "$$REMOVE",
        "lease": "$$REMOVE",
        "token": plus_one("$token"),
        "wakeAt": {"$cond": [IS_PAUSED, "$$REMOVE", "$$NOW"]},
        "pausedWakeAt": {"$cond": [IS_PAUSED, "$$NOW", "$$REMOVE"]},
        "lane": {"$ifNull": ["$lane", {"$literal": lane}]},
        "slot": {"$ifNull": ["$slot", slot]},
        **_control_fields(control_id),
    }


def _unchanged_since(acts: float) -> Query:
    """Matches a run without another control operation since its count of them was read.

    An equality with the stored value would refuse every operation on a run whose count was damaged: PyMongo cannot write all that it reads.
    """
    return {"$expr": {"$eq": [_COUNT, acts]}}


def _control_fields(control_id: str) -> Expression:
    """The fields that every control operation changes: its number, its id and the time."""
    earlier = {"$cond": [{"$isArray": ["$actIds"]}, "$actIds", []]}
    return {
        "acts": {"$add": [_COUNT, 1]},
        "lastAct": {"$literal": control_id},
        "actIds": {"$slice": [{"$concatArrays": [earlier, [{"$literal": control_id}]]}, -CONTROL_IDS_KEPT]},
        "updatedAt": "$$NOW",
    }
