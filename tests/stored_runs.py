"""Runs as the database holds them: the document, one of its steps, and waiting until a step has a status."""

from __future__ import annotations

from typing import Any

from pymongo.read_concern import ReadConcern

from streamline_pool import Run, Streamline
from support import eventually, present

__all__ = ["step_of", "stored", "until_step"]


def stored(app: Streamline, run: Run | str) -> dict[str, Any]:
    """The run's document by a majority read, as every caller of the API reads it. A local read may return it some moments earlier."""
    run_id = run if isinstance(run, str) else run.id
    document = app.runs.with_options(read_concern=ReadConcern("majority")).find_one({"_id": run_id})
    return dict(present(document))


def step_of(app: Streamline, run: Run | str, step_id: str) -> dict[str, Any]:
    """The stored step `step_id` of the run."""
    steps: list[dict[str, Any]] = stored(app, run)["steps"]
    return next(step for step in steps if step["stepId"] == step_id)


def until_step(app: Streamline, run: Run | str, step_id: str, status: str, *, timeout: float = 20.0) -> dict[str, Any]:
    """The run's document as soon as that step has that status. If the step waits, the lease must be released too."""

    def reached() -> dict[str, Any] | None:
        document = stored(app, run)
        step = next(step for step in document["steps"] if step["stepId"] == step_id)
        return document if step["status"] == status and (status != "waiting" or "lease" not in document) else None

    return present(eventually(reached, timeout=timeout))
