"""Signals between processes, as data. A signal is a hint in a capped collection: its loss costs latency, never correctness.

Owns the collection, and what a position in it is: the tick that the server gives each signal when it stores it. Ticks never go
back, on no member of a replica set; the time `at` that a signal carries is its sender's, and no position rests on it. What the
signals of streamed events hold is in event_stream.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from .codec import SERVER_TICK, Tick
from .operations import Command, Find, Query, Reply, Signal, Tail

__all__ = [
    "SIGNALS_BYTES",
    "beyond",
    "cap_signals",
    "ensure_signals",
    "latest_signal",
    "read_signals_options",
    "send_signal",
    "signals_after",
    "tail_query",
    "tick_of",
]

SIGNALS_BYTES = 16 * 1024 * 1024
"""Size of the capped collection: about half a minute of signals at full load. A tail must not fall further behind."""


def ensure_signals() -> Command:
    """Create the capped collection. The caller takes the error code NAMESPACE_EXISTS for success."""
    body = {"capped": True, "size": SIGNALS_BYTES}
    return Command(name="ensure_signals", collection="signals", verb="create", body=body)


def read_signals_options(stored_name: str) -> Command:
    """Yields the options of the collection with that stored name, such as `{capped, size}`, or None if there is no such collection."""
    body = {"filter": {"name": stored_name}, "cursor": {}}
    return Command(name="read_signals_options", collection="", verb="listCollections", body=body, parse=_options, writes=False)


def _options(reply: Reply) -> Mapping[str, Any] | None:
    found = reply["cursor"]["firstBatch"]
    return found[0].get("options", {}) if found else None


def cap_signals() -> Command:
    """Make the collection capped again, after an insert created it as an ordinary one."""
    return Command(name="cap_signals", collection="signals", verb="convertToCapped", body={"size": SIGNALS_BYTES})


def send_signal(kind: str, at: datetime, **fields: Any) -> Signal:
    """Write one signal. `at` is the server's time. Fields by kind:

    "due" {lane, runId, wakeAt, count}: a run can be claimed. "cancel" {runId}: a control operation changed a run that a worker
    may hold (a cancel, a pause or a rewind). "ended" {runs}. "host" {host}. Those of the event stream are in event_stream.py.
    """
    return Signal(name=f"signal_{kind}", document={"kind": kind, "at": at, "tick": SERVER_TICK, **fields})


def latest_signal() -> Find:
    """The signal that was written last: its tick. Where a tail of all later signals begins."""
    return Find(name="latest_signal", collection="signals", filter={}, projection={"tick": 1}, sort=(("$natural", -1),), limit=1)


def tick_of(found: Sequence[Mapping[str, Any]]) -> Tick:
    """The tick of the first of these signals; the lowest tick if there is none, or if another program has stored it."""
    tick = found[0].get("tick") if found else None
    return tick if isinstance(tick, Tick) else SERVER_TICK


def beyond(position: Tick, signal: Mapping[str, Any]) -> Tick:
    """The position of a tail at `position` that has read this signal."""
    return max(position, tick_of([signal]))


def signals_after(position: Tick | None, **match: Any) -> Tail:
    """Signals with these fields. `position`: as in `Tail.after`."""
    return Tail(match=match, after=position)


def tail_query(tail: Tail, position: Tick) -> Query:
    """The filter of a cursor of `tail`, whose latest signal had the tick `position` (SERVER_TICK: none yet).

    The last second before that is read once more, because signals that were written at the same moment may be stored in another
    order than that of their ticks.
    """
    begin = max(position, SERVER_TICK if tail.after is None else tail.after)
    return {"tick": {"$gt": Tick(begin.time - 1, 0)}, **tail.match} if begin.time else dict(tail.match)
