"""Control operations on runs: cancel, pause, resume, rewind, answer by a hook. Client procedures, without I/O.

Owns what is decided between reading a run and changing it, and what a caller gets back. Each call reads once, decides
once, and names what it has read in the filter of its write. After a lost reply the same write is repeated, never the
decision. Event delivery is in event_delivery.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from streamline_pool.domain.document import HookDocument, RunDocument, StepDocument
from streamline_pool.domain.errors import (
    DataCorruptionError,
    HookTokenError,
    InvalidStateError,
    PayloadTooLargeError,
    WorkflowNotFoundError,
)
from streamline_pool.domain.model import TERMINAL, Run, RunStatus, StepStatus
from streamline_pool.domain.waits import arrived
from streamline_pool.engine.hooks import hash_token, run_id_of
from streamline_pool.protocol import answers, control, run_lifecycle
from streamline_pool.protocol.codec import check_text, decode_payload, size_of
from streamline_pool.protocol.expressions import NON_TERMINAL_TEXTS
from streamline_pool.protocol.hosts import list_hosts
from streamline_pool.protocol.inbox import INBOX_BYTES_MAX, INBOX_MAX
from streamline_pool.protocol.operations import Command
from streamline_pool.protocol.outputs import NewOutput
from streamline_pool.protocol.payloads import EXTERNAL_KEY, SplitOutput, external_ids, is_external, split_output
from streamline_pool.protocol.run_document import check_run_id, parse_run, validate_run_document
from streamline_pool.storage.outputs import loading_outputs, putting_output
from streamline_pool.storage.procedures import Procedure

from .services import Services

__all__ = [
    "ITEM_BYTES", "HookResult",
    "answered_step", "answering_hook", "cancelling_run", "changed_run", "check_due", "check_not_full", "controlling", "getting_run",
    "listing_pools", "making_run", "notifying_holder", "pausing_run", "publish_resumed", "reading_run", "resuming_run", "signalling_due",
]  # fmt: skip

log = logging.getLogger("streamline_pool")

Document = Mapping[str, Any]  # a run document whose steps, waits and inbox another program may have changed

ITEM_BYTES = 200
"""Of an inbox item, beside its data."""

_ROUNDS_MAX = 50  # new decisions because other clients changed the run meanwhile; a guess: more means that they do nothing else


class HookResult(NamedTuple):
    """What became of an answer by hook token."""

    run_id: str
    run: Run  # after the answer


# --- reading -----------------------------------------------------------------------------------------------------------


def getting_run(workflow_id: str | None, run_id: str) -> Procedure[Run | None]:
    """The run with that id, of that workflow or (None) of any."""
    check_run_id(run_id)
    found = yield run_lifecycle.get_run(workflow_id, run_id)
    if not found:
        return None
    try:
        return (yield from making_run(found[0]))
    except WorkflowNotFoundError:  # it was deleted while its outputs were read
        return None


def listing_pools() -> Procedure[list[dict[str, Any]]]:
    """What the pools report of themselves; see `Streamline.workers`."""
    hosts: list[dict[str, Any]] = yield list_hosts()
    return hosts


def making_run(document: Document) -> Procedure[Run]:
    """The `Run` of a stored document, with outputs that are stored beside it.

    Raises DataCorruptionError, and WorkflowNotFoundError for a run that is deleted while they are read.
    """
    run = parse_run(document)  # an unreadable document is reported before its outputs are read
    if not external_ids(document):
        return run
    try:
        loaded = yield from loading_outputs(document)
    except DataCorruptionError:
        # The outputs of a run are deleted after its document, so without it nothing is corrupted.
        if not (yield run_lifecycle.get_run(None, document["_id"])):
            raise WorkflowNotFoundError(f"run {document['_id']!r} was deleted while it was read", run_id=document["_id"]) from None
        raise
    return replace(parse_run(loaded), document=document)


def changed_run(document: Document) -> Procedure[Run]:
    """The `Run` after an operation that took effect. That an output beside it is missing, or it was deleted since, makes no call fail."""
    try:
        return (yield from making_run(document))
    except (DataCorruptionError, WorkflowNotFoundError) as exc:
        log.warning("outputs_missing", extra={"run_id": document["_id"], "error": exc.message})
        return parse_run(document)  # with the references in place of the outputs


def reading_run(workflow_id: str | None, run_id: str) -> Procedure[dict[str, Any]]:
    """The stored document. Raises WorkflowNotFoundError if there is none, DataCorruptionError if it cannot be read as a run."""
    document = yield from _finding_run(workflow_id, run_id)
    parse_run(document)  # an unreadable document is reported, not changed
    return document


def _finding_run(workflow_id: str | None, run_id: str) -> Procedure[dict[str, Any]]:
    found = yield run_lifecycle.get_run(workflow_id, run_id)
    if not found:
        raise WorkflowNotFoundError(f"no run {run_id!r}{f' of workflow {workflow_id}' if workflow_id else ''}", run_id=run_id)
    document: dict[str, Any] = found[0]
    return document


def _check_result(found: Document, **changes: Any) -> None:
    """Raise DataCorruptionError if the run could not be read after these changes: a call must not raise when it has taken effect."""
    parse_run({**found, **changes})


def check_due(found: Document, **changes: Any) -> None:
    """As `_check_result`, for an operation that makes the run due, unless it is paused."""
    _check_result(found, status=RunStatus.RUNNING.value, lease=None, wakeAt=found["createdAt"], **changes)


def _reading_valid_run(workflow_id: str | None, run_id: str) -> Procedure[RunDocument]:
    """The stored document. The steps, waits and inbox of a run that has not ended have the shape that the engine relies on."""
    document: Any = yield from reading_run(workflow_id, run_id)
    reason = None if document["status"] in TERMINAL else validate_run_document(document)
    if reason is not None:
        raise DataCorruptionError(f"run {run_id}: the stored document was changed by another program: {reason}; mend it", run_id=run_id)
    valid: RunDocument = document
    return valid


# --- cancel and pause --------------------------------------------------------------------------------------------------


def cancelling_run(services: Services, workflow_id: str | None, run_id: str, reason: str | None) -> Procedure[Run]:
    """Cancel a run; see `Workflow.cancel`."""
    check_run_id(run_id)
    if reason is not None:
        check_text(reason, "cancel: reason")
    control_id = services.env.new_id()
    for _ in range(_ROUNDS_MAX):
        found = yield from _finding_run(workflow_id, run_id)
        if found.get("status") in NON_TERMINAL_TEXTS:
            _check_result(found, status=RunStatus.CANCELLED.value)  # also a run that no worker finds can be cancelled
            document = yield control.cancel_run(workflow_id, run_id, control.control_count(found), reason, control_id)
            if document is not None:
                break
            continue  # it has ended, or another control operation came first: decide again
        parse_run(found)
        if found.get("lastAct") != control_id:
            return (yield from making_run(found))
        document = found  # our own write was committed, and its reply was lost
        break
    else:
        raise _busy(run_id)
    yield from notifying_holder(services, run_id)
    yield from services.signal("ended", runs=[run_id])
    services.publish(document, "workflow:cancelled", reason)
    return (yield from changed_run(document))


def pausing_run(services: Services, workflow_id: str | None, run_id: str, reason: str | None) -> Procedure[Run]:
    """Pause a run; see `Workflow.pause`."""
    check_run_id(run_id)
    if reason is not None:
        check_text(reason, "pause: reason")
    control_id = services.env.new_id()

    def decide(found: Document) -> Command | None:
        if found["status"] in TERMINAL or found.get("paused") is True:
            return None
        return control.pause_run(workflow_id, run_id, control.control_count(found), reason, control_id)

    document, applied = yield from controlling(workflow_id, run_id, control_id, decide)
    if applied:
        yield from notifying_holder(services, run_id)
        services.publish(document, "workflow:paused", reason)
    return (yield from changed_run(document) if applied else making_run(document))


# --- resume and answer -------------------------------------------------------------------------------------------------


def resuming_run(services: Services, workflow_id: str | None, run_id: str, payload: Any) -> Procedure[Run]:
    """Un-pause a paused run, else answer its wait; see `Workflow.resume`. The first read decides which, for all repetitions."""
    check_run_id(run_id)
    answer = split_output(payload, "resume: payload", services.env.new_id)
    found = yield from _reading_valid_run(workflow_id, run_id)
    if found.get("paused") is True and found["status"] not in TERMINAL:
        if payload is not None:
            raise InvalidStateError(f"run {run_id} is paused: resume it without a payload first; its wait stays unanswered", run_id=run_id)
        return (yield from _unpausing_run(services, workflow_id, run_id))
    return (yield from _answering_wait(services, workflow_id, found, answer))


def _unpausing_run(services: Services, workflow_id: str | None, run_id: str) -> Procedure[Run]:
    control_id = services.env.new_id()

    def decide(found: Document) -> Command | None:
        if found.get("paused") is not True or found["status"] in TERMINAL:
            return None  # another client has resumed or ended it meanwhile
        held = isinstance(found.get("lease"), dict)
        _check_result(found, paused=False, wakeAt=None if held else found.get("pausedWakeAt"))
        return control.unpause_run(workflow_id, run_id, control.control_count(found), control_id)

    document, applied = yield from controlling(workflow_id, run_id, control_id, decide)
    if applied:
        yield from signalling_due(services, document)
        services.publish(document, "workflow:resumed")
    return (yield from changed_run(document) if applied else making_run(document))


def _answering_wait(services: Services, workflow_id: str | None, found: RunDocument, answer: SplitOutput) -> Procedure[Run]:
    run_id, step = found["_id"], _current_step(found)
    if step is None or step["status"] != StepStatus.WAITING or step["waitingFor"]["type"] not in ("human", "webhook"):
        raise InvalidStateError(
            f"run {run_id} is not paused, and waits for no answer: it is {_standing(found)}", run_id=run_id, status=found["status"]
        )
    check_due(found)
    answer_id = services.env.new_id()
    yield from _putting(answer, run_id)
    document = yield answers.answer_wait(workflow_id, run_id, step["stepId"], step["gen"], answer.stored, answer_id)
    if document is None:
        document = yield from _reading_valid_run(workflow_id, run_id)
        if answered_step(document, answer_id) is None:
            raise InvalidStateError(
                f"run {run_id}: step {step['stepId']} waits no more, because of another answer or control operation; "
                f"it is {_standing(document)}",
                run_id=run_id,
                status=document["status"],
            )
    yield from signalling_due(services, document)
    publish_resumed(services, document, step["stepId"], _value(answer))
    return (yield from changed_run(document))


def answering_hook(services: Services, token: str, payload: Any) -> Procedure[HookResult]:
    """Answer by a hook token; see `Streamline.resume_hook`. The database decides whether the token is good."""
    run_id, token_hash = run_id_of(token), hash_token(token)
    answer = split_output(payload, "resume_hook: payload", services.env.new_id)
    size = answer.size + ITEM_BYTES
    try:
        found = yield from _reading_valid_run(None, run_id)
    except WorkflowNotFoundError:
        raise _bad_token() from None
    step, hook = _hook_of(found, token_hash)
    if step is None or hook is None:
        raise _bad_token()
    check_due(found)
    answer_id = services.env.new_id()
    yield from _putting(answer, run_id)
    document = yield answers.answer_hook(
        run_id, step["stepId"], hook["gen"], token_hash, hook.get("expiresAt"), answer.stored, size, answer_id
    )
    if document is None:
        document = yield from _reading_valid_run(None, run_id)
        in_inbox = document["status"] not in TERMINAL and arrived(document, {"id": answer_id}) is not None
        if not in_inbox and answered_step(document, answer_id) is None:
            if _hook_of(document, token_hash)[1] is not None and step["status"] != StepStatus.WAITING:
                check_not_full(document, size)
            raise _bad_token()
    if answered_step(document, answer_id) is not None:
        yield from signalling_due(services, document)
        publish_resumed(services, document, step["stepId"], _value(answer))
    return HookResult(run_id, (yield from changed_run(document)))


def _putting(answer: SplitOutput, run_id: str) -> Procedure[None]:
    """Store a large answer beside the run first. If the answer is refused, that stays until the run is deleted."""
    if answer.content is not None:
        assert is_external(answer.stored), "what has content is stored as its marker"
        yield from putting_output(NewOutput(answer.stored[EXTERNAL_KEY], run_id, answer.content))


def _value(answer: SplitOutput) -> Any:
    return answer.stored if answer.content is None else decode_payload(answer.content)


def _hook_of(document: RunDocument, token_hash: bytes) -> tuple[StepDocument | None, HookDocument | None]:
    if document["status"] not in TERMINAL:
        for step in document["steps"]:
            for hook in step.get("hooks") or ():
                if hook["hash"] == token_hash:
                    return step, hook
    return None, None


def _bad_token() -> HookTokenError:
    # One text for every reason: a caller that guesses tokens learns nothing from it.
    return HookTokenError("the token is wrong, used, expired, or of a wait that is over; nothing was changed")


def check_not_full(document: Document, size: int) -> None:
    """Raise PayloadTooLargeError if the run's inbox has no room for an item of `size` bytes."""
    stored = document.get("inbox")
    inbox = stored if isinstance(stored, list) else []
    if len(inbox) >= INBOX_MAX or size_of({"inbox": inbox}) + size > INBOX_BYTES_MAX:
        raise PayloadTooLargeError(
            f"run {document['_id']}: its inbox is full: {len(inbox)} items came before they were waited for, and {INBOX_MAX} items or "
            f"{INBOX_BYTES_MAX} bytes are the limit; nothing was stored; send again when the run has taken some",
            run_id=document["_id"],
        )


