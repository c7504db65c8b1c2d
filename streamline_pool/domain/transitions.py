"""How a run that a worker holds goes on, ends, or is released: pure functions from (document, event, now) to a `Change`.

Owns every decision about a run's next state but those about waits (waits.py). No clock, no I/O, nothing of MongoDB.
`document` is always the lease holder's copy and is never changed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple, assert_never, cast

from .change import Change, ChangeEvent, ChangeKind, make_change
from .definition import MAIN, StepDefinition
from .document import Fields, RunDocument, StepDocument
from .errors import ErrorCode
from .model import ENDED_STEPS, RunStatus, StepStatus

__all__ = [
    "Failure",
    "advance",
    "context_fields",
    "current_place",
    "decide_entry",
    "ended_well",
    "entered",
    "error_of",
    "fail_run",
    "finish",
    "is_durable",
    "milliseconds",
    "release",
    "skip",
    "step_failed",
    "under_pause",
    "without_next_start",
]

# Enum look-ups cost on the hot path; these are the stored texts.
_RUNNING, _WAITING, _DONE, _FAILED = (RunStatus.RUNNING.value, RunStatus.WAITING.value, RunStatus.DONE.value, RunStatus.FAILED.value)
_S_PENDING, _S_RUNNING = (StepStatus.PENDING.value, StepStatus.RUNNING.value)
_S_DONE, _S_FAILED, _S_SKIPPED = (StepStatus.DONE.value, StepStatus.FAILED.value, StepStatus.SKIPPED.value)


class Failure(NamedTuple):
    """A failed attempt, normalised: whatever a handler raised or did, in words that can be stored."""

    code: ErrorCode
    message: str
    type: str  # bare class name of what was raised
    traceback: str
    retriable: bool


def current_place(document: Mapping[str, Any] | RunDocument) -> int | None:
    """The place of the step to work on, or None when every step has ended."""
    current = document["currentStepId"]
    if current is None:
        return None
    for place, step in enumerate(document["steps"]):
        if step["stepId"] == current:
            return place
    raise AssertionError(f"currentStepId {current!r} is no step: run_document.validate_run_document was not called")


# --- results -------------------------------------------------------------------------------------------------------


def advance(document: RunDocument, place: int, output: Any, sets: Mapping[str, Any], now: datetime) -> Change:
    """The step is done: its result, the cursor and the next step's start (or the run's end) in one write."""
    step = document["steps"][place]
    done = ended_well(step, output, now)
    change = _next_step(document, place, done, ("step:completed", step["stepId"], output), sets, now)
    if "hooks" in step or "awaits" in document:
        # The step's hooks end with it, and so do answers to them that arrived unasked; the run awaits no event any more.
        takes = ({"stepId": step["stepId"]},) if "hooks" in step else ()
        change = change._replace(takes=takes, unset=("awaits",) if "awaits" in document else ())
    return change


def ended_well(step: StepDocument, output: Any, now: datetime) -> StepDocument:
    """The step, or the call, with its result."""
    started = step.get("startedAt") or now
    done: StepDocument = {
        "stepId": step["stepId"],
        "status": _S_DONE,
        "attempts": step["attempts"],
        "startedAt": started,
        "endedAt": now,
        "durationMs": milliseconds(started, now),
        "output": output,
    }
    if "kind" in step:
        done["kind"] = step["kind"]
    return done


def skip(document: RunDocument, place: int, sets: Mapping[str, Any], now: datetime) -> Change:
    """The step's condition refused the entry: the step ends without an attempt, and the run moves on."""
    step = document["steps"][place]
    skipped: StepDocument = {"stepId": step["stepId"], "status": _S_SKIPPED, "attempts": 0, "endedAt": now, "output": None}
    return _next_step(document, place, skipped, ("step:skipped", step["stepId"], None), sets, now)


def _next_step(
    document: RunDocument, place: int, ended: StepDocument, event: ChangeEvent, sets: Mapping[str, Any], now: datetime
) -> Change:
    following = _following(document, place)
    if following is None:
        fields: Fields = {
            "status": _DONE,
            "currentStepId": None,
            "output": ended["output"],
            "endedAt": now,
            "crashes": 0,
            "failures": 0,
            **context_fields(document, sets),
        }
        completed = ("workflow:completed", None, ended["output"])
        return make_change(document, ChangeKind.FINISH, fields, {place: ended}, (event, completed), releases=True)
    upcoming = document["steps"][following]
    start: StepDocument = {
        "stepId": upcoming["stepId"],
        "status": _S_RUNNING,
        "attempts": upcoming["attempts"] + 1,
        "startedAt": now,
    }
    if "kind" in upcoming:
        start["kind"] = upcoming["kind"]
    fields = {"currentStepId": start["stepId"]}
    if document["status"] != _RUNNING:
        fields["status"] = _RUNNING
    if document["crashes"] or document["failures"]:
        # Lost workers and failed attempts are counted per step: a result ends the count.
        fields["crashes"] = fields["failures"] = 0
    if sets:
        fields.update(context_fields(document, sets))
    return make_change(document, ChangeKind.ADVANCE, fields, {place: ended, following: start}, (event,))


