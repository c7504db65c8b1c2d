"""What programs do to runs from outside: cancel, pause, resume, rewind, answer by a hook. Client procedures, without I/O.

Owns what is decided between reading a run and acting on it, and what a caller is told. Each call reads once, decides
once and names what it has read in its act's filter; after a lost reply the same act is repeated, never the decision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from . import acts, ops
from .documents import SLOTS, as_payload, check_run_id, check_text, parse_run
from .errors import HookTokenError, InvalidStateError, PayloadTooLargeError, StepNotFoundError, WorkflowNotFoundError
from .hooks import hash_token, run_id_of
from .model import TERMINAL, Run, RunStatus, StepStatus
from .procedures import Procedure

if TYPE_CHECKING:
    from .client import Streamline

__all__ = [
    "ITEM_BYTES", "HookResult",
    "answering_hook", "cancelling_run", "check_not_full", "getting_run", "pausing_run", "publish_resumed", "reading_run", "resuming_run",
    "rewinding_run", "ringing",
]  # fmt: skip

Document = Mapping[str, Any]

_ROUNDS_MAX = 50  # decisions anew because others acted at the same moment; a guess: more means that they do nothing else


class HookResult(NamedTuple):
    """What became of an answer by hook token."""

    run_id: str
    run: Run  # after the answer


def getting_run(app: Streamline, workflow_id: str | None, run_id: str) -> Procedure[Run | None]:
    """The run with that id, of that workflow or (None) of any."""
    check_run_id(run_id)
    found = yield ops.get_run(workflow_id, run_id)
    return parse_run(found[0]) if found else None


def reading_run(workflow_id: str | None, run_id: str) -> Procedure[dict[str, Any]]:
    """The stored document; WorkflowNotFoundError if there is none."""
    found = yield ops.get_run(workflow_id, run_id)
    if not found:
        raise WorkflowNotFoundError(f"no run {run_id!r}{f' of workflow {workflow_id}' if workflow_id else ''}", run_id=run_id)
    document: dict[str, Any] = found[0]
    return document


def cancelling_run(app: Streamline, workflow_id: str | None, run_id: str, reason: str | None) -> Procedure[Run]:
    """Cancel a run; see `Workflow.cancel`."""
    check_run_id(run_id)
    if reason is not None:
        check_text(reason, "cancel: reason")
    act_id = app.env.new_id()
    while True:
        document = yield acts.cancel_run(workflow_id, run_id, reason, act_id)
        if document is None:
            found = yield from reading_run(workflow_id, run_id)
            stored = parse_run(found)
            if not stored.is_terminal:
                continue  # it changed between the two reads: decide again
            if found.get("lastAct") != act_id:
                return stored
            document = found  # our own write had landed, its reply was lost
        yield from app._signalling("cancel", runId=run_id)
        yield from app._signalling("ended", runs=[run_id])
        app._publish(document, "workflow:cancelled", reason)
        return parse_run(document)


def pausing_run(app: Streamline, workflow_id: str | None, run_id: str, reason: str | None) -> Procedure[Run]:
    """Pause a run; see `Workflow.pause`."""
    check_run_id(run_id)
    if reason is not None:
        check_text(reason, "pause: reason")
    act_id = app.env.new_id()

    def decide(found: Document) -> ops.Command | None:
        if found["status"] in TERMINAL or found.get("paused") is True:
            return None
        return acts.pause_run(workflow_id, run_id, found.get("acts"), reason, act_id)

    document, landed = yield from _acting(workflow_id, run_id, act_id, decide)
    if landed:
        yield from app._signalling("cancel", runId=run_id)  # its holder looks at the database at once, and finds the pause
        app._publish(document, "workflow:paused", reason)
    return parse_run(document)


def resuming_run(app: Streamline, workflow_id: str | None, run_id: str, payload: Any) -> Procedure[Run]:
    """Un-pause a paused run, else answer its wait; see `Workflow.resume`. What was read first decides, through all repetitions."""
    check_run_id(run_id)
    payload, _ = as_payload(payload, "resume: payload")
    found = yield from reading_run(workflow_id, run_id)
    if found.get("paused") is True and found["status"] not in TERMINAL:
        if payload is not None:
            raise InvalidStateError(f"run {run_id} is paused: resume it without a payload first; its wait stays unanswered", run_id=run_id)
        return (yield from _unpausing_run(app, workflow_id, run_id))
    return (yield from _answering_wait(app, workflow_id, found, payload))


def _unpausing_run(app: Streamline, workflow_id: str | None, run_id: str) -> Procedure[Run]:
    act_id = app.env.new_id()

    def decide(found: Document) -> ops.Command | None:
        if found.get("paused") is not True or found["status"] in TERMINAL:
            return None  # somebody else has resumed or ended it meanwhile
        return acts.unpause_run(workflow_id, run_id, found.get("acts"), act_id)

    document, landed = yield from _acting(workflow_id, run_id, act_id, decide)
    if landed:
        yield from ringing(app, document)
        app._publish(document, "workflow:resumed", None)
    return parse_run(document)


def _answering_wait(app: Streamline, workflow_id: str | None, found: Document, payload: Any) -> Procedure[Run]:
    run_id, step = found["_id"], _current_step(found)
    if step is None or step["status"] != StepStatus.WAITING or step["waitingFor"]["type"] not in ("human", "webhook"):
        raise InvalidStateError(f"run {run_id} waits for nobody's answer: it is {_standing(found)}", run_id=run_id, status=found["status"])
    answer_id = app.env.new_id()
    document = yield acts.answer_wait(workflow_id, run_id, step["stepId"], step["gen"], payload, answer_id)
    if document is None:
        document = yield from reading_run(workflow_id, run_id)
        if not _names_answer(document, answer_id):
            raise InvalidStateError(
                f"run {run_id}: step {step['stepId']} waits no more, because of another answer or act; it is {_standing(document)}",
                run_id=run_id,
                status=document["status"],
            )
    yield from ringing(app, document)
    publish_resumed(app, document, step["stepId"], payload)
    return parse_run(document)


def answering_hook(app: Streamline, token: str, payload: Any) -> Procedure[HookResult]:
    """Answer by a hook token; see `Streamline.resume_hook`. Whether the token is good is the database's decision."""
    run_id, token_hash = run_id_of(token), hash_token(token)
    payload, size = as_payload(payload, "resume_hook: payload")
    found = yield ops.get_run(None, run_id)
    step, hook = _hook_of(found[0], token_hash) if found else (None, None)
    if step is None or hook is None:
        raise _bad_token()
    answer_id = app.env.new_id()
    document = yield acts.answer_hook(
        run_id, step["stepId"], hook["gen"], token_hash, hook.get("expiresAt"), payload, size + ITEM_BYTES, answer_id
    )
    if document is None:
        document = yield from reading_run(None, run_id)
        in_inbox = any(item.get("id") == answer_id for item in document.get("inbox") or ())
        if not in_inbox and not _names_answer(document, answer_id):
            if _hook_of(document, token_hash)[1] is not None and step["status"] != StepStatus.WAITING:
                check_not_full(document, size + ITEM_BYTES)
            raise _bad_token()
    if _names_answer(document, answer_id):
        yield from ringing(app, document)
        publish_resumed(app, document, step["stepId"], payload)
    return HookResult(run_id, parse_run(document))