# --- shared ------------------------------------------------------------------------------------------------------------


def controlling(
    workflow_id: str | None, run_id: str, control_id: str, decide: Callable[[Document], Command | None]
) -> Procedure[tuple[dict[str, Any], bool]]:
    """Read the run, apply what `decide` makes of it. Returns the stored document, and whether the operation took effect.

    The operation names the count of control operations that was read, so it takes effect once, and on that state only. If
    it matches nothing, the run holds the ids of the operations since. Either ours is among them, or it was not committed
    and never will be, and is decided anew.
    """
    for _ in range(_ROUNDS_MAX):
        found = yield from reading_run(workflow_id, run_id)
        operation = decide(found)
        if operation is None:
            return found, False
        document = yield operation
        if document is not None:
            return document, True
        after = yield from reading_run(workflow_id, run_id)
        kept = after.get("actIds")
        if after.get("lastAct") == control_id or (isinstance(kept, list) and control_id in kept):
            return after, True
        if control.control_count(after) - control.control_count(found) > control.CONTROL_IDS_KEPT:
            break  # ours may be one of those whose ids are kept no more
    raise _busy(run_id)


def _busy(run_id: str) -> InvalidStateError:
    return InvalidStateError(
        f"run {run_id}: other clients change it all the time, so it is unknown whether this call took effect; read the run to see",
        run_id=run_id,
    )


