"""How events are streamed across the cluster, as data. Owns the signals and host records of subscribers.

Events are published in the signals, a capped collection, which keeps them in the order of their writes. One signal of kind
"events" is a batch of one publisher, and the publisher numbers its events. A subscriber has a record among the hosts (with
`listener: true`) and asks by signals of kind "listen". A pool whose workers publish for it answers with kind "heard".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from streamline_pool.domain.errors import ValidationError

from . import hosts, signals
from .codec import SERVER_TICK, Tick
from .operations import Command, Find, Reply, Signal, Tail, error_text

__all__ = [
    "SUBSCRIBER_TTL_S",
    "announce_subscriber",
    "answer_subscribers",
    "events_signal",
    "find_pools",
    "find_subscribers",
    "put_subscriber",
    "remove_subscriber",
    "send_events",
    "stream_tail",
    "unlisten",
]  # fmt: skip

_FIRST, _LAST = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)

SUBSCRIBER_TTL_S = 90.0
"""Seconds after which a subscriber that has not renewed its request counts as gone. It renews three times as often."""


def put_subscriber(subscriber: str, host: str, pid: int) -> Command:
    """Store the record of a subscriber. The record expires, as that of a pool does."""
    return hosts.put_host({"_id": subscriber, "listener": True, "host": host, "pid": pid}, SUBSCRIBER_TTL_S)


def remove_subscriber(subscriber: str) -> Command:
    """Remove the record of a subscriber that has closed its stream."""
    return hosts.remove_host(subscriber)


def find_subscribers() -> Find:
    """All subscribers: `_id` and `expireAt`. Expired ones may still be among them."""
    # Another program may have stored anything, also a date that Python cannot hold.
    query = {"listener": True, "_id": {"$type": "string"}, "expireAt": {"$gte": _FIRST, "$lt": _LAST}}
    return Find(name="find_listeners", collection="hosts", filter=query, projection={"expireAt": 1})


def find_pools(seen_within_s: float) -> Find:
    """Ids of the pools that have renewed their record within that time, by the server's clock."""
    since = {"$dateSubtract": {"startDate": "$$NOW", "unit": "millisecond", "amount": round(seen_within_s * 1000)}}
    query = {"listener": {"$exists": False}, "$expr": {"$gt": ["$seenAt", since]}}
    return Find(name="find_pools", collection="hosts", filter=query, projection={"_id": 1})


def announce_subscriber(subscriber: str, at: datetime) -> Signal:
    """Ask every pool to publish for this subscriber, for LISTENER_TTL_S from now on."""
    return signals.send_signal("listen", at, listener=subscriber)


def unlisten(subscriber: str, at: datetime) -> Signal:
    """This subscriber has closed its stream."""
    return signals.send_signal("unlisten", at, listener=subscriber)


def answer_subscribers(pool: str, subscribers: Sequence[str], at: datetime) -> Signal:
    """All workers of this pool publish for these subscribers."""
    return signals.send_signal("heard", at, pool=pool, listeners=list(subscribers))


def _batch(publisher: str, first: int, events: Sequence[Any], greets: Mapping[str, int], at: datetime) -> dict[str, Any]:
    """Events numbered from `first` on. `greets`: for each new subscriber, the number of the first event that it receives."""
    greeting = [{"listener": subscriber, "number": number} for subscriber, number in greets.items()]
    return {"kind": "events", "at": at, "tick": SERVER_TICK, "publisher": publisher, "first": first, "events": events, "greets": greeting}


def send_events(publisher: str, first: int, events: Sequence[Any], greets: Mapping[str, int], at: datetime) -> Command:
    """Write a batch and wait for the reply. That keeps a publisher's batches in order, and the publisher no faster than the server.

    One member acknowledges it: a batch reports what is durable already, and a second copy does no harm.
    """
    body = {"documents": [_batch(publisher, first, events, greets, at)], "writeConcern": {"w": 1}}
    return Command(name="send_events", collection="signals", verb="insert", body=body, parse=_stored, writes=False)


def _stored(reply: Reply) -> None:
    if reply.get("writeErrors"):
        raise ValidationError(f"MongoDB refuses a signal: {error_text(reply['writeErrors'][0])}")


def events_signal(publisher: str, first: int, events: Sequence[Any], at: datetime) -> Signal:
    """A batch that is written without waiting for a reply."""
    return Signal(name="signal_events", document=_batch(publisher, first, events, {}, at))


def stream_tail(subscriber: str, position: Tick) -> Tail:
    """All signals for one subscriber. `position`: as in `Tail.after`."""
    mine = {"kind": {"$in": ["listen", "unlisten"]}, "listener": subscriber}
    return Tail(match={"$or": [{"kind": "events"}, mine, {"kind": "heard", "listeners": subscriber}]}, after=position)
