"""What the end of an attempt means for its run: from a handler's outcome to the transition that is to be stored.

Owns the reading of outcomes, conditions and version mismatches. Pure but for the users' own predicates: it writes
nothing, and clock and chance come as arguments. run_writer.py performs what is decided here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple, cast

from streamline_pool.domain import journal, transitions, waits
from streamline_pool.domain.change import Change
from streamline_pool.domain.definition import Definition, StepDefinition
from streamline_pool.domain.document import RunDocument, WaitDocument
from streamline_pool.domain.errors import ErrorCode, MaxRetriesExceededError, WorkflowError
from streamline_pool.domain.transitions import Failure
from streamline_pool.protocol.outputs import NewOutput
from streamline_pool.protocol.payloads import EXTERNAL_KEY, split_output, with_outputs
from streamline_pool.protocol.run_document import parse_run

from .attempt import Attempt, Kind, Outcome
from .context import Context
from .failures import failure_of, timeout_failure
from .intents import ContinueSuspension, Intents, ParkSuspension, ReleaseSuspension, SleepSuspension, Suspension, WaitSuspension

__all__ = ["Decided", "Moment", "allowed", "attempt_ended", "damaged", "failed", "version_mismatch"]

_NO_THREAD_PAUSE_S = 0.5  # a guess: this worker is recycled meanwhile, or a thread has become free; without it claims would follow at once


class Decided(NamedTuple):
    """What is to be stored of a run."""

    change: Change
    size: int = 0  # bytes that it takes in the document, payloads only
    output: NewOutput | None = None  # to be stored beside the run before anything refers to it


class Moment(NamedTuple):
    """The circumstances of a decision: time, chance, and ids."""

    now: datetime  # the server's time
    chance: float  # uniform in [0, 1), for jitter
    new_id: Callable[[], str]  # for an output beside the run

    def after(self, delay_s: float) -> datetime:
        """The time so many seconds from now, in whole milliseconds."""
        return self.now + timedelta(milliseconds=round(delay_s * 1000))


def attempt_ended(document: RunDocument, definition: Definition, place: int, attempt: Attempt, outcome: Outcome, at: Moment) -> Decided:
    """The transition that follows an attempt at the step at `place`."""
    step, intents, reason = definition.steps[place], attempt.intents, attempt.context.signal.reason
    if reason == "timeout":
        return Decided(failed(document, step, place, timeout_failure(step), at))
    if outcome.kind in (Kind.NOT_ENTERED, Kind.TOO_LATE):
        released = transitions.release(document, place, at.now, was_entered=False)
        return Decided(released if outcome.kind is Kind.TOO_LATE else released._replace(wake_at=at.after(_NO_THREAD_PAUSE_S)))
    suspension = intents.suspension or (outcome.value if outcome.kind is Kind.SUSPENDED else None)
    if suspension is None and outcome.kind is not Kind.RETURNED:
        if reason in ("shutdown", "lease-lost"):
            return Decided(transitions.release(document, place, at.now, was_entered=True))
        change = failed(document, step, place, failure_of(outcome.value), at)
        return Decided(_naming_call(change, document, outcome.value) if definition.is_durable else change)
    if isinstance(suspension, ContinueSuspension):
        return Decided(journal.continue_as_new(document, suspension.input, intents.sets, at.now), suspension.size + intents.sets_bytes)
    if suspension is not None:
        return Decided(_suspended(document, place, suspension, intents.sets, at), intents.sets_bytes)
    return _returned(document, step, place, outcome.value, intents, at)


def _returned(document: RunDocument, step: StepDefinition, place: int, value: Any, intents: Intents, at: Moment) -> Decided:
    """The handler returned an output, which must be storable."""
    try:
        output, content, size = split_output(value, f"output of step {step.id}", at.new_id)
    except WorkflowError as exc:
        return Decided(failed(document, step, place, failure_of(exc), at))
    change = transitions.advance(document, place, output, intents.sets, at.now)
    beside = None if content is None else NewOutput(output[EXTERNAL_KEY], document["_id"], content)
    # The last step's output is stored once more, as the run's.
    return Decided(change, 2 * size + intents.sets_bytes, beside)


def _suspended(document: RunDocument, place: int, suspension: Suspension, sets: Mapping[str, Any], at: Moment) -> Change:
    """The handler left by `ctx.sleep`, `ctx.wait` or `ctx.wait_for`. An answer that has arrived already ends the step at once."""
    if isinstance(suspension, ReleaseSuspension):
        released = transitions.release(document, place, at.now, was_entered=True)
        return released._replace(wake_at=at.after(suspension.delay_s)) if suspension.delay_s else released
    if isinstance(suspension, ParkSuspension):
        return journal.park(document, suspension.wake_at)
    assert isinstance(suspension, SleepSuspension | WaitSuspension), "a handler is suspended by a sleep or by a wait"
    place = place if suspension.place is None else suspension.place
    if isinstance(suspension, SleepSuspension):
        return waits.sleep(document, place, at.after(suspension.delay_s), sets)
    waiting_for = cast(WaitDocument, dict(suspension.waiting_for))
    if suspension.timeout_s is not None:
        waiting_for["expiresAt"] = at.after(suspension.timeout_s)
    begin = waits.await_event if waiting_for["type"] == "event" else waits.wait
    waiting = begin(document, place, waiting_for, sets)
    return waits.take(document, waiting, at.now) or waiting


def _naming_call(change: Change, document: RunDocument, exc: BaseException) -> Change:
    """The failure of a durable function. If a failed call has ended it, the run's error names that call: `Workflow.retry` begins there."""
    step_id = exc.context.get("step_id") if isinstance(exc, MaxRetriesExceededError) else None
    named = step_id is not None and "error" in change.fields and any(step["stepId"] == step_id for step in document["steps"])
    return change._replace(fields={**change.fields, "error": {**change.fields["error"], "stepId": step_id}}) if named else change