def notifying_holder(services: Services, run_id: str) -> Procedure[None]:
    """Have the process that holds the run read its state at once, this process included."""
    services.check_here(run_id)
    yield from services.signal("cancel", runId=run_id)


def signalling_due(services: Services, document: Document) -> Procedure[None]:
    """Have a worker poll for a run that has become due."""
    if document.get("wakeAt") is not None:
        yield from services.signal("due", wakeAt=document["wakeAt"], lane=document.get("lane"), runId=document["_id"], count=1)


def publish_resumed(services: Services, document: Document, step_id: str, payload: Any) -> None:
    """Publish that an answer or an event has ended a step's wait."""
    services.publish(document, "step:completed", payload, step_id)
    services.publish(document, "workflow:resumed", payload, step_id)


def _current_step(document: RunDocument) -> StepDocument | None:
    steps = (step for step in document["steps"] if step["stepId"] == document.get("currentStepId"))
    return next(steps, None) if document["status"] not in TERMINAL else None


def answered_step(document: Document, answer_id: str) -> str | None:
    """The id of the step that this answer or event has ended, or None. The steps may have any shape."""
    stored = document.get("steps")
    steps = stored if isinstance(stored, list) else ()
    return next((step["stepId"] for step in steps if isinstance(step, dict) and step.get("answer") == answer_id), None)


def _standing(document: RunDocument) -> str:
    step = _current_step(document)
    if step is None:
        return str(document["status"])
    doing = f"waiting for a {step['waitingFor']['type']}" if step["status"] == StepStatus.WAITING else step["status"]
    return f"{document['status']}{', paused' if document.get('paused') else ''}, and its step {step['stepId']} is {doing}"
