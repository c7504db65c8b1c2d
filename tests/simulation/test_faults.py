"""Every operation of a whole run fails once, in every way an operation can fail, on a real server (SQLite's malloc loop).

A run with a retry, a sleep and checkpoints is driven while operation number 1, 2, 3 … fails, until a run ends without
reaching the faulty number. After each run: the run has ended, each result was stored once, no handler was entered after
its result was durable, and nothing is wedged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from faulty_store import CLAIMS, OUTAGE, EntryLog, Faults, FaultyAsyncStore, FaultyStore, hasty_env, install_faults
from stored_runs import stored
from workers import Pool, check_invariants

from streamline_pool import Streamline
from streamline_pool.protocol.payloads import EXTERNAL_BYTES

LARGE = EXTERNAL_BYTES + 1
OPERATIONS_MAX = 60  # a run needs about 25; more would mean that a fault causes endless repetition


class Retrying(EntryLog):
    """A workflow whose first step fails once, whose second step sleeps, and whose third step runs on the event loop."""

    def __init__(self, app: Streamline) -> None:
        super().__init__(app)
        self.workflow = app.workflow(
            "faulty",
            steps={"count": (self.count, {"retries": 3, "retry_delay": 0.01}), "nap": self.nap, "end": self.end},
        )

    def count(self, ctx: Any) -> int:
        self.enter(ctx)
        so_far: int = ctx.get_checkpoint() or 0
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


class Producing(EntryLog):
    """A workflow whose outputs are stored beside its runs, and are asked for on a thread, on the event loop, and after a sleep."""

    def __init__(self, app: Streamline) -> None:
        super().__init__(app)
        steps = {"make": self.make, "nap": self.nap, "use": self.use, "end": self.end}
        self.workflow = app.workflow("producing", steps=steps)

    async def make(self, ctx: Any) -> str:
        self.enter(ctx)
        return "x" * LARGE

    def nap(self, ctx: Any) -> None:
        self.enter(ctx)
        ctx.sleep(0.02)

    def use(self, ctx: Any) -> str:
        self.enter(ctx)
        return str(ctx.get_output("make")) + "y"

    async def end(self, ctx: Any) -> str:
        self.enter(ctx)
        return str(ctx.get_output("use")) + "z"


async def drive(app: Streamline, scenario: Retrying | Producing, faults: Faults) -> dict[str, Any]:
    """Start one run and drive it to its end under `faults`. Returns its document."""
    store = app.connections.use(FaultyAsyncStore(app.where, app.env))
    run = await scenario.workflow.start_async()
    store._ensured = True
    store.faults = faults
    blocking = app.store()
    assert isinstance(blocking, FaultyStore)
    blocking.faults = faults
    async with Pool(app, recover_every_s=0.05) as pool:
        await pool.until(lambda: stored(app, run)["endedAt"] is not None, timeout=60)
        await pool.until_idle(timeout=60)
        faults.first = 0  # the drain is not part of the run
        await store.late_applied()
    return stored(app, run)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", [pytest.param(1, id="once"), pytest.param(OUTAGE, id="for a while", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [pytest.param("lost", marks=pytest.mark.slow), "unknown", "late"])
def test_a_run_ends_whichever_of_its_operations_fails(make_app: Callable[..., Streamline], kind: str, count: int) -> None:
    """The outcome of each write is unknown for a moment; a protocol that is wrong at one of these moments is wrong."""
    app = make_app(env=hasty_env(), lease_s=0.5, max_crashes=20)
    install_faults(app)
    scenario = Retrying(app)
    for number in range(1, OPERATIONS_MAX):
        faults = Faults(kind, number, count)
        scenario.entries.clear()
        document = asyncio.run(drive(app, scenario, faults))
        where = f"operation {number} ({', '.join(faults.hit)}) {kind}"
        check_invariants([document])
        assert document["status"] == "done", f"{where}: {document}"
        assert document["output"] == "True twice", where
        assert document["context"] == {"seen": document["steps"][0]["output"]}, where
        assert [step["status"] for step in document["steps"]] == ["done", "done", "done"], where
        assert not scenario.too_late, f"{where}: {scenario.too_late}"
        if not CLAIMS & set(faults.hit):
            # Only a claim of unknown outcome is abandoned. The sender repeats every other write until its outcome is known.
            assert [step["attempts"] for step in document["steps"]] == [2, 1, 1], where
        for step in document["steps"]:
            entered = scenario.times(step["stepId"])
            # A granted attempt may be lost before its handler is entered, but no handler is entered without a grant.
            assert entered <= step["attempts"], f"{where}: {step}, entered {entered} times"
        if not faults.hit:
            assert number > 10, "the loop ended before it tested anything"
            return
    raise AssertionError(f"a run needed {OPERATIONS_MAX} operations: something repeats without end")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", [pytest.param(1, id="once"), pytest.param(OUTAGE, id="for a while", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [pytest.param("lost", marks=pytest.mark.slow), "unknown", "late"])
def test_outputs_beside_a_run_are_complete_whichever_operation_fails(make_app: Callable[..., Streamline], kind: str, count: int) -> None:
    """An output is stored by one write and referred to by another; between the two, anything may fail."""
    app = make_app(env=hasty_env(), lease_s=0.5, max_crashes=20)
    install_faults(app)
    scenario = Producing(app)
    outputs = app.store().collection("outputs")
    for number in range(1, OPERATIONS_MAX):
        faults = Faults(kind, number, count)
        scenario.entries.clear()
        document = asyncio.run(drive(app, scenario, faults))
        where = f"operation {number} ({', '.join(faults.hit)}) {kind}"
        check_invariants([document])
        assert document["status"] == "done", f"{where}: {document}"
        assert not scenario.too_late, f"{where}: {scenario.too_late}"
        run = scenario.workflow.get(document["_id"])
        assert run is not None, where
        assert run.output == "x" * LARGE + "yz", where
        assert run.step("make").output == "x" * LARGE, where
        referred = {step["output"]["$external"] for step in document["steps"] if step["output"] is not None}
        stored_ids = set(outputs.distinct("_id", {"runId": document["_id"]}))
        assert referred <= stored_ids, where
        if not CLAIMS & set(faults.hit):
            assert referred == stored_ids, f"{where}: a repeated write must not store a second copy"
        if not faults.hit:
            assert number > 10, "the loop ended before it tested anything"
            return
    raise AssertionError(f"a run needed {OPERATIONS_MAX} operations: something repeats without end")
