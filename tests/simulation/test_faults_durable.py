"""Every operation of a durable function's run fails once, in every way; the loop of test_faults.py.

The function uses every kind of call, and clients answer its waits. After each run: it has ended with the result that a run without
faults has, no call was entered after its result was durable, and no call was entered more often than claims allow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from faulty_store import CLAIMS, OUTAGE, Faults, FaultyAsyncStore, FaultyStore, hasty_env, install_faults
from stored_runs import stored
from workers import Pool, check_invariants

from streamline_pool import BlockingDurableContext, DurableContext, Streamline, current_step
from streamline_pool.protocol.payloads import EXTERNAL_BYTES

OPERATIONS_MAX = 120  # a run needs about 50; more would mean that a fault causes endless repetition
LARGE = "x" * (EXTERNAL_BYTES + 1)


class CallLog:
    """The entries into the calls of one run. `too_late` names those that had a durable result."""

    def __init__(self, app: Streamline) -> None:
        self._app = app
        self.entered: list[str] = []
        self.too_late: list[str] = []

    def enter(self, value: Any) -> Any:
        """`fn` of a call: compares the entry with the database, and records it."""
        step = current_step()
        document = self._app.runs.find_one({"_id": step.run_id})
        assert document is not None
        key = f"{document.get('generation', 0)}:{step.step_id}"
        found = [each for each in document["steps"] if each["stepId"] == step.step_id]
        if found and found[0]["status"] in ("done", "failed"):
            self.too_late.append(f"{key} was entered, and is {found[0]}")
        self.entered.append(key)
        return value

    async def enter_async(self, value: Any) -> Any:
        """As `enter`, on the event loop."""
        return self.enter(value)

    def fail_once(self, value: Any) -> Any:
        """As `enter`; the first attempt fails."""
        self.enter(value)
        if current_step().attempt == 1:
            raise ValueError("the first attempt fails")
        return value


class Async:
    """A durable function with every kind of call."""

    def __init__(self, app: Streamline, log: CallLog) -> None:
        self.log = log
        self.workflow = app.workflow("async")
        self.workflow.main(self.main)

    async def main(self, ctx: DurableContext) -> Any:
        log = self.log
        if ctx.input != "again":
            await ctx.step("before", log.enter, 0)
            ctx.continue_as_new("again")
        first = await ctx.step("first", log.enter_async, 1)
        both = await asyncio.gather(ctx.step("left", log.enter, 2), ctx.step("right", log.enter_async, 3))
        ctx.set("seen", both)
        failing = await ctx.step("failing", log.fail_once, 4, retry_delay=0.01)
        large = await ctx.step("large", log.enter_async, LARGE)
        is_new = ctx.patched("patch")
        answer = await ctx.wait("go on?")
        await ctx.sleep(0.02)
        mapped = await ctx.map("each", log.enter_async, [5, 6, 7], concurrency=2)
        event = await ctx.wait_for("news")
        return [first, both, failing, large == LARGE, is_new, answer, mapped, event]


class Blocking:
    """The same as a `def`."""

    def __init__(self, app: Streamline, log: CallLog) -> None:
        self.log = log
        self.workflow = app.workflow("blocking")
        self.workflow.main(self.main)

    def main(self, ctx: BlockingDurableContext) -> Any:
        log = self.log
        if ctx.input != "again":
            ctx.step("before", log.enter, 0)
            ctx.continue_as_new("again")
        first = ctx.step("first", log.enter_async, 1)
        both = [ctx.step("left", log.enter, 2), ctx.step("right", log.enter_async, 3)]
        ctx.set("seen", both)
        failing = ctx.step("failing", log.fail_once, 4, retry_delay=0.01)
        large = ctx.step("large", log.enter_async, LARGE)
        is_new = ctx.patched("patch")
        answer = ctx.wait("go on?")
        ctx.sleep(0.02)
        mapped = ctx.map("each", log.enter_async, [5, 6, 7], concurrency=2)
        event = ctx.wait_for("news")
        return [first, both, failing, large == LARGE, is_new, answer, mapped, event]


RESULT = [1, [2, 3], 4, True, True, {"answer": 1}, [5, 6, 7], "news"]
NAMES = ["main", "first", "left", "right", "failing", "large", "patch", "wait", "sleep", "each[0]", "each[1]", "each[2]", "event:news"]


async def drive(app: Streamline, workflow: Any, faults: Faults) -> dict[str, Any]:
    """Start one run, answer it, and drive it to its end under `faults`. Returns its document."""
    store = app.connections.use(FaultyAsyncStore(app.where, app.env))
    run = await workflow.start_async()
    store._ensured = True
    store.faults = faults
    blocking = app.store()
    assert isinstance(blocking, FaultyStore)
    blocking.faults = faults
    async with Pool(app, recover_every_s=0.05) as pool:
        await pool.until(lambda: waits(stored(app, run), "wait"), timeout=60)
        await workflow.resume_async(run.id, {"answer": 1})
        await app.send_event_async("news", "news", run_id=run.id)
        await pool.until(lambda: stored(app, run)["endedAt"] is not None, timeout=60)
        await pool.until_idle(timeout=60)
        faults.first = 0  # the drain is not part of the run
        await store.late_applied()
    return stored(app, run)


def waits(document: dict[str, Any], step_id: str) -> bool:
    return any(step["stepId"] == step_id and step["status"] == "waiting" for step in document["steps"])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", [pytest.param(1, id="once"), pytest.param(OUTAGE, id="for a while", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [pytest.param("lost", marks=pytest.mark.slow), "unknown", pytest.param("late", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", [Async, pytest.param(Blocking, marks=pytest.mark.slow)])
def test_a_durable_function_ends_whichever_of_its_operations_fails(
    make_app: Callable[..., Streamline], form: type[Async] | type[Blocking], kind: str, count: int
) -> None:
    app = make_app(env=hasty_env(), lease_s=0.5, max_crashes=20)
    install_faults(app)
    log = CallLog(app)
    workflow = form(app, log).workflow
    for number in range(1, OPERATIONS_MAX):
        faults = Faults(kind, number, count)
        log.entered.clear()
        document = asyncio.run(drive(app, workflow, faults))
        where = f"operation {number} ({', '.join(faults.hit)}) {kind}"
        check_invariants([document])
        assert document["status"] == "done", f"{where}: {document}"
        assert document["output"] == RESULT, where
        assert document["context"] == {"seen": [2, 3]}, where
        assert [step["stepId"] for step in document["steps"]] == NAMES, where
        assert {step["status"] for step in document["steps"]} == {"done"}, where
        assert document["generation"] == 1, where
        assert not log.too_late, f"{where}: {log.too_late}"
        if not CLAIMS & set(faults.hit):
            # Only a claim of unknown outcome is abandoned, and with it the calls that were under way.
            once = {name: log.entered.count(name) for name in log.entered}
            assert once.pop("1:failing") == 2, where
            assert set(once.values()) == {1}, f"{where}: {once}"
        if not faults.hit:
            assert number > 20, "the loop ended before it tested anything"
            return
    raise AssertionError(f"a run needed {OPERATIONS_MAX} operations: something repeats without end")
