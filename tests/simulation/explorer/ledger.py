"""What happened in a schedule, apart from the database: entries into handlers, calls of clients, and the story.

Owns the records. The rules that compare them with the database are in transitions.py and judgement.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Call", "Entry", "Ledger", "Violation"]


class Violation(Exception):
    """A promise was broken. The text says which, and how."""


@dataclass(slots=True, kw_only=True)
class Entry:
    """One entry into a handler."""

    actor: str
    owner: str
    run_id: str
    step_id: str
    attempt: int
    key: str  # the idempotency key
    at: float
    lease_id: str | None  # of the claim under which the handler was entered
    left: bool = False
    is_call: bool = False  # of a durable function


@dataclass(slots=True, kw_only=True)
class Call:
    """One call of a client."""

    number: int
    actor: str
    kind: str  # "start", "pause", …
    run_id: str | None
    argument: Any
    began: int  # number of the last change before it
    outcome: str = "open"  # "ok", "error", "open", "died"
    result: Any = None
    effects: list[tuple[int, str, str, Any]] = field(default_factory=list)  # (number of the change, kind, run id, id)
    began_at: float = 0.0  # virtual seconds
    ended: int = -1  # number of the last change before its end
    ended_at: float | None = None  # virtual seconds, if it succeeded

    def __str__(self) -> str:
        return f"call {self.number} of {self.actor}: {self.kind} {self.run_id or ''} {self.argument or ''}"


class Ledger:
    """The records of one schedule."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.calls: list[Call] = []
        self.story: list[str] = []

    def tell(self, at: float, text: str) -> None:
        """Add a line to the story."""
        self.story.append(f"{at:9.3f}  {text}")
