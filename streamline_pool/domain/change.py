"""One transition of a run, as data: what one fenced write stores. Owns the form, and the check against the tables of moves.

transitions.py and waits.py make changes, protocol/commits.py turns one into a write, engine/ performs the write.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import Enum
from typing import Any, NamedTuple, cast

from .document import Fields, RunDocument, StepDocument
from .model import RUN_MOVES, STEP_MOVES

__all__ = ["Change", "ChangeEvent", "ChangeKind", "apply", "item_has", "make_change"]

ChangeEvent = tuple[str, str | None, Any]
"""(event name, step id or None, data)"""


class ChangeKind(Enum):
    """What a change does. The engine and `transitions.under_pause` decide by it; logs name it."""

    ADVANCE = "advance"  # a step's result is stored, and the next step starts (or is left to the next holder)
    FINISH = "finish"  # the run is done
    ENTRY_DECIDED = "entry decided"  # the step's condition allowed the entry
    SLEEP = "sleep"  # the step waits for a time
    WAIT = "wait"  # the step waits for an answer
    AWAIT_EVENT = "await event"  # the step waits for an event; the holder keeps the run until it has searched for broadcasts
    WAKE = "wake"  # the clock ended the wait
    WAIT_ANSWERED = "wait answered"  # an event or an answer ended the wait
    PARK = "park"  # the wait goes on, and the lease is released
    RETRY = "retry"  # the attempt failed, another one follows
    FAIL = "fail"  # the run failed
    RECORD = "record"  # calls of a durable function have begun or ended; it goes on
    CONTINUE = "continue"  # a durable function begins again, with another input and no results
    RELEASE = "release"  # the lease is released, and any worker may go on with the run


class Change(NamedTuple):
    """One transition. Made by `make_change`.

    Exactly one of these holds: the lease is kept; or `releases` with `wake_at`; or `releases`, and the run has ended or
    waits for an answer. So no change can leave a run that no process will ever continue.
    """

    kind: ChangeKind
    fields: Mapping[str, Any]  # top-level fields to set
    steps: Mapping[int, StepDocument]  # whole steps to set, by place
    events: tuple[ChangeEvent, ...] = ()  # published once the write is durable
    wake_at: datetime | None = None  # from when the run may be claimed again
    releases: bool = False  # the lease is released with this write
    not_before: datetime | None = None  # the server's clock must have passed this time, else nothing is written
    unless_arrived: Mapping[str, Any] | None = None  # nothing is written if the inbox holds an item with these fields
    takes: tuple[Mapping[str, Any], ...] = ()  # items with the fields of one of these leave the inbox
    seen: str | None = None  # id of a broadcast event that this run has received, and must never receive again
    unset: tuple[str, ...] = ()  # top-level fields that end with this write


# Pairs of stored texts: enum look-ups cost on the hot path.
_RUN_MOVES = frozenset((old.value, new.value) for old, following in RUN_MOVES.items() for new in following)
_STEP_MOVES = frozenset((old.value, new.value) for old, following in STEP_MOVES.items() for new in following)


def make_change(
    document: RunDocument,
    kind: ChangeKind,
    fields: Mapping[str, Any],
    steps: Mapping[int, StepDocument],
    events: tuple[ChangeEvent, ...] = (),
    *,
    wake_at: datetime | None = None,
    releases: bool = False,
) -> Change:
    """A change of `document`. Asserts that each status in it may follow the stored one (`RUN_MOVES`, `STEP_MOVES`)."""
    status = fields.get("status")
    assert status is None or (document["status"], status) in _RUN_MOVES, f"{kind}: a run goes from {document['status']} to {status}"
    for place, step in steps.items():
        old = document["steps"][place]["status"]
        assert (old, step["status"]) in _STEP_MOVES, f"{kind}: step {step['stepId']} goes from {old} to {step['status']}"
    return Change(kind, fields, steps, events, wake_at, releases)


def apply(document: RunDocument, change: Change) -> None:
    """Bring the holder's copy to what the write has stored. The one function of domain/ that changes its argument."""
    stored = cast(Fields, document)
    for name, value in change.fields.items():
        if name.startswith("context."):
            document["context"][name.removeprefix("context.")] = value
        else:
            stored[name] = value
    for place, step in change.steps.items():
        document["steps"][place] = step
    for name in change.unset:
        stored.pop(name, None)
    if change.takes:
        kept = (item for item in document.get("inbox") or () if not any(item_has(item, taken) for taken in change.takes))
        document["inbox"] = list(kept)
    if change.seen is not None:
        document["seen"] = [*(document.get("seen") or ()), change.seen]
    document["rev"] += 1


def item_has(item: Any, wanted: Mapping[str, Any]) -> bool:
    """Whether an item of the inbox, into which another program may have put anything, has these fields."""
    return isinstance(item, dict) and all(item.get(name) == value for name, value in wanted.items())
