"""What the end of an attempt means for its run: from a handler's outcome to the transition that is to be stored.

Owns the reading of outcomes, conditions and version mismatches. Pure but for the users' own predicates: it writes
nothing, and clock and chance come as arguments. engine.py performs what is decided here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from . import transitions
from .attempt import Kind, Outcome, failure_of, timeout_failure
from .context import Context, Ending, SleepEnding, WaitEnding
from .definition import Definition, StepDefinition
from .documents import as_payload, parse_run
from .errors import ErrorCode, WorkflowError
from .transitions import Change, Document, Failure

__all__ = ["Moment", "allowed", "change_after", "failed", "version_mismatch"]


class Moment(NamedTuple):
    """When and by what chance something is decided."""

    now: datetime  # the server's time
    chance: float  # uniform in [0, 1), for jitter

    def after(self, seconds: float) -> datetime:
        """The instant so many seconds from now, in whole milliseconds."""
        return self.now + timedelta(milliseconds=round(seconds * 1000))


def change_after(
    document: Document, definition: Definition, place: int, context: Context, outcome: Outcome, at: Moment
) -> tuple[Change, int]:
    """The transition that follows an attempt at the step at `place`, and the size in bytes of what it stores."""
    step = definition.steps[place]
    reason = context.signal.reason
    if reason == "timeout":
        return failed(document, step, place, timeout_failure(step), at), 0
    ending = context._ending  # also when the handler swallowed it and returned
    if ending is None and outcome.kind is Kind.ENDED:
        ending = outcome.value
    if ending is not None:
        return _ended(document, definition, place, ending, context._sets, at), context._sets_bytes
    if outcome.kind is Kind.RETURNED:
        try:
            output, size = as_payload(outcome.value, f"output of step {step.id}")
        except WorkflowError as exc:
            return failed(document, step, place, failure_of(exc), at), 0
        # The last step's output is stored once more, as the run's.
        return transitions.advance(document, definition, place, output, context._sets, at.now), 2 * size + context._sets_bytes
    if reason in ("shutdown", "lease-lost"):
        return transitions.give_back(document, place, at.now, entered=True), 0
    return failed(document, step, place, failure_of(outcome.value), at), 0


def _ended(document: Document, definition: Definition, place: int, ending: Ending, sets: Mapping[str, Any], at: Moment) -> Change:
    """The handler left by `ctx.sleep`, `ctx.wait` or `ctx.wait_for`. What has arrived already is not waited for."""
    if isinstance(ending, SleepEnding):
        return transitions.sleep(document, place, at.after(ending.delay_s), sets, at.now)
    assert isinstance(ending, WaitEnding), "a handler ends in a sleep or in a wait"
    waiting_for = dict(ending.waiting_for)
    if ending.timeout_s is not None:
        waiting_for["expiresAt"] = at.after(ending.timeout_s)
    begin = transitions.await_event if waiting_for["type"] == "event" else transitions.wait
    waiting = begin(document, place, waiting_for, sets, at.now)
    return transitions.take(document, definition, waiting, at.now) or waiting


def failed(document: Document, step: StepDefinition, place: int, failure: Failure, at: Moment) -> Change:
    """The attempt failed: another one after its back-off, or the end of the run."""
    delay_s = step.retry.delay_after(document["failures"] + 1, at.chance)
    return transitions.step_failed(document, step, place, failure, at.now, at.after(delay_s))


async def allowed(step: StepDefinition, context: Context, document: Mapping[str, Any]) -> bool:
    """Whether the step is to be entered: `condition`, then `skip_if`, then `run_if`; each may be async."""
    questions: list[tuple[Callable[[], Any], bool]] = []
    if step.condition is not None:
        condition = step.condition
        questions.append((lambda: condition(context, parse_run(document)), True))
    if step.skip_if is not None:
        skip_if = step.skip_if
        questions.append((lambda: skip_if(context), False))
    if step.run_if is not None:
        run_if = step.run_if
        questions.append((lambda: run_if(context), True))
    for ask, wanted in questions:
        answer = ask()
        if inspect.isawaitable(answer):
            answer = await answer
        if bool(answer) is not wanted:
            return False
    return True


def version_mismatch(document: Document, definition: Definition, now: datetime) -> Change | None:
    """How the run fails when its stored steps are not those of the version it names; None when they are."""
    stored = [step["stepId"] for step in document["steps"]]
    if stored == list(definition.index):
        return None
    message = (
        f"run {document['_id']} was stored with steps {', '.join(stored)}, but workflow {definition.workflow_id} "
        f"{definition.version} has {', '.join(definition.index)}; give changed steps a new version"
    )
    failure = Failure(ErrorCode.VERSION_MISMATCH, message, "VersionMismatchError", "", False)
    place = transitions.current_place(document) or 0
    return transitions.fail_run(document, place, failure, now, failures=document["failures"], code=failure.code)
