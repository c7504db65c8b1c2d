"""A run whose handler works until the test lets it return. Owns the thread and its events; the tests call control operations."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Unpack

from streamline_pool import Run, StepOptions, Streamline

__all__ = ["held"]


def held(
    app: Streamline, handler: Callable[[Any], Any], **options: Unpack[StepOptions]
) -> tuple[Any, Run, threading.Event, threading.Thread]:
    """(workflow, run, go, thread): the run's first handler works until `go` is set, and then does what `handler` does."""
    entered, go = threading.Event(), threading.Event()

    def work(ctx: Any) -> Any:
        if ctx.attempt == 1 and not go.is_set():
            entered.set()
            go.wait(20)
        return handler(ctx)

    workflow = app.workflow("held", steps={"work": (work, options), "end": lambda ctx: "end"})
    run = workflow.start()
    thread = threading.Thread(target=workflow.execute, args=(run.id,))
    thread.start()
    assert entered.wait(20)
    return workflow, run, go, thread
