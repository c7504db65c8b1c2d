"""Durable events, as data: delivery to one run, and the stored broadcast events, which are for every run.

Owns the filters that decide which runs an event reaches; inbox.py has the update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from streamline_pool.domain.errors import StoreUnavailableError
from streamline_pool.domain.model import StepStatus

from . import server_codes
from .codec import SERVER_TICK
from .expressions import IS_CURRENT, NON_TERMINAL_TEXTS, live_run, server_time_in, some_step
from .inbox import deliver_item, has_room
from .operations import Command, Find, Query, Reply, change_one, deleted, error_text
from .stored_once import stored_or_there

__all__ = [
    "EVENT_BYTES_MAX",
    "OLDEST_READ",
    "deliver_event",
    "deliver_to_waiters",
    "find_event_for",
    "find_outdated",
    "find_pending_events",
    "find_waiters",
    "forget_events",
    "mark_delivered",
    "oldest_runs",
    "postpone_event",
    "read_delivered",
    "read_event",
    "record_event",
]

_POSTPONED_MS = 30_000  # a guess: a person needs longer than this to make room in a run
_POSTPONED_MAX_MS = 3_600_000  # a guess: then such an event costs no more than some commands an hour

_WAITING = StepStatus.WAITING.value

EVENT_BYTES_MAX = 256 * 1024
"""Bytes of the data of one event. The data is copied into every run that it reaches."""


def deliver_event(run_id: str, event_id: str, name: str, data: Any, size: int) -> Command:
    """Deliver an event to one run: it ends the run's wait for it, or goes to the inbox. Yields the document or None.

    `size` is the bytes of `data`. An event that the run has seen is not delivered again, so the call may be repeated.
    """
    waits = {"$and": [{"$eq": ["$$step.status", _WAITING]}, {"$eq": ["$$step.waitingFor.eventName", {"$literal": name}]}]}
    hit = some_step({"$and": [IS_CURRENT, waits]})
    query = {**live_run(None, run_id), "seen": {"$ne": event_id}, "$expr": {"$or": [hit, has_room(size)]}}
    return change_one("deliver_event", query, deliver_item(hit, {"id": event_id, "name": name, "data": data}, is_event=True))


def record_event(event_id: str, name: str, data: Any, at: datetime) -> Command:
    """Store a broadcast event: for every run that exists now and waits for it, now or later. Repeating changes nothing.

    It is pending until the runs that wait now have received it. `bornAt`, and no clock, decides which runs exist.
    Raises ValidationError when the server refuses it for good.
    """
    document = {"_id": event_id, "name": name, "data": data, "at": at, "bornAt": SERVER_TICK, "pending": True}
    body = {"documents": [document], "ordered": False}
    return Command(name="record_event", collection="events", verb="insert", body=body, parse=stored_or_there("an event"))


def read_event(event_id: str) -> Find:
    """The event with that id, as stored."""
    return Find(name="read_event", collection="events", filter={"_id": event_id}, limit=1)


def find_waiters(event: Mapping[str, Any], after: str | None, limit: int) -> Find:
    """Runs that wait for this event and have not seen it, with ids above `after`: id and `waitGen` of each. Index streamline_awaits."""
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
    """End each of these waits, if it is still the one that `find_waiters` found.

    Yields the errors `[{index, code, errmsg}]` of the runs that the server could not store, for example because their
    documents are full. Those are unchanged, and the others are not affected. May be repeated.
    """
    update = deliver_item(True, {"id": event["_id"], "data": event.get("data")}, is_event=True)
    query = _waits_for(event)
    query["steps"] = {"$elemMatch": {"status": _WAITING, "waitingFor.eventName": event["name"]}}
    updates = [{"q": query | {"_id": found["_id"], "waitGen": found.get("waitGen")}, "u": update} for found in waiters]
    return Command(name="deliver_to_waiters", collection="runs", verb="update", body={"updates": updates, "ordered": False}, parse=_refused)


def _refused(reply: Reply) -> list[Mapping[str, Any]]:
    errors = list(reply.get("writeErrors", ()))
    for error in errors:
        if error.get("code") in server_codes.TRANSIENT:  # a fail-over in the middle of the command: no run refuses the event
            raise StoreUnavailableError(f"deliver_to_waiters: {error_text(error)}", transient=True)
    return errors


def _waits_for(event: Mapping[str, Any]) -> Query:
    # An event never reaches a run that began after it was sent, however late it is delivered.
    return {
        "awaits": event["name"],
        "seen": {"$ne": event["_id"]},
        "bornAt": {"$lt": event.get("bornAt")},
        "status": {"$in": NON_TERMINAL_TEXTS},
    }


def read_delivered(run_ids: Sequence[str], event_id: str) -> Find:
    """Those of the runs whose wait this event has ended, with the fields that are published to subscribers."""
    projection = {"workflowId": 1, "lane": 1, "steps.stepId": 1, "steps.answer": 1, "wakeAt": 1}
    query = {"_id": {"$in": list(run_ids)}, "steps.answer": event_id}
    return Find(name="read_delivered", collection="runs", filter=query, projection=projection)


def mark_delivered(event_id: str) -> Command:
    """Every run that waited when the event was sent has received it. A run that waits later reads the stored event."""
    body = {"updates": [{"q": {"_id": event_id}, "u": {"$set": {"pending": False}}}]}
    return Command(name="settle_event", collection="events", verb="update", body=body)


def postpone_event(event_id: str) -> Command:
    """A pending event cannot be delivered to all its runs now. Try again after a pause that doubles each time: 30 s to an hour."""
    times = {"$min": [{"$ifNull": ["$refusals", 0]}, 20]}
    pause_ms = {"$toLong": {"$min": [_POSTPONED_MAX_MS, {"$multiply": [_POSTPONED_MS, {"$pow": [2, times]}]}]}}
    update = [{"$set": {"retryAt": {"$add": ["$$NOW", pause_ms]}, "refusals": {"$add": [times, 1]}}}]
    body = {"updates": [{"q": {"_id": event_id, "pending": True}, "u": update}]}
    return Command(name="postpone_event", collection="events", verb="update", body=body)


def find_pending_events(before: datetime, limit: int) -> Find:
    """Events that were sent at `before` or earlier, are not delivered, and are not postponed. Index streamline_pending."""
    is_time = {"$lte": ["$retryAt", "$$NOW"]}  # a missing field is less than any date
    query = {"pending": True, "at": {"$lte": before}, "name": {"$type": "string"}, "$expr": is_time}
    return Find(name="find_pending_events", collection="events", filter=query, sort=(("at", 1),), limit=limit)


def find_event_for(name: str, born_at: Any, seen: Sequence[str]) -> Find:
    """The oldest broadcast event of that name that was sent after `born_at`. Index streamline_event.

    `born_at` is the run's `bornAt`; `seen` are ids of events that the run has had already.
    """
    query: Query = {"name": name, "bornAt": {"$gt": born_at}}
    if seen:
        query["_id"] = {"$nin": list(seen)}
    return Find(name="find_event_for", collection="events", filter=query, sort=(("bornAt", 1),), limit=1)


OLDEST_READ = 100
"""Runs that `oldest_runs` reads. A guess: the oldest one is hardly ever behind a hundred cancelled runs."""


def oldest_runs() -> Find:
    """`bornAt` and status of the OLDEST_READ oldest stored runs, the oldest first. Index streamline_born, so it reads no other run.

    A run whose `bornAt` another program has removed or changed receives no event to all, and is left out.
    """
    return Find(
        name="oldest_runs",
        collection="runs",
        filter={"bornAt": {"$type": "timestamp"}},
        projection={"bornAt": 1, "status": 1},
        sort=(("bornAt", 1),),
        limit=OLDEST_READ,
        hint="streamline_born",
    )


def find_outdated(before: Any, limit: int) -> Find:
    """Ids of delivered events with a `bornAt` less than `before` (None: any) that are an hour old. Index streamline_event_born."""
    return Find(
        name="find_outdated_events",
        collection="events",
        filter=_outdated(before),
        projection={"_id": 1},
        sort=(("bornAt", 1),),
        limit=limit,
        hint="streamline_event_born",
    )


def forget_events(event_ids: Sequence[str], before: Any) -> Command:
    """Delete those of the events that `find_outdated(before)` still finds. Yields how many."""
    body = {"deletes": [{"q": {"_id": {"$in": list(event_ids)}, **_outdated(before)}, "limit": 0}]}
    return Command(name="forget_events", collection="events", verb="delete", body=body, parse=deleted("events"))


def _outdated(before: Any) -> Query:
    # The hour: a run that is older than the event may not be stored yet, by a transaction for example.
    older = {"$type": "timestamp"} if before is None else {"$lt": before}
    return {"bornAt": older, "pending": False, "$expr": {"$lt": ["$at", server_time_in(-3600)]}}
