"""One event: something that happened to a run or in a pool. Owns the record and the names that the engine reserves.

How events reach subscribers is left to bus.py (this process), publisher.py and stream.py (the cluster).
"""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from streamline_pool.domain.errors import ValidationError

__all__ = ["ENGINE_EVENTS", "Event", "check_subscribed", "is_engine_name"]

log = logging.getLogger("streamline_pool")

ENGINE_EVENTS = frozenset(
    [f"workflow:{what}" for what in ["started", "completed", "failed", "waiting", "resumed", "cancelled", "recovered", "retry", "paused"]]
    + [f"step:{what}" for what in ["started", "completed", "failed", "waiting", "skipped", "retry-scheduled"]]
    + ["engine:error", "scheduler:error", "scheduler:circuit-open", "scheduler:circuit-closed"]
)
"""Names that only the engine publishes."""

_PREFIXES = ("workflow:", "step:", "engine:", "scheduler:")
_ALIKE = 0.9  # of 1: `workflow.completed` is like an engine event, `order:completed` is not; chosen by trying such names


def is_engine_name(name: str) -> bool:
    """True for names that are the engine's alone, whether or not it publishes an event of that name."""
    return name.startswith(_PREFIXES)


def check_subscribed(name: str, where: str) -> None:
    """Say that a name is misspelt: its subscriber would never be called.

    A name with a prefix of the engine that no event has: ValidationError, naming the nearest. Another name that is much like
    an engine event may be the user's own: a warning is logged.
    """
    if name in ENGINE_EVENTS:
        return
    if is_engine_name(name):
        near = difflib.get_close_matches(name, ENGINE_EVENTS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"those of the engine are {', '.join(sorted(ENGINE_EVENTS))}"
        raise ValidationError(f"{where}: no event is named {name!r}, and names that begin so are the engine's; {hint}")
    near = difflib.get_close_matches(name.lower(), ENGINE_EVENTS, n=1, cutoff=_ALIKE)
    if near:
        log.warning("event_name_unusual: %r is not %r, an event of the engine that is much like it", name, near[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened. It is published only after the write that it reports is durable."""

    name: str  # one of ENGINE_EVENTS, or what `ctx.emit` was given
    run_id: str | None  # None for events of the engine and the pool
    workflow_id: str | None
    step_id: str | None  # None for events of the whole run
    data: Any  # output, error, payload, reason or wait; None if the event has none
    at: datetime  # aware UTC
