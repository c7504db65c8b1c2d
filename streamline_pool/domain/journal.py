"""The calls of a durable function, as its run stores them, and how the function's run goes on: pure functions to a `Change`.

Owns kinds and names of calls, and the changes that only a durable function has. `steps[0]` is the function itself, `MAIN`. Each
call that it makes follows, in the order in which the calls first began. A name finds its call again after every stop: what is stored is
returned, and `fn` is not entered. (DBOS, Absurd and Inngest remember steps by name, too; Restate by position.) How a wait begins
and ends is in waits.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, cast

from .change import Change, ChangeEvent, ChangeKind, make_change
from .definition import MAIN
from .document import Fields, RunDocument, StepDocument
from .errors import ValidationError
from .model import ENDED_STEPS, RunStatus, StepStatus
from .transitions import Failure, context_fields, ended_well, error_of, milliseconds

__all__ = [
    "CALLS_MAX",
    "CALL_KINDS",
    "RUN_BYTES_MAX",
    "begun",
    "begun_again",
    "call_failed",
    "check_name",
    "continue_as_new",
    "ended",
    "event_name",
    "failed_for_good",
    "numbered",
    "park",
    "record",
]

CALL_KINDS = frozenset({"step", "sleep", "wait", "event", "patch"})
"""What a durable function may call; stored as `kind`."""

CALLS_MAX = 5_000
"""Calls of one generation. A fixed limit of the public contract."""

RUN_BYTES_MAX = 12 * 1024 * 1024
"""Of a run with all its calls. A fixed limit of the public contract. It leaves room for what arrives, and for a failure."""

_NAME_CHARS_MAX = 200
_QUOTED = '"'
_NUMBERED = re.compile(r".*(#\d+|\[\d+\])", re.DOTALL)  # what `numbered` and `ctx.map` make of a name


def check_name(name: object, where: str) -> str:
    """`name` if it can name a call; a ValidationError otherwise."""
    if not isinstance(name, str) or not 1 <= len(name) <= _NAME_CHARS_MAX or "\0" in name:
        raise ValidationError(f"{where}: a name is text of 1 to {_NAME_CHARS_MAX} characters, not {name!r:.100}")
    if name == MAIN:
        raise ValidationError(f"{where}: {MAIN!r} is the durable function itself; give the call another name")
    if _NUMBERED.fullmatch(name):
        raise ValidationError(f"{where}: the name {name!r} ends as those that the engine numbers (#2, [0]); give the call another name")
    return name


def event_name(name: str) -> str:
    """The name of a wait for that event. A name of the form that `numbered` makes is quoted, so that it is no use of a shorter one."""
    needs_quotes = _NUMBERED.fullmatch(name) or name.startswith(_QUOTED)
    return f"event:{_QUOTED}{name}{_QUOTED}" if needs_quotes else f"event:{name}"


def numbered(name: str, use: int) -> str:
    """The name under which the n-th use of a name is stored, in one pass through the function."""
    return name if use == 1 else f"{name}#{use}"


# --- one call ------------------------------------------------------------------------------------------------------


def begun(name: str, kind: str, now: datetime) -> StepDocument:
    """A call that begins for the first time."""
    return {"stepId": name, "kind": kind, "status": StepStatus.RUNNING.value, "attempts": 1, "startedAt": now}


def begun_again(call: StepDocument, now: datetime) -> StepDocument:
    """A call of which no result is stored begins again: after a failure, or because its worker was lost."""
    again = cast(StepDocument, {name: value for name, value in call.items() if name != "retryAfter"})
    again["status"], again["startedAt"] = StepStatus.RUNNING.value, now
    again["attempts"] = call["attempts"] + 1
    return again


def ended(call: StepDocument, output: Any, now: datetime) -> StepDocument:
    """The call with its result."""
    return ended_well(call, output, now)


def call_failed(call: StepDocument, failure: Failure, retry_at: datetime) -> StepDocument:
    """An attempt at the call failed, another one follows at `retry_at`."""
    failed = cast(StepDocument, {**call, "failures": call.get("failures", 0) + 1})
    failed["status"], failed["error"], failed["retryAfter"] = StepStatus.PENDING.value, error_of(failure), retry_at
    return failed


def failed_for_good(call: StepDocument, failure: Failure, now: datetime) -> StepDocument:
    """The last attempt at the call failed."""
    failed = cast(StepDocument, {name: value for name, value in call.items() if name not in ("retryAfter", "checkpoint")})
    failed["status"], failed["error"], failed["failures"] = StepStatus.FAILED.value, error_of(failure), call.get("failures", 0) + 1
    failed["endedAt"], failed["durationMs"] = now, milliseconds(call.get("startedAt") or now, now)
    return failed


# --- the run -------------------------------------------------------------------------------------------------------


def record(document: RunDocument, calls: Mapping[int, StepDocument], sets: Mapping[str, Any], events: tuple[ChangeEvent, ...]) -> Change:
    """Calls have begun or ended, by place; the function goes on. A result ends the count of lost workers; a checkpoint does not."""
    fields: Fields = context_fields(document, sets)
    if document["crashes"] and any(call["status"] in ENDED_STEPS for call in calls.values()):
        fields["crashes"] = 0
    return make_change(document, ChangeKind.RECORD, fields, calls, events)


def park(document: RunDocument, wake_at: datetime) -> Change:
    """Every call that goes on waits for its next attempt: the run waits with them, and no worker holds it."""
    main = cast(StepDocument, {**document["steps"][0], "status": StepStatus.PENDING.value})
    return make_change(document, ChangeKind.PARK, {"status": RunStatus.WAITING.value}, {0: main}, wake_at=wake_at, releases=True)


def continue_as_new(document: RunDocument, input: Any, sets: Mapping[str, Any], now: datetime) -> Change:
    """The same run begins again with this input, and without the results of its calls. What has arrived for it stays."""
    main: StepDocument = {"stepId": MAIN, "kind": MAIN, "status": StepStatus.RUNNING.value, "attempts": 1, "startedAt": now}
    fields: Fields = {
        "input": input,
        "steps": [main],
        "generation": document.get("generation", 0) + 1,
        "rewinds": document.get("rewinds", 0) + 1,
        "crashes": 0,
        "failures": 0,
        **context_fields(document, sets),
    }
    return make_change(document, ChangeKind.CONTINUE, fields, {})
