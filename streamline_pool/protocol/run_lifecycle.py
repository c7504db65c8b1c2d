"""Every query and update of the engine, named, as data. Does no I/O: store.py runs them. Outside acts are in acts.py.

Owns filters and update operators of runs that start, are claimed, held and recovered, of signals and of hosts. All
writes are `w: majority, j: true`, all reads that decide are majority reads on the primary (store.py sees to both).
Filters of states are derived from model.py's tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from streamline_pool.domain.errors import ErrorCode, ValidationError
from streamline_pool.domain.model import RunStatus, StepStatus
from streamline_pool.domain.transitions import Change

from .expressions import IS_CURRENT, NON_TERMINAL_TEXTS, NOT_PAUSED, TERMINAL_TEXTS, map_steps, plus_one, server_time_in, some_step, text_of
from .operations import Command, Fence, Find, Op, Reply, Signal, Statement, Tail
from .run_document import EVENT_INDEXES, HOST_INDEXES, RUN_INDEXES, SERVER_TICK, SLOTS

__all__ = ["Command", "Fence", "Find", "Op", "Signal", "Statement", "Tail"]

Document = dict[str, Any]

_NOT_ENDED = {"$nin": TERMINAL_TEXTS}  # so that a `wakeAt` which another program wrote revives nothing
# In an expression a missing field is less than any date, so the first half is what keeps leased and ended runs out.
_DUE = {"wakeAt": {"$type": "date"}, "$expr": {"$lte": ["$wakeAt", "$$NOW"]}}

SIGNALS_BYTES = 16 * 1024 * 1024
"""Size of the capped collection of signals: about half a minute of them at full load, which a tail must not fall behind."""


# --- starting ------------------------------------------------------------------------------------------------------


def ensure_indexes(collection: str = "runs") -> Command:
    """Create the engine's indexes of a collection; does nothing when they exist."""
    made = {"runs": RUN_INDEXES, "hosts": HOST_INDEXES, "events": EVENT_INDEXES}[collection]
    body = {"indexes": [index.spec() for index in made]}
    return Command(name=f"ensure_{collection}_indexes", collection=collection, verb="createIndexes", body=body)


def ensure_signals() -> Command:
    """Create the capped collection of signals; the reply's code 48 (exists) counts as success."""
    body = {"capped": True, "size": SIGNALS_BYTES}
    return Command(name="ensure_signals", collection="signals", verb="create", body=body)


def cap_signals() -> Command:
    """Make a capped collection of the signals that somebody's insert has made an ordinary one."""
    return Command(name="cap_signals", collection="signals", verb="convertToCapped", body={"size": SIGNALS_BYTES})


def server_info() -> Command:
    """`hello`: version of the protocol, topology and the server's clock."""
    return Command(name="server_info", collection="", verb="hello", body={}, parse=dict, writes=False)


def build_info() -> Command:
    """`buildInfo`: the server's version."""
    return Command(name="build_info", collection="", verb="buildInfo", body={}, parse=dict, writes=False)


def insert_runs(documents: Sequence[Document]) -> Command:
    """Store new runs. Yields the errors `[{index, code, keyPattern, …}]` of those that were refused.

    Each gets `bornAt`, which nobody knows before the server has stored it: which events are younger than the run.
    """
    stored = [{**document, "bornAt": SERVER_TICK} for document in documents]
    return Command(
        name="insert_runs",
        collection="runs",
        verb="insert",
        body={"documents": stored, "ordered": False},
        parse=lambda reply: list(reply.get("writeErrors", ())),
    )


# --- reading -------------------------------------------------------------------------------------------------------


def get_run(workflow_id: str | None, run_id: str) -> Find:
    """The run with that id, if it is of that workflow; None: of any."""
    query: Document = {"_id": run_id} if workflow_id is None else {"_id": run_id, "workflowId": workflow_id}
    return Find(name="get_run", collection="runs", filter=query, limit=1)


