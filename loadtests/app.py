"""The application of the load tests' pools. Most handlers do nothing, so that the engine is what is measured.

The exceptions: the first step of `marked` writes when it was entered, into the file of MARKS_VARIABLE. `busy` takes a fixed
time. `nap` sleeps, and returns when it went on. `held` writes when its signal fired.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
from typing import Any

from streamline_pool import DurableContext, Streamline, Workflow

__all__ = [
    "BUSY_S", "CALLS", "CLAIMS_VARIABLE", "HOLD_S", "MARKS_VARIABLE",
    "absent", "app", "busy", "client_app", "held", "held_def", "marked", "marked_short", "nap", "noop", "noop_def",
    "ten_calls", "ten_steps",
]  # fmt: skip

MARKS_VARIABLE = "LOADTEST_MARKS"
CLAIMS_VARIABLE = "LOADTEST_CLAIMS"  # see counted.py

CALLS = 10
"""Calls of a run of `ten_calls`, and steps of one of `ten_steps`."""

BUSY_S = 0.5
"""How long a run of `busy` waits, without using a processor."""

HOLD_S = 60.0
"""How long the handlers of `held` and `held_def` wait for their cancellation."""

app = Streamline()


async def _noop(ctx: Any) -> None:
    return None


async def _noop_call() -> None:
    return None


def _noop_def(ctx: Any) -> None:
    return None


async def _mark(ctx: Any) -> None:
    """Each `write` to a file opened for appending adds one whole line, even with several processes."""
    entered_at = time.monotonic()  # the same clock in all processes on Linux and macOS
    os.write(_marks(), f"{ctx.run_id} {entered_at!r}\n".encode())


@functools.cache
def _marks() -> int:
    """The file's descriptor, opened at the first mark."""
    return os.open(os.environ[MARKS_VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


async def _busy(ctx: Any) -> None:
    await asyncio.sleep(BUSY_S)


async def _fall_asleep(ctx: Any) -> None:
    ctx.set("due_at", time.time() + ctx.input["seconds"])
    ctx.sleep(ctx.input["seconds"])


async def _go_on(ctx: Any) -> float:
    return time.time()


async def _hold(ctx: Any) -> None:
    _note(ctx, "entered")
    try:
        await asyncio.sleep(HOLD_S)
    except asyncio.CancelledError:
        _note(ctx, ctx.signal.reason)
        raise


def _hold_def(ctx: Any) -> None:
    _note(ctx, "entered")
    ctx.signal.wait(HOLD_S)
    _note(ctx, ctx.signal.reason)


def _note(ctx: Any, what: str | None) -> None:
    os.write(_marks(), f"{ctx.run_id} {what} {time.monotonic()!r}\n".encode())


noop = app.workflow("noop", steps={"first": _noop, "second": _noop, "third": _noop})
noop_def = app.workflow("noop-def", steps={"first": _noop_def, "second": _noop_def, "third": _noop_def})
marked = app.workflow("marked", steps={"first": _mark, "second": _noop, "third": _noop})
marked_short = app.workflow("marked-short", steps={"only": _mark})
busy = app.workflow("busy", steps={"only": _busy})
nap = app.workflow("nap", steps={"asleep": _fall_asleep, "awake": _go_on})
held = app.workflow("held", steps={"only": _hold})
held_def = app.workflow("held-def", steps={"only": _hold_def})

ten_steps = app.workflow("ten-steps", steps={f"call-{number}": _noop for number in range(CALLS)})
ten_calls = app.workflow("ten-calls")


@ten_calls.main
async def _call(ctx: DurableContext) -> None:
    for number in range(CALLS):
        await ctx.step(f"call-{number}", _noop_call)


absent = Streamline().workflow("absent", steps={"first": _noop, "second": _noop, "third": _noop})
"""A workflow that the pools of the load tests do not serve."""


def client_app(uri: str, database: str, *workflows: Workflow) -> Streamline:
    """An application for a process that starts runs of these workflows, on that database."""
    client = Streamline(uri, database=database)
    for workflow in workflows:
        if workflow.definition.is_durable:
            client.workflow(workflow.id).main(workflow.definition.steps[0].handler)
        else:
            client.workflow(workflow.id, steps={step.id: step.handler for step in workflow.definition.steps})
    return client
