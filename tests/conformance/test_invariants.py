"""The invariants of a stored run (docs/architecture.md) after random interleavings: several workers, lost workers, cancels, sweeps.

Each seed is part of the test's id. A seed that fails becomes a test case of its own.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from workers import Pool, check_invariants

from streamline_pool import StepOptions, Streamline
from streamline_pool.protocol import operations, recovery

RUNS = 40
SEEDS = [pytest.param(seed, marks=[pytest.mark.slow] if seed > 3 else []) for seed in range(1, 16)]


class Scripted:
    """Handlers that randomly return, fail or sleep, and a record of their entries."""

    def __init__(self, app: Streamline, chance: random.Random) -> None:
        self.app = app
        self.chance = chance
        self.entered_done: list[str] = []
        self.entries: Counter[tuple[str, str]] = Counter()
        options: StepOptions = {"retries": 20, "retry_delay": 0.005, "timeout": 5}
        handlers = {"one": self.step, "two": self.step_async, "three": self.step}
        self.workflow = app.workflow("scripted", steps={name: (handler, options) for name, handler in handlers.items()})

    def enter(self, ctx: Any) -> str:
        stored = self.app.runs.find_one({"_id": ctx.run_id})
        step = next(step for step in stored["steps"] if step["stepId"] == ctx.step_id)
        if step["status"] in ("done", "waiting") and ctx.signal.reason is None:
            self.entered_done.append(f"{ctx.run_id} {ctx.step_id} attempt {ctx.attempt}: {step}")
        self.entries[ctx.run_id, ctx.step_id] += 1
        return self.chance.choice(["return", "return", "return", "fail", "sleep", "checkpoint", "set", "slow"])

    def act(self, ctx: Any, what: str) -> Any:
        match what:
            case "fail":
                raise ValueError("by chance")
            case "sleep":
                ctx.sleep(self.chance.random() / 100)
            case "checkpoint":
                ctx.checkpoint((ctx.get_checkpoint() or 0) + 1)
            case "set":
                ctx.set(f"{ctx.step_id}.set", ctx.attempt)
        return [ctx.step_id, ctx.idempotency_key]

    def step(self, ctx: Any) -> Any:
        what = self.enter(ctx)
        if what == "slow":
            ctx.signal.wait(0.02)
        return self.act(ctx, what)

    async def step_async(self, ctx: Any) -> Any:
        what = self.enter(ctx)
        if what == "slow":
            await asyncio.sleep(0.02)
        return self.act(ctx, what)


async def disturb(app: Streamline, runs: list[str], chance: random.Random, cancelled: set[str]) -> None:
    """Cancel runs, let leases expire and recover them, at random moments."""
    store = app.store_async()
    for _ in range(60):
        await asyncio.sleep(chance.random() / 50)
        run_id = chance.choice(runs)
        match chance.randrange(4):
            case 0:
                if (await app.cancel_run_async(run_id)).status == "cancelled":
                    cancelled.add(run_id)
            case 1:
                # As if its worker had not renewed in time: the lease holder learns it at its next write.
                query = {"_id": run_id, "lease.expiresAt": {"$exists": True}}
                await store.run(operations.update_matching("expire", query, [{"$set": {"lease.expiresAt": {"$subtract": ["$$NOW", 1]}}}]))
            case 2:
                await store.run(recovery.recover_expired(app.settings.max_crashes))
            case 3:
                await asyncio.gather(*(store.run(recovery.recover_expired(app.settings.max_crashes)) for _ in range(2)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.slow
@pytest.mark.slow
def test_each_run_ends_once_and_none_is_wedged_after_random_interleavings(make_app: Callable[..., Streamline], seed: int) -> None:
    print(f"seed {seed}")
    chance = random.Random(seed)
    app = make_app(lease_s=2.0, max_crashes=1_000, concurrency=chance.choice([1, 5, 50]))
    scripted = Scripted(app, chance)
    runs = [run.id for run in scripted.workflow.start_many(range(RUNS))]
    cancelled: set[str] = set()

    async def play() -> None:
        async with Pool(app, workers=chance.choice([1, 2, 3]), recover_every_s=0.05) as pool:
            disturbing = asyncio.create_task(disturb(app, runs, chance, cancelled))
            while not disturbing.done():
                await asyncio.sleep(0.05)
                check_invariants(await asyncio.to_thread(lambda: list(app.runs.find())))
            await disturbing
            await pool.until(lambda: app.runs.count_documents({"endedAt": None}) == 0, timeout=45)

    asyncio.run(play())
    documents = list(app.runs.find())
    check_invariants(documents)
    assert not scripted.entered_done
    for document in documents:
        ended = "cancelled" if document["_id"] in cancelled else "done"
        assert document["status"] == ended, document
        if ended == "done":
            for step in document["steps"]:
                assert step["status"] == "done"
                assert step["output"] in (None, [step["stepId"], f"{document['_id']}:{step['stepId']}"])
                assert 1 <= scripted.entries[document["_id"], step["stepId"]] <= step["attempts"]
            assert document["output"] == document["steps"][-1]["output"]