ITEM_BYTES = 200  # of an inbox item beside its data


def _hook_of(document: Document, token_hash: bytes) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    for step in document["steps"]:
        for hook in step.get("hooks") or ():
            if hook.get("hash") == token_hash:
                return step, hook
    return None, None


def _bad_token() -> HookTokenError:
    # One text for every reason: whoever guesses tokens learns nothing from it.
    return HookTokenError("the token is wrong, used, expired, or of a wait that is over; nothing was changed")


def check_not_full(document: Document, size: int) -> None:
    """PayloadTooLargeError if the run's inbox has no room for an item of so many bytes."""
    inbox = list(document.get("inbox") or ())
    if len(inbox) >= acts.INBOX_MAX or as_payload({"inbox": inbox}, "inbox")[1] + size > acts.INBOX_BYTES_MAX:
        raise PayloadTooLargeError(
            f"run {document['_id']}: its inbox is full: {len(inbox)} items came before they were waited for, and {acts.INBOX_MAX} items or "
            f"{acts.INBOX_BYTES_MAX} bytes are the limit; nothing was stored; send again when the run has taken some",
            run_id=document["_id"],
        )


def rewinding_run(app: Streamline, workflow_id: str | None, run_id: str, step_id: str) -> Procedure[Run]:
    """Rewind a run; see `Workflow.rewind_to`."""
    check_run_id(run_id)
    act_id = app.env.new_id()

    def decide(found: Document) -> ops.Command:
        step_ids = [step["stepId"] for step in found["steps"]]
        if found["status"] == RunStatus.CANCELLED:
            raise InvalidStateError(f"run {run_id} was cancelled, which is final; start a new one", run_id=run_id, status="cancelled")
        if step_id not in step_ids:
            raise StepNotFoundError(
                f"run {run_id}: no step {step_id!r}; its steps are {', '.join(step_ids)}", run_id=run_id, step_id=step_id
            )
        place = step_ids.index(step_id)
        unreached = [step["stepId"] for step in found["steps"][:place] if step["status"] not in (StepStatus.DONE, StepStatus.SKIPPED)]
        if unreached:
            raise InvalidStateError(
                f"run {run_id} has not come to step {step_id!r} yet: step {unreached[0]!r} comes first; rewind to that", run_id=run_id
            )
        lane = f"{found.get('queue', 'default')}/{found['workflowId']}/{found['version']}"
        slot = int(app.env.random() * SLOTS)
        return acts.rewind_run(workflow_id, run_id, found.get("acts"), place, step_ids[place:], lane, slot, act_id)

    document, landed = yield from _acting(workflow_id, run_id, act_id, decide)
    if landed:
        yield from app._signalling("cancel", runId=run_id)  # whoever still holds it finds out at once
        yield from ringing(app, document)
    return parse_run(document)