def get_runs_by_key(workflow_id: str, keys: Sequence[str]) -> Find:
    """The runs that own these idempotency keys of that workflow."""
    query = {"workflowId": workflow_id, "idempotencyKey": {"$in": list(keys)}}
    return Find(name="get_runs_by_key", collection="runs", filter=query)


def taken_runs(run_ids: Sequence[str]) -> Find:
    """Which of these runs exist and cannot be claimed: somebody holds them, or they have ended."""
    query = {"_id": {"$in": list(run_ids)}, "wakeAt": {"$exists": False}}
    return Find(name="taken_runs", collection="runs", filter=query, projection={"_id": 1})


# --- claiming ------------------------------------------------------------------------------------------------------


def find_due(
    lanes: Sequence[str],
    slots: Sequence[int] | None,
    due_at: datetime,
    limit: int,
    crashes_below: int | None,
    passed_over: Sequence[str] = (),
    *,
    since: datetime | None = None,
    priorities: Sequence[int] = (),
) -> Find:
    """Ids of runs that look claimable, highest priority first, then longest due.

    Index streamline_due: one scan per lane and slot, merged. `slots` None means all of them. `crashes_below` leaves
    out runs whose next lost worker would convict them, for a worker that has one of those already, `passed_over` those
    that cannot be claimed. `since`, with the `priorities` it is known for, starts the scans there instead of at the
    beginning (lookout.py says why); `priorities` alone leaves these out.
    """
    query: Document = {
        "lane": {"$in": list(lanes)},
        "slot": {"$in": list(range(SLOTS)) if slots is None else list(slots)},
        "wakeAt": {"$lte": due_at},
    }
    if since is not None:
        query["wakeAt"]["$gte"] = since
        query["priority"] = {"$in": list(priorities)}
    elif priorities:
        query["priority"] = {"$nin": list(priorities)}
    if crashes_below is not None:
        query["crashes"] = {"$lt": crashes_below}
    if passed_over:
        query["_id"] = {"$nin": list(passed_over)}
    return Find(
        name="find_due",
        collection="runs",
        filter=query,
        projection={"_id": 1, "crashes": 1, "priority": 1, "wakeAt": 1},
        sort=(("priority", -1), ("wakeAt", 1)),
        limit=limit,
        hint="streamline_due",
    )


def claim_runs(
    run_ids: Sequence[str], lanes: Sequence[str] | None, lease_id: str, owner: str, lease_s: float, crashes_below: int | None = None
) -> Command:
    """Take the lease of those runs that are still due and not paused. Yields how many.

    The attempt is counted here, so that a crash before the first write still costs one (River counts it in the
    same place). Times are the server's.
    """
    query = _claimable({"$in": list(run_ids)}, lanes, crashes_below)
    return _update_many("claim_runs", query, _claim_update(lease_id, owner, lease_s))


def _update_many(name: str, query: Document, update: list[Document] | Document) -> Command:
    """Update whatever matches. Yields how many did; to be run by multi_update.py."""
    body = {"updates": [{"q": query, "u": update, "multi": True}]}
    return Command(name=name, collection="runs", verb="update", body=body, parse=all_or_refused)


def all_or_refused(reply: Reply) -> int:
    """How many matched; a ValidationError if the server refused one, whatever had been updated by then (`n` is 0)."""
    if reply.get("writeErrors"):
        raise ValidationError(f"MongoDB refuses to update one of the runs: {str(reply['writeErrors'][0].get('errmsg'))[:500]}")
    return int(reply["n"])


def claim_run(
    run_id: str, lanes: Sequence[str] | None, lease_id: str, owner: str, lease_s: float, crashes_below: int | None = None
) -> Command:
    """Claim one named run in one round trip. Yields the claimed document or None.

    The document is the one that the majority-acknowledged write has made, hence as good as a majority read.
    """
    body = {"query": _claimable(run_id, lanes, crashes_below), "update": _claim_update(lease_id, owner, lease_s), "new": True}
    return Command(name="claim_run", collection="runs", verb="findAndModify", body=body, parse=lambda reply: reply.get("value"))


