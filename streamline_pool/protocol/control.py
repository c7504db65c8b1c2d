"""What may be done to a run from outside, as data: cancel, pause, resume, rewind, answer, and the delivery of events.

Owns the filters and updates of outside acts and of the stored events; ops.py has those of the engine. Each is one
conditional update whose filter holds every precondition, so that none of them ever needs to read, decide and write back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from streamline_pool.domain.errors import ValidationError
from streamline_pool.domain.model import RunStatus, StepStatus

from .expressions import INBOX, IS_CURRENT, NON_TERMINAL_TEXTS, NOT_PAUSED, STEPS, map_steps, plus_one, server_time_in, some_step
from .operations import Command, Find, Reply
from .run_document import SERVER_TICK

__all__ = [
    "ACTS_KEPT", "EVENT_BYTES_MAX", "INBOX_BYTES_MAX", "INBOX_MAX",
    "answer_hook", "answer_wait", "cancel_run", "deliver_event", "deliver_to_waiters", "find_event_for", "find_pending_events",
    "find_waiters", "forget_events", "oldest_live_run", "pause_run", "read_delivered", "read_event", "record_event",
    "rewind_run", "settle_event", "unpause_run",
]  # fmt: skip

Document = dict[str, Any]

INBOX_MAX = 100
"""Items that arrived before they were waited for; a guess, far above what a workflow in order ever has."""

INBOX_BYTES_MAX = 2 * 1024 * 1024
"""Bytes of them; derived: a run that is otherwise full to its limit still has so much room in its document."""

ACTS_KEPT = 8
"""Ids of the latest acts that a run keeps, so that a caller knows of its own for certain when others have acted after it."""

EVENT_BYTES_MAX = 256 * 1024
"""Data of one event. It is copied into every run that it reaches."""

_WAITING, _RUNNING, _PENDING, _DONE = (
    status.value for status in (StepStatus.WAITING, StepStatus.RUNNING, StepStatus.PENDING, StepStatus.DONE)
)
_DUPLICATE_KEY = 11000
_IS_PAUSED: Document = {"$eq": ["$paused", True]}
_BY_A_PERSON = ("human", "webhook")
"""Types of waits that an answer ends."""


# --- acts on a run as a whole --------------------------------------------------------------------------------------


def cancel_run(workflow_id: str | None, run_id: str, reason: str | None, act_id: str) -> Command:
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
        **_act(act_id),
        "actIds": "$$REMOVE",  # no act follows
    }
    return _change_one("cancel_run", _run(workflow_id, run_id), [{"$set": sets}])


def pause_run(workflow_id: str | None, run_id: str, acts: object, reason: str | None, act_id: str) -> Command:
    """Keep a run from being claimed, as it was found with `acts`. Yields the paused document or None.

    A live lease is left alone: its holder finds the pause at its next write, stores its result and gives the run up.
    """
    query = {**_run(workflow_id, run_id), "paused": NOT_PAUSED, "acts": {"$eq": acts}}
    sets = {"paused": True, "pauseReason": {"$literal": reason}, "pausedWakeAt": "$wakeAt", "wakeAt": "$$REMOVE", **_act(act_id)}
    return _change_one("pause_run", query, [{"$set": sets}])


def unpause_run(workflow_id: str | None, run_id: str, acts: object, act_id: str) -> Command:
    """Let a paused run go on, as it was found with `acts`. Yields the document or None.

    Where a worker holds the run, nothing else changes: its next write simply succeeds.
    """
    query = {**_run(workflow_id, run_id), "paused": True, "acts": {"$eq": acts}}
    free = {"$ne": [{"$type": "$lease"}, "object"]}
    sets = {
        "paused": False,
        "pauseReason": "$$REMOVE",
        "wakeAt": {"$cond": [free, {"$ifNull": ["$pausedWakeAt", "$$REMOVE"]}, "$$REMOVE"]},
        "pausedWakeAt": "$$REMOVE",
        **_act(act_id),
    }
    return _change_one("unpause_run", query, [{"$set": sets}])


def rewind_run(
    workflow_id: str | None, run_id: str, acts: object, place: int, step_ids: Sequence[str], lane: str, slot: int, act_id: str
) -> Command:
    """Bring the step at `place` and all later ones, `step_ids`, back to pending, as the run was found with `acts`.

    Yields the document or None. Takes the lease away. Hooks go with the steps, and so do answers to them. A paused run
    stays paused. `lane` and `slot` are given to a run that has none any more, because it had no room for them.
    """
    query = {
        **_run(workflow_id, run_id),
        "status": {"$ne": RunStatus.CANCELLED.value},
        "acts": {"$eq": acts},
        f"steps.{place}.stepId": step_ids[0],
    }
    tail = {"$literal": [{"stepId": step_id, "status": _PENDING, "attempts": 0} for step_id in step_ids]}
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
        "wakeAt": {"$cond": [_IS_PAUSED, "$$REMOVE", "$$NOW"]},
        "pausedWakeAt": {"$cond": [_IS_PAUSED, "$$NOW", "$$REMOVE"]},
        "lane": {"$ifNull": ["$lane", {"$literal": lane}]},
        "slot": {"$ifNull": ["$slot", slot]},
        **_act(act_id),
    }
    return _change_one("rewind_run", query, [{"$set": sets}])


def _run(workflow_id: str | None, run_id: str) -> Document:
    """One run that has not ended, of that workflow or (None) of any."""
    query: Document = {"_id": run_id, "status": {"$in": NON_TERMINAL_TEXTS}}
    if workflow_id is not None:
        query["workflowId"] = workflow_id
    return query


def _act(act_id: str) -> Document:
    earlier = {"$cond": [{"$isArray": ["$actIds"]}, "$actIds", []]}
    return {
        "acts": plus_one("$acts"),
        "lastAct": {"$literal": act_id},
        "actIds": {"$slice": [{"$concatArrays": [earlier, [{"$literal": act_id}]]}, -ACTS_KEPT]},
        "updatedAt": "$$NOW",
    }


def _change_one(name: str, query: Document, update: list[Document]) -> Command:
    body: Document = {"query": query, "update": update, "new": True}
    return Command(name=name, collection="runs", verb="findAndModify", body=body, parse=lambda reply: reply.get("value"))


# --- answers -------------------------------------------------------------------------------------------------------


def answer_wait(workflow_id: str | None, run_id: str, step_id: str, gen: int, output: Any, answer_id: str) -> Command:
    """End the wait for a person that this step began as the run's wait number `gen`. Yields the document or None.

    The step keeps the answer's id, by which the caller knows after a lost reply that it was its own. Takes the lease
    away, also from a worker that has just claimed the run for the wait's deadline.
    """
    waiting = {"stepId": step_id, "status": _WAITING, "gen": gen, "waitingFor.type": {"$in": list(_BY_A_PERSON)}}
    query = {**_run(workflow_id, run_id), "currentStepId": step_id, "steps": {"$elemMatch": waiting}}
    return _change_one("answer_wait", query, _delivering(True, {"id": answer_id, "data": output}))


def answer_hook(
    run_id: str, step_id: str, gen: int, token_hash: bytes, expires_at: datetime | None, output: Any, size: int, answer_id: str
) -> Command:
    """Answer by a hook: end its wait, or keep the answer for the wait that is not stored yet. Yields the document or None.

    The filter holds the token's hash, its generation and its expiry by the server's clock; one answer per hook. A step
    that made a hook and then slept, or waits for an event, has no wait that the hook could end.
    """
    waiting = {"status": _WAITING, "gen": gen, "waitingFor.type": "webhook"}
    has_hook = {"stepId": step_id, "hooks": {"$elemMatch": {"hash": token_hash, "gen": gen}}}
    early = {
        "waitGen": gen - 1,
        "steps": {"$elemMatch": {**has_hook, "status": {"$in": [_PENDING, _RUNNING]}}},
        "inbox": {"$not": {"$elemMatch": {"stepId": step_id, "gen": gen}}},
        "$expr": _has_room(size),
    }
    query: Document = {
        **_run(None, run_id),
        "currentStepId": step_id,
        "$or": [{"steps": {"$elemMatch": {**has_hook, **waiting}}}, early],
    }
    if expires_at is not None:
        query["$expr"] = {"$lt": ["$$NOW", {"$literal": expires_at}]}
    hit = some_step({"$and": [IS_CURRENT, {"$eq": ["$$step.status", _WAITING]}]})
    return _change_one("answer_hook", query, _delivering(hit, {"id": answer_id, "stepId": step_id, "gen": gen, "data": output}))


def _has_room(size: int) -> Document:
    room = {"$lte": [{"$add": [{"$bsonSize": {"inbox": INBOX}}, size]}, INBOX_BYTES_MAX]}
    return {"$and": [{"$lt": [{"$size": INBOX}, INBOX_MAX]}, room]}


def _delivering(hit: Document | bool, item: Mapping[str, Any], *, is_event: bool = False) -> list[Document]:
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
        "wakeAt": on_hit({"$cond": [_IS_PAUSED, "$$REMOVE", "$$NOW"]}, "$wakeAt"),
        "pausedWakeAt": on_hit({"$cond": [_IS_PAUSED, "$$NOW", "$$REMOVE"]}, "$pausedWakeAt"),
        "updatedAt": "$$NOW",
    }
    if hit is not True:
        sets["inbox"] = on_hit("$inbox", {"$concatArrays": [INBOX, [{"$mergeObjects": ["$_item", {"at": "$$NOW"}]}]]})
    if is_event:
        sets["seen"] = {"$concatArrays": [{"$cond": [{"$isArray": ["$seen"]}, "$seen", []]}, ["$_item.id"]]}
    # The item is sent once, however often it is referred to: an answer may be large, and a command ends at 16 MiB. As a
    # literal, since it is a user's: an expression or a path in it is data.
    return [{"$set": {"_hit": hit, "_item": {"$literal": dict(item)}}}, {"$set": sets}, {"$unset": ["_hit", "_item"]}]


# --- events --------------------------------------------------------------------------------------------------------


def deliver_event(run_id: str, event_id: str, name: str, data: Any, size: int) -> Command:
    """Hand an event to one run: it ends the run's wait for it, or goes to the inbox. Yields the document or None.

    An event that the run has seen is not delivered again, so the call may be repeated.
    """
    waits = {"$and": [{"$eq": ["$$step.status", _WAITING]}, {"$eq": ["$$step.waitingFor.eventName", {"$literal": name}]}]}
    hit = some_step({"$and": [IS_CURRENT, waits]})
    query = {**_run(None, run_id), "seen": {"$ne": event_id}, "$expr": {"$or": [hit, _has_room(size)]}}
    return _change_one("deliver_event", query, _delivering(hit, {"id": event_id, "name": name, "data": data}, is_event=True))


def record_event(event_id: str, name: str, data: Any, at: datetime) -> Command:
    """Store an event for every run that exists now and waits for it sooner or later. Repeating changes nothing.

    It is pending until those that wait now have it. Which runs exist is told by `bornAt`, and not by a clock.
    """
    document = {"_id": event_id, "name": name, "data": data, "at": at, "bornAt": SERVER_TICK, "pending": True}
    return Command(
        name="record_event", collection="events", verb="insert", body={"documents": [document], "ordered": False}, parse=_there_now
    )


def _there_now(reply: Reply) -> None:
    for error in reply.get("writeErrors", ()):
        if error.get("code") != _DUPLICATE_KEY:
            raise ValidationError(f"MongoDB refuses to store the event: {str(error.get('errmsg'))[:500]}")


def read_event(event_id: str) -> Find:
    """The event with that id, as stored."""
    return Find(name="read_event", collection="events", filter={"_id": event_id}, limit=1)


def find_waiters(event: Mapping[str, Any], after: str | None, limit: int) -> Find:
    """Runs that wait for this event and have not seen it, with ids above `after`: id and wait number. Index streamline_awaits."""
    query = _waits_for(event)
    if after is not None:
        query["_id"] = {"$gt": after}
    return Find(
        name="find_waiters",
        collection="runs",
        filter=query,
        projection={"_id": 1, "waitGen": 1},
        sort=(("_id", 1),),
        limit=limit,
        hint="streamline_awaits",
    )


def deliver_to_waiters(event: Mapping[str, Any], waiters: Sequence[Mapping[str, Any]]) -> Command:
    """End each of these waits, if it is still the one that was found. Yields the reply, with `writeErrors` by index."""
    update = _delivering(True, {"id": event["_id"], "data": event.get("data")}, is_event=True)
    query = _waits_for(event)
    query["steps"] = {"$elemMatch": {"status": _WAITING, "waitingFor.eventName": event["name"]}}
    updates = [{"q": query | {"_id": found["_id"], "waitGen": found.get("waitGen")}, "u": update} for found in waiters]
    return Command(name="deliver_to_waiters", collection="runs", verb="update", body={"updates": updates, "ordered": False}, parse=dict)


def _waits_for(event: Mapping[str, Any]) -> Document:
    # A run that began after the event was sent is none of its business, however late it is delivered.
    return {
        "awaits": event["name"],
        "seen": {"$ne": event["_id"]},
        "bornAt": {"$lt": event.get("bornAt")},
        "status": {"$in": NON_TERMINAL_TEXTS},
    }


def read_delivered(run_ids: Sequence[str], event_id: str) -> Find:
    """Those of the runs that an event has woken, with what their subscribers are told."""
    projection = {"workflowId": 1, "lane": 1, "steps.stepId": 1, "steps.answer": 1, "wakeAt": 1}
    query = {"_id": {"$in": list(run_ids)}, "steps.answer": event_id}
    return Find(name="read_delivered", collection="runs", filter=query, projection=projection)


def settle_event(event_id: str) -> Command:
    """Everybody who waited when the event was sent has it; who waits later looks for it."""
    body = {"updates": [{"q": {"_id": event_id}, "u": {"$set": {"pending": False}}}]}
    return Command(name="settle_event", collection="events", verb="update", body=body)


def find_pending_events(before: datetime, limit: int) -> Find:
    """Events that were sent before that, and whose sender has not finished. Index streamline_pending."""
    query = {"pending": True, "at": {"$lte": before}, "name": {"$type": "string"}}
    return Find(name="find_pending_events", collection="events", filter=query, sort=(("at", 1),), limit=limit)


def find_event_for(name: str, born_at: Any, seen: Sequence[str]) -> Find:
    """The oldest event of that name that was sent to all after a run was born, and is none of those. Index streamline_event."""
    query: Document = {"name": name, "bornAt": {"$gt": born_at}}
    if seen:
        query["_id"] = {"$nin": list(seen)}
    return Find(name="find_event_for", collection="events", filter=query, sort=(("bornAt", 1),), limit=1)


def oldest_live_run() -> Find:
    """When the oldest run that has not ended was born: no event older than that can be wanted any more."""
    query = {"status": {"$in": NON_TERMINAL_TEXTS}}
    return Find(name="oldest_live_run", collection="runs", filter=query, projection={"bornAt": 1}, sort=(("bornAt", 1),), limit=1)


def forget_events(before: Any) -> Command:
    """Delete delivered events that are older than what was born then (None: any), and not of just now. Yields how many."""
    # The hour: a run that is older than the event may just be about to be stored, by a transaction for example.
    query: Document = {"pending": False, "$expr": {"$lt": ["$at", server_time_in(-3600)]}}
    if before is not None:
        query["bornAt"] = {"$lt": before}
    body = {"deletes": [{"q": query, "limit": 0}]}
    return Command(name="forget_events", collection="events", verb="delete", body=body, parse=lambda reply: int(reply["n"]))
