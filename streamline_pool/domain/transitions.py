"""What may happen to a run that a worker holds: pure functions from (document, event, now) to a `Change`.

Owns every decision about a run's next state; ops.py turns a `Change` into one fenced write, engine.py
performs it. No clock, no I/O, nothing of MongoDB. `document` is always the holder's copy and is never changed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

from .definition import Definition, StepDefinition
from .errors import ErrorCode
from .model import RunStatus, StepStatus, timeout_output

__all__ = [
    "Change",
    "Failure",
    "advance",
    "apply",
    "arrived",
    "await_event",
    "current_place",
    "decide_entry",
    "fail_run",
    "finish",
    "park",
    "release",
    "skip",
    "sleep",
    "step_failed",
    "take",
    "time_out",
    "under_pause",
    "wait",
    "wait_answered",
    "wake",
    "without_grant",
]

Document = dict[str, Any]

# Enum look-ups cost on the hot path; these are the stored texts.
_RUNNING, _WAITING, _DONE, _FAILED = (RunStatus.RUNNING.value, RunStatus.WAITING.value, RunStatus.DONE.value, RunStatus.FAILED.value)
_S_PENDING, _S_RUNNING, _S_WAITING = (StepStatus.PENDING.value, StepStatus.RUNNING.value, StepStatus.WAITING.value)
_S_DONE, _S_FAILED, _S_SKIPPED = (StepStatus.DONE.value, StepStatus.FAILED.value, StepStatus.SKIPPED.value)


class Change(NamedTuple):
    """One transition, as data: what one fenced write stores.

    `wake_at` and the lease: exactly one of (lease kept), (`releases` with `wake_at`), (`releases`, terminal or
    waiting for an outside act) holds, which is invariant 4 at the place where it is made.
    """

    name: str  # for logs and for the pause rule: "advance", "retry", …
    fields: Mapping[str, Any]  # top-level fields to set
    steps: Mapping[int, Document]  # whole steps to set, by place
    events: tuple[tuple[str, str | None, Any], ...] = ()  # (name, step id, data), published once the write is durable
    wake_at: datetime | None = None  # from when the run may be claimed again
    releases: bool = False  # the lease is given up with this write
    not_before: datetime | None = None  # the server's clock must have passed this instant, else nothing is written
    unless_arrived: Mapping[str, Any] | None = None  # nothing is written if the inbox holds an item with these fields
    takes: Mapping[str, Any] | None = None  # items with these fields leave the inbox
    seen: str | None = None  # id of an event that this run has taken, and must never take again
    unset: tuple[str, ...] = ()  # top-level fields that end with this write


class Failure(NamedTuple):
    """A failed attempt, normalised: whatever a handler raised or did, in words that can be stored."""

    code: ErrorCode
    message: str
    type: str  # bare class name of what was raised
    traceback: str
    retriable: bool


def current_place(document: Mapping[str, Any]) -> int | None:
    """The place of the step to work on, or None when every step has ended."""
    current = document["currentStepId"]
    if current is None:
        return None
    for place, step in enumerate(document["steps"]):
        if step["stepId"] == current:
            return place
    raise AssertionError(f"currentStepId {current!r} is no step: documents.misfit was not asked")


def advance(document: Document, definition: Definition, place: int, output: Any, sets: Mapping[str, Any], now: datetime) -> Change:
    """The step is done: its result, the cursor and the next step's grant (or the run's end) in one write."""
    step = document["steps"][place]
    started = step.get("startedAt") or now
    done: Document = {
        "stepId": step["stepId"],
        "status": _S_DONE,
        "attempts": step["attempts"],
        "startedAt": started,
        "endedAt": now,
        "durationMs": _milliseconds(started, now),
        "output": output,
    }
    change = _next_step(document, definition, place, done, ("step:completed", step["stepId"], output), sets, now)
    if "hooks" in step or "awaits" in document:
        change = _closed(document, step, change)
    return change


def _closed(document: Document, step: Document, change: Change) -> Change:
    """The step's hooks end with it, and so do answers to them that nobody has waited for; the run awaits no event any more."""
    takes = {"stepId": step["stepId"]} if "hooks" in step else None
    return change._replace(takes=takes, unset=("awaits",) if "awaits" in document else ())


def skip(document: Document, definition: Definition, place: int, sets: Mapping[str, Any], now: datetime) -> Change:
    """The step's condition said no: it ends without having been entered, and the run moves on."""
    step = document["steps"][place]
    skipped: Document = {"stepId": step["stepId"], "status": _S_SKIPPED, "attempts": 0, "endedAt": now, "output": None}
    return _next_step(document, definition, place, skipped, ("step:skipped", step["stepId"], None), sets, now)