def is_durable(document: Mapping[str, Any] | RunDocument) -> bool:
    """Whether the run is one of a durable function: its first step is the function, its other steps are the calls of it."""
    return document["steps"][0].get("kind") == MAIN


def _following(document: RunDocument, place: int) -> int | None:
    """The place of the step after the one that ends; None after the last. A durable function goes on after each of its calls."""
    if is_durable(document):
        return None if place == 0 else 0
    return place + 1 if place + 1 < len(document["steps"]) else None


def context_fields(document: RunDocument, sets: Mapping[str, Any]) -> Fields:
    """Context keys one by one where a path can name them; otherwise the whole context, which only the lease holder writes."""
    if not sets:
        return {}
    if all(key and not key.startswith("$") and "." not in key for key in sets):
        return {f"context.{key}": value for key, value in sets.items()}
    return {"context": {**document["context"], **sets}}


def finish(document: RunDocument, now: datetime) -> Change:
    """Every step has ended but the run has not: the last result was stored while the run was paused."""
    output = document["steps"][0 if is_durable(document) else -1].get("output")
    fields = {"status": _DONE, "output": output, "endedAt": now}
    return make_change(document, ChangeKind.FINISH, fields, {}, (("workflow:completed", None, output),), releases=True)


def decide_entry(document: RunDocument, place: int) -> Change:
    """The step's condition allowed the entry: stored with the step, so that no later attempt decides again."""
    step = cast(StepDocument, {**document["steps"][place], "decided": True})
    return make_change(document, ChangeKind.ENTRY_DECIDED, {}, {place: step})


# --- failures ------------------------------------------------------------------------------------------------------


def step_failed(document: RunDocument, step: StepDefinition, place: int, failure: Failure, now: datetime, retry_at: datetime) -> Change:
    """One attempt failed: schedule the next one, or end the run when there is none."""
    failures = document["failures"] + 1
    stored = document["steps"][place]
    if not failure.retriable or failures >= step.retry.attempts_max:
        used_up = failure.retriable and step.retry.attempts_max > 1
        return fail_run(document, place, failure, now, failures=failures, code=ErrorCode.MAX_RETRIES_EXCEEDED if used_up else failure.code)
    error = error_of(failure)
    pending = entered(stored)
    pending["status"], pending["error"], pending["retryAfter"] = _S_PENDING, error, retry_at
    data = {"error": error, "retryAfter": retry_at, "attempt": stored["attempts"]}
    events = (("step:retry-scheduled", stored["stepId"], data), ("workflow:retry", stored["stepId"], data))
    fields = {"status": _WAITING, "failures": failures}
    return make_change(document, ChangeKind.RETRY, fields, {place: pending}, events, wake_at=retry_at, releases=True)


def fail_run(document: RunDocument, place: int, failure: Failure, now: datetime, *, failures: int, code: ErrorCode) -> Change:
    """The run ends here: the step keeps its own cause, the run's error says what it means for the run.

    A step that had ended before keeps its result.
    """
    stored = document["steps"][place]
    step_error = error_of(failure)
    message = failure.message
    if code is ErrorCode.MAX_RETRIES_EXCEEDED:
        message = f"step {stored['stepId']} failed {failures} times, the last time with {failure.code}: {failure.type}: {failure.message}"
    run_error = {"code": code.value, "message": message, "type": failure.type, "stepId": stored["stepId"], "traceback": failure.traceback}
    steps: dict[int, StepDocument] = {}
    if stored["status"] not in ENDED_STEPS:
        failed = entered(stored)
        started = stored.get("startedAt") or now
        failed["status"], failed["error"], failed["endedAt"], failed["durationMs"] = _S_FAILED, step_error, now, milliseconds(started, now)
        steps[place] = failed
    fields = {"status": _FAILED, "error": run_error, "endedAt": now, "failures": failures}
    run_failed = ("workflow:failed", None, run_error)
    events = (("step:failed", stored["stepId"], step_error), run_failed) if steps else (run_failed,)
    change = make_change(document, ChangeKind.FAIL, fields, steps, events, releases=True)
    return change._replace(unset=("awaits",)) if "awaits" in document else change


