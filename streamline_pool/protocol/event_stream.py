"""What is written and read to stream events across the cluster, as data. Runs nothing, as ops.py.

Events travel in the signals (a capped collection, which keeps what is written to it in order): one signal of kind
"events" is a batch of one publisher, which numbers its events. Whoever streams is a record among the hosts and calls by
signals of kind "listen"; a pool whose workers publish answers "heard".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from streamline_pool.domain.errors import ValidationError

from . import hosts, signals
from .operations import Command, Find, Reply, Signal, Tail

__all__ = [
    "LISTENER_TTL_S", "events_signal", "find_listeners", "find_pools", "heard", "listen", "put_listener", "remove_listener", "send_events",
    "stream_tail", "unlisten",
]  # fmt: skip

LISTENER_TTL_S = 90.0
"""A listener that has not said for so long that it listens is one no more; it says so three times as often."""


def put_listener(subscriber: str, host: str, pid: int) -> Command:
    """Say that somebody streams. The record vanishes by itself, as that of a pool does."""
    return hosts.put_host({"_id": subscriber, "listener": True, "host": host, "pid": pid}, LISTENER_TTL_S)


def remove_listener(subscriber: str) -> Command:
    """It streams no more."""
    return hosts.remove_host(subscriber)


def find_listeners() -> Find:
    """Whoever streams: `_id` and `expireAt`. The expired may still be among them."""
    query = {"listener": True, "_id": {"$type": "string"}, "expireAt": {"$type": "date"}}  # whatever another program has put there
    return Find(name="find_listeners", collection="hosts", filter=query, projection={"expireAt": 1})


def find_pools(seen_within_s: float) -> Find:
    """Ids of the pools that have said something within that time, by the server's clock."""
    since = {"$dateSubtract": {"startDate": "$$NOW", "unit": "millisecond", "amount": round(seen_within_s * 1000)}}
    query = {"listener": {"$exists": False}, "$expr": {"$gt": ["$seenAt", since]}}
    return Find(name="find_pools", collection="hosts", filter=query, projection={"_id": 1})


def listen(subscriber: str, at: datetime) -> Signal:
    """Ask every pool to publish for this listener, for LISTENER_TTL_S from now on."""
    return signals.send_signal("listen", at, listener=subscriber)


def unlisten(subscriber: str, at: datetime) -> Signal:
    """This listener has gone."""
    return signals.send_signal("unlisten", at, listener=subscriber)


def heard(pool: str, subscribers: Sequence[str], at: datetime) -> Signal:
    """All workers of this pool publish for these listeners."""
    return signals.send_signal("heard", at, pool=pool, listeners=list(subscribers))


def _batch(publisher: str, first: int, events: Sequence[Any], greets: Mapping[str, int], at: datetime) -> dict[str, Any]:
    """Events numbered from `first` on. `greets`: the number from which on each new listener is owed this publisher's events."""
    greeting = [{"listener": subscriber, "number": number} for subscriber, number in greets.items()]
    return {"kind": "events", "at": at, "publisher": publisher, "first": first, "events": events, "greets": greeting}


def send_events(publisher: str, first: int, events: Sequence[Any], greets: Mapping[str, int], at: datetime) -> Command:
    """Write a batch and wait until it is there, which keeps a publisher's batches in order and its pace to that of the server.

    Acknowledged by one member only: what a batch reports is durable already, and sending it twice does no harm.
    """
    body = {"documents": [_batch(publisher, first, events, greets, at)], "writeConcern": {"w": 1}}
    return Command(name="send_events", collection="signals", verb="insert", body=body, parse=_stored, writes=False)


def _stored(reply: Reply) -> None:
    if reply.get("writeErrors"):
        raise ValidationError(f"MongoDB refuses a signal: {str(reply['writeErrors'][0].get('errmsg'))[:500]}")


def events_signal(publisher: str, first: int, events: Sequence[Any], at: datetime) -> Signal:
    """A batch written without waiting for an answer."""
    return Signal(name="signal_events", document=_batch(publisher, first, events, {}, at))


def stream_tail(subscriber: str, since: datetime) -> Tail:
    """All that concerns one listener, written from about `since` on."""
    mine = {"kind": {"$in": ["listen", "unlisten"]}, "listener": subscriber}
    return Tail(filter={"at": {"$gte": since}, "$or": [{"kind": "events"}, mine, {"kind": "heard", "listeners": subscriber}]})
