"""The run document: how a new one is made, how a stored one is checked, and how it becomes a `Run`.

Owns the limits of a run and the checks. The field names and types are in domain/document.py, what a payload may be in codec.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, cast

from streamline_pool.domain.definition import MAIN, Definition, StepDefinition, queue_of
from streamline_pool.domain.document import RunDocument, StepDocument
from streamline_pool.domain.errors import DataCorruptionError, ValidationError
from streamline_pool.domain.journal import CALL_KINDS
from streamline_pool.domain.model import TERMINAL, Run, RunStatus, StepState, StepStatus

from .codec import check_text, decode_document, encode_document
from .expressions import ENDED_STEP_TEXTS
from .replacements import way_out
from .too_large import above_limit

__all__ = ["NEW_RUN_BYTES_MAX", "SLOTS", "as_stored", "check_run_id", "make_context", "new_run", "parse_run", "validate_run_document"]

SLOTS = 16
"""Runs are spread over this many slots, so that the workers of a host do not all try to claim the same runs. A guess: as many
as there are workers on most hosts."""

NEW_RUN_BYTES_MAX = 15 * 1024 * 1024
"""The largest run that can be started. A document ends at 16 MiB, and a full one could not even be claimed."""


def check_run_id(run_id: object) -> str:
    """`run_id` if it is text of 1 to 100 characters that can be stored. Raises ValidationError otherwise."""
    if not isinstance(run_id, str) or not 1 <= len(run_id) <= 100:
        raise ValidationError(f"run_id {run_id!r}: a run id is text of 1 to 100 characters")
    return check_text(run_id, "run_id")


def new_run(
    definition: Definition,
    *,
    run_id: str,
    input: Any,
    context: Any,
    meta: Mapping[str, Any] | None,
    idempotency_key: str | None,
    priority: int,
    queue: str,
    due_at: datetime,
    user_id: str | None,
    tags: Sequence[str],
    slot: int,
    now: datetime,
    start_id: str,
) -> RunDocument:
    """The document of a new run. It can be claimed from `due_at` on, and is a `draft` if that is later than `now`.

    `due_at` and `now` are aware UTC. `start_id` identifies this start, so that the call recognises its own run
    after a lost reply, whatever other clients have done with the run meanwhile.
    """
    document: RunDocument = {
        "_id": run_id,
        "workflowId": definition.workflow_id,
        "version": definition.version,
        "status": (RunStatus.DRAFT if due_at > now else RunStatus.RUNNING).value,
        "steps": [_new_step(step, is_durable=definition.is_durable) for step in definition.steps],
        "currentStepId": definition.steps[0].id,
        "context": context,
        "input": input,
        "output": None,
        "error": None,
        "createdAt": now,
        "updatedAt": now,
        "startedAt": None,
        "endedAt": None,
        "paused": False,
        "userId": user_id,
        "tags": list(tags),
        "meta": dict(meta) if meta is not None else None,
        "priority": priority,
        "queue": queue,
        # From here on: fields that the engine schedules by.
        "startId": start_id,
        "lane": definition.lane_of(queue),
        "slot": slot,
        "wakeAt": due_at,
        "token": 0,
        "rev": 0,
        "acts": 0,
        "waitGen": 0,
        "crashes": 0,
        "failures": 0,
    }
    if idempotency_key is not None:
        document["idempotencyKey"] = idempotency_key
    return document


def _new_step(step: StepDefinition, *, is_durable: bool) -> StepDocument:
    made: StepDocument = {"stepId": step.id, "status": StepStatus.PENDING.value, "attempts": 0}
    if is_durable:
        made["kind"] = MAIN
    return made


def validate_run_document(document: Mapping[str, Any]) -> str | None:
    """Why the engine cannot work with this document: a field is missing or of another type. None: it can.

    The engine calls it once per claim, so that a document which another program has changed fails that run alone.
    """
    for name, kind in _RELIED_ON:
        if not isinstance(document.get(name), kind):
            return f"field {name!r} is {document.get(name)!r}, expected {kind.__name__}"
    try:
        RunStatus(document["status"])
    except ValueError:
        return f"field 'status' is {document['status']!r}, which is no status"
    steps = document["steps"]
    if not steps:
        return "field 'steps' is empty"
    if not isinstance(document.get("waitGen", 0), int):
        return f"field 'waitGen' is {document['waitGen']!r}, expected a whole number"
    for name in ("inbox", "seen"):
        if not isinstance(document.get(name, []), list):
            return f"field {name!r} is {document[name]!r}, expected a list"
    reason = _validate_steps(steps, document.get("currentStepId"))
    if reason is None and document["status"] == RunStatus.DRAFT and any(step["status"] != StepStatus.PENDING for step in steps):
        return "field 'status' is 'draft', but a step has started"  # a claim leaves the status of a run that waits as it is
    return reason


_RELIED_ON: tuple[tuple[str, type], ...] = (
    ("workflowId", str),
    ("version", str),
    ("status", str),
    ("steps", list),
    ("context", dict),
    ("lane", str),
    ("rev", int),
    ("token", int),
    ("crashes", int),
    ("failures", int),
)
_STEP_STATUSES = frozenset(status.value for status in StepStatus)
_WAITS = ("human", "webhook", "timer", "event")


def _validate_steps(steps: list[Any], current: Any) -> str | None:
    """Why the engine cannot work with these steps and this `currentStepId`, or None."""
    for place, step in enumerate(steps):
        reason = _validate_step(step)
        if reason:
            return f"steps[{place}]: {reason}"
    ids = [step["stepId"] for step in steps]
    if len(set(ids)) != len(ids):
        return f"two steps have one id: {', '.join(ids)}"
    if current is not None and current not in ids:
        return f"field 'currentStepId' is {current!r}, which is none of the steps {', '.join(ids)}"
    for step in steps[:1] if steps[0].get("kind") == MAIN else steps:
        if (step["stepId"] == current) if step["status"] in ENDED_STEP_TEXTS else (current is None):
            return f"field 'currentStepId' is {current!r}, but step {step['stepId']} is {step['status']}"
    if steps[0].get("kind") == MAIN:
        return _validate_calls(steps, current)
    for step in steps[ids.index(current) + 1 :] if current is not None else ():
        if step["status"] != StepStatus.PENDING:  # a change could not start it: `STEP_MOVES`
            return f"field 'currentStepId' is {current!r}, but step {step['stepId']}, which comes later, is {step['status']}"
    return None


def _validate_calls(steps: list[Any], current: Any) -> str | None:
    """Why the engine cannot work with these calls of a durable function, or None."""
    for place, step in enumerate(steps[1:], start=1):
        if step.get("kind") not in CALL_KINDS:
            return f"steps[{place}]: kind is {step.get('kind')!r}, expected one of {', '.join(sorted(CALL_KINDS))}"
        if not isinstance(step.get("failures", 0), int):
            return f"steps[{place}]: failures is {step['failures']!r}, expected a whole number"
        if step["status"] in ENDED_STEP_TEXTS if step["stepId"] == current else step["status"] == StepStatus.WAITING:
            return f"field 'currentStepId' is {current!r}, but call {step['stepId']} is {step['status']}"
        if not isinstance(step.get("retryAfter"), (datetime, type(None))):
            return f"steps[{place}]: retryAfter is {step['retryAfter']!r}, expected a date"
    return None


def _validate_step(step: Any) -> str | None:
    """Why the engine cannot work with this element of `steps`, or None."""
    if not isinstance(step, dict) or not isinstance(step.get("stepId"), str):
        return f"{step!r} is not a step"
    if not isinstance(step.get("status"), str) or step["status"] not in _STEP_STATUSES:
        return f"status {step.get('status')!r} is no status of a step"
    if not isinstance(step.get("attempts"), int):
        return f"attempts is {step.get('attempts')!r}, expected a whole number"
    if not isinstance(step.get("startedAt"), (datetime, type(None))):
        return f"startedAt is {step['startedAt']!r}, expected a date"
    for hook in step.get("hooks", []) if isinstance(step.get("hooks", []), list) else [step["hooks"]]:
        if not isinstance(hook, dict) or not isinstance(hook.get("hash"), bytes) or not isinstance(hook.get("gen"), int):
            return f"hooks: {hook!r} is not a hook"
    return _validate_wait(step) if step["status"] == StepStatus.WAITING else None


def _validate_wait(step: Mapping[str, Any]) -> str | None:
    """Why the engine cannot work with this step that waits, or None."""
    waiting_for = step.get("waitingFor")
    if not isinstance(waiting_for, dict) or waiting_for.get("type") not in _WAITS:
        return "waiting, but 'waitingFor' does not say for what"
    if waiting_for["type"] != "timer" and not isinstance(step.get("gen"), int):
        return f"waiting, and gen is {step.get('gen')!r}, expected a whole number"
    if waiting_for["type"] == "timer" and not isinstance(waiting_for.get("resumeAt"), datetime):
        return f"waitingFor.resumeAt is {waiting_for.get('resumeAt')!r}, expected a date"
    if not isinstance(waiting_for.get("expiresAt"), (datetime, type(None))):
        return f"waitingFor.expiresAt is {waiting_for['expiresAt']!r}, expected a date"
    if waiting_for["type"] == "event" and not isinstance(waiting_for.get("eventName"), str):
        return f"waitingFor.eventName is {waiting_for.get('eventName')!r}, expected text"
    return None


def parse_run(document: Mapping[str, Any]) -> Run:
    """The `Run` of a stored document. Raises DataCorruptionError, which names the first field of the wrong type or value."""
    try:
        _check_reachable(document)
        return Run(
            id=document["_id"],
            workflow_id=_typed(document, "workflowId", str),
            version=_typed(document, "version", str),
            status=RunStatus(document["status"]),
            steps=tuple(_parse_step(step) for step in _typed(document, "steps", list)),
            current_step_id=document.get("currentStepId"),
            input=document.get("input"),
            context=document.get("context") or {},
            output=document.get("output"),
            error=document.get("error"),
            meta=document.get("meta"),
            user_id=document.get("userId"),
            tags=tuple(document.get("tags") or ()),
            priority=document.get("priority", 0),
            queue=document.get("queue", "default"),
            paused=bool(document.get("paused", False)),
            created_at=_typed(document, "createdAt", datetime),
            updated_at=_typed(document, "updatedAt", datetime),
            started_at=document.get("startedAt"),
            ended_at=document.get("endedAt"),
            document=document,
            generation=document.get("generation", 0),
        )
    except (KeyError, TypeError, ValueError) as exc:
        run_id = document.get("_id")
        raise DataCorruptionError(
            f"run {run_id}: the stored document was changed by another program: {_describe(exc)}; mend it, or delete it", run_id=run_id
        ) from exc


def _check_reachable(document: Mapping[str, Any]) -> None:
    """Raise ValueError for a live run that no claim and no recovery will ever find: only a reader can notice it."""
    if document["status"] in TERMINAL or document.get("paused") is True:
        return
    lease = document.get("lease")
    if isinstance(lease, Mapping) and isinstance(lease.get("expiresAt"), datetime):
        return
    if not isinstance(document.get("wakeAt"), datetime):
        waiting = [
            step for step in document["steps"] if step["stepId"] == document["currentStepId"] and step["status"] == StepStatus.WAITING
        ]
        if not waiting or waiting[0]["waitingFor"]["type"] == "timer":
            raise ValueError(f"it is neither leased ({lease!r}) nor due ({document.get('wakeAt')!r}), so no worker will find it")
        return
    lane = _typed(document, "lane", str)
    if document.get("queue") != queue_of(lane):
        raise ValueError(f"field 'queue' is {document.get('queue')!r} and field 'lane' is {lane!r}, so no worker will find it")


def _describe(exc: Exception) -> str:
    return f"field {exc.args[0]!r} is missing" if isinstance(exc, KeyError) else str(exc)


def _typed(document: Mapping[str, Any], name: str, kind: type) -> Any:
    value = document[name]
    if not isinstance(value, kind):
        raise TypeError(f"field {name!r} is {value!r}, expected {kind.__name__}")
    return value


def _parse_step(step: Any) -> StepState:
    if not isinstance(step, Mapping):
        raise TypeError(f"{step!r} in 'steps' is not a step")
    duration_ms = step.get("durationMs")
    return StepState(
        step_id=_typed(step, "stepId", str),
        status=StepStatus(step["status"]),
        attempts=_typed(step, "attempts", int),
        output=step.get("output"),
        error=step.get("error"),
        waiting_for=step.get("waitingFor"),
        retry_after=step.get("retryAfter"),
        started_at=step.get("startedAt"),
        ended_at=step.get("endedAt"),
        duration=None if duration_ms is None else duration_ms / 1000,
        kind=step.get("kind"),
    )


def as_stored(document: RunDocument) -> tuple[RunDocument, int]:
    """The document that a reader will find after this new run was stored, and its size in bytes.

    Raises PayloadTooLargeError above NEW_RUN_BYTES_MAX.
    """
    encoded = encode_document(document)
    if len(encoded) > NEW_RUN_BYTES_MAX:
        found = f"start: the run would take {len(encoded)} bytes (a mapping input counts twice: it is the context as well)"
        raise above_limit(found, NEW_RUN_BYTES_MAX, "store the bulk elsewhere and pass a reference", size=len(encoded))
    return cast("RunDocument", decode_document(encoded)), len(encoded)


def make_context(make: Callable[[Any], Any] | None, input: Any, where: str) -> Any:
    """The first context of a run: the result of `context=` for the input, or else a copy of a mapping input, or else empty.

    Raises ValidationError for a context that is no mapping or that BSON would read as a reference; `where` names the workflow.
    """
    context = make(input) if make is not None else input if isinstance(input, Mapping) else {}
    if not isinstance(context, Mapping):
        raise ValidationError(f"{where}: context= must return a mapping, not {type(context)}{way_out(context)}")
    if "$ref" in context and "$id" in context:
        raise ValidationError(f"{where}: BSON reads a context with both $ref and $id as a database reference; rename one of the keys")
    return dict(context)