def failed(document: RunDocument, step: StepDefinition, place: int, failure: Failure, at: Moment) -> Change:
    """The attempt failed: another one after its back-off, or the end of the run."""
    delay_s = step.retry.delay_after(document["failures"] + 1, at.chance)
    return transitions.step_failed(document, step, place, failure, at.now, at.after(delay_s))


def damaged(document: RunDocument, place: int, exc: WorkflowError, now: datetime) -> Change:
    """The run ends because a part of it, such as an output, is missing."""
    failure = Failure(exc.code, exc.message, type(exc).__name__, "", False)
    return transitions.fail_run(document, place, failure, now, failures=document["failures"], code=exc.code)


async def allowed(step: StepDefinition, context: Context, document: RunDocument, outputs: Mapping[str, Any]) -> bool:
    """Whether the step is to be entered: `condition`, then `skip_if`, then `run_if`; each may be async."""
    questions: list[tuple[Callable[[], Any], bool]] = []
    if step.condition is not None:
        condition = step.condition
        questions.append((lambda: condition(context, parse_run(with_outputs(document, outputs))), True))
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


def version_mismatch(document: RunDocument, definition: Definition, now: datetime) -> Change | None:
    """How the run fails when its stored steps are not those of the version it names; None when they are."""
    stored = [step["stepId"] for step in document["steps"]]
    if definition.is_durable and transitions.is_durable(document):
        return None  # which calls it makes is for its code to say
    if stored == list(definition.index) and not definition.is_durable and not transitions.is_durable(document):
        return None
    message = (
        f"run {document['_id']} was stored with steps {', '.join(stored)}, but workflow {definition.workflow_id} "
        f"{definition.version} has {', '.join(definition.index)}; give changed steps a new version"
    )
    failure = Failure(ErrorCode.VERSION_MISMATCH, message, "VersionMismatchError", "", False)
    place = transitions.current_place(document) or 0
    return transitions.fail_run(document, place, failure, now, failures=document["failures"], code=failure.code)