def _next_step(
    document: Document,
    definition: Definition,
    place: int,
    ended: Document,
    event: tuple[str, str | None, Any],
    sets: Mapping[str, Any],
    now: datetime,
) -> Change:
    following = place + 1
    if following == len(document["steps"]):
        fields = {
            "status": _DONE,
            "currentStepId": None,
            "output": ended["output"],
            "endedAt": now,
            "crashes": 0,
            "failures": 0,
            **_context_fields(document, sets),
        }
        return Change("finish", fields, {place: ended}, (event, ("workflow:completed", None, ended["output"])), releases=True)
    upcoming = document["steps"][following]
    grant: Document = {
        "stepId": upcoming["stepId"],
        "status": _S_RUNNING,
        "attempts": upcoming["attempts"] + 1,
        "startedAt": now,
    }
    fields = {"currentStepId": grant["stepId"]}
    if document["status"] != _RUNNING:
        fields["status"] = _RUNNING
    if document["crashes"] or document["failures"]:
        # Lost workers and failed attempts are counted per step: a result ends the count.
        fields["crashes"] = fields["failures"] = 0
    if sets:
        fields.update(_context_fields(document, sets))
    return Change("advance", fields, {place: ended, following: grant}, (event,))


def _context_fields(document: Document, sets: Mapping[str, Any]) -> Document:
    """Context keys one by one where a path can name them; otherwise the whole context, which only the holder writes."""
    if not sets:
        return {}
    if all(key and not key.startswith("$") and "." not in key for key in sets):
        return {f"context.{key}": value for key, value in sets.items()}
    return {"context": {**document["context"], **sets}}


def finish(document: Document, now: datetime) -> Change:
    """Every step has ended but the run has not: the last result was stored while the run was paused."""
    output = document["steps"][-1].get("output")
    fields = {"status": _DONE, "output": output, "endedAt": now}
    return Change("finish", fields, {}, (("workflow:completed", None, output),), releases=True)


def decide_entry(document: Document, place: int) -> Change:
    """The step's condition said yes: kept with the step, so that no later attempt decides anew."""
    return Change("decide", {}, {place: {**document["steps"][place], "decided": True}})


def sleep(document: Document, place: int, until: datetime, sets: Mapping[str, Any], now: datetime) -> Change:
    """The handler ended in `ctx.sleep`: the step waits for an instant, and is done when that has come."""
    change = _begin_wait(document, place, {"type": "timer", "reason": "sleep", "resumeAt": until}, sets)
    return change._replace(name="sleep", wake_at=until, releases=True)


def wake(document: Document, definition: Definition, place: int, now: datetime) -> Change:
    """The sleep is over: its step is done, provided that the server's clock agrees."""
    change = _resumed(document, definition, place, None, now)
    return change._replace(name="wake", not_before=document["steps"][place]["waitingFor"]["resumeAt"])


def wait(document: Document, place: int, waiting_for: Document, sets: Mapping[str, Any], now: datetime) -> Change:
    """The handler ended in `ctx.wait`: the step waits for a person's answer, or for the answer to its hook.

    `waiting_for` is stored as it is; its `expiresAt`, if there is one, is when the wait is given up. An answer that
    came to the hook before is in the inbox: then this is not written, and `take` follows instead.
    """
    change = _begin_wait(document, place, waiting_for, sets)
    unless = {"stepId": document["steps"][place]["stepId"], "gen": change.fields["waitGen"]}
    return change._replace(
        name="wait",
        wake_at=waiting_for.get("expiresAt"),
        releases=True,
        unless_arrived=unless if "hooks" in document["steps"][place] else None,
    )


def await_event(document: Document, place: int, waiting_for: Document, sets: Mapping[str, Any], now: datetime) -> Change:
    """The handler ended in `ctx.wait_for`: from now on events find the run. It is kept until broadcasts were looked for.

    Not written if the event is in the inbox already; `take` follows instead.
    """
    change = _begin_wait(document, place, waiting_for, sets)
    fields = {**change.fields, "awaits": waiting_for["eventName"]}
    return change._replace(name="await", fields=fields, unless_arrived={"name": waiting_for["eventName"]})


def _begin_wait(document: Document, place: int, waiting_for: Document, sets: Mapping[str, Any]) -> Change:
    step = document["steps"][place]
    gen = document.get("waitGen", 0) + 1
    waiting = {**_entered(step), "status": _S_WAITING, "waitingFor": waiting_for, "gen": gen}
    fields: Document = {"status": _WAITING, "waitGen": gen, "crashes": 0, "failures": 0, **_context_fields(document, sets)}
    events = (("step:waiting", step["stepId"], waiting_for), ("workflow:waiting", step["stepId"], waiting_for))
    return Change("", fields, {place: waiting}, events)


