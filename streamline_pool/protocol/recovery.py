"""The recovery of runs from lost workers, and the failure of runs with a damaged document, as data.

Owns the filters and updates. Owns no decision which worker is lost: the pool and the lease's expiry decide that.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from streamline_pool.domain.errors import ErrorCode
from streamline_pool.domain.model import RunStatus, StepStatus

from .expressions import IS_CURRENT, IS_PAUSED, TERMINAL_TEXTS, map_steps, plus_one, text_of
from .minimal_failure import failure_update
from .operations import Command, Expression, Query, update_matching

__all__ = [
    "mark_corrupt",
    "recover_expired",
    "release_owner",
]


def release_owner(owner: str, max_crashes: int, evidence: Mapping[str, Any], since: datetime | None = None) -> Command:
    """Remove the leases of one dead worker process. Yields how many. For `since` see `recover_expired`.

    Each run is claimable at once, and its current step counts one more lost worker. At `max_crashes` lost workers a run that
    its last worker ran alone fails with WORKER_CRASHED and the evidence, such as `{"signal": "SIGKILL"}`. Beside others it may be
    innocent: it stays a suspect, and runs alone next time (engine/solitude.py). Idempotent, like `recover_expired`.
    """
    query = {"lease.expiresAt": _lease_from(since), "lease.owner": owner}
    return _recover("release_owner", query, max_crashes, _describe_death(evidence))


def recover_expired(max_crashes: int, since: datetime | None = None) -> Command:
    """Remove every lease that has expired by the server's clock. Yields how many. Any number of hosts may do this.

    `since` leaves out leases that expired before it. An earlier sweep has seen those, and the index still holds an entry
    for every lease of the last five minutes, which a scan from the start would step over (worker/poller.py says why).
    """
    query = {"lease.expiresAt": _lease_from(since), "$expr": {"$lte": ["$lease.expiresAt", "$$NOW"]}}
    return _recover("recover_expired", query, max_crashes, "it stopped renewing its lease")


def _lease_from(since: datetime | None) -> Query:
    return {"$exists": True} if since is None else {"$exists": True, "$gte": since}


def _describe_death(evidence: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in evidence.items() if value) or "it died"


def _recover(name: str, query: Query, max_crashes: int, evidence: str) -> Command:
    crashes = plus_one("$crashes")
    is_convicted: Expression = {"$gte": [crashes, max_crashes]}  # the step, of the loss of its workers
    if max_crashes > 1:  # else the first lost worker convicts, without a suspicion before
        is_convicted = {"$and": [is_convicted, {"$eq": ["$lease.alone", True]}]}
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
        "$cond": [{"$and": [IS_CURRENT, is_convicted]}, failed, {"$cond": [{"$and": [IS_CURRENT, was_running]}, pending, "$$step"]}],
    }
    # Due since its creation, so that it is claimed before younger runs and does not wait behind a whole backlog again.
    due_at = {"$cond": [{"$eq": [{"$type": "$createdAt"}, "date"]}, {"$min": ["$createdAt", "$$NOW"]}, "$$NOW"]}
    fields = {
        "lease": "$$REMOVE",
        "token": plus_one("$token"),
        "updatedAt": "$$NOW",
        "crashes": crashes,
        "steps": map_steps(step),
        "wakeAt": {"$cond": [{"$or": [is_convicted, IS_PAUSED]}, "$$REMOVE", due_at]},
        "pausedWakeAt": {"$cond": [{"$and": [IS_PAUSED, {"$not": [is_convicted]}]}, due_at, "$$REMOVE"]},
        "awaits": {"$cond": [is_convicted, "$$REMOVE", "$awaits"]},
        "status": {"$cond": [is_convicted, RunStatus.FAILED.value, "$status"]},
        "error": {"$cond": [is_convicted, {**error, "stepId": "$currentStepId", "traceback": ""}, "$error"]},
        "endedAt": {"$cond": [is_convicted, "$$NOW", "$endedAt"]},
    }
    return update_matching(name, query, [{"$set": fields}])


def mark_corrupt(run_id: str, reason: str, now: datetime) -> Command:
    """Fail a run whose document does not have the shape that this package writes. Yields how many matched (0 or 1).

    It relies on no field but `_id`. A run that has ended stays as it is.
    """
    error = {
        "code": ErrorCode.DATA_CORRUPTION.value,
        "message": f"the stored document was changed by another program: {reason}; mend it and rewind, or delete it",
        "type": "DataCorruptionError",
        "stepId": None,
        "traceback": "",
    }
    query = {"_id": run_id, "status": {"$nin": TERMINAL_TEXTS}}
    return update_matching("mark_corrupt", query, failure_update(error, now))
