"""Durable events, as data: delivery to one run, and the stored events that are for every run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from streamline_pool.domain.errors import ValidationError
from streamline_pool.domain.model import StepStatus

from .codec import SERVER_TICK
from .expressions import IS_CURRENT, NON_TERMINAL_TEXTS, live_run, server_time_in, some_step
from .inbox import deliver_item, has_room
from .operations import Command, Find, Reply, change_one

__all__ = [
    "EVENT_BYTES_MAX",
    "deliver_event",
    "deliver_to_waiters",
    "find_event_for",
    "find_pending_events",
    "find_waiters",
    "forget_events",
    "mark_delivered",
    "oldest_live_run",
    "read_delivered",
    "read_event",
    "record_event",
]

Document = dict[str, Any]

_WAITING = StepStatus.WAITING.value
_DUPLICATE_KEY = 11000

EVENT_BYTES_MAX = 256 * 1024
"""Data of one event. It is copied into every run that it reaches."""


def deliver_event(run_id: str, event_id: str, name: str, data: Any, size: int) -> Command:
    """Hand an event to one run: it ends the run's wait for it, or goes to the inbox. Yields the document or None.

    An event that the run has seen is not delivered again, so the call may be repeated.
    """
    waits = {"$and": [{"$eq": ["$$step.status", _WAITING]}, {"$eq": ["$$step.waitingFor.eventName", {"$literal": name}]}]}
    hit = some_step({"$and": [IS_CURRENT, waits]})
    query = {**live_run(None, run_id), "seen": {"$ne": event_id}, "$expr": {"$or": [hit, has_room(size)]}}
    return change_one("deliver_event", query, deliver_item(hit, {"id": event_id, "name": name, "data": data}, is_event=True))


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
    update = deliver_item(True, {"id": event["_id"], "data": event.get("data")}, is_event=True)
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


def mark_delivered(event_id: str) -> Command:
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