def _claimable(run_id: Any, lanes: Sequence[str] | None, crashes_below: int | None) -> Document:
    query: Document = {"_id": run_id, "status": _NOT_ENDED, "paused": NOT_PAUSED, **_DUE}
    if lanes is not None:
        query["lane"] = {"$in": list(lanes)}
    if crashes_below is not None:
        query["crashes"] = {"$lt": crashes_below}
    return query


def _claim_update(lease_id: str, owner: str, lease_s: float) -> list[Document]:
    enterable = {"$in": ["$$step.status", [StepStatus.PENDING.value, StepStatus.RUNNING.value]]}
    entry = {"status": StepStatus.RUNNING.value, "attempts": plus_one("$$step.attempts"), "startedAt": "$$NOW"}
    step = {"$cond": [{"$and": [IS_CURRENT, enterable]}, {"$mergeObjects": ["$$step", entry]}, "$$step"]}
    # A run whose current step waits stays `waiting` until its holder has ended that wait.
    waits = {"$and": [IS_CURRENT, {"$eq": ["$$step.status", StepStatus.WAITING.value]}]}
    some_wait = some_step(waits)
    unknown = {"$not": [{"$in": ["$status", NON_TERMINAL_TEXTS]}]}  # left for documents.misfit to report
    lease = {"id": lease_id, "owner": owner, "token": plus_one("$token"), "expiresAt": server_time_in(lease_s)}
    return [
        {
            "$set": {
                "wakeAt": "$$REMOVE",
                "token": plus_one("$token"),
                "lease": {"$mergeObjects": [lease]},  # replaces whatever is there; a plain document would be merged into it
                "startedAt": {"$ifNull": ["$startedAt", "$$NOW"]},
                "status": {"$cond": [{"$or": [some_wait, unknown]}, "$status", RunStatus.RUNNING.value]},
                "steps": map_steps(step),
            }
        }
    ]


def read_claimed(run_ids: Sequence[str], lease_id: str) -> Find:
    """Those of the runs that carry this claim's id: what was really won."""
    return Find(name="read_claimed", collection="runs", filter={"_id": {"$in": list(run_ids)}, "lease.id": lease_id})


# --- holding -------------------------------------------------------------------------------------------------------


def commit(fence: Fence, change: Change, now: datetime, size: int) -> Statement:
    """Store one transition of a run that is not paused."""
    return Statement(fence, {"q": _fenced(fence, change, paused=False), "u": _commit_update(fence, change, now, "wakeAt")}, size)


def commit_under_pause(fence: Fence, change: Change, now: datetime, size: int) -> Statement:
    """Store what `transitions.under_pause` left of a transition, on a run that is paused."""
    return Statement(fence, {"q": _fenced(fence, change, paused=True), "u": _commit_update(fence, change, now, "pausedWakeAt")}, size)


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
    if change.takes is not None:
        update["$pull"] = {"inbox": change.takes}
    if change.seen is not None:
        update["$push"] = {"seen": change.seen}
    return update


def save_in_step(fence: Fence, place: int, field: str, value: Any, now: datetime, size: int) -> Statement:
    """Store one field of the step at hand, its checkpoint or its hooks; the lease stays, also under pause."""
    query = {"_id": fence.run_id, "lease.id": fence.lease_id, "rev": fence.rev}
    sets = {"rev": fence.rev + 1, "updatedAt": now, f"steps.{place}.{field}": value}
    return Statement(fence, {"q": query, "u": {"$set": sets}}, size)


