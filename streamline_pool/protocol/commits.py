"""The writes of a lease holder, as data: transitions, checkpoints, renewals, and the reads that resolve an unknown outcome.

Owns the fence: every filter here names the claim (`lease.id`), and every write except the renewal also names `rev`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from streamline_pool.domain.change import Change
from streamline_pool.domain.errors import ErrorCode

from .expressions import NOT_PAUSED, server_time_in
from .minimal_failure import minimal_failure
from .operations import Command, Fence, Find, Statement, update_matching

__all__ = [
    "commit",
    "commit_under_pause",
    "fail_minimal",
    "mark_alone",
    "read_fences",
    "read_held",
    "read_run",
    "record_under_pause",
    "renew",
    "save_in_step",
    "write_statements",
]

Document = dict[str, Any]


def commit(fence: Fence, change: Change, now: datetime, size: int) -> Statement:
    """Store one transition of a run that is not paused."""
    return Statement(fence, {"q": _fenced(fence, change, paused=False), "u": _commit_update(fence, change, now, "wakeAt")}, size)


def commit_under_pause(fence: Fence, change: Change, now: datetime, size: int) -> Statement:
    """Store the form that `transitions.under_pause` gave a transition, on a run that is paused."""
    return Statement(fence, {"q": _fenced(fence, change, paused=True), "u": _commit_update(fence, change, now, "pausedWakeAt")}, size)


def record_under_pause(fence: Fence, change: Change, now: datetime, size: int) -> Statement:
    """Store calls of a durable function that had begun before the pause. The lease stays."""
    query = {"_id": fence.run_id, "lease.id": fence.lease_id, "rev": fence.rev}
    return Statement(fence, {"q": query, "u": _commit_update(fence, change, now, "pausedWakeAt")}, size)


def _fenced(fence: Fence, change: Change, *, paused: bool) -> Document:
    query: Document = {"_id": fence.run_id, "lease.id": fence.lease_id, "rev": fence.rev, "paused": True if paused else NOT_PAUSED}
    if change.not_before is not None:
        query["$expr"] = {"$lte": [change.not_before, "$$NOW"]}
    if change.unless_arrived is not None:
        query["inbox"] = {"$not": {"$elemMatch": change.unless_arrived}}
    return query


def _commit_update(fence: Fence, change: Change, now: datetime, wake_field: str) -> Document:
    sets: Document = {"rev": fence.rev + 1, "updatedAt": now, **change.fields}
    for place, step in change.steps.items():
        sets[f"steps.{place}"] = step
    update: Document = {"$set": sets}
    unset = dict.fromkeys(change.unset, "")
    if change.releases:
        unset["lease"] = ""
        if change.wake_at is not None:
            sets[wake_field] = change.wake_at
    if unset:
        update["$unset"] = unset
    if change.takes:
        update["$pull"] = {"inbox": {"$or": list(change.takes)} if len(change.takes) > 1 else change.takes[0]}
    if change.seen is not None:
        update["$push"] = {"seen": change.seen}
    return update


def save_in_step(fence: Fence, place: int, field: str, value: Any, now: datetime, size: int) -> Statement:
    """Store one field of the current step, its checkpoint or its hooks; the lease stays, also under a pause."""
    query = {"_id": fence.run_id, "lease.id": fence.lease_id, "rev": fence.rev}
    sets = {"rev": fence.rev + 1, "updatedAt": now, f"steps.{place}.{field}": value}
    return Statement(fence, {"q": query, "u": {"$set": sets}}, size)


def mark_alone(fence: Fence, now: datetime, size: int) -> Statement:
    """Store in the lease that its holder runs this run and no other; protocol/recovery.py reads it. The lease stays, also under a pause."""
    query = {"_id": fence.run_id, "lease.id": fence.lease_id, "rev": fence.rev}
    return Statement(fence, {"q": query, "u": {"$set": {"rev": fence.rev + 1, "updatedAt": now, "lease.alone": True}}}, size)


def fail_minimal(fence: Fence, place: int, code: ErrorCode, message: str, now: datetime) -> Statement:
    """End a run whose document has no room even for its own failure: the reason in few bytes, the checkpoint dropped."""
    update = minimal_failure(code, message, now, also_unset=(f"steps.{place}.checkpoint",), whole_error=True)
    update["$set"]["rev"] = fence.rev + 1
    query = {"_id": fence.run_id, "lease.id": fence.lease_id, "rev": fence.rev}
    return Statement(fence, {"q": query, "u": update}, len(message) + 600)


def write_statements(statements: Sequence[Statement]) -> Command:
    """Send fenced writes of many runs in one command. Yields the reply: `n` matched, and `writeErrors` by index."""
    return Command(
        name="commit_runs",
        collection="runs",
        verb="update",
        body={"updates": [statement.update for statement in statements], "ordered": False},
        parse=lambda reply: reply,
    )


def read_fences(run_ids: Sequence[str]) -> Find:
    """What shows the outcome of fenced writes that did not all match: lease, rev, pause and inbox of each run."""
    projection = {"lease.id": 1, "rev": 1, "token": 1, "paused": 1, "status": 1, "inbox.name": 1, "inbox.stepId": 1, "inbox.gen": 1}
    return Find(name="read_fences", collection="runs", filter={"_id": {"$in": list(run_ids)}}, projection=projection)


def read_run(run_id: str) -> Find:
    """The whole document of a run."""
    return Find(name="read_run", collection="runs", filter={"_id": run_id}, limit=1)


def read_held(run_id: str, lease_id: str) -> Find:
    """The whole document of a run, if this claim still holds it."""
    return Find(name="read_held", collection="runs", filter={"_id": run_id, "lease.id": lease_id}, limit=1)


def renew(run_ids: Sequence[str], lease_ids: Sequence[str], lease_s: float) -> Command:
    """Extend the leases of these runs, each named, never "all of this worker". Yields how many matched."""
    query = {"_id": {"$in": list(run_ids)}, "lease.id": {"$in": list(lease_ids)}}
    update = [{"$set": {"lease.expiresAt": server_time_in(lease_s)}}]
    return update_matching("renew", query, update)