# --- shared ------------------------------------------------------------------------------------------------------------


def _acting(
    workflow_id: str | None, run_id: str, act_id: str, decide: Callable[[Document], ops.Command | None]
) -> Procedure[tuple[dict[str, Any], bool]]:
    """Read the run, act on it as it was found, and say whether that took effect. The stored document either way.

    The act names the count of acts that was read, so it takes effect once and on that state alone. Where another act came
    first, and nothing else (the count moved by one, and the act is not ours), ours has certainly not landed: decide anew.
    """
    for _ in range(_ROUNDS_MAX):
        found = yield from reading_run(workflow_id, run_id)
        parse_run(found)  # garbage is reported, not acted on
        act = decide(found)
        if act is None:
            return found, False
        document = yield act
        if document is not None:
            return document, True
        after = yield from reading_run(workflow_id, run_id)
        if after.get("lastAct") == act_id:
            return after, True
        moved = after.get("acts", 0) - found.get("acts", 0)
        if moved > 1:
            return after, False  # ours may have landed in between and have been overtaken: report what there is
    raise InvalidStateError(f"run {run_id}: others act on it all the time; nothing was changed, try again", run_id=run_id)


def ringing(app: Streamline, document: Document) -> Procedure[None]:
    """Have a worker look at a run that has become due."""
    if document.get("wakeAt") is not None:
        yield from app._signalling("due", wakeAt=document["wakeAt"], lane=document.get("lane"), runId=document["_id"], count=1)


def publish_resumed(app: Streamline, document: Document, step_id: str, payload: Any) -> None:
    """Tell subscribers that an answer or an event has ended a step's wait."""
    app._publish(document, "step:completed", payload, step_id)
    app._publish(document, "workflow:resumed", payload, step_id)


def _current_step(document: Document) -> dict[str, Any] | None:
    steps = (step for step in document["steps"] if step["stepId"] == document.get("currentStepId"))
    return next(steps, None) if document["status"] not in TERMINAL else None


def _names_answer(document: Document, answer_id: str) -> bool:
    return any(step.get("answer") == answer_id for step in document["steps"])


def _standing(document: Document) -> str:
    step = _current_step(document)
    if step is None:
        return str(document["status"])
    doing = f"waiting for a {step['waitingFor']['type']}" if step["status"] == StepStatus.WAITING else step["status"]
    return f"{document['status']}{', paused' if document.get('paused') else ''}, and its step {step['stepId']} is {doing}"
