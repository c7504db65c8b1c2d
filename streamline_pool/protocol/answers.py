"""Answers to waits, as data: by `resume`, and by a hook token."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from streamline_pool.domain.model import StepStatus

from .expressions import IS_CURRENT, live_run, some_step
from .inbox import deliver_item, has_room
from .operations import Command, change_one

__all__ = [
    "answer_hook",
    "answer_wait",
]

Document = dict[str, Any]

_WAITING, _RUNNING, _PENDING = (status.value for status in (StepStatus.WAITING, StepStatus.RUNNING, StepStatus.PENDING))
_BY_A_PERSON = ("human", "webhook")
"""Types of waits that an answer ends."""


def answer_wait(workflow_id: str | None, run_id: str, step_id: str, gen: int, output: Any, answer_id: str) -> Command:
    """End the wait for a person that this step began as the run's wait number `gen`. Yields the document or None.

    The step keeps the answer's id, by which the caller knows after a lost reply that it was its own. Takes the lease
    away, also from a worker that has just claimed the run for the wait's deadline.
    """
    waiting = {"stepId": step_id, "status": _WAITING, "gen": gen, "waitingFor.type": {"$in": list(_BY_A_PERSON)}}
    query = {**live_run(workflow_id, run_id), "currentStepId": step_id, "steps": {"$elemMatch": waiting}}
    return change_one("answer_wait", query, deliver_item(True, {"id": answer_id, "data": output}))


def answer_hook(
    run_id: str, step_id: str, gen: int, token_hash: bytes, expires_at: datetime | None, output: Any, size: int, answer_id: str
) -> Command:
    """Answer by a hook: end its wait, or keep the answer for the wait that is not stored yet. Yields the document or None.

    The filter holds the token's hash, its generation and its expiry by the server's clock; one answer per hook. A step
    that made a hook and then slept, or waits for an event, has no wait that the hook could end.
    """
    waiting = {"status": _WAITING, "gen": gen, "waitingFor.type": "webhook"}
    has_hook = {"stepId": step_id, "hooks": {"$elemMatch": {"hash": token_hash, "gen": gen}}}
    early = {
        "waitGen": gen - 1,
        "steps": {"$elemMatch": {**has_hook, "status": {"$in": [_PENDING, _RUNNING]}}},
        "inbox": {"$not": {"$elemMatch": {"stepId": step_id, "gen": gen}}},
        "$expr": has_room(size),
    }
    query: Document = {
        **live_run(None, run_id),
        "currentStepId": step_id,
        "$or": [{"steps": {"$elemMatch": {**has_hook, **waiting}}}, early],
    }
    if expires_at is not None:
        query["$expr"] = {"$lt": ["$$NOW", {"$literal": expires_at}]}
    hit = some_step({"$and": [IS_CURRENT, {"$eq": ["$$step.status", _WAITING]}]})
    return change_one("answer_hook", query, deliver_item(hit, {"id": answer_id, "stepId": step_id, "gen": gen, "data": output}))
