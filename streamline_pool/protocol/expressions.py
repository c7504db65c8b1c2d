"""Fragments of filters and of update pipelines that several operations share, as data.

A pipeline that meets a value of the wrong type fails as a whole, and with it every other run of the batch. These
expressions hold whatever another program did to a document; documents.misfit then reports it.
"""

from __future__ import annotations

from typing import Any

from streamline_pool.domain.model import NON_TERMINAL, TERMINAL

__all__ = [
    "INBOX", "IS_CURRENT", "IS_PAUSED", "NON_TERMINAL_TEXTS", "NOT_PAUSED", "STEPS", "TERMINAL_TEXTS",
    "live_run", "map_steps", "plus_one", "server_time_in", "some_step", "text_of",
]  # fmt: skip

Document = dict[str, Any]

TERMINAL_TEXTS = sorted(status.value for status in TERMINAL)
NON_TERMINAL_TEXTS = sorted(status.value for status in NON_TERMINAL)
NOT_PAUSED = {"$ne": True}

IS_CURRENT: Document = {"$and": [{"$eq": [{"$type": "$$step"}, "object"]}, {"$eq": ["$$step.stepId", "$currentStepId"]}]}
"""True within `map_steps` and `some_step` for the step that the run is at."""

IS_PAUSED: Document = {"$eq": ["$paused", True]}

STEPS: Document = {"$cond": [{"$isArray": ["$steps"]}, "$steps", []]}
INBOX: Document = {"$cond": [{"$isArray": ["$inbox"]}, "$inbox", []]}


def map_steps(expression: Document) -> Document:
    """The steps, each replaced by `expression` of `$$step`."""
    return {"$cond": [{"$isArray": ["$steps"]}, {"$map": {"input": STEPS, "as": "step", "in": expression}}, "$steps"]}


def some_step(condition: Document) -> Document:
    """True if `condition` of `$$step` holds for a step."""
    return {"$anyElementTrue": [{"$map": {"input": STEPS, "as": "step", "in": condition}}]}


def plus_one(path: str) -> Document:
    """The number at `path` (what is no number counts as 0) and one."""
    return {"$add": [{"$cond": [{"$isNumber": path}, path, 0]}, 1]}


def text_of(path: str) -> Document:
    """The text at `path`."""
    return {"$cond": [{"$eq": [{"$type": path}, "string"]}, path, "(unknown)"]}


def server_time_in(seconds: float) -> Document:
    """The server's time, so many seconds from now."""
    return {"$dateAdd": {"startDate": "$$NOW", "unit": "millisecond", "amount": round(seconds * 1000)}}


def live_run(workflow_id: str | None, run_id: str) -> Document:
    """One run that has not ended, of that workflow or (None) of any."""
    query: Document = {"_id": run_id, "status": {"$in": NON_TERMINAL_TEXTS}}
    if workflow_id is not None:
        query["workflowId"] = workflow_id
    return query
