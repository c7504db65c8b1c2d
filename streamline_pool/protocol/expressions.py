"""Parts of filters and of update pipelines that several operations share, as data. Owns which statuses a filter names.

A pipeline that meets a value of the wrong type fails as a whole, and with it the update of every other run of the batch.
These expressions therefore accept whatever another program did to a document. `validate_run_document` then reports it.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from streamline_pool.domain.definition import MAIN
from streamline_pool.domain.model import ENDED_STEPS, NON_TERMINAL, REWINDABLE, TERMINAL, RunStatus, StepStatus

from .operations import Expression, Query

__all__ = [
    "ENDED_STEP_TEXTS", "ENTERABLE_STEP_TEXTS", "INBOX", "IS_CURRENT", "IS_DURABLE", "IS_PAUSED", "NON_TERMINAL_TEXTS", "NOT_PAUSED",
    "NOT_REWINDABLE_TEXTS", "STEPS", "TERMINAL_TEXTS", "live_run", "map_steps", "plus_one", "server_time_in", "some_step",
    "status_texts", "text_of",
]  # fmt: skip


def status_texts(statuses: Iterable[StrEnum]) -> list[str]:
    """Statuses as they are stored, sorted, for `$in` and `$nin`."""
    return sorted(status.value for status in statuses)


TERMINAL_TEXTS = status_texts(TERMINAL)
NON_TERMINAL_TEXTS = status_texts(NON_TERMINAL)
NOT_REWINDABLE_TEXTS = status_texts(set(RunStatus) - REWINDABLE)

ENDED_STEP_TEXTS = status_texts(ENDED_STEPS)
ENTERABLE_STEP_TEXTS = status_texts(set(StepStatus) - ENDED_STEPS - {StepStatus.WAITING})
"""Statuses of a step whose handler may be entered: not entered yet, or entered by a worker that was lost."""

NOT_PAUSED: Query = {"$ne": True}
IS_PAUSED: Expression = {"$eq": ["$paused", True]}

IS_CURRENT: Expression = {"$and": [{"$eq": [{"$type": "$$step"}, "object"]}, {"$eq": ["$$step.stepId", "$currentStepId"]}]}
"""True within `map_steps` and `some_step` for the step that the run is at."""

STEPS: Expression = {"$cond": [{"$isArray": ["$steps"]}, "$steps", []]}
IS_DURABLE: Expression = {"$eq": [{"$arrayElemAt": [{"$ifNull": ["$steps.kind", []]}, 0]}, MAIN]}
"""True for the run of a durable function. Of steps that are all declared, `$steps.kind` is an empty list."""
INBOX: Expression = {"$cond": [{"$isArray": ["$inbox"]}, "$inbox", []]}


def live_run(workflow_id: str | None, run_id: str) -> Query:
    """One run that has not ended, of that workflow or (None) of any."""
    query: Query = {"_id": run_id, "status": {"$in": NON_TERMINAL_TEXTS}}
    if workflow_id is not None:
        query["workflowId"] = workflow_id
    return query


def map_steps(expression: Expression) -> Expression:
    """The steps, each replaced by `expression` of `$$step`."""
    return {"$cond": [{"$isArray": ["$steps"]}, {"$map": {"input": STEPS, "as": "step", "in": expression}}, "$steps"]}


def some_step(condition: Expression) -> Expression:
    """True if `condition` of `$$step` holds for a step."""
    return {"$anyElementTrue": [{"$map": {"input": STEPS, "as": "step", "in": condition}}]}


def plus_one(path: str) -> Expression:
    """The number at `path`, plus one. A value that is no number counts as 0."""
    return {"$add": [{"$cond": [{"$isNumber": path}, path, 0]}, 1]}


def text_of(path: str) -> Expression:
    """The text at `path`, or "(unknown)"."""
    return {"$cond": [{"$eq": [{"$type": path}, "string"]}, path, "(unknown)"]}


def server_time_in(seconds: float) -> Expression:
    """The server's time, so many seconds from now."""
    return {"$dateAdd": {"startDate": "$$NOW", "unit": "millisecond", "amount": round(seconds * 1000)}}
