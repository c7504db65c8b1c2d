"""The workload: fifty workflows that use every capability, and whose handlers note in the ledger what they see.

At every entry a handler notes the run, the step, `ctx.idempotency_key`, and what it sees of the outputs of all steps before it
(`seen`). A handler returns its key and a nonce of this entry, so a later entry shows which result was accepted. At every exit it
notes how it ended. Owns the workflows; leaves starting and answering runs to clients.py.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from streamline_pool import NonRetriableError, Streamline, create_hook, execute_parallel, execute_parallel_sync, is_timeout

from .ledger import FOLDER_VARIABLE, Ledger, real_monotonic

__all__ = ["FAILING_STEPS", "FAILS", "KINDS", "NEVER", "WORKFLOWS", "app", "define"]

WORKFLOWS = 50
NEVER = "chaos-never"  # an event that is never sent
FAILING_STEPS = ("flaky", "broken", "hang")  # their handlers fail or hang on purpose
FAILS = "broken"  # the one kind whose runs are to fail

_CHECKPOINTS = 6


class _Steps:
    """The handlers, which note in `ledger`."""

    def __init__(self, app: Streamline, ledger: Ledger) -> None:
        self._app, self._ledger = app, ledger

    # --- the ledger ------------------------------------------------------------------------------------------------

    def _enter(self, ctx: Any, **more: Any) -> dict[str, Any]:
        """Note an entry. Returns what the handler returns."""
        entered_at = real_monotonic()
        value = {"key": ctx.idempotency_key, "nonce": f"{os.getpid()}-{os.urandom(6).hex()}"}
        steps = self._app.workflows[ctx.workflow_id].steps
        slept_until = ctx.context.get("until", 0.0) if ctx.step_id == "end" else 0.0
        starts_at = 0.0 if value["key"].count(":") > 1 else ctx.input.get("not_before", 0.0)  # a rewind makes a draft due at once
        self._ledger.note(
            "entry",
            at=entered_at,  # and not when it is noted: the process may be suspended in between
            **{"run": ctx.run_id, "step": ctx.step_id, "key": value["key"], "nonce": value["nonce"], "attempt": ctx.attempt},
            seen={step: _brief(ctx.get_output(step)) for step in steps[: steps.index(ctx.step_id)]},
            place=steps.index(ctx.step_id),
            last=ctx.step_id == steps[-1],
            early_s=max(0.0, max(slept_until, starts_at) - entered_at),
            **more,
        )
        return value

    def watched(self, handler: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The handler, which also notes its exit: "returned", or the name of what it raised."""

        def left(ctx: Any, exc: BaseException | None) -> None:
            end = "returned" if exc is None else type(exc).__name__
            self._ledger.note("exit", run=ctx.run_id, step=ctx.step_id, key=ctx.idempotency_key, end=end)

        @functools.wraps(handler)
        async def asynchronous(ctx: Any) -> Any:
            try:
                output = await handler(ctx)
            except BaseException as exc:
                left(ctx, exc)
                raise
            left(ctx, None)
            return output

        @functools.wraps(handler)
        def synchronous(ctx: Any) -> Any:
            try:
                output = handler(ctx)
            except BaseException as exc:
                left(ctx, exc)
                raise
            left(ctx, None)
            return output

        return asynchronous if inspect.iscoroutinefunction(handler) else synchronous

    # --- handlers --------------------------------------------------------------------------------------------------

    async def plain(self, ctx: Any) -> Any:
        return self._enter(ctx)

    def plain_def(self, ctx: Any) -> Any:
        return self._enter(ctx)

    async def flaky(self, ctx: Any) -> Any:
        value = self._enter(ctx)
        if ctx.attempt < 3:
            raise RuntimeError("this step fails twice")
        return value

    def broken(self, ctx: Any) -> Any:
        self._enter(ctx)
        raise NonRetriableError("this step always fails")

    async def nap(self, ctx: Any) -> None:
        self._enter(ctx)
        ctx.set("until", real_monotonic() + ctx.input["seconds"])
        ctx.sleep(ctx.input["seconds"])

    async def long_nap(self, ctx: Any) -> None:
        self._enter(ctx)
        ctx.set("until", real_monotonic() + 5 * ctx.input["seconds"])
        ctx.sleep(5 * ctx.input["seconds"])

    async def ask(self, ctx: Any) -> None:
        self._enter(ctx)
        ctx.wait("a client answers")

    def ask_def(self, ctx: Any) -> None:
        self._enter(ctx)
        ctx.wait("a client answers")

    async def hook_early(self, ctx: Any) -> None:
        self._enter(ctx)
        self._ledger.note("blocks", run=ctx.run_id, key=ctx.idempotency_key)
        token = create_hook(ctx, "a client answers").token
        self._ledger.note("hook", run=ctx.run_id, token=token, key=ctx.idempotency_key)
        await asyncio.sleep(0.7)  # so that the answer comes before the wait
        ctx.wait("a client answers")

    def hook_late(self, ctx: Any) -> None:
        self._enter(ctx)
        self._ledger.note("hook", run=ctx.run_id, token=create_hook(ctx, "a client answers").token)
        ctx.wait("a client answers")

    async def hear(self, ctx: Any) -> None:
        self._enter(ctx)
        ctx.wait_for(ctx.input["event"])

    async def ask_briefly(self, ctx: Any) -> None:
        self._enter(ctx)
        ctx.wait("a client may answer", timeout=0.7)

    def hear_briefly(self, ctx: Any) -> None:
        self._enter(ctx)
        ctx.wait_for(NEVER, timeout=0.7)

    async def fan(self, ctx: Any) -> Any:
        value = self._enter(ctx)

        def task(n: int) -> Callable[[], Any]:
            async def square() -> int:
                await asyncio.sleep(0.01 * n)
                return n * n

            return square

        squares = await execute_parallel([task(n) for n in range(4)], concurrency=2)
        first = await execute_parallel([task(n) for n in range(2)], mode="race")
        return {**value, "parts": [*squares, first]}

    def fan_def(self, ctx: Any) -> Any:
        value = self._enter(ctx)
        settled = execute_parallel_sync([lambda: 1, lambda: 1 // 0], mode="all_settled")
        return {**value, "parts": [one.ok for one in settled]}

    async def count(self, ctx: Any) -> Any:
        """Six checkpoints, each noted when it is durable. An entry notes the checkpoint that it finds."""
        stored = ctx.get_checkpoint() or 0
        value = self._enter(ctx, found=stored)
        for n in range(stored + 1, _CHECKPOINTS + 1):
            await asyncio.sleep(0.15)
            self._ledger.note("blocks", run=ctx.run_id, key=value["key"])
            ctx.checkpoint(n)
            self._ledger.note("checkpoint", run=ctx.run_id, key=value["key"], n=n)
        return value

    def large(self, kib: int) -> Callable[[Any], Any]:
        async def large(ctx: Any) -> Any:
            value = self._enter(ctx)
            return {**value, "blob": _blob(value["nonce"], kib)}

        return large

    async def slow(self, ctx: Any) -> Any:
        value = self._enter(ctx, length_s=ctx.input["seconds"])
        await asyncio.sleep(ctx.input["seconds"])
        ctx.heartbeat()
        ctx.emit("chaos:slow", {"n": ctx.input["n"]})
        return value

    def slow_def(self, ctx: Any) -> Any:
        value = self._enter(ctx, length_s=ctx.input["seconds"])
        ctx.signal.wait(ctx.input["seconds"])
        return value

    async def hang(self, ctx: Any) -> Any:
        value = self._enter(ctx)
        if ctx.attempt == 1:
            await asyncio.sleep(60)  # until the step's timeout
        return value

    async def expire(self, ctx: Any) -> Any:
        ctx.set("expireAt", datetime.now(UTC) + timedelta(seconds=1))
        return self._enter(ctx)


def _brief(output: Any) -> Any:
    """What the ledger keeps of an output: nonces, payloads, and whether a large output is whole."""
    if is_timeout(output):
        return {"timeout": True}
    if isinstance(output, dict) and "blob" in output:
        kib = len(output["blob"]) // 1024
        return {**output, "blob": kib if output["blob"] == _blob(output["nonce"], kib) else "damaged"}
    return output


def _blob(nonce: str, kib: int) -> bytes:
    return (nonce.encode() * (kib * 1024 // len(nonce) + 1))[: kib * 1024]


KINDS: dict[str, Callable[[_Steps], dict[str, Any]]] = {
    "plain": lambda s: {"first": s.plain, "second": s.plain, "end": s.plain},
    "plain-def": lambda s: {"first": s.plain_def, "second": s.plain_def, "end": s.plain_def},
    "flaky": lambda s: {"flaky": s.flaky, "end": s.plain},
    FAILS: lambda s: {"first": s.plain, "broken": s.broken},
    "nap": lambda s: {"nap": s.nap, "end": s.plain},
    "long-nap": lambda s: {"nap": s.long_nap, "end": s.plain_def},
    "human": lambda s: {"first": s.plain, "ask": s.ask, "end": s.plain},
    "human-def": lambda s: {"ask": s.ask_def, "second": s.plain_def, "end": s.plain_def},
    "hook-early": lambda s: {"hook": s.hook_early, "end": s.plain},
    "hook-late": lambda s: {"first": s.plain_def, "hook": s.hook_late, "end": s.plain_def},
    "event-one": lambda s: {"first": s.plain, "hear": s.hear, "end": s.plain},
    "event-all": lambda s: {"hear": s.hear, "end": s.plain},
    "timeouts": lambda s: {"ask": s.ask_briefly, "hear": s.hear_briefly, "end": s.plain},
    "parallel": lambda s: {"fan": s.fan, "fan-def": s.fan_def, "end": s.plain},
    "checkpoints": lambda s: {"count": s.count, "end": s.plain},
    "large-16": lambda s: {"large": s.large(16), "end": s.plain},
    "large-100": lambda s: {"large": s.large(100), "end": s.plain},
    "large-300": lambda s: {"large": s.large(300), "end": s.plain},
    "slow": lambda s: {"first": s.plain, "slow": s.slow, "end": s.plain},
    "slow-def": lambda s: {"slow": s.slow_def, "end": s.plain_def},
    "hang": lambda s: {"hang": (s.hang, {"timeout": 0.6}), "end": s.plain},
    "skip": lambda s: {"first": s.plain, "skipped": (s.plain, {"skip_if": lambda ctx: ctx.input["n"] % 2 == 0}), "end": s.plain},
    "expire": lambda s: {"expire": s.expire, "end": s.plain},
}
"""Kind of workflow → its steps. `_` and a number make the id of a workflow of that kind."""


def define(app: Streamline, ledger: Ledger) -> Streamline:
    """Declare the workflows. Every second one has the queue `second`."""
    steps, kinds = _Steps(app, ledger), list(KINDS)
    for number in range(WORKFLOWS):
        kind = kinds[number % len(kinds)]
        defaults: Any = {"retries": 20, "retry_delay": 0.1, "retry_backoff": "linear"}
        queue = "second" if number % 2 else "default"
        app.workflow(f"{kind}_{number // len(kinds)}", steps=_watched(steps, KINDS[kind](steps)), defaults=defaults, queue=queue)
    return app


def _watched(steps: _Steps, declared: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: (steps.watched(given[0]), given[1]) if isinstance(given, tuple) else steps.watched(given) for name, given in declared.items()
    }


app = define(Streamline(), Ledger(os.environ.get(FOLDER_VARIABLE, os.curdir)))
