"""How a step begins to wait, and how its wait ends: pure functions from (document, event, now) to a `Change`.

Owns sleeps, waits for answers, waits for events, and their deadlines. What follows a result is in transitions.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, cast

from .change import Change, ChangeKind, item_has, make_change
from .document import Fields, InboxItem, RunDocument, StepDocument, WaitDocument
from .model import RunStatus, StepStatus, timeout_output
from .transitions import advance, context_fields, entered

__all__ = ["arrived", "await_event", "park", "sleep", "take", "time_out", "wait", "wait_answered", "wake"]

_WAITING = RunStatus.WAITING.value  # enum look-ups cost on the hot path


# --- beginning -----------------------------------------------------------------------------------------------------


def sleep(document: RunDocument, place: int, until: datetime, sets: Mapping[str, Any]) -> Change:
    """The handler ended in `ctx.sleep`: the step waits until then, and is done."""
    change = _begin_wait(document, ChangeKind.SLEEP, place, {"type": "timer", "reason": "sleep", "resumeAt": until}, sets)
    return change._replace(wake_at=until, releases=True)


def wait(document: RunDocument, place: int, waiting_for: WaitDocument, sets: Mapping[str, Any]) -> Change:
    """The handler ended in `ctx.wait`: the step waits for a person's answer, or for the answer to its hook.

    `waiting_for` is stored as it is; at its `expiresAt`, if there is one, the wait ends without an answer. An answer that
    came to the hook earlier is in the inbox: then this change is not written, and `take` follows instead.
    """
    step = document["steps"][place]
    change = _begin_wait(document, ChangeKind.WAIT, place, waiting_for, sets)
    unless = {"stepId": step["stepId"], "gen": change.fields["waitGen"]} if "hooks" in step else None
    return change._replace(wake_at=waiting_for.get("expiresAt"), releases=True, unless_arrived=unless)


def await_event(document: RunDocument, place: int, waiting_for: WaitDocument, sets: Mapping[str, Any]) -> Change:
    """The handler ended in `ctx.wait_for`: from now on events find the run.

    The holder keeps the run until it has searched for broadcast events. Not written if the event is in the inbox
    already; `take` follows instead.
    """
    change = _begin_wait(document, ChangeKind.AWAIT_EVENT, place, waiting_for, sets)
    fields = {**change.fields, "awaits": waiting_for["eventName"]}
    return change._replace(fields=fields, unless_arrived={"name": waiting_for["eventName"]})


def _begin_wait(document: RunDocument, kind: ChangeKind, place: int, waiting_for: WaitDocument, sets: Mapping[str, Any]) -> Change:
    step = document["steps"][place]
    gen = document.get("waitGen", 0) + 1
    waiting = entered(step)
    waiting["status"], waiting["waitingFor"], waiting["gen"] = StepStatus.WAITING.value, waiting_for, gen
    fields: Fields = {"status": _WAITING, "waitGen": gen, "crashes": 0, "failures": 0, **context_fields(document, sets)}
    if "kind" in step:
        fields["currentStepId"] = step["stepId"]  # a durable function waits in one of its calls
    events = (("step:waiting", step["stepId"], waiting_for), ("workflow:waiting", step["stepId"], waiting_for))
    return make_change(document, kind, fields, {place: waiting}, events)


# --- answers that came first ---------------------------------------------------------------------------------------


def arrived(document: Mapping[str, Any] | RunDocument, wanted: Mapping[str, Any] | None) -> InboxItem | None:
    """The oldest item of the inbox that has the `wanted` fields, or None."""
    if wanted is None:
        return None
    inbox = document.get("inbox")
    return next((item for item in inbox if item_has(item, wanted)), None) if isinstance(inbox, list) else None


def take(document: RunDocument, waiting: Change, now: datetime) -> Change | None:
    """What a wait becomes whose answer arrived before it: the step is done at once. None: the answer has not arrived."""
    item = arrived(document, waiting.unless_arrived)
    if item is None:
        return None
    (place,) = waiting.steps
    change = advance(document, place, item.get("data"), {}, now)
    kept = {name: value for name, value in waiting.fields.items() if name in ("waitGen", "context") or name.startswith("context.")}
    return _answered(_taking(change._replace(fields={**change.fields, **kept}), item), place, item.get("id"))


def _taking(change: Change, item: Mapping[str, Any]) -> Change:
    """The item leaves the inbox. `advance` takes the answers to the step's hooks out with the step; an event is one item of several."""
    return change if "stepId" in item else change._replace(takes=(*change.takes, {"id": item.get("id")}))


# --- ending --------------------------------------------------------------------------------------------------------


def wake(document: RunDocument, place: int, now: datetime) -> Change:
    """The sleep is over: its step is done, provided that the server's clock agrees."""
    change = _resumed(document, place, None, now)
    return change._replace(kind=ChangeKind.WAKE, not_before=document["steps"][place]["waitingFor"]["resumeAt"])


def time_out(document: RunDocument, place: int, now: datetime) -> Change:
    """No answer came in time: the step is done with an output that says so, provided that the server's clock agrees."""
    waiting_for = document["steps"][place]["waitingFor"]
    change = _resumed(document, place, timeout_output(waiting_for, now), now)
    return change._replace(kind=ChangeKind.WAKE, not_before=waiting_for["expiresAt"])


def wait_answered(document: RunDocument, place: int, item: Mapping[str, Any], now: datetime) -> Change:
    """A waiting run has found what it waits for: in its inbox, or among the events that were broadcast (they have `_id`)."""
    change = _resumed(document, place, item.get("data"), now)._replace(kind=ChangeKind.WAIT_ANSWERED)
    if "_id" in item:
        return _answered(change._replace(seen=item["_id"]), place, item["_id"])
    return _answered(_taking(change, item), place, item.get("id"))


def park(document: RunDocument, place: int) -> Change:
    """Nothing has ended the wait: the run goes back to it, with its own `wakeAt`, or none if only an answer can end it."""
    waiting_for = document["steps"][place]["waitingFor"]
    wake_at = waiting_for.get("resumeAt") if waiting_for["type"] == "timer" else waiting_for.get("expiresAt")
    return make_change(document, ChangeKind.PARK, {"status": _WAITING}, {}, wake_at=wake_at, releases=True)


def _resumed(document: RunDocument, place: int, output: Any, now: datetime) -> Change:
    """The end of a wait: its step is done, and the run goes on."""
    change = advance(document, place, output, {}, now)
    resumed = ("workflow:resumed", document["steps"][place]["stepId"], output)
    return change._replace(events=(*change.events[:1], resumed, *change.events[1:]))


def _answered(change: Change, place: int, answer_id: Any) -> Change:
    """The step keeps the id of its answer: a caller whose reply was lost asks for it."""
    step = cast(StepDocument, {**change.steps[place], "answer": answer_id})
    return change._replace(steps={**change.steps, place: step})
