"""What became of a fenced write, and what follows from that. Pure: group_commit.py sends writes, run_writer.py performs actions.

Owns the reading of an unknown outcome (`resolve_write`) and the decision after every outcome (`after_write`).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import Enum
from typing import Any, NamedTuple, assert_never

from streamline_pool.domain import transitions, waits
from streamline_pool.domain.change import Change, ChangeKind
from streamline_pool.domain.definition import StepDefinition
from streamline_pool.domain.document import RunDocument
from streamline_pool.domain.errors import ValidationError
from streamline_pool.protocol.operations import Statement

from .failures import failure_of
from .outcomes import Moment, failed

__all__ = [
    "Action", "Committed", "FailMinimal", "FindStored", "Held", "Lost", "ReadFirst", "Send", "Write", "WriteOutcome",
    "after_reading", "after_write", "first_write", "lease_id_of", "resolve_write", "stored_form",
]  # fmt: skip


class WriteOutcome(Enum):
    """What became of a fenced write."""

    COMMITTED = "committed"
    FORM_COMMITTED = "form committed"  # this form or an earlier one of the same write is stored: go on from the document
    FENCED = "fenced"  # this worker no longer holds the run: write nothing more
    PAUSED = "paused"  # not stored, the run is paused: send the form for paused runs
    RESUMED = "resumed"  # that form was not stored, the run is no longer paused: send the first form
    NOT_YET = "not yet"  # not stored: by the server's clock it is too early
    ARRIVED = "arrived"  # not stored: what the run is about to wait for is in its inbox


def resolve_write(statement: Statement, document: Mapping[str, Any] | None) -> WriteOutcome | None:
    """What a majority read shows of a statement that was sent, or None if it was not stored and may be sent again."""
    fence = statement.fence
    if document is None:
        return WriteOutcome.FENCED
    lease_id = lease_id_of(document)
    holds = lease_id == fence.lease_id
    # Without a lease, and with the same token, no claim came since: the write that follows this `rev` has released the run.
    released = lease_id is None and document.get("token") == fence.token
    if document.get("rev") == fence.rev + 1 and (holds or released):
        if statement.follows_form:
            return WriteOutcome.FORM_COMMITTED
        return WriteOutcome.COMMITTED if released == _releases(statement) else WriteOutcome.FENCED
    if not holds or document.get("rev") != fence.rev:
        return WriteOutcome.FENCED
    wanted = statement.update["q"].get("paused")
    if wanted is True and document.get("paused") is not True:
        return WriteOutcome.RESUMED
    if isinstance(wanted, dict) and document.get("paused") is True:
        return WriteOutcome.PAUSED
    if "$expr" in statement.update["q"]:
        return WriteOutcome.NOT_YET
    inbox = statement.update["q"].get("inbox")
    return WriteOutcome.ARRIVED if inbox is not None and waits.arrived(document, inbox["$not"]["$elemMatch"]) is not None else None


def _releases(statement: Statement) -> bool:
    return "lease" in statement.update["u"].get("$unset", ())


def lease_id_of(document: Mapping[str, Any]) -> Any:
    """The claim id of the run's lease holder, or None; the field may hold anything that another program stored there."""
    lease = document.get("lease")
    return lease.get("id") if isinstance(lease, Mapping) else None


# --- what follows --------------------------------------------------------------------------------------------------


class Held(NamedTuple):
    """The lease holder's view of its run."""

    document: RunDocument
    step: StepDefinition  # the current one
    place: int  # of that step
    stopping: bool  # no further step is to be started here


class Write(NamedTuple):
    """What is to be stored: the decision, and its form for the state that the run is in."""

    decided: Change  # for a run that is not paused
    change: Change  # what is sent
    under_pause: bool = False
    earlier: tuple[Change, ...] = ()  # forms that were sent before: a late copy of one may be stored in the place of this one

    @property
    def sent(self) -> tuple[Change, ...]:
        """Every form, once this one was sent."""
        return (*self.earlier, self.change)


class Send(NamedTuple):
    """Not stored: send this instead."""

    write: Write


class Committed(NamedTuple):
    """Stored."""

    change: Change


class ReadFirst(NamedTuple):
    """Not stored: the document has something that the holder's copy lacks. Read it, then ask `after_reading`."""


class FindStored(NamedTuple):
    """One of several forms may be stored. Read the run, then ask `stored_form`."""


class Lost(NamedTuple):
    """Another process has the run, or it ended: write nothing more."""


class FailMinimal(NamedTuple):
    """Not even the run's failure can be stored: store that it failed, in as few bytes as possible."""

    cause: ValidationError


Action = Send | Committed | ReadFirst | FindStored | Lost | FailMinimal


def first_write(change: Change, held: Held, now: datetime) -> Write:
    """The write of a decision. A holder that is stopping leaves the next step to the next holder, in this same write."""
    if held.stopping and change.kind is ChangeKind.ADVANCE:
        change = transitions.without_next_start(held.document, change, now)
    return Write(change, change)


def after_write(result: WriteOutcome | ValidationError, write: Write, held: Held, at: Moment) -> Action:
    """What follows when `write` had this result; a ValidationError means that the server can never store it."""
    match result:
        case ValidationError():
            if write.change.kind is ChangeKind.FAIL:
                return FailMinimal(result)
            # A failure has the same form under a pause.
            change = failed(held.document, held.step, held.place, failure_of(result), at)
            return Send(Write(change, change, write.under_pause, earlier=write.sent))
        case WriteOutcome.COMMITTED:
            return Committed(write.change)
        case WriteOutcome.FORM_COMMITTED:
            return FindStored()
        case WriteOutcome.FENCED:
            return Lost()
        case WriteOutcome.PAUSED:
            change = transitions.under_pause(held.document, write.decided, at.now)
            return Send(Write(write.decided, change, under_pause=True, earlier=write.sent))
        case WriteOutcome.RESUMED:
            return Send(Write(write.decided, write.decided, earlier=write.sent))
        case WriteOutcome.NOT_YET:
            change = waits.park(held.document, held.place)
            return Send(Write(change, change, earlier=write.sent))
        case WriteOutcome.ARRIVED:
            return ReadFirst()
        case _:
            assert_never(result)


def after_reading(write: Write, held: Held, now: datetime) -> Write:
    """After `ReadFirst`: `held` is what was read. The wait has ended before it began, or it begins as decided."""
    return first_write(waits.take(held.document, write.decided, now) or write.decided, held, now)._replace(earlier=write.sent)


def stored_form(write: Write, before: RunDocument, found: RunDocument) -> Change | None:
    """Which of the forms that were sent is stored in `found`; None: none of them. `before`: the run before this write.

    A claim, and a control operation that takes the lease, change the token; so with the same token the holder's own form is stored.
    """
    if found["rev"] != before["rev"] + 1 or found["token"] != before["token"]:
        return None
    return next((change for change in reversed(write.sent) if _is_stored(change, before, found)), None)


def _is_stored(change: Change, before: RunDocument, found: RunDocument) -> bool:
    """What tells forms of one decision apart: the state of the run and of its steps, and whether the lease is released."""
    steps = all(
        (found["steps"][place]["status"], found["steps"][place]["attempts"]) == (step["status"], step["attempts"])
        for place, step in change.steps.items()
    )
    return steps and found["status"] == change.fields.get("status", before["status"]) and ("lease" in found) is not change.releases
