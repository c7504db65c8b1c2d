"""The application that the load tests' pools run. Its handlers do nothing, so that what is measured is the engine.

`marked` is the exception: its first step notes when it was entered, in the file that MARKS_VARIABLE names.
"""

from __future__ import annotations

import functools
import os
import time
from typing import Any

from streamline_pool import Streamline, Workflow

__all__ = ["CLAIMS_VARIABLE", "MARKS_VARIABLE", "absent", "app", "client_app", "marked", "marked_short", "noop", "noop_def"]

MARKS_VARIABLE = "LOADTEST_MARKS"
CLAIMS_VARIABLE = "LOADTEST_CLAIMS"  # see counted.py

app = Streamline()


async def _noop(ctx: Any) -> None:
    return None


def _noop_def(ctx: Any) -> None:
    return None


async def _mark(ctx: Any) -> None:
    """One `write` to a file opened for appending is one whole line, whichever process writes it."""
    entered_at = time.monotonic()  # system-wide on Linux and macOS: the starter's clock reads the same
    os.write(_marks(), f"{ctx.run_id} {entered_at!r}\n".encode())


@functools.cache
def _marks() -> int:
    """The file's descriptor, opened at the first mark."""
    return os.open(os.environ[MARKS_VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


noop = app.workflow("noop", steps={"first": _noop, "second": _noop, "third": _noop})
noop_def = app.workflow("noop-def", steps={"first": _noop_def, "second": _noop_def, "third": _noop_def})
marked = app.workflow("marked", steps={"first": _mark, "second": _noop, "third": _noop})
marked_short = app.workflow("marked-short", steps={"only": _mark})

absent = Streamline().workflow("absent", steps={"first": _noop, "second": _noop, "third": _noop})
"""A workflow that the pools of the load tests do not have."""


def client_app(uri: str, database: str, *workflows: Workflow) -> Streamline:
    """An application for a process that starts runs of these workflows, on that database."""
    client = Streamline(uri, database=database)
    for workflow in workflows:
        client.workflow(workflow.id, steps={step.id: step.handler for step in workflow.definition.steps})
    return client
