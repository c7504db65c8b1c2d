"""The workflows of the soak, one for each capability. Owns the handlers; soak_client.py starts the runs and acts on them.

Handlers take no time, and sleep for milliseconds. The last step of a workflow checks what the steps before it left, and fails the run
for good if it is wrong, so that a soak also shows that what it measured was correct.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from streamline_pool import NonRetriableError, Streamline, create_hook, execute_parallel

__all__ = ["LARGE_BYTES", "SHARES", "SLEEP_S", "app", "define"]

SLEEP_S = 0.02
LARGE_BYTES = 16 * 1024  # above 4 KiB, so it is stored beside the run

SHARES = {
    "plain": 24, "plain_def": 8, "retried": 6, "asleep": 8, "checkpointed": 5, "parallel": 5, "large": 5, "keyed": 5,
    "answered": 7, "hooked": 5, "event_one": 6, "event_all": 6, "paused": 4, "rewound": 3, "cancelled": 3,
}  # fmt: skip
"""Workflow → its share of the runs, in hundredths."""


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise NonRetriableError(f"the soak expected that {what}")


async def _first(ctx: Any) -> Any:
    return {"n": ctx.input["n"]}


async def _last(ctx: Any) -> Any:
    _must(ctx.get_output("first") == {"n": ctx.input["n"]}, "the first step's output is kept")
    return ctx.input["n"]


def _first_def(ctx: Any) -> Any:
    return {"n": ctx.input["n"]}


def _last_def(ctx: Any) -> Any:
    _must(ctx.get_output("first") == {"n": ctx.input["n"]}, "the first step's output is kept")
    return ctx.input["n"]


async def _fails_once(ctx: Any) -> Any:
    if ctx.attempt == 1:
        raise RuntimeError("the first attempt fails")
    return {"n": ctx.input["n"]}


async def _falls_asleep(ctx: Any) -> None:
    ctx.set("asleep_at", time.time())
    ctx.sleep(SLEEP_S)


async def _has_slept(ctx: Any) -> Any:
    _must(time.time() >= ctx.context["asleep_at"] + SLEEP_S - 0.005, "a sleep does not end early")
    return ctx.input["n"]


async def _checkpoints(ctx: Any) -> Any:
    """The second attempt finds the checkpoint of the first."""
    if ctx.attempt == 1:
        ctx.checkpoint({"n": ctx.input["n"]})
        raise RuntimeError("the first attempt fails after its checkpoint")
    return ctx.get_checkpoint()


async def _fans_out(ctx: Any) -> Any:
    def task(value: int) -> Callable[[], Awaitable[int]]:
        async def run() -> int:
            await asyncio.sleep(0)
            return value

        return run

    values = await execute_parallel([task(n) for n in range(4)], concurrency=2)
    _must(values == [0, 1, 2, 3], "the results of tasks are in order")
    return {"n": ctx.input["n"]}


async def _returns_much(ctx: Any) -> Any:
    return {"n": ctx.input["n"], "blob": b"%8d" % ctx.input["n"] * (LARGE_BYTES // 8)}


async def _reads_much(ctx: Any) -> Any:
    output = ctx.get_output("first")
    _must(output["blob"] == b"%8d" % ctx.input["n"] * (LARGE_BYTES // 8), "a large output is whole")
    return output["n"]


async def _asks(ctx: Any) -> None:
    ctx.wait("the client answers", {"n": ctx.input["n"]})


async def _asks_by_hook(ctx: Any) -> None:
    ctx.set("token", create_hook(ctx, "the client answers").token)
    ctx.wait("the client answers")


async def _waits_for_event(ctx: Any) -> None:
    ctx.wait_for(ctx.input["event"])


async def _was_answered(ctx: Any) -> Any:
    answer = ctx.get_output("wait")
    _must(answer in ({"n": ctx.input["n"]}, {"event": ctx.input.get("event")}), "the answer is that of this run")
    return ctx.input["n"]


async def _was_cancelled(ctx: Any) -> None:
    _must(False, "a run that was cancelled enters no further step")


def define(app: Streamline) -> Streamline:
    """Declare the workflows of SHARES."""
    quick: Any = {"retries": 5, "retry_delay": 0.01, "retry_backoff": "fixed"}
    plain, waiting = {"first": _first, "second": _first, "last": _last}, {"first": _first, "wait": _asks, "last": _was_answered}
    steps: dict[str, Any] = {
        "plain": plain,
        "plain_def": {"first": _first_def, "last": _last_def},
        "retried": {"first": _fails_once, "last": _last},
        "asleep": {"first": _falls_asleep, "last": _has_slept},
        "checkpointed": {"first": _checkpoints, "last": _last},
        "parallel": {"first": _fans_out, "last": _last},
        "large": {"first": _returns_much, "last": _reads_much},
        "keyed": {"first": _first, "last": _last},
        "answered": waiting,
        "hooked": {"wait": _asks_by_hook, "last": _was_answered},
        "event_one": {"wait": _waits_for_event, "last": _was_answered},
        "event_all": {"wait": _waits_for_event, "last": _was_answered},
        "paused": waiting,
        "rewound": waiting,
        "cancelled": {"wait": _asks, "last": _was_cancelled},
    }
    assert set(steps) == set(SHARES), "each workflow has its share"
    for workflow_id, its_steps in steps.items():
        app.workflow(workflow_id, steps=its_steps, defaults=quick)
    return app


app = define(Streamline())
