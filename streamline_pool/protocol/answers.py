"""Answers to waits, as data: by `resume`, and by the token of a hook. Owns the filters; inbox.py has the update."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from streamline_pool.domain.model import StepStatus

from .expressions import ENTERABLE_STEP_TEXTS, IS_CURRENT, live_run, some_step
from .inbox import deliver_item, has_room
from .operations import Command, Query, change_one

__all__ = [
    "answer_hook",
    "answer_wait",
]

_WAITING = StepStatus.WAITING.value
_BY_A_PERSON = ("human", "webhook")
"""Types of waits that an answer ends."""


def answer_wait(workflow_id: str | None, run_id: str, step_id: str, gen: int, output: Any, answer_id: str) -> Command:
    """End the wait for a person that this step began as the run's wait number `gen`. Yields the document or None.

    The step keeps `answer_id`. After a lost reply, the caller recognises its own answer by it. The update removes the
    lease, also that of a worker that has just claimed the run for the deadline of the wait.
    """
    waiting = {"stepId": step_id, "status": _WAITING, "gen": gen, "waitingFor.type": {"$in": list(_BY_A_PERSON)}}
    query = {**live_run(workflow_id, run_id), "currentStepId": step_id, "steps": {"$elemMatch": waiting}}
    return change_one("answer_wait", query, deliver_item(True, {"id": answer_id, "data": output}))


def answer_hook(
    run_id: str, step_id: str, gen: int, token_hash: bytes, expires_at: datetime | None, output: Any, size: int, answer_id: str
) -> Command:
    """Answer by a hook: end its wait, or keep the answer for the wait that is not stored yet. Yields the document or None.

    `gen` is the number of the wait, `size` the bytes of `output`. The filter holds the token's hash, its wait and its
    expiry by the server's clock, and allows one answer per hook. It does not match a step that made a hook and then
    slept, or waits for an event: such a step has no wait that the hook could end.
    """
    waiting = {"status": _WAITING, "gen": gen, "waitingFor.type": "webhook"}
    has_hook = {"stepId": step_id, "hooks": {"$elemMatch": {"hash": token_hash, "gen": gen}}}
    early = {
        "waitGen": gen - 1,
        "steps": {"$elemMatch": {**has_hook, "status": {"$in": ENTERABLE_STEP_TEXTS}}},
        "inbox": {"$not": {"$elemMatch": {"stepId": step_id, "gen": gen}}},
        "$expr": has_room(size),
    }
    query: Query = {
        **live_run(None, run_id),
        "currentStepId": step_id,
        "$or": [{"steps": {"$elemMatch": {**has_hook, **waiting}}}, early],
    }
    if expires_at is not None:
        query["$expr"] = {"$lt": ["$$NOW", {"$literal": expires_at}]}
    hit = some_step({"$and": [IS_CURRENT, {"$eq": ["$$step.status", _WAITING]}]})
    return change_one("answer_hook", query, deliver_item(hit, {"id": answer_id, "stepId": step_id, "gen": gen, "data": output}))
