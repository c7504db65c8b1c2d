"""A run that is rewound while its worker runs a step, and that the same worker claims again before it has heard of it."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from workers import Pool, check_invariants

from streamline_pool import Streamline
from streamline_pool.domain.errors import WorkflowError
from streamline_pool.protocol import control
from support import present


class Rewound:
    """A run whose first attempt is at work until `go`, or until it hears its signal if it is `polite`. Then it is rewound."""

    def __init__(self, app: Streamline, kind: str, *, polite: bool) -> None:
        self.app = app
        self.polite = polite
        self.go = threading.Event()
        self.entries: list[str] = []
        self.at_work = 0
        self.most_at_work = 0
        self.reasons: list[str | None] = []
        self.refused: list[str] = []
        self.workflow = app.workflow("w", steps={"work": self.work_async if kind == "async" else self.work})
        self.run = self.workflow.start()

    def work(self, ctx: Any) -> int:
        self.enter(ctx)
        try:
            while len(self.entries) == 1 and not self.go.is_set() and not (self.polite and ctx.signal.aborted):
                time.sleep(0.002)
            self.leave(ctx, first=len(self.entries) == 1)
        finally:
            self.at_work -= 1
        return len(self.entries)

    async def work_async(self, ctx: Any) -> int:
        self.enter(ctx)
        first = len(self.entries) == 1
        try:
            while first and not self.go.is_set():
                try:
                    await asyncio.sleep(0.002)
                except asyncio.CancelledError:
                    if self.polite:
                        break
            self.leave(ctx, first=first)
        finally:
            self.at_work -= 1
        return len(self.entries)

    def enter(self, ctx: Any) -> None:
        self.entries.append(ctx.idempotency_key)
        self.at_work += 1
        self.most_at_work = max(self.most_at_work, self.at_work)

    def leave(self, ctx: Any, *, first: bool) -> None:
        if first:
            self.reasons.append(ctx.signal.reason)
            try:
                ctx.checkpoint("of the first attempt")
            except WorkflowError as exc:
                self.refused.append(type(exc).__name__)

    def rewind_unheard(self) -> None:
        """Another program rewinds it, and its signals are lost."""
        lane = self.workflow.definition.lane
        assert self.app.store().run(control.rewind_run("w", self.run.id, 0, 0, ["work"], lane, 0, "rewind")) is not None

    def play(self, play: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            asyncio.run(play())
        finally:
            self.go.set()  # or a thread would outlive a test that fails

    def status(self) -> str:
        return present(self.workflow.get(self.run.id)).status


@pytest.mark.parametrize("kind", ["def", "async"])
def test_the_earlier_execution_is_aborted_and_the_new_one_begins_after_it(app: Streamline, kind: str) -> None:
    """Otherwise the first handler works on beside the second, neither aborted nor counted, for as long as it likes."""
    rewound = Rewound(app, kind, polite=True)

    async def play() -> None:
        async with Pool(app) as pool:
            await pool.until(lambda: rewound.entries)
            await asyncio.to_thread(rewound.rewind_unheard)
            await pool.until(lambda: rewound.status() == "done")
            await pool.until(lambda: pool.statuses()[0].in_flight == 0)
            assert rewound.at_work == 0

    rewound.play(play)
    check_invariants([app.runs.find_one({})])
    assert rewound.reasons == ["lease-lost"]
    assert rewound.refused == ["LeaseLostError"], "its checkpoint must not reach the new attempt"
    assert (rewound.most_at_work, len(set(rewound.entries))) == (1, 2)
    assert present(rewound.workflow.get(rewound.run.id)).output == 2


@pytest.mark.parametrize("kind", ["def", pytest.param("async", marks=pytest.mark.slow)])
def test_an_earlier_execution_that_does_not_end_is_counted_and_its_worker_asks_to_be_recycled(app: Streamline, kind: str) -> None:
    """A drained worker that does not count it would end, or go on, with a handler at work that it knows nothing of."""
    rewound = Rewound(app, kind, polite=False)

    async def play() -> None:
        async with Pool(app) as pool:
            await pool.until(lambda: rewound.entries)
            await asyncio.to_thread(rewound.rewind_unheard)
            await pool.until(lambda: pool.statuses()[0].in_flight == 2)
            await pool.until(lambda: pool.statuses()[0].recycle)
            await pool.until(lambda: rewound.status() == "done")
            rewound.go.set()
            await pool.until(lambda: pool.statuses()[0].in_flight == 0 and rewound.at_work == 0)

    rewound.play(play)
    assert rewound.most_at_work == 2, "after the grace the new attempt does not wait any longer"


@pytest.mark.parametrize("kind", ["def", "async"])
def test_a_drain_waits_for_the_earlier_execution(app: Streamline, kind: str) -> None:
    rewound = Rewound(app, kind, polite=False)

    async def play() -> None:
        async with Pool(app) as pool:
            await pool.until(lambda: rewound.entries)
            await asyncio.to_thread(rewound.rewind_unheard)
            await pool.until(lambda: pool.statuses()[0].in_flight == 2)
            pool.workers[0].drain()
            await asyncio.sleep(0)
            assert pool.statuses()[0].in_flight >= 1
            assert pool.statuses()[0].state == "draining"
            rewound.go.set()

    rewound.play(play)
    assert rewound.at_work == 0
    document = app.runs.find_one({})
    check_invariants([document])
    assert (len(rewound.entries), document["steps"][0]["status"], document["steps"][0]["attempts"]) == (1, "pending", 0)


@pytest.mark.parametrize("named", ["wake-up", "timer"])
def test_a_wake_up_for_a_run_that_this_worker_has_lost_unheard_is_followed_by_a_claim(app: Streamline, named: str) -> None:
    """The wake-up of a rewind reached the worker while the run still counted as in progress there. A sweep came seconds later."""
    rewound = Rewound(app, "async", polite=True)

    async def play() -> None:
        async with Pool(app) as pool:
            await pool.until(lambda: rewound.entries)
            pool.stop_waking_up()
            await asyncio.to_thread(rewound.rewind_unheard)
            worker = pool.workers[0]
            if named == "timer":
                worker.timers_fired([rewound.run.id])
            else:
                worker.wake_up(rewound.run.id)
            await pool.until(lambda: rewound.status() == "done", timeout=5)

    rewound.play(play)
    assert rewound.most_at_work == 1


def test_a_wake_up_for_a_run_that_is_in_progress_here_leads_to_one_read(make_app: Callable[..., Streamline]) -> None:
    """A start's wake-up often comes after a poll has claimed the run: that must not cost a claim each time."""
    app = make_app()
    rewound = Rewound(app, "async", polite=True)
    operations: list[str] = []

    async def play() -> None:
        async with Pool(app) as pool:
            await pool.until(lambda: rewound.entries and pool.statuses()[0].idle)
            pool.stop_waking_up()
            store = app.store_async()
            run = store.run

            async def recording(op: Any, session: Any = None) -> Any:
                operations.append(op.name)
                return await run(op, session)

            store.run = recording  # type: ignore[method-assign]
            pool.workers[0].wake_up(rewound.run.id)
            await pool.until(lambda: "taken_runs" in operations and pool.statuses()[0].idle)
            rewound.go.set()
            await pool.until(lambda: rewound.status() == "done")

    rewound.play(play)
    assert operations.count("taken_runs") == 1
    assert not {"claim_run", "claim_runs"} & set(operations)
    assert len(rewound.entries) == 1


def test_the_answer_of_an_earlier_claim_that_comes_late_does_not_end_the_execution_of_the_later_one(app: Streamline) -> None:
    """Named claims and polls run side by side. The late one would run without a lease, and the valid lease would not be renewed."""
    rewound = Rewound(app, "async", polite=True)

    async def play() -> None:
        async with Pool(app) as pool:
            worker = pool.workers[0]
            await pool.until(lambda: rewound.entries)
            worker.hold(True)
            pool.stop_waking_up()
            engine = present(worker._engine)
            held = engine.active_runs.held[rewound.run.id]
            late = copy.deepcopy(held.document)
            late["token"] -= 1
            late["lease"] = {**present(late["lease"]), "id": "earlier", "token": late["token"]}
            engine.admit(late, held.deadline)
            await asyncio.sleep(0.1)
            assert engine.active_runs.held[rewound.run.id] is held
            assert (held.lost, pool.statuses()[0].in_flight) == (None, 1)
            rewound.go.set()
            await pool.until(lambda: rewound.status() == "done")

    rewound.play(play)
    assert len(rewound.entries) == 1