def fail_barely(fence: Fence, place: int, code: ErrorCode, message: str, now: datetime) -> Statement:
    """End a run that has no room left even for its own failure: the reason in few bytes, the checkpoint dropped."""
    error = {"code": code.value, "message": message[:100], "type": "", "stepId": None, "traceback": ""}
    sets = {"rev": fence.rev + 1, "status": RunStatus.FAILED.value, "error": error, "endedAt": now, "updatedAt": now}
    unset = {"lease": "", "wakeAt": "", "pausedWakeAt": "", "awaits": "", "lastAct": "", "actIds": "", f"steps.{place}.checkpoint": ""}
    query = {"_id": fence.run_id, "lease.id": fence.lease_id, "rev": fence.rev}
    return Statement(fence, {"q": query, "u": {"$set": sets, "$unset": unset}}, len(message) + 600)


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
    """What decides the fate of fenced writes that did not all match: lease, rev, pause and inbox of each run."""
    projection = {"lease.id": 1, "rev": 1, "token": 1, "paused": 1, "status": 1, "inbox.name": 1, "inbox.stepId": 1, "inbox.gen": 1}
    return Find(name="read_fences", collection="runs", filter={"_id": {"$in": list(run_ids)}}, projection=projection)


def read_held(run_id: str, lease_id: str) -> Find:
    """The whole document of a run, if this claim still holds it."""
    return Find(name="read_held", collection="runs", filter={"_id": run_id, "lease.id": lease_id}, limit=1)


def renew(run_ids: Sequence[str], lease_ids: Sequence[str], lease_s: float) -> Command:
    """Extend the leases of runs that have a live task, never "all of this worker". Yields how many matched."""
    query = {"_id": {"$in": list(run_ids)}, "lease.id": {"$in": list(lease_ids)}}
    update = [{"$set": {"lease.expiresAt": server_time_in(lease_s)}}]
    return _update_many("renew", query, update)


# --- recovering ----------------------------------------------------------------------------------------------------


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
    return _update_many(name, query, [{"$set": alive}])


def find_due_before(lanes: Sequence[str], until: datetime, limit: int, since: datetime | None = None) -> Find:
    """Runs due by `until` (and not before `since`), in no particular order: for the steward's timers and for the fallback sweep."""
    instants = {"$lte": until} if since is None else {"$lte": until, "$gt": since}
    query = {"lane": {"$in": list(lanes)}, "slot": {"$in": list(range(SLOTS))}, "wakeAt": instants}
    return Find(
        name="find_due_before",
        collection="runs",
        filter=query,
        projection={"lane": 1, "wakeAt": 1},
        limit=limit,
        hint="streamline_due",
    )


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
    return _update_many("mark_corrupt", query, update)


# --- signals -------------------------------------------------------------------------------------------------------


def send_signal(kind: str, at: datetime, **fields: Any) -> Signal:
    """Write one signal: "due" {lane, runId}, "ended" {runs}, "cancel" {runId}. Losing it costs latency, never correctness."""
    return Signal(name=f"signal_{kind}", document={"kind": kind, "at": at, **fields})


def signals_since(since: datetime, **match: Any) -> Tail:
    """Signals written from about `since` on that match."""
    return Tail(filter={"at": {"$gte": since}, **match})


# --- hosts ---------------------------------------------------------------------------------------------------------


def put_host(record: Mapping[str, Any], ttl_s: float) -> Command:
    """Store what a pool on some host says of itself; it vanishes `ttl_s` seconds after its last word."""
    fields = {name: {"$literal": value} for name, value in record.items() if name != "_id"}
    update = [{"$set": {**fields, "seenAt": "$$NOW", "expireAt": server_time_in(ttl_s)}}]
    return Command(
        name="put_host", collection="hosts", verb="update", body={"updates": [{"q": {"_id": record["_id"]}, "u": update, "upsert": True}]}
    )


def remove_host(host_id: str) -> Command:
    """The pool is gone in good order."""
    return Command(name="remove_host", collection="hosts", verb="delete", body={"deletes": [{"q": {"_id": host_id}, "limit": 1}]})


def list_hosts() -> Find:
    """Every pool that has spoken lately."""
    return Find(name="list_hosts", collection="hosts", filter={"listener": {"$exists": False}}, sort=(("_id", 1),))
