"""Signals between processes, as data. A signal is a hint in a capped collection: its loss costs latency, never correctness.

Owns the collection. What the signals of streamed events hold is in event_stream.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from .operations import Command, Reply, Signal, Tail

__all__ = [
    "SIGNALS_BYTES",
    "cap_signals",
    "ensure_signals",
    "read_signals_options",
    "send_signal",
    "signals_since",
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
    return Signal(name=f"signal_{kind}", document={"kind": kind, "at": at, **fields})


def signals_since(since: datetime, **match: Any) -> Tail:
    """Signals with these fields that were written from about `since` on."""
    return Tail(filter={"at": {"$gte": since}, **match})
