"""As test_faults.py, for a run that waits in every way: a hook answered early, events sent before, a deadline that passes.

Each begins and ends a wait by writes of its own (the hook, the wait, the taking of what has arrived, the look, the time-out),
and each of them fails once, in every way. The same again for a run that is paused while each of its handlers works.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from test_faults import HASTE, OPERATIONS_MAX, Faults, FaultyBlockingStore, FaultyStore
from workers import Pool, check_invariants

from streamline_pool import Streamline, create_hook, is_timeout
from streamline_pool.config.env import system_env


class Waiter:
    """The handlers of the run. What comes from outside comes through `sound`, which no fault hits."""

    def __init__(self, app: Streamline, sound: Streamline, pausing: bool) -> None:
        self.pausing = pausing
        self.entries: Counter[str] = Counter()
        self.too_late: list[str] = []
        self._app = app
        self._sound = sound
        handlers = {
            "offer": self.offer,
            "offer_async": self.offer_async,
            "hear_one": lambda ctx: self.enter(ctx) or ctx.wait_for("one"),
            "hear_all": lambda ctx: self.enter(ctx) or ctx.wait_for("all"),
            "ask": lambda ctx: self.enter(ctx) or ctx.wait("?", timeout=0.02),
            "end": lambda ctx: self.enter(ctx) or [ctx.get_output(name) for name in list(handlers)[:-1]],
        }
        self.workflow = app.workflow("waiter", steps=handlers)

    def enter(self, ctx: Any) -> None:
        stored = self._sound.runs.find_one({"_id": ctx.run_id})
        step = next(step for step in stored["steps"] if step["stepId"] == ctx.step_id)
        if step["status"] in ("done", "waiting"):
            self.too_late.append(f"{ctx.step_id} was entered, and is {step}")
        self.entries[ctx.step_id] += 1
        if self.pausing:
            self._sound.pause_run(ctx.run_id)

    def has_ended(self, run_id: str) -> bool:
        """Whether it has; a run that is paused and nobody's is resumed."""
        document = self._sound.runs.find_one({"_id": run_id})
        if document["paused"] and "lease" not in document and document["endedAt"] is None:
            self._sound.resume_run(run_id)
        return document["endedAt"] is not None

    def offer(self, ctx: Any) -> None:
        self.enter(ctx)
        self._sound.resume_hook(create_hook(ctx, "?").token, f"signed {ctx.step_id}")
        ctx.wait("?")

    async def offer_async(self, ctx: Any) -> None:
        self.offer(ctx)


async def drive(app: Streamline, sound: Streamline, waiter: Waiter, faults: Faults) -> dict[str, Any]:
    """One whole run under `faults`; its document at the end."""
    store = app.connections.use(FaultyStore(app.where, app.env))
    store.faults = Faults("none", 0, 0)
    run = await waiter.workflow.start_async()
    await asyncio.to_thread(sound.send_event, "one", 1, run_id=run.id)
    await asyncio.to_thread(sound.send_event, "all", 2)
    store._ensured = True
    store.faults = faults
    blocking = app.store()
    assert isinstance(blocking, FaultyBlockingStore)
    blocking.faults = faults
    async with Pool(app, recover_every_s=0.05) as pool:
        await pool.until(lambda: waiter.has_ended(run.id), timeout=60)
        await pool.until_idle(timeout=60)
        faults.first = 0  # the draining is not part of it
        await asyncio.gather(*getattr(store, "late", []), return_exceptions=True)
    document: dict[str, Any] = sound.runs.find_one({"_id": run.id})
    return document


@pytest.mark.timeout(300)
@pytest.mark.parametrize("pausing", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["not paused", "paused"])
@pytest.mark.parametrize("kind", ["unknown", pytest.param("lost", marks=pytest.mark.slow), pytest.param("late", marks=pytest.mark.slow)])
def test_a_run_that_waits_hears_all_of_it_once_whichever_of_its_operations_fails(
    make_app: Callable[..., Streamline], kind: str, pausing: bool
) -> None:
    """An answer that was accepted, or an event that was sent, is neither lost nor taken twice by a write of unknown fate."""
    system = system_env()
    hasty = replace(system, sleep=lambda s: system.sleep(s / HASTE), async_sleep=lambda s: asyncio.sleep(s / HASTE))
    app, sound = make_app(env=hasty, lease_s=0.5, max_crashes=20), make_app()
    blocking = app.connections.use(FaultyBlockingStore(app.where, app.env))
    blocking.faults = Faults("none", 0, 0)
    waiter = Waiter(app, sound, pausing)
    operations_max = 90 if pausing else OPERATIONS_MAX  # each pause costs a miss, a read, a twin and another claim
    for number in range(1, operations_max):
        faults = Faults(kind, number, 1)
        waiter.entries.clear()
        document = asyncio.run(drive(app, sound, waiter, faults))
        where = f"operation {number} ({', '.join(faults.hit)}) {kind}"
        check_invariants([document])
        assert document["status"] == "done", f"{where}: {document}"
        assert document["output"][:4] == ["signed offer", "signed offer_async", 1, 2], f"{where}: {document['output']}"
        assert is_timeout(document["output"][4]), where
        assert (document["inbox"], document["waitGen"], len(document["seen"])) == ([], 5, 2), where
        assert "awaits" not in document, where
        assert not waiter.too_late, f"{where}: {waiter.too_late}"
        if not {"claim_run", "claim_runs"} & set(faults.hit):
            assert [step["attempts"] for step in document["steps"]] == [1] * 6, f"{where}: {document}"
        for step in document["steps"]:
            assert waiter.entries[step["stepId"]] <= step["attempts"], f"{where}: {step}"
        if not faults.hit:
            print(f"{number - 1} operations")
            assert number > 10, "the loop ended before it tested anything"
            return
    raise AssertionError(f"a run of {operations_max} operations: something spins")
