"""As test_faults.py, for a run that waits in every way: a hook answered early, events sent before the wait, a deadline that passes.

Each wait begins and ends by several writes: the hook, the wait, taking an event that has arrived, the look-up of stored
events, and the time-out. Each of them fails once, in every way. The second variant pauses the run while each handler works.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from faulty_store import CLAIMS, EntryLog, Faults, FaultyAsyncStore, FaultyStore, hasty_env, install_faults
from stored_runs import stored
from workers import Pool, check_invariants

from streamline_pool import Streamline, create_hook, is_timeout

OPERATIONS_MAX = 60  # a run needs about 40; more would mean that a fault causes endless repetition


class Waiter(EntryLog):
    """The handlers of the run. Answers, events and pauses go through `client`, an application without faults."""

    def __init__(self, app: Streamline, client: Streamline, pausing: bool) -> None:
        super().__init__(client)
        self.pausing = pausing
        self._client = client
        names = ["offer", "offer_async", "take_one", "take_all", "ask"]
        self.workflow = app.workflow(
            "waiter",
            steps={
                "offer": self.offer,
                "offer_async": self.offer_async,
                "take_one": self.then(lambda ctx: ctx.wait_for("one")),
                "take_all": self.then(lambda ctx: ctx.wait_for("all")),
                "ask": self.then(lambda ctx: ctx.wait("?", timeout=0.02)),
                "end": self.then(lambda ctx: [ctx.get_output(name) for name in names]),
            },
        )

    def enter(self, ctx: Any) -> None:
        super().enter(ctx)
        if self.pausing:
            self._client.pause_run(ctx.run_id)

    def then(self, handler: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The handler, with its entries recorded."""

        def entered(ctx: Any) -> Any:
            self.enter(ctx)
            return handler(ctx)

        return entered

    def has_ended(self, run_id: str) -> bool:
        """True if the run has ended. Resumes the run if it is paused and no worker holds its lease."""
        document = stored(self._client, run_id)
        if document["paused"] and "lease" not in document and document["endedAt"] is None:
            self._client.resume_run(run_id)
        return document["endedAt"] is not None

    def offer(self, ctx: Any) -> None:
        self.enter(ctx)
        self._client.resume_hook(create_hook(ctx, "?").token, f"signed {ctx.step_id}")
        ctx.wait("?")

    async def offer_async(self, ctx: Any) -> None:
        self.offer(ctx)


async def drive(app: Streamline, client: Streamline, waiter: Waiter, faults: Faults) -> dict[str, Any]:
    """Start one run and drive it to its end under `faults`. Returns its document."""
    store = app.connections.use(FaultyAsyncStore(app.where, app.env))
    run = await waiter.workflow.start_async()
    await asyncio.to_thread(client.send_event, "one", 1, run_id=run.id)
    await asyncio.to_thread(client.send_event, "all", 2)
    store._ensured = True
    store.faults = faults
    blocking = app.store()
    assert isinstance(blocking, FaultyStore)
    blocking.faults = faults
    async with Pool(app, recover_every_s=0.05) as pool:
        await pool.until(lambda: waiter.has_ended(run.id), timeout=60)
        await pool.until_idle(timeout=60)
        faults.first = 0  # the drain is not part of the run
        await store.late_applied()
    return stored(client, run)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("pausing", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["not paused", "paused"])
@pytest.mark.parametrize("kind", ["unknown", pytest.param("lost", marks=pytest.mark.slow), pytest.param("late", marks=pytest.mark.slow)])
def test_a_run_takes_each_answer_and_event_once_whichever_of_its_operations_fails(
    make_app: Callable[..., Streamline], kind: str, pausing: bool
) -> None:
    """A write of unknown outcome must neither lose an accepted answer or a sent event, nor take it twice."""
    app, client = make_app(env=hasty_env(), lease_s=0.5, max_crashes=20), make_app()
    install_faults(app)
    waiter = Waiter(app, client, pausing)
    operations_max = 90 if pausing else OPERATIONS_MAX  # each pause costs a refused write, a read, a write under pause and another claim
    for number in range(1, operations_max):
        faults = Faults(kind, number, 1)
        waiter.entries.clear()
        document = asyncio.run(drive(app, client, waiter, faults))
        where = f"operation {number} ({', '.join(faults.hit)}) {kind}"
        check_invariants([document])
        assert document["status"] == "done", f"{where}: {document}"
        assert document["output"][:4] == ["signed offer", "signed offer_async", 1, 2], f"{where}: {document['output']}"
        assert is_timeout(document["output"][4]), where
        assert (document["inbox"], document["waitGen"], len(document["seen"])) == ([], 5, 2), where
        assert "awaits" not in document, where
        assert not waiter.too_late, f"{where}: {waiter.too_late}"
        if not CLAIMS & set(faults.hit):
            assert [step["attempts"] for step in document["steps"]] == [1] * 6, f"{where}: {document}"
        for step in document["steps"]:
            assert waiter.times(step["stepId"]) <= step["attempts"], f"{where}: {step}"
        if not faults.hit:
            print(f"{number - 1} operations")
            assert number > 10, "the loop ended before it tested anything"
            return
    raise AssertionError(f"a run needed {operations_max} operations: something repeats without end")
