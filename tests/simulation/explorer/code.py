"""The durable function of the workload: calls in a row and side by side, a wait, a sleep, a patch, another generation.

Owns the rule about replay: a call returns one and the same result in every entry into the function, and only once that is durable.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from streamline_pool import DurableContext, current_step
from streamline_pool.protocol.payloads import EXTERNAL_BYTES

from .ledger import Violation

if TYPE_CHECKING:
    from .actors import Actor
    from .world import World

__all__ = ["Code"]


class Code:
    """The function, as each actor has it."""

    def __init__(self, world: World) -> None:
        draw = random.Random(
            world.choices.seed ^ 0xC0DE
        )  # apart from what is drawn for the other workflows, whose schedules stay as they were
        self._world = world
        self._work = [draw.choice((0.0, 0.0, 0.003, 0.5, 8.0, 33.0)) for _ in range(5)]
        self._retry_s = draw.choice((0.1, 1.0, 20.0))
        self._failures = draw.choice((0, 1, 2))
        self._sleep_s = draw.choice((0.01, 1.0, 50.0))
        self._deadline_s = draw.choice((None, 0.5, 20.0))
        self._generations = draw.choice((0, 0, 1))
        self._returned: dict[tuple[str, int, str], Any] = {}  # (run id, rewinds, name) -> the result

    def asked_s(self, kind: str) -> float | None:
        """As Workload.asked_s."""
        return self._sleep_s if kind == "timer" else self._deadline_s

    def main(self, actor: Actor) -> Callable[[DurableContext], Awaitable[Any]]:
        """The function, whose calls report to the ledger as this actor."""

        async def run(ctx: DurableContext) -> Any:
            first = await self._step(ctx, actor, "s0", 0)
            both = await asyncio.gather(self._step(ctx, actor, "s1", 1), self._step(ctx, actor, "s2", 2))
            is_new = ctx.patched("patch")
            await ctx.sleep(self._sleep_s, name="nap")
            answer = await ctx.wait("answer me", timeout=self._deadline_s, name="ask")
            if ctx.generation < self._generations:
                ctx.continue_as_new(ctx.input)
            failing = await self._step(ctx, actor, "s3", 3, self._failures)
            large = await self._step(ctx, actor, "s4", 4)
            if not is_new:
                self._world.fail(Violation(f"patched is false in {ctx.run_id}, whose code has never changed"))
            return {
                "first": first["entry"],
                "both": [each["entry"] for each in both],
                "answer": answer,
                "last": [failing["entry"], large["entry"]],
            }

        return run

    async def _step(self, ctx: DurableContext, actor: Actor, name: str, place: int, failures: int = 0) -> Any:
        """One call, and the rule about what it returns."""
        result = await ctx.step(name, self._fn(actor, place, failures), retries=8, retry_delay=self._retry_s, retry_backoff="fixed")
        rules = self._world.rules
        active = next((one for one in actor.engine.active_runs.all() if one.run_id == ctx.run_id), None) if actor.engine else None
        if active is None:
            return result
        rewinds = active.document.get("rewinds", 0)
        known = self._returned.setdefault((ctx.run_id, rewinds, name), result)
        if known != result and ctx.run_id not in rules.deleted:
            self._world.fail(Violation(f"{name} of {ctx.run_id} returned {result}, and before {known}"))
        run = rules.durable().get(ctx.run_id)
        is_mine = run is not None and run.get("rewinds", 0) == rewinds and (ctx.run_id, active.lease_id) not in rules.taken
        stored: Any = next((step for step in (run or {}).get("steps", ()) if step["stepId"] == name), {})
        if is_mine and stored.get("status") != "done":
            self._world.fail(Violation(f"{name} of {ctx.run_id} returned, and a majority has {stored or 'nothing'}"))
        return result

    def _fn(self, actor: Actor, place: int, failures: int) -> Callable[[], Awaitable[Any]]:
        async def fn() -> Any:
            context = current_step()
            try:
                entry = self._world.rules.entries.entered(actor, context)
            except Violation as violation:
                self._world.fail(violation)
                raise
            number = len(self._world.ledger.entries) - 1
            try:
                if self._work[place]:
                    await asyncio.sleep(self._work[place])
                if context.attempt <= failures:
                    raise ValueError("a failure of the workload")
                return {"entry": number, "of": "x" * (EXTERNAL_BYTES + 1) if place == 4 else place}
            except asyncio.CancelledError:
                try:
                    self._world.rules.entries.stopped(actor, entry)
                except Violation as violation:
                    self._world.fail(violation)
                raise
            finally:
                entry.left = True

        return fn