# --- releasing -----------------------------------------------------------------------------------------------------


def release(document: RunDocument, place: int, now: datetime, *, was_entered: bool) -> Change:
    """Nothing is known to have failed: any worker may claim the run at once, uncounted (drain, second INT).

    Not `was_entered`: the attempt that the claim counted has not taken place.
    """
    step = document["steps"][place]
    steps: dict[int, StepDocument] = {}
    if step["status"] == _S_RUNNING:
        steps = {place: _not_started(step, 0 if was_entered else 1)}
    return make_change(document, ChangeKind.RELEASE, {}, steps, wake_at=_in_turn(document, now), releases=True)


def without_next_start(document: RunDocument, change: Change, now: datetime) -> Change:
    """A step's result without the start of the next one: the next lease holder starts and counts that."""
    ended = dict(list(change.steps.items())[:1])
    return change._replace(kind=ChangeKind.ADVANCE, steps=ended, wake_at=_in_turn(document, now), releases=True)


def _not_started(step: StepDocument, attempts: int) -> StepDocument:
    """The step back to pending, with so many counted attempts taken back."""
    return cast(StepDocument, {**step, "status": _S_PENDING, "attempts": step["attempts"] - attempts})


def _in_turn(document: RunDocument, now: datetime) -> datetime:
    """A `wakeAt` that is due at once and keeps the run's place: it queues by its age, not behind all that came later."""
    created_at: Any = document.get("createdAt")  # another program may have changed it
    return created_at if isinstance(created_at, datetime) and created_at < now else now


def under_pause(document: RunDocument, change: Change, now: datetime) -> Change:
    """The form of a change for a run that is paused: a handler's result is stored, but nothing is started or ended by it.

    `wake_at` of the result goes to `pausedWakeAt`. What a clock, an answer or a condition decided is left to the lease
    holder after the resume.
    """
    match change.kind:
        case ChangeKind.WAKE | ChangeKind.WAIT_ANSWERED:
            return make_change(document, ChangeKind.RELEASE, {}, {}, wake_at=now, releases=True)
        case ChangeKind.ENTRY_DECIDED:  # the entry that the claim or the step before has counted does not take place
            steps = {place: _not_started(step, 1) for place, step in change.steps.items()}
            return make_change(document, ChangeKind.RELEASE, {}, steps, wake_at=now, releases=True)
        case ChangeKind.PARK:
            return make_change(document, ChangeKind.RELEASE, {}, {}, wake_at=change.wake_at, releases=True)
        case ChangeKind.RELEASE:
            return make_change(document, ChangeKind.RELEASE, {}, change.steps, wake_at=now, releases=True)
        case ChangeKind.FINISH:
            if not change.steps:
                return make_change(document, ChangeKind.RELEASE, {}, {}, wake_at=now, releases=True)
            kept = {name: value for name, value in change.fields.items() if name not in ("status", "output", "endedAt")}
            return change._replace(kind=ChangeKind.ADVANCE, fields=kept, events=change.events[:1], wake_at=now, releases=True)
        case ChangeKind.ADVANCE:
            return change if change.releases else without_next_start(document, change, now)
        case ChangeKind.AWAIT_EVENT:
            return change._replace(wake_at=now, releases=True)  # the next holder still has to search for broadcasts
        case ChangeKind.SLEEP | ChangeKind.WAIT | ChangeKind.RETRY | ChangeKind.FAIL | ChangeKind.RECORD:
            return change
        case ChangeKind.CONTINUE:
            (main,) = change.fields["steps"]
            fields = {**change.fields, "steps": [_not_started(main, main["attempts"])]}
            return change._replace(fields=fields, wake_at=now, releases=True)
        case _:
            assert_never(change.kind)


# --- shared --------------------------------------------------------------------------------------------------------

_KEPT = frozenset({"stepId", "kind", "failures", "attempts", "startedAt", "checkpoint", "decided", "error", "hooks"})


def entered(step: StepDocument) -> StepDocument:
    """What a step keeps from its entry, as a new dict, without what belonged to an earlier wait or failure."""
    return cast(StepDocument, {key: value for key, value in step.items() if key in _KEPT})


def error_of(failure: Failure) -> Fields:
    return {"code": failure.code.value, "message": failure.message, "type": failure.type}


def milliseconds(start: datetime, end: datetime) -> int:
    return max(0, round((end - start).total_seconds() * 1000))
