"""The application of the storm: fifty workflows that use every capability, and whose handlers write a ledger.

At every entry a handler inserts one document into LEDGER: the run, the step, `ctx.idempotency_key`, the time, and what it sees of
the outputs of all steps before it (`seen`). A handler returns its key and a nonce of this entry, so a later entry shows which
result was accepted. Ledger writes are repeated through a failover, so that only the engine can fail a run.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from pymongo.errors import DuplicateKeyError, PyMongoError
from pymongo.write_concern import WriteConcern

from streamline_pool import NonRetriableError, Streamline, create_hook, execute_parallel, execute_parallel_sync, is_timeout

__all__ = ["CHECKPOINTS", "FAILS", "HOOKS", "KINDS", "LEDGER", "NEVER", "WORKFLOWS", "app", "define"]

LEDGER, HOOKS, CHECKPOINTS = "storm_ledger", "storm_hooks", "storm_checkpoints"
WORKFLOWS = 50
NEVER = "storm-never"  # an event that is never sent
FAILS = "broken"  # the one kind whose runs are to fail

_LEDGER_TIMEOUT_S = 60.0
_CLOCK_MARGIN_S = 0.05  # the engine corrects a host's clock by a measured offset
_CHECKPOINTS = 6


class _Steps:
    """The handlers. `app` is the pool's, for the collections of the ledger."""

    def __init__(self, app: Streamline) -> None:
        self._app = app

    # --- the ledger ------------------------------------------------------------------------------------------------

    def _collection(self, name: str) -> Any:
        return self._app.store().collection(name).with_options(write_concern=WriteConcern("majority"))

    def _entry(self, ctx: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the handler returns, and the document for the ledger."""
        entered_at = time.time()
        value = {"key": ctx.idempotency_key, "nonce": f"{os.getpid()}-{uuid4().hex[:12]}"}
        steps = self._app.workflows[ctx.workflow_id].steps
        seen = {step: _brief(ctx.get_output(step)) for step in steps[: steps.index(ctx.step_id)]}
        slept_until = ctx.context.get("until", 0.0) if ctx.step_id == "end" else 0.0
        starts_at = 0.0 if value["key"].count(":") > 1 else ctx.input.get("not_before", 0.0)  # a rewind makes a draft due at once
        not_before = max(slept_until, starts_at)
        early_s = not_before - entered_at
        document = {
            **{"_id": value["nonce"], "run": ctx.run_id, "step": ctx.step_id, "key": value["key"], "attempt": ctx.attempt},
            **{"at": entered_at, "seen": seen, "last": ctx.step_id == steps[-1]},
            **({"fault": f"entered {early_s:.3f} s early"} if early_s > _CLOCK_MARGIN_S else {}),
        }
        return value, document

    async def _enter(self, ctx: Any) -> dict[str, Any]:
        value, document = self._entry(ctx)
        await asyncio.to_thread(self._insert, LEDGER, document)
        return value

    def _enter_def(self, ctx: Any) -> dict[str, Any]:
        value, document = self._entry(ctx)
        self._insert(LEDGER, document)
        return value

    def _insert(self, name: str, document: Mapping[str, Any]) -> None:
        _patiently(lambda: self._collection(name).insert_one(document))

    # --- handlers --------------------------------------------------------------------------------------------------

    async def plain(self, ctx: Any) -> Any:
        return await self._enter(ctx)

    def plain_def(self, ctx: Any) -> Any:
        return self._enter_def(ctx)

    async def flaky(self, ctx: Any) -> Any:
        value = await self._enter(ctx)
        if ctx.attempt < 3:
            raise RuntimeError("this step fails twice")
        return value

    def broken(self, ctx: Any) -> Any:
        self._enter_def(ctx)
        raise NonRetriableError("this step always fails")

    async def nap(self, ctx: Any) -> None:
        await self._enter(ctx)
        ctx.set("until", time.time() + ctx.input["seconds"])
        ctx.sleep(ctx.input["seconds"])

    async def long_nap(self, ctx: Any) -> None:
        await self._enter(ctx)
        ctx.set("until", time.time() + 5 * ctx.input["seconds"])
        ctx.sleep(5 * ctx.input["seconds"])

    async def ask(self, ctx: Any) -> None:
        await self._enter(ctx)
        ctx.wait("the storm answers")

    def ask_def(self, ctx: Any) -> None:
        self._enter_def(ctx)
        ctx.wait("the storm answers")

    async def hook_early(self, ctx: Any) -> None:
        await self._enter(ctx)
        token = create_hook(ctx, "the storm answers").token
        await asyncio.to_thread(self._insert, HOOKS, {"_id": token, "run": ctx.run_id})
        await asyncio.sleep(0.7)  # so that the answer comes before the wait
        ctx.wait("the storm answers")

    def hook_late(self, ctx: Any) -> None:
        self._enter_def(ctx)
        self._insert(HOOKS, {"_id": create_hook(ctx, "the storm answers").token, "run": ctx.run_id})
        ctx.wait("the storm answers")

    async def hear(self, ctx: Any) -> None:
        await self._enter(ctx)
        ctx.wait_for(ctx.input["event"])

    async def ask_briefly(self, ctx: Any) -> None:
        await self._enter(ctx)
        ctx.wait("the storm may answer", timeout=0.7)

    def hear_briefly(self, ctx: Any) -> None:
        self._enter_def(ctx)
        ctx.wait_for(NEVER, timeout=0.7)

    async def fan(self, ctx: Any) -> Any:
        value = await self._enter(ctx)

        def task(n: int) -> Callable[[], Any]:
            async def square() -> int:
                await asyncio.sleep(0.01 * n)
                return n * n

            return square

        squares = await execute_parallel([task(n) for n in range(4)], concurrency=2)
        first = await execute_parallel([task(n) for n in range(2)], mode="race")
        return {**value, "parts": [*squares, first]}

    def fan_def(self, ctx: Any) -> Any:
        value = self._enter_def(ctx)
        settled = execute_parallel_sync([lambda: 1, lambda: 1 // 0], mode="all_settled")
        return {**value, "parts": [one.ok for one in settled]}

    async def count(self, ctx: Any) -> Any:
        """Six checkpoints. An entry must find at least the checkpoint that an earlier entry knew to be durable."""
        value, document = self._entry(ctx)
        stored = ctx.get_checkpoint() or 0
        durable = await asyncio.to_thread(_patiently, lambda: self._collection(CHECKPOINTS).find_one({"_id": value["key"]}))
        if durable is not None and durable["n"] > stored:
            document["fault"] = f"checkpoint {durable['n']} was durable, found {stored}"
        await asyncio.to_thread(self._insert, LEDGER, document)
        for n in range(stored + 1, _CHECKPOINTS + 1):
            await asyncio.sleep(0.15)
            ctx.checkpoint(n)
            await asyncio.to_thread(self._note_checkpoint, value["key"], n)
        return value

    def _note_checkpoint(self, key: str, n: int) -> None:
        _patiently(lambda: self._collection(CHECKPOINTS).update_one({"_id": key}, {"$max": {"n": n}}, upsert=True))

    def large(self, kib: int) -> Callable[[Any], Any]:
        async def large(ctx: Any) -> Any:
            value = await self._enter(ctx)
            return {**value, "blob": _blob(value["nonce"], kib)}

        return large

    async def slow(self, ctx: Any) -> Any:
        value = await self._enter(ctx)
        await asyncio.sleep(ctx.input["seconds"])
        ctx.heartbeat()
        ctx.emit("storm:slow", {"n": ctx.input["n"]})
        return value

    def slow_def(self, ctx: Any) -> Any:
        value = self._enter_def(ctx)
        ctx.signal.wait(ctx.input["seconds"])
        return value

    async def hang(self, ctx: Any) -> Any:
        value = await self._enter(ctx)
        if ctx.attempt == 1:
            await asyncio.sleep(60)  # until the step's timeout
        return value

    async def expire(self, ctx: Any) -> Any:
        ctx.set("expireAt", datetime.now(UTC) + timedelta(seconds=1))
        return await self._enter(ctx)


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


def _patiently(write: Callable[[], Any]) -> Any:
    """Repeat a write or a read of the ledger through a failover."""
    deadline = time.monotonic() + _LEDGER_TIMEOUT_S
    while True:
        try:
            return write()
        except DuplicateKeyError:
            return None  # an insert whose reply was lost
        except PyMongoError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


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


def define(app: Streamline) -> Streamline:
    """Declare the workflows. Every second one has the queue `second`."""
    steps, kinds = _Steps(app), list(KINDS)
    for number in range(WORKFLOWS):
        kind = kinds[number % len(kinds)]
        defaults: Any = {"retries": 20, "retry_delay": 0.1, "retry_backoff": "linear"}
        queue = "second" if number % 2 else "default"
        app.workflow(f"{kind}_{number // len(kinds)}", steps=KINDS[kind](steps), defaults=defaults, queue=queue)
    return app


app = define(Streamline())
