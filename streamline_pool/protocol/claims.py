"""The search for due runs and their claim, as data. Owns the filter that every claim shares.

Owns no decision which runs to claim: worker/ makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from streamline_pool.domain.definition import queue_of
from streamline_pool.domain.model import RunStatus, StepStatus

from .expressions import (
    ENTERABLE_STEP_TEXTS,
    IS_CURRENT,
    NON_TERMINAL_TEXTS,
    NOT_PAUSED,
    TERMINAL_TEXTS,
    map_steps,
    plus_one,
    server_time_in,
    some_step,
)
from .operations import Command, Expression, Find, Query, changed_document, update_matching

__all__ = [
    "SlotShare",
    "claim_run",
    "claim_runs",
    "find_due",
    "find_due_before",
    "read_claimed",
    "taken_runs",
]

_NOT_ENDED: Query = {"$nin": TERMINAL_TEXTS}  # a `wakeAt` that another program wrote must not revive an ended run
# In an expression a missing field is less than any date, so the first half keeps leased and ended runs out.
_DUE: Query = {"wakeAt": {"$type": "date"}, "$expr": {"$lte": ["$wakeAt", "$$NOW"]}}
_BY_QUEUE = "streamline_claimable"


class SlotShare(NamedTuple):
    """The slots from which one worker claims first: those that leave `remainder` when divided by `divisor`."""

    divisor: int
    remainder: int


def taken_runs(run_ids: Sequence[str]) -> Find:
    """Which of these runs exist and cannot be claimed: they are leased, or paused, or wait for an answer, or have ended."""
    query = {"_id": {"$in": list(run_ids)}, "wakeAt": {"$exists": False}}
    return Find(name="taken_runs", collection="runs", filter=query, projection={"_id": 1})


def find_due(
    lanes: Sequence[str],
    slots: SlotShare | None,
    due_at: datetime,
    limit: int,
    crashes_below: int | None,
    skipped: Sequence[str] = (),
    *,
    since: datetime | None = None,
    priorities: Sequence[int] = (),
) -> Find:
    """Runs that seem claimable, highest priority first, then longest due: id, crashes, priority and `wakeAt` of each.

    Index streamline_claimable: one scan for each queue of the lanes, merged. The scan steps over other slots and lanes.

    - `slots`: None means all of them.
    - `due_at`: the latest `wakeAt`.
    - `crashes_below`: leaves out runs that have lost as many workers, for a worker whose turn is for the others.
    - `skipped`: ids of runs that cannot be claimed.
    - `since`: the scans start at this `wakeAt`, in each priority, instead of at the beginning (worker/poller.py says why).
    - `priorities`: only runs of these priorities; empty means all.
    """
    query = _in_lanes(lanes)
    query |= {"wakeAt": {"$lte": due_at}, "status": _NOT_ENDED, "paused": NOT_PAUSED}  # what no claim matches must not fill a poll
    if slots is not None:
        query["slot"] = {"$mod": list(slots)}  # `$in` would make the scan seek from slot to slot; this one steps
    if since is not None:
        query["wakeAt"]["$gte"] = since
    if priorities:
        query["priority"] = {"$in": list(priorities)}
    if crashes_below is not None:
        query["crashes"] = {"$lt": crashes_below}
    if skipped:
        query["_id"] = {"$nin": list(skipped)}
    return Find(
        name="find_due",
        collection="runs",
        filter=query,
        projection={"_id": 1, "crashes": 1, "priority": 1, "wakeAt": 1},
        sort=(("priority", -1), ("wakeAt", 1)),
        limit=limit,
        hint=_BY_QUEUE,
    )


def _in_lanes(lanes: Sequence[str]) -> Query:
    return {"queue": {"$in": _queues_of(tuple(lanes))}, "lane": {"$in": list(lanes)}}


@lru_cache(maxsize=16)  # a pool always asks for the same lanes, and there may be a thousand of them
def _queues_of(lanes: tuple[str, ...]) -> list[str]:
    return sorted({queue_of(lane) for lane in lanes})


def claim_runs(
    run_ids: Sequence[str], lanes: Sequence[str] | None, lease_id: str, owner: str, lease_s: float, crashes_below: int | None = None
) -> Command:
    """Take the lease of those runs that are still due and not paused. Yields how many.

    The claim counts the attempt, so that a crash before the first write still costs one (River counts it in the
    same place). Times are the server's. `lanes` None: any. `crashes_below`: as in `find_due`.
    """
    query = _claimable({"$in": list(run_ids)}, lanes, crashes_below)
    return update_matching("claim_runs", query, _claim_update(lease_id, owner, lease_s))


def claim_run(
    run_id: str, lanes: Sequence[str] | None, lease_id: str, owner: str, lease_s: float, crashes_below: int | None = None
) -> Command:
    """Claim one named run in one round trip. Yields the claimed document or None.

    The document is the one that the majority-acknowledged write made, so it is as good as a majority read.
    """
    body = {"query": _claimable(run_id, lanes, crashes_below), "update": _claim_update(lease_id, owner, lease_s), "new": True}
    return Command(name="claim_run", collection="runs", verb="findAndModify", body=body, parse=changed_document)


def _claimable(run_id: Any, lanes: Sequence[str] | None, crashes_below: int | None) -> Query:
    query: Query = {"_id": run_id, "status": _NOT_ENDED, "paused": NOT_PAUSED, **_DUE}
    if lanes is not None:
        query["lane"] = {"$in": list(lanes)}
    if crashes_below is not None:
        query["crashes"] = {"$lt": crashes_below}
    return query


def _claim_update(lease_id: str, owner: str, lease_s: float) -> list[Expression]:
    enterable = {"$in": ["$$step.status", ENTERABLE_STEP_TEXTS]}
    entry = {"status": StepStatus.RUNNING.value, "attempts": plus_one("$$step.attempts"), "startedAt": "$$NOW"}
    step = {"$cond": [{"$and": [IS_CURRENT, enterable]}, {"$mergeObjects": ["$$step", entry]}, "$$step"]}
    # A run whose current step waits stays `waiting` until the lease holder has ended that wait.
    waits = {"$and": [IS_CURRENT, {"$eq": ["$$step.status", StepStatus.WAITING.value]}]}
    some_wait = some_step(waits)
    unknown = {"$not": [{"$in": ["$status", NON_TERMINAL_TEXTS]}]}  # `validate_run_document` reports it after the claim
    lease = {"id": lease_id, "owner": owner, "token": plus_one("$token"), "expiresAt": server_time_in(lease_s)}
    return [
        {
            "$set": {
                "wakeAt": "$$REMOVE",
                "token": plus_one("$token"),
                "lease": {"$mergeObjects": [lease]},  # replaces the stored value; a plain document would be merged into it
                "startedAt": {"$ifNull": ["$startedAt", "$$NOW"]},
                "status": {"$cond": [{"$or": [some_wait, unknown]}, "$status", RunStatus.RUNNING.value]},
                "steps": map_steps(step),
            }
        }
    ]


def read_claimed(run_ids: Sequence[str], lease_id: str) -> Find:
    """The documents of those runs that this claim has won: they carry its id."""
    return Find(name="read_claimed", collection="runs", filter={"_id": {"$in": list(run_ids)}, "lease.id": lease_id})


def find_due_before(lanes: Sequence[str], until: datetime, limit: int, since: datetime | None = None) -> Find:
    """Runs due after `since` and until `until`, in no particular order: lane and `wakeAt` of each. For the steward."""
    due = {"$lte": until} if since is None else {"$lte": until, "$gt": since}
    query = {**_in_lanes(lanes), "wakeAt": due, "status": _NOT_ENDED, "paused": NOT_PAUSED}
    return Find(
        name="find_due_before",
        collection="runs",
        filter=query,
        projection={"lane": 1, "wakeAt": 1},
        limit=limit,
        hint=_BY_QUEUE,
    )
