"""Runs that begin again in the middle: rewind, and the retry of a failed run. Owns from which step or call they may go on.

Each is one conditional update (protocol/control.py), decided anew when another client came first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamline_pool.domain.errors import InvalidStateError, StepNotFoundError
from streamline_pool.domain.model import ENDED_STEPS, Run, RunStatus, StepStatus
from streamline_pool.domain.transitions import is_durable
from streamline_pool.protocol import control
from streamline_pool.protocol.operations import Command
from streamline_pool.protocol.run_document import SLOTS, check_run_id
from streamline_pool.storage.procedures import Procedure

from .run_control import changed_run, check_due, controlling, making_run, notifying_holder, signalling_due
from .services import Services

__all__ = ["retrying_run", "rewinding_run"]

Document = Mapping[str, Any]


def rewinding_run(services: Services, workflow_id: str | None, run_id: str, step_id: str) -> Procedure[Run]:
    """Rewind a run; see `Workflow.rewind_to`."""
    check_run_id(run_id)
    control_id = services.env.new_id()

    def decide(found: Document) -> Command:
        place = _place_to_rewind_to(found, step_id)
        step_ids = [step["stepId"] for step in found["steps"][place:]]
        lane = _lane_of(found)
        slot = int(services.env.random() * SLOTS)
        check_due(found, lane=lane)
        acts, rewinds = control.control_count(found), found.get("rewinds", 0)
        is_code = is_durable(found)
        return control.rewind_run(workflow_id, run_id, acts, place, step_ids, lane, slot, control_id, is_durable=is_code, rewinds=rewinds)

    document, applied = yield from controlling(workflow_id, run_id, control_id, decide)
    if applied:
        yield from notifying_holder(services, run_id)
        yield from signalling_due(services, document)
    return (yield from changed_run(document) if applied else making_run(document))


def _place_to_rewind_to(found: Document, step_id: str) -> int:
    """The place of the step, if the run can be rewound to it. Raises InvalidStateError or StepNotFoundError."""
    run_id = found["_id"]
    step_ids = [step["stepId"] for step in found["steps"]]
    if found["status"] == RunStatus.CANCELLED:
        raise InvalidStateError(f"run {run_id} was cancelled, which is final; start a new one", run_id=run_id, status="cancelled")
    if step_id not in step_ids:
        raise StepNotFoundError(f"run {run_id}: no step {step_id!r}; its steps are {', '.join(step_ids)}", run_id=run_id, step_id=step_id)
    place = step_ids.index(step_id)
    if is_durable(found):
        return place  # the function is called again and makes its calls in its own order
    unreached = [step["stepId"] for step in found["steps"][:place] if step["status"] not in (StepStatus.DONE, StepStatus.SKIPPED)]
    if unreached:
        raise InvalidStateError(
            f"run {run_id} has not come to step {step_id!r} yet: step {unreached[0]!r} comes first; rewind to that", run_id=run_id
        )
    return place


def retrying_run(services: Services, workflow_id: str | None, run_id: str) -> Procedure[Run]:
    """Let a failed run go on; see `Workflow.retry`."""
    check_run_id(run_id)
    control_id = services.env.new_id()

    def decide(found: Document) -> Command:
        if found["status"] != RunStatus.FAILED:
            raise InvalidStateError(f"run {run_id} is {found['status']}; only a failed run can be retried", run_id=run_id)
        slot = int(services.env.random() * SLOTS)
        check_due(found, lane=_lane_of(found))
        acts, step_id = control.control_count(found), _step_to_retry(found)
        return control.retry_run(workflow_id, run_id, acts, step_id, _lane_of(found), slot, control_id, is_durable=is_durable(found))

    document, applied = yield from controlling(workflow_id, run_id, control_id, decide)
    if applied:
        yield from signalling_due(services, document)
    return (yield from changed_run(document) if applied else making_run(document))


def _step_to_retry(found: Document) -> str:
    """The step or the call that has failed the run, or where the run was when another program had damaged it."""
    step_ids = [step["stepId"] for step in found["steps"]]
    named = (found.get("error") or {}).get("stepId")
    if named in step_ids:
        return str(named)
    return str(next((step["stepId"] for step in found["steps"] if step["status"] not in ENDED_STEPS), step_ids[-1]))


def _lane_of(found: Document) -> str:
    stored = found.get("lane")
    return f"{found.get('queue', 'default')}/{found['workflowId']}/{found['version']}" if stored is None else str(stored)
