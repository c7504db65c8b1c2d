"""Signals between processes, as data: hints in a capped collection. The loss of a signal costs latency, never correctness."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from .operations import Command, Signal, Tail

__all__ = [
    "SIGNALS_BYTES",
    "cap_signals",
    "ensure_signals",
    "send_signal",
    "signals_since",
]

Document = dict[str, Any]

SIGNALS_BYTES = 16 * 1024 * 1024
"""Size of the capped collection of signals: about half a minute of them at full load, which a tail must not fall behind."""


def ensure_signals() -> Command:
    """Create the capped collection of signals; the reply's code 48 (exists) counts as success."""
    body = {"capped": True, "size": SIGNALS_BYTES}
    return Command(name="ensure_signals", collection="signals", verb="create", body=body)


def cap_signals() -> Command:
    """Make a capped collection of the signals that somebody's insert has made an ordinary one."""
    return Command(name="cap_signals", collection="signals", verb="convertToCapped", body={"size": SIGNALS_BYTES})


def send_signal(kind: str, at: datetime, **fields: Any) -> Signal:
    """Write one signal: "due" {lane, runId}, "ended" {runs}, "cancel" {runId}. Losing it costs latency, never correctness."""
    return Signal(name=f"signal_{kind}", document={"kind": kind, "at": at, **fields})


def signals_since(since: datetime, **match: Any) -> Tail:
    """Signals written from about `since` on that match."""
    return Tail(filter={"at": {"$gte": since}, **match})
