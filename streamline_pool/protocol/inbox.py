"""The update that hands an answer or an event to a run: it ends the wait for it, or keeps the item in the inbox.

Owns the limits of the inbox."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamline_pool.domain.model import RunStatus, StepStatus

from .expressions import INBOX, IS_CURRENT, IS_PAUSED, map_steps, plus_one

__all__ = [
    "INBOX_BYTES_MAX",
    "INBOX_MAX",
    "deliver_item",
    "has_room",
]

Document = dict[str, Any]

_DONE = StepStatus.DONE.value

INBOX_MAX = 100
"""Items that arrived before they were waited for; a guess, far above what a workflow in order ever has."""

INBOX_BYTES_MAX = 2 * 1024 * 1024
"""Bytes of them; derived: a run that is otherwise full to its limit still has so much room in its document."""


def has_room(size: int) -> Document:
    room = {"$lte": [{"$add": [{"$bsonSize": {"inbox": INBOX}}, size]}, INBOX_BYTES_MAX]}
    return {"$and": [{"$lt": [{"$size": INBOX}, INBOX_MAX]}, room]}


def deliver_item(hit: Document | bool, item: Mapping[str, Any], *, is_event: bool = False) -> list[Document]:
    """Where `hit`, the current step's wait ends with the item's data; otherwise the item goes to the inbox.

    What is a result resets the counts of failures and lost workers, as in transitions.py. The next step is granted by
    whoever claims the run, and a run whose last step this was is finished by it.
    """

    def on_hit(value: Any, otherwise: Any) -> Document:
        return {"$cond": ["$_hit", value, otherwise]}

    duration = {"$cond": [{"$eq": [{"$type": "$$step.startedAt"}, "date"]}, {"$subtract": ["$$NOW", "$$step.startedAt"]}, 0]}
    done = {
        "stepId": "$$step.stepId",
        "status": _DONE,
        "attempts": "$$step.attempts",
        "startedAt": "$$step.startedAt",
        "endedAt": "$$NOW",
        "durationMs": {"$max": [0, duration]},
        "output": "$_item.data",
        "answer": "$_item.id",
    }
    place = {"$indexOfArray": ["$$ids", "$currentStepId"]}
    following = {"$let": {"vars": {"ids": "$steps.stepId"}, "in": {"$arrayElemAt": ["$$ids", {"$add": [place, 1]}]}}}
    sets: Document = {
        "steps": map_steps({"$cond": [{"$and": ["$_hit", IS_CURRENT]}, done, "$$step"]}),
        "currentStepId": on_hit({"$ifNull": [following, None]}, "$currentStepId"),
        "status": on_hit(RunStatus.RUNNING.value, "$status"),
        "crashes": on_hit(0, "$crashes"),
        "failures": on_hit(0, "$failures"),
        "lease": on_hit("$$REMOVE", "$lease"),
        "token": on_hit(plus_one("$token"), "$token"),
        "awaits": on_hit("$$REMOVE", "$awaits"),
        "wakeAt": on_hit({"$cond": [IS_PAUSED, "$$REMOVE", "$$NOW"]}, "$wakeAt"),
        "pausedWakeAt": on_hit({"$cond": [IS_PAUSED, "$$NOW", "$$REMOVE"]}, "$pausedWakeAt"),
        "updatedAt": "$$NOW",
    }
    if hit is not True:
        sets["inbox"] = on_hit("$inbox", {"$concatArrays": [INBOX, [{"$mergeObjects": ["$_item", {"at": "$$NOW"}]}]]})
    if is_event:
        sets["seen"] = {"$concatArrays": [{"$cond": [{"$isArray": ["$seen"]}, "$seen", []]}, ["$_item.id"]]}
    # The item is sent once, however often it is referred to: an answer may be large, and a command ends at 16 MiB. As a
    # literal, since it is a user's: an expression or a path in it is data.
    return [{"$set": {"_hit": hit, "_item": {"$literal": dict(item)}}}, {"$set": sets}, {"$unset": ["_hit", "_item"]}]
