"""A look that does not start at the beginning of the queue must still lead to every run, and in the right order."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from streamline_pool import Streamline, Workflow
from streamline_pool.protocol import claims
from streamline_pool.storage.store import AsyncStore
from streamline_pool.worker.poller import Poller


class JumpingClock:
    """Stands still between jumps, so a look from the start costs nothing and the next is affordable at once, or never."""

    def __init__(self, real: Any) -> None:
        self.now = real.now
        self.at = real.monotonic()
        self.cost_s = 0.0

    def monotonic(self) -> float:
        self.at += self.cost_s  # what every question seems to take
        return self.at


class Watch:
    """A lookout on a real store, with what it asked."""

    def __init__(self, app: Streamline, store: AsyncStore, lanes: tuple[str, ...], total: int) -> None:
        self.clock = JumpingClock(app.env.clock)
        self.poller = Poller(lanes, 0, total, dataclasses.replace(app.env, clock=self.clock))
        self._store = store

    async def take(self, limit: int) -> list[str]:
        """Look and claim, as a worker does."""
        rows, _ = await self.poller.poll(self._store, limit, None)
        run_ids = [row["_id"] for row in rows]
        if run_ids:
            assert await self._store.run(claims.claim_runs(run_ids, None, "lease", "watch", 30.0)) == len(run_ids)
        return run_ids


@pytest.fixture
def flow(app: Streamline) -> Workflow:
    return app.workflow("flow", steps={"only": lambda ctx: None})


def watch(app: Streamline, use: Callable[[Watch], Awaitable[None]], workers: int = 1) -> None:
    async def main() -> None:
        store = app.store_async()
        await store.ensure()
        await use(Watch(app, store, app.lanes(), workers))
        await app.close_async()

    asyncio.run(main())


def test_the_runs_longest_due_are_taken_first(app: Streamline, flow: Workflow) -> None:
    """Sixteen slots are sixteen queues; merged wrongly, a run waits for ever at the end of one of them."""
    due_at = {run.id: run.document["wakeAt"] for n in range(10) for run in flow.start_many([n] * 5)}

    async def use(watch: Watch) -> None:
        watch.clock.cost_s = 1.0  # only the first look is from the start
        taken: list[str] = []
        while run_ids := await watch.take(7):
            taken += run_ids
        assert set(taken) == set(due_at)
        assert [due_at[run_id] for run_id in taken] == sorted(due_at.values())

    watch(app, use)


def test_an_older_run_of_a_lower_priority_is_not_left_behind(app: Streamline, flow: Workflow) -> None:
    """Looks go on from where the urgent runs began, which is after it."""
    old = flow.start(priority=1)
    urgent = [run.id for run in flow.start_many([None] * 10, priority=5)]

    async def use(watch: Watch) -> None:
        watch.clock.cost_s = 1.0
        taken = [run_id for _ in range(4) for run_id in await watch.take(4)]
        assert set(taken[:10]) == set(urgent)
        assert taken[10:] == [old.id]

    watch(app, use)


def test_a_run_that_was_given_back_is_found_after_a_ring_for_anything(app: Streamline, flow: Workflow) -> None:
    """It keeps its old place in the queue, and nobody looks there without being told."""
    given_back = flow.start()
    others = {run.id for run in flow.start_many([None] * 6)}

    async def use(watch: Watch) -> None:
        watch.clock.cost_s = 1.0
        store = app.store_async()
        assert await watch.take(1) == [given_back.id]
        first = await watch.take(3)
        assert set(first) < others
        await asyncio.to_thread(
            lambda: app.runs.update_one({"_id": given_back.id}, {"$unset": {"lease": ""}, "$set": {"wakeAt": past(store)}})
        )
        assert set(await watch.take(1)) < others - set(first), "not found where looks go on"
        watch.poller.forget()
        assert await watch.take(1) == [given_back.id]

    watch(app, use)


def past(store: AsyncStore) -> Any:
    return store.now() - timedelta(hours=1)


def test_a_priority_that_was_never_seen_is_found_once_a_look_from_the_start_is_affordable(app: Streamline, flow: Workflow) -> None:
    """A backlog must not hide an urgent run for longer than a look costs."""
    flow.start_many([None] * 30)

    async def use(watch: Watch) -> None:
        watch.clock.cost_s = 1.0
        await watch.take(3)
        urgent = await flow.start_async(priority=9)
        assert urgent.id not in await watch.take(3)
        watch.clock.at += 3600
        assert (await watch.take(3))[0] == urgent.id

    watch(app, use)


def test_somebody_elses_slots_are_looked_at_when_ones_own_are_empty(app: Streamline, flow: Workflow) -> None:
    """A worker that died took its slots with it."""
    started = {run.id for run in flow.start_many([None] * 40)}

    async def use(watch: Watch) -> None:
        watch.clock.cost_s = 1.0
        taken: list[str] = []
        while run_ids := await watch.take(5):
            taken += run_ids
        assert set(taken) == started
        assert len(taken) == len(started)

    watch(app, use, workers=4)


def test_a_run_started_after_an_empty_look_is_found_by_the_next(app: Streamline, flow: Workflow) -> None:
    """The end of the queue was seen; what comes later stands behind it."""

    async def use(watch: Watch) -> None:
        watch.clock.cost_s = 1.0
        assert await watch.take(5) == []
        run = await flow.start_async()
        assert await watch.take(5) == [run.id]

    watch(app, use)