def arrived(document: Mapping[str, Any], wanted: Mapping[str, Any] | None) -> Document | None:
    """The oldest item of the inbox that has the `wanted` fields, or None."""
    if wanted is None:
        return None
    inbox = document.get("inbox")
    return next((item for item in inbox if _has(item, wanted)), None) if isinstance(inbox, list) else None


def _has(item: Any, wanted: Mapping[str, Any]) -> bool:
    """Whether an item of the inbox, in which another program may have put anything, has these fields."""
    return isinstance(item, dict) and all(item.get(name) == value for name, value in wanted.items())


def take(document: Document, definition: Definition, waiting: Change, now: datetime) -> Change | None:
    """What a wait comes to whose answer has arrived before it: the step is done at once. None: it has not arrived."""
    item = arrived(document, waiting.unless_arrived)
    if item is None:
        return None
    (place,) = waiting.steps
    change = advance(document, definition, place, item.get("data"), {}, now)
    kept = {name: value for name, value in waiting.fields.items() if name in ("waitGen", "context") or name.startswith("context.")}
    # A hook's answers go with the step (`_closed`); an event is one item of several.
    takes = change.takes if "stepId" in item else {"id": item.get("id")}
    return _answered(change._replace(fields={**change.fields, **kept}, takes=takes), place, item.get("id"))


def _answered(change: Change, place: int, answer_id: Any) -> Change:
    """The step keeps whose answer it was: a caller whose reply was lost asks for it."""
    return change._replace(steps={**change.steps, place: {**change.steps[place], "answer": answer_id}})


def wait_answered(document: Document, definition: Definition, place: int, item: Mapping[str, Any], now: datetime) -> Change:
    """A waiting run has found what it waits for: in its inbox, or among the events that were sent to all."""
    change = _resumed(document, definition, place, item.get("data"), now)
    if "_id" in item:  # sent to all
        return _answered(change._replace(name="look", seen=item["_id"]), place, item["_id"])
    return _answered(change._replace(name="look", takes={"id": item.get("id")}), place, item.get("id"))


def time_out(document: Document, definition: Definition, place: int, now: datetime) -> Change:
    """Nobody answered in time: the step is done with an output that says so, provided that the server's clock agrees."""
    waiting_for = document["steps"][place]["waitingFor"]
    change = _resumed(document, definition, place, timeout_output(waiting_for, now), now)
    return change._replace(name="wake", not_before=waiting_for["expiresAt"])


def _resumed(document: Document, definition: Definition, place: int, output: Any, now: datetime) -> Change:
    """The end of a wait: its step is done, and the run goes on."""
    change = advance(document, definition, place, output, {}, now)
    resumed = ("workflow:resumed", document["steps"][place]["stepId"], output)
    return change._replace(events=(*change.events[:1], resumed, *change.events[1:]))


def park(document: Document, place: int) -> Change:
    """Nothing has ended the wait: back to it, with its own `wakeAt`, or none if only an outside act can end it."""
    waiting_for = document["steps"][place]["waitingFor"]
    wake_at = waiting_for.get("resumeAt" if waiting_for["type"] == "timer" else "expiresAt")
    return Change("park", {"status": _WAITING}, {}, wake_at=wake_at, releases=True)


def step_failed(document: Document, step: StepDefinition, place: int, failure: Failure, now: datetime, retry_at: datetime) -> Change:
    """One attempt failed: wait for the next, or end the run when there is none."""
    failures = document["failures"] + 1
    stored = document["steps"][place]
    if not failure.retriable or failures >= step.retry.attempts_max:
        used_up = failure.retriable and step.retry.attempts_max > 1
        return fail_run(document, place, failure, now, failures=failures, code=ErrorCode.MAX_RETRIES_EXCEEDED if used_up else failure.code)
    error = _error(failure)
    pending = {**_entered(stored), "status": _S_PENDING, "error": error, "retryAfter": retry_at}
    data = {"error": error, "retryAfter": retry_at, "attempt": stored["attempts"]}
    events = (("step:retry-scheduled", stored["stepId"], data), ("workflow:retry", stored["stepId"], data))
    return Change("retry", {"status": _WAITING, "failures": failures}, {place: pending}, events, wake_at=retry_at, releases=True)


