"""The update that delivers an answer or an event to a run: it ends the wait for it, or keeps the item in the inbox.

Owns the limits of the inbox.
"""

from __future__ import annotations

from typing import Any

from streamline_pool.domain.document import InboxItem
from streamline_pool.domain.model import RunStatus, StepStatus

from .expressions import INBOX, IS_CURRENT, IS_DURABLE, IS_PAUSED, map_steps, plus_one
from .operations import Expression

__all__ = [
    "INBOX_BYTES_MAX",
    "INBOX_MAX",
    "deliver_item",
    "has_room",
]

INBOX_MAX = 100
"""Items that arrived before the run waited for them. A guess, far above what a sound workflow ever has."""

INBOX_BYTES_MAX = 2 * 1024 * 1024
"""Bytes of these items. Derived: a run that is otherwise full to its limit still has so much room in its document."""


def has_room(size: int) -> Expression:
    """True if the inbox can take one more item with so many bytes of data."""
    room = {"$lte": [{"$add": [{"$bsonSize": {"inbox": INBOX}}, size]}, INBOX_BYTES_MAX]}
    return {"$and": [{"$lt": [{"$size": INBOX}, INBOX_MAX]}, room]}


def deliver_item(hit: Expression | bool, item: InboxItem, *, is_event: bool = False) -> list[Expression]:
    """Where `hit` is true, the current step's wait ends with the item's data. Otherwise the item goes to the inbox.

    The end of a wait is a result, so it resets the counts of failures and lost workers, as in domain/transitions.py. The
    next claim grants the following step. If this step was the last one, the worker that claims the run finishes it.
    """
    sets: Expression = {
        "steps": map_steps({"$cond": [{"$and": ["$_hit", IS_CURRENT]}, _DONE_STEP, "$$step"]}),
        "currentStepId": _on_hit({"$ifNull": [_FOLLOWING_STEP, None]}, "$currentStepId"),
        "status": _on_hit(RunStatus.RUNNING.value, "$status"),
        "crashes": _on_hit(0, "$crashes"),
        "failures": _on_hit(0, "$failures"),
        "lease": _on_hit("$$REMOVE", "$lease"),
        "token": _on_hit(plus_one("$token"), "$token"),
        "awaits": _on_hit("$$REMOVE", "$awaits"),
        "wakeAt": _on_hit({"$cond": [IS_PAUSED, "$$REMOVE", "$$NOW"]}, "$wakeAt"),
        "pausedWakeAt": _on_hit({"$cond": [IS_PAUSED, "$$NOW", "$$REMOVE"]}, "$pausedWakeAt"),
        "updatedAt": "$$NOW",
    }
    sets["inbox"] = _on_hit(_WITHOUT_ANSWERS, {"$concatArrays": [INBOX, [{"$mergeObjects": ["$_item", {"at": "$$NOW"}]}]]})
    if is_event:
        sets["seen"] = {"$concatArrays": [{"$cond": [{"$isArray": ["$seen"]}, "$seen", []]}, ["$_item.id"]]}
    # The command holds the item once, however often it is referred to: an answer may be large, and a command ends at
    # 16 MiB. It is a literal, because it is a user's: an expression or a path in it is data.
    return [{"$set": {"_hit": hit, "_item": {"$literal": dict(item)}}}, {"$set": sets}, {"$unset": ["_hit", "_item"]}]


def _on_hit(value: Any, otherwise: Any) -> Expression:
    return {"$cond": ["$_hit", value, otherwise]}


_IS_ANSWER = {"$eq": [{"$ifNull": ["$$item.stepId", None]}, "$currentStepId"]}
_FILTERED = {"$filter": {"input": INBOX, "as": "item", "cond": {"$not": [_IS_ANSWER]}}}
_WITHOUT_ANSWERS: Expression = {"$cond": [{"$isArray": ["$inbox"]}, _FILTERED, "$inbox"]}
"""The inbox without answers to hooks of the step that ends: no wait can take them any more."""

_DURATION = {"$cond": [{"$eq": [{"$type": "$$step.startedAt"}, "date"]}, {"$subtract": ["$$NOW", "$$step.startedAt"]}, 0]}
_DONE_STEP: Expression = {
    "stepId": "$$step.stepId",
    "kind": "$$step.kind",  # stays missing in a declared step
    "status": StepStatus.DONE.value,
    "attempts": "$$step.attempts",
    "startedAt": "$$step.startedAt",
    "endedAt": "$$NOW",
    "durationMs": {"$max": [0, _DURATION]},
    "output": "$_item.data",
    "answer": "$_item.id",
}

_PLACE = {"$indexOfArray": ["$$ids", "$currentStepId"]}
_FOLLOWING_PLACE = {"$cond": [IS_DURABLE, 0, {"$add": [_PLACE, 1]}]}
_FOLLOWING_STEP: Expression = {
    "$let": {"vars": {"ids": "$steps.stepId"}, "in": {"$arrayElemAt": ["$$ids", _FOLLOWING_PLACE]}},
}
"""Id of the step after the current one; missing after the last. A durable function goes on after each of its calls."""
