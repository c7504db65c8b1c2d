"""One event: something that happened to a run or in a pool. Owns the record and the names that the engine reserves.

How events reach subscribers is left to bus.py (this process), publisher.py and stream.py (the cluster).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

__all__ = ["ENGINE_EVENTS", "Event"]

ENGINE_EVENTS = frozenset(
    [f"workflow:{what}" for what in ["started", "completed", "failed", "waiting", "resumed", "cancelled", "recovered", "retry", "paused"]]
    + [f"step:{what}" for what in ["started", "completed", "failed", "waiting", "skipped", "retry-scheduled"]]
    + ["engine:error", "scheduler:error", "scheduler:circuit-open", "scheduler:circuit-closed"]
)
"""Names that only the engine publishes. `ctx.emit` refuses them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened. It is published only after the write that it reports is durable."""

    name: str  # one of ENGINE_EVENTS, or what `ctx.emit` was given
    run_id: str | None  # None for events of the engine and the pool
    workflow_id: str | None
    step_id: str | None  # None for events of the whole run
    data: Any  # output, error, payload, reason or wait; None if the event has none
    at: datetime  # aware UTC