def fail_run(document: Document, place: int, failure: Failure, now: datetime, *, failures: int, code: ErrorCode) -> Change:
    """The run ends here: the step keeps its own cause, the run says what it means for it."""
    stored = document["steps"][place]
    step_error = _error(failure)
    message = failure.message
    if code is ErrorCode.MAX_RETRIES_EXCEEDED:
        message = f"step {stored['stepId']} failed {failures} times, the last time with {failure.code}: {failure.type}: {failure.message}"
    run_error = {"code": code.value, "message": message, "type": failure.type, "stepId": stored["stepId"], "traceback": failure.traceback}
    started = stored.get("startedAt") or now
    failed = {**_entered(stored), "status": _S_FAILED, "error": step_error, "endedAt": now, "durationMs": _milliseconds(started, now)}
    fields = {"status": _FAILED, "error": run_error, "endedAt": now, "failures": failures}
    events = (("step:failed", stored["stepId"], step_error), ("workflow:failed", None, run_error))
    return Change("fail", fields, {place: failed}, events, releases=True, unset=("awaits",) if "awaits" in document else ())


def release(document: Document, place: int, now: datetime, *, entered: bool) -> Change:
    """Nothing is known to have failed: claimable again at once, by anyone, uncounted (drain, second INT).

    Not `entered`: the attempt that the claim counted has not taken place.
    """
    step = document["steps"][place]
    steps: dict[int, Document] = {}
    if step["status"] == _S_RUNNING:
        steps = {place: {**step, "status": _S_PENDING, "attempts": step["attempts"] - (0 if entered else 1)}}
    return Change("release", {}, steps, wake_at=_in_turn(document, now), releases=True)


def without_grant(document: Document, change: Change, now: datetime) -> Change:
    """A step's result without the start of the next one: whoever claims the run grants and counts that."""
    ended = dict(list(change.steps.items())[:1])
    return change._replace(name="advance", steps=ended, wake_at=_in_turn(document, now), releases=True)


def _in_turn(document: Document, now: datetime) -> datetime:
    """A `wakeAt` that is due at once and keeps the run's place: it queues by its age, not behind all who came meanwhile."""
    created_at = document.get("createdAt")
    return created_at if isinstance(created_at, datetime) and created_at < now else now


def under_pause(document: Document, change: Change, now: datetime) -> Change:
    """The same result for a run that turned out to be paused: stored, but nothing is started or ended by it.

    `wake_at` of what this returns goes to `pausedWakeAt`. Only a handler's result is stored; ending a sleep
    is left to the holder after resume.
    """
    if change.name in ("wake", "look", "decide", "park", "release") or (change.name == "finish" and not change.steps):
        kept_steps = {} if change.name in ("wake", "look") else change.steps
        if change.name == "decide":  # the entry that the claim or the step before has counted does not take place
            kept_steps = {place: {**step, "status": _S_PENDING, "attempts": step["attempts"] - 1} for place, step in change.steps.items()}
        return Change("release", {}, kept_steps, wake_at=change.wake_at if change.name == "park" else now, releases=True)
    if change.name == "finish":
        kept = {name: value for name, value in change.fields.items() if name not in ("status", "output", "endedAt")}
        return change._replace(name="advance", fields=kept, events=change.events[:1], wake_at=now, releases=True)
    if change.name == "await":
        return change._replace(wake_at=now, releases=True)  # it still owes its look for what was sent to all
    return without_grant(document, change, now) if change.name == "advance" and not change.releases else change


def apply(document: Document, change: Change) -> None:
    """Bring the holder's copy to what the write has stored. The one function here that changes its argument."""
    for name, value in change.fields.items():
        if name.startswith("context."):
            document["context"][name[len("context.") :]] = value
        else:
            document[name] = value
    for place, step in change.steps.items():
        document["steps"][place] = step
    for name in change.unset:
        document.pop(name, None)
    if change.takes is not None:
        document["inbox"] = [item for item in document.get("inbox") or () if not _has(item, change.takes)]
    if change.seen is not None:
        document["seen"] = [*(document.get("seen") or ()), change.seen]
    document["rev"] += 1


_KEPT = frozenset({"stepId", "attempts", "startedAt", "checkpoint", "decided", "error", "hooks"})


def _entered(step: Document) -> Document:
    """What a step keeps from its entry, without what belonged to an earlier wait or failure."""
    return {key: value for key, value in step.items() if key in _KEPT}


def _error(failure: Failure) -> Document:
    return {"code": failure.code.value, "message": failure.message, "type": failure.type}


def _milliseconds(start: datetime, end: datetime) -> int:
    return max(0, round((end - start).total_seconds() * 1000))
