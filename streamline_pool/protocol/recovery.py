"""Taking leases back from lost workers, and failing runs whose document is damaged, as data."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from streamline_pool.domain.errors import ErrorCode
from streamline_pool.domain.model import RunStatus, StepStatus

from .expressions import IS_CURRENT, TERMINAL_TEXTS, map_steps, plus_one, text_of
from .operations import Command, update_matching

__all__ = [
    "mark_corrupt",
    "recover_expired",
    "release_owner",
]

Document = dict[str, Any]


def release_owner(owner: str, max_crashes: int, evidence: Mapping[str, Any], since: datetime | None = None) -> Command:
    """Take back the leases of one dead incarnation of a worker. Yields how many. For `since` see `recover_expired`.

    Each run is claimable at once and its current step has one more lost worker on record; at `max_crashes` the run
    fails with WORKER_CRASHED and the evidence. Idempotent, like `recover_expired`.
    """
    query = {"lease.expiresAt": _lease_from(since), "lease.owner": owner}
    return _recover("release_owner", query, max_crashes, _describe_death(evidence))


def recover_expired(max_crashes: int, since: datetime | None = None) -> Command:
    """Take back every lease that has run out by the server's clock. Yields how many. Any number of hosts may sweep.

    `since` leaves out leases that ended before it: an earlier sweep has seen those, and the index still holds an entry
    for every lease of the last five minutes, which a scan from the start steps over (lookout.py says why).
    """
    query = {"lease.expiresAt": _lease_from(since), "$expr": {"$lte": ["$lease.expiresAt", "$$NOW"]}}
    return _recover("recover_expired", query, max_crashes, "it stopped renewing its lease")


def _lease_from(since: datetime | None) -> Document:
    return {"$exists": True} if since is None else {"$exists": True, "$gte": since}


def _describe_death(evidence: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in evidence.items() if value) or "it died"


def _recover(name: str, query: Document, max_crashes: int, evidence: str) -> Command:
    crashes = plus_one("$crashes")
    convicted = {"$gte": [crashes, max_crashes]}
    message = {
        "$concat": [
            {"$toString": crashes},
            " workers were lost while they ran step ",
            text_of("$currentStepId"),
            "; the last one, ",
            text_of("$lease.owner"),
            ": ",
            {"$literal": evidence},
        ]
    }
    error = {"code": ErrorCode.WORKER_CRASHED.value, "message": message, "type": "WorkerCrashed"}
    was_running = {"$eq": ["$$step.status", StepStatus.RUNNING.value]}
    failed = {"$mergeObjects": ["$$step", {"status": StepStatus.FAILED.value, "error": error, "endedAt": "$$NOW"}]}
    pending = {"$mergeObjects": ["$$step", {"status": StepStatus.PENDING.value}]}
    step = {
        "$cond": [{"$and": [IS_CURRENT, convicted]}, failed, {"$cond": [{"$and": [IS_CURRENT, was_running]}, pending, "$$step"]}],
    }
    paused = {"$eq": ["$paused", True]}
    # Due since it was created, so that it goes before younger runs and does not wait behind a whole backlog once more.
    due_at = {"$cond": [{"$eq": [{"$type": "$createdAt"}, "date"]}, {"$min": ["$createdAt", "$$NOW"]}, "$$NOW"]}
    alive = {
        "lease": "$$REMOVE",
        "token": plus_one("$token"),
        "updatedAt": "$$NOW",
        "crashes": crashes,
        "steps": map_steps(step),
        "wakeAt": {"$cond": [{"$or": [convicted, paused]}, "$$REMOVE", due_at]},
        "pausedWakeAt": {"$cond": [{"$and": [paused, {"$not": [convicted]}]}, due_at, "$$REMOVE"]},
        "awaits": {"$cond": [convicted, "$$REMOVE", "$awaits"]},
        "status": {"$cond": [convicted, RunStatus.FAILED.value, "$status"]},
        "error": {"$cond": [convicted, {**error, "stepId": "$currentStepId", "traceback": ""}, "$error"]},
        "endedAt": {"$cond": [convicted, "$$NOW", "$endedAt"]},
    }
    return update_matching(name, query, [{"$set": alive}])


def mark_corrupt(run_id: str, reason: str, now: datetime) -> Command:
    """Fail a run whose document does not have the shape this package writes. Yields how many matched (0 or 1).

    The one update that cannot rely on any field but `_id`; a terminal run is left as it is.
    """
    error = {
        "code": ErrorCode.DATA_CORRUPTION.value,
        "message": f"the stored document was changed by another program: {reason}; mend it and rewind, or delete it",
        "type": "DataCorruptionError",
        "stepId": None,
        "traceback": "",
    }
    update = {
        "$set": {"status": RunStatus.FAILED.value, "error": error, "endedAt": now, "updatedAt": now},
        "$unset": {"lease": "", "wakeAt": "", "pausedWakeAt": "", "awaits": ""},
    }
    query = {"_id": run_id, "status": {"$nin": TERMINAL_TEXTS}}
    return update_matching("mark_corrupt", query, update)
