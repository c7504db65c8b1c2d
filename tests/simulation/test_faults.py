"""Every operation of a whole run fails once, in every way an operation can fail, on a real server (SQLite's malloc loop).

A run with a retry, a sleep and checkpoints is driven while operation number 1, 2, 3 … fails, until a run gets through
without reaching the faulty number. After each: the run has ended, each result was stored once, no handler was entered
whose result was durable, nothing is wedged.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from workers import Pool, check_invariants

from streamline_pool import Streamline
from streamline_pool.config.env import system_env
from streamline_pool.domain.errors import StoreUnavailableError
from streamline_pool.protocol.operations import Command, Op
from streamline_pool.storage.store import AsyncStore, Store

LATE_S = 0.03  # how long a copy of a write that was given up on is under way
OPERATIONS_MAX = 60  # a run needs some 25; more would mean that a fault makes it spin
OUTAGE = 6  # operations that fail in a row when a fault lasts
HASTE = 10  # back-offs are this much shorter than in life
STEWARD = frozenset({"find_due_before", "recover_expired", "live"})  # the test's own, and not counted


class Faults:
    """Which operation fails, and how: "lost" on the way there, "unknown" on the way back, "late" and then applied after all."""

    def __init__(self, kind: str, first: int, count: int) -> None:
        self.kind = kind
        self.first = first
        self.count = count
        self.seen = 0
        self.hit: list[str] = []

    def strikes(self, op: Op) -> bool:
        if op.name in STEWARD:
            return False
        self.seen += 1
        if not self.first <= self.seen < self.first + self.count:
            return False
        self.hit.append(op.name)
        return True

    @staticmethod
    def error(op: Op) -> StoreUnavailableError:
        return StoreUnavailableError(f"{op.name}: a fault of this test", transient=True)


class FaultyStore(AsyncStore):
    faults: Faults

    async def run(self, op: Op, session: Any = None) -> Any:
        if not self.faults.strikes(op):
            return await super().run(op, session)
        if self.faults.kind == "unknown":
            await super().run(op, session)
        elif self.faults.kind == "late" and isinstance(op, Command):
            late = asyncio.get_running_loop().create_task(self._run_late(op, session))
            self.late = [*getattr(self, "late", []), late]
        raise self.faults.error(op)

    async def _run_late(self, op: Op, session: Any) -> None:
        await asyncio.sleep(LATE_S)
        await super().run(op, session)


class FaultyBlockingStore(Store):
    faults: Faults

    def run(self, op: Op, session: Any = None) -> Any:
        if not self.faults.strikes(op):
            return super().run(op, session)
        if self.faults.kind == "unknown":
            super().run(op, session)
        elif self.faults.kind == "late" and isinstance(op, Command):
            timer = threading.Timer(LATE_S, super().run, (op, session))
            timer.start()
        raise self.faults.error(op)


class Witness:
    """The handlers of the run, and what the database said when each was entered."""

    def __init__(self, app: Streamline) -> None:
        self.entries: Counter[str] = Counter()
        self.too_late: list[str] = []
        self._app = app
        self.workflow = app.workflow(
            "faulty",
            steps={"count": (self.count, {"retries": 3, "retry_delay": 0.01}), "nap": self.nap, "end": self.end},
        )

    def enter(self, ctx: Any) -> None:
        stored = self._app.runs.find_one({"_id": ctx.run_id})
        step = next(step for step in stored["steps"] if step["stepId"] == ctx.step_id)
        if step["status"] in ("done", "waiting"):
            self.too_late.append(f"{ctx.step_id} was entered, and is {step}")
        self.entries[ctx.step_id] += 1

    def count(self, ctx: Any) -> int:
        self.enter(ctx)
        so_far = ctx.get_checkpoint() or 0
        ctx.checkpoint(so_far + 1)
        ctx.set("seen", so_far + 1)
        if so_far == 0:
            raise ValueError("the first attempt fails")
        return so_far + 1

    def nap(self, ctx: Any) -> None:
        self.enter(ctx)
        ctx.sleep(0.02)

    async def end(self, ctx: Any) -> str:
        self.enter(ctx)
        ctx.checkpoint("on the loop's own thread")
        ctx.checkpoint("twice")
        return f"{ctx.get_output('count') >= 2} {ctx.get_checkpoint()}"


async def drive(app: Streamline, witness: Witness, faults: Faults) -> dict[str, Any]:
    """One whole run under `faults`; its document at the end."""
    store = app.connections.use(FaultyStore(app.where, app.env))
    store.faults = Faults("none", 0, 0)
    run = await witness.workflow.start_async()
    store._ensured = True
    store.faults = faults
    blocking = app.store()
    assert isinstance(blocking, FaultyBlockingStore)
    blocking.faults = faults
    async with Pool(app, recover_every_s=0.05) as pool:
        await pool.until(lambda: app.runs.find_one({"_id": run.id})["endedAt"] is not None, timeout=60)
        await pool.until_idle(timeout=60)
        faults.first = 0  # the draining is not part of it
        await asyncio.gather(*getattr(store, "late", []), return_exceptions=True)
    document: dict[str, Any] = app.runs.find_one({"_id": run.id})
    return document


@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", [pytest.param(1, id="once"), pytest.param(OUTAGE, id="for a while", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["lost", "unknown", "late"])
def test_a_run_ends_whichever_of_its_operations_fails(make_app: Callable[..., Streamline], kind: str, count: int) -> None:
    """Each write has an instant at which its fate is unknown; a protocol that is wrong at one of them is wrong."""
    system = system_env()
    hasty = replace(system, sleep=lambda s: system.sleep(s / HASTE), async_sleep=lambda s: asyncio.sleep(s / HASTE))
    app = make_app(env=hasty, lease_s=0.5, max_crashes=20)
    blocking = app.connections.use(FaultyBlockingStore(app.where, app.env))
    blocking.faults = Faults("none", 0, 0)
    witness = Witness(app)
    for number in range(1, OPERATIONS_MAX):
        faults = Faults(kind, number, count)
        witness.entries.clear()
        document = asyncio.run(drive(app, witness, faults))
        where = f"operation {number} ({', '.join(faults.hit)}) {kind}"
        check_invariants([document])
        assert document["status"] == "done", f"{where}: {document}"
        assert document["output"] == "True twice", where
        assert document["context"] == {"seen": document["steps"][0]["output"]}, where
        assert [step["status"] for step in document["steps"]] == ["done", "done", "done"], where
        assert not witness.too_late, f"{where}: {witness.too_late}"
        if not {"claim_run", "claim_runs"} & set(faults.hit):
            # Only a claim of unknown outcome is forgotten; every other write is seen through by who sent it.
            assert [step["attempts"] for step in document["steps"]] == [2, 1, 1], where
        for step in document["steps"]:
            entered = witness.entries[step["stepId"]]
            # A grant may be lost before its handler is entered, but no handler is entered without one.
            assert entered <= step["attempts"], f"{where}: {step}, entered {entered} times"
        if not faults.hit:
            assert number > 10, "the loop ended before it tested anything"
            return
    raise AssertionError(f"a run of {OPERATIONS_MAX} operations: something spins")
