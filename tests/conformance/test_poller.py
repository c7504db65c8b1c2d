"""A poll that does not start at the beginning of the queue must still find every run, in the right order."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
from workers import Pool

from streamline_pool import Streamline, Workflow
from streamline_pool.config.env import system_env
from streamline_pool.protocol import claims
from streamline_pool.protocol.operations import Find, Op
from streamline_pool.storage.store import AsyncStore
from streamline_pool.worker.poller import Poller


class JumpingClock:
    """Stands still between jumps, so that a full poll costs nothing, unless a test sets `cost_s`."""

    def __init__(self, real: Any) -> None:
        self.now = real.now
        self.at: float = real.monotonic()
        self.cost_s = 0.0

    def monotonic(self) -> float:
        self.at += self.cost_s  # seconds that each reading adds; then the next full poll is not affordable for a while
        return self.at


class Watch:
    """A poller on a real store."""

    def __init__(self, app: Streamline, store: AsyncStore, lanes: tuple[str, ...], total: int) -> None:
        self.clock = JumpingClock(app.env.clock)
        self.poller = Poller(lanes, 0, total, dataclasses.replace(app.env, clock=self.clock))
        self.store = store

    async def take(self, limit: int) -> list[str]:
        """Poll and claim, as a worker does. Yields the run ids."""
        rows, _ = await self.poller.poll(self.store, limit, None)
        run_ids = [row["_id"] for row in rows]
        if run_ids:
            assert await self.store.run(claims.claim_runs(run_ids, None, "lease", "watch", 30.0)) == len(run_ids)
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
    """Sixteen slots are sixteen queues; if they are merged wrongly, a run waits for ever at the end of one of them."""
    due_at = {run.id: run.document["wakeAt"] for n in range(10) for run in flow.start_many([n] * 5)}

    async def use(watch: Watch) -> None:
        watch.clock.cost_s = 1.0  # only the first poll is a full one
        taken: list[str] = []
        while run_ids := await watch.take(7):
            taken += run_ids
        assert set(taken) == set(due_at)
        assert [due_at[run_id] for run_id in taken] == sorted(due_at.values())

    watch(app, use)


def test_an_older_run_of_a_lower_priority_is_not_left_behind(app: Streamline, flow: Workflow) -> None:
    """The next polls start where the urgent runs began. The old run is before that place."""
    old = flow.start(priority=1)
    urgent = [run.id for run in flow.start_many([None] * 10, priority=5)]

    async def use(watch: Watch) -> None:
        watch.clock.cost_s = 1.0
        taken = [run_id for _ in range(4) for run_id in await watch.take(4)]
        assert set(taken[:10]) == set(urgent)
        assert taken[10:] == [old.id]

    watch(app, use)


def test_a_run_that_was_released_is_found_after_a_wake_up_for_any_run(app: Streamline, flow: Workflow) -> None:
    """It keeps its old place in the queue, where only a full poll finds it."""
    released = flow.start()
    others = {run.id for run in flow.start_many([None] * 6)}

    async def use(watch: Watch) -> None:
        watch.clock.cost_s = 1.0
        store = app.store_async()
        assert await watch.take(1) == [released.id]
        first = await watch.take(3)
        assert set(first) < others
        await asyncio.to_thread(
            lambda: app.runs.update_one({"_id": released.id}, {"$unset": {"lease": ""}, "$set": {"wakeAt": past(store)}})
        )
        assert set(await watch.take(1)) < others - set(first), "polls start after its place"
        watch.poller.forget()
        assert await watch.take(1) == [released.id]

    watch(app, use)


def test_a_wake_up_for_any_run_during_a_poll_makes_the_next_poll_a_full_one(app: Streamline, flow: Workflow) -> None:
    """The poll may have passed the place of the released run already; its trail would hide that run from the next polls."""
    others = {run.id for run in flow.start_many([None] * 6)}

    async def use(watch: Watch) -> None:
        watch.clock.cost_s = 1.0
        store = watch.store
        poll = asyncio.create_task(watch.poller.poll(store, 2, None))
        await asyncio.sleep(0)  # the poll has begun
        watch.poller.forget()
        rows, _ = await poll
        assert {row["_id"] for row in rows} < others
        released = await flow.start_async()
        await asyncio.to_thread(lambda: app.runs.update_one({"_id": released.id}, {"$set": {"wakeAt": past(store)}}))
        assert await watch.take(1) == [released.id]

    watch(app, use)


def past(store: AsyncStore) -> Any:
    return store.now() - timedelta(hours=1)


def test_a_priority_that_was_never_seen_is_found_once_a_full_poll_is_affordable(app: Streamline, flow: Workflow) -> None:
    """A backlog must not hide an urgent run for longer than the cost of a full poll requires."""
    flow.start_many([None] * 30)

    async def use(watch: Watch) -> None:
        watch.clock.cost_s = 1.0
        await watch.take(3)
        urgent = await flow.start_async(priority=9)
        assert urgent.id not in await watch.take(3)
        watch.clock.at += 3600
        assert (await watch.take(3))[0] == urgent.id

    watch(app, use)


def test_all_slots_are_polled_when_the_workers_own_are_empty(app: Streamline, flow: Workflow) -> None:
    """No other worker polls the slots of a dead worker first."""
    started = {run.id for run in flow.start_many([None] * 40)}

    async def use(watch: Watch) -> None:
        watch.clock.cost_s = 1.0
        taken: list[str] = []
        while run_ids := await watch.take(5):
            taken += run_ids
        assert set(taken) == started
        assert len(taken) == len(started)

    watch(app, use, workers=4)


@pytest.mark.parametrize("slot", [99, None, "three"])
def test_a_run_whose_slot_was_damaged_is_found_all_the_same(app: Streamline, flow: Workflow, slot: object) -> None:
    """A slot only spreads the work. A run must not wait for ever because another program has changed it."""
    run = flow.start()
    app.runs.update_one({"_id": run.id}, {"$set": {"slot": slot}})

    async def use(watch: Watch) -> None:
        assert await watch.take(5) == [run.id]

    watch(app, use, workers=4)


def test_runs_of_more_queues_than_fit_in_one_search_are_all_found(app: Streamline) -> None:
    """MongoDB merges at most 200 index scans. A worker with more queues takes turns, and must leave none out."""
    flow = app.workflow("flow", steps={"only": lambda ctx: None})
    queues = [f"tenant-{number}" for number in range(130)]
    started = {flow.start(queue=queue).id for queue in queues}

    async def use(watch: Watch) -> None:
        watch.poller = Poller(app.lanes(queues), 0, 2, app.env)
        taken: list[str] = []
        while run_ids := await watch.take(50):
            taken += run_ids
        assert sorted(taken) == sorted(started)

    watch(app, use)


def test_a_search_reads_only_the_workflows_of_its_worker(app: Streamline, flow: Workflow) -> None:
    """Other applications share the queue. Their runs are stepped over by their index keys, and never read or claimed."""
    other = Streamline(app.where.uri, database=app.where.database).workflow("other", steps={"only": lambda ctx: None})
    with other.app:
        other.start_many([None] * 300)
    mine = flow.start()
    stats = explained(app, claims.find_due(app.lanes(), None, app.store().now(), 200, None))
    assert (stats["nReturned"], stats["totalDocsExamined"]) == (1, 1)

    async def use(watch: Watch) -> None:
        assert await watch.take(200) == [mine.id]

    watch(app, use, workers=2)


def test_an_urgent_run_that_comes_again_is_seen_behind_a_backlog(app: Streamline, flow: Workflow) -> None:
    """Its priority was seen before, so no full poll is needed to find it."""
    flow.start(priority=9)
    flow.start_many([None] * 30)

    async def use(watch: Watch) -> None:
        watch.clock.cost_s = 1.0
        for _ in range(3):
            await watch.take(3)
        urgent = await flow.start_async(priority=9)
        assert (await watch.take(3))[0] == urgent.id

    watch(app, use)


def test_a_poll_behind_the_end_of_the_queue_steps_over_nothing_old(app: Streamline, flow: Workflow) -> None:
    """A thousand claimed or unwanted runs of another priority must not be looked at again by each poll of an idle worker."""
    other = Streamline(app.where.uri, database=app.where.database).workflow("other", steps={"only": lambda ctx: None})
    with other.app:
        other.start_many([None] * 1_000, priority=7)
    app.runs.update_many({}, [{"$set": {"wakeAt": {"$subtract": ["$wakeAt", 60_000]}}}])
    store = app.store()
    op = claims.find_due(app.lanes(), None, store.now(), 200, None, since=store.now() - timedelta(seconds=5))
    stats = explained(app, op)
    assert stats["totalKeysExamined"] < 10
    assert explained(app, claims.find_due(app.lanes(), None, store.now(), 200, None))["totalKeysExamined"] > 100


def explained(app: Streamline, op: Find) -> dict[str, Any]:
    """What the server examines for this search."""
    command = {
        "find": app.runs.name,
        "filter": op.filter,
        "projection": op.projection,
        "sort": dict(op.sort),
        "limit": op.limit,
        "hint": op.hint,
    }
    stats: dict[str, Any] = app.runs.database.command("explain", command, verbosity="executionStats")["executionStats"]
    return stats


def test_a_run_started_after_an_empty_poll_is_found_by_the_next(app: Streamline, flow: Workflow) -> None:
    """The empty poll has seen the end of the queue. New runs stand behind it."""

    async def use(watch: Watch) -> None:
        watch.clock.cost_s = 1.0
        assert await watch.take(5) == []
        run = await flow.start_async()
        assert await watch.take(5) == [run.id]

    watch(app, use)


def test_a_host_that_takes_for_due_what_the_server_does_not_polls_no_more_than_a_few_times(make_app: Callable[..., Streamline]) -> None:
    """A new primary's clock may be far behind. With more such runs than one claim takes, a worker polled without a pause."""
    system = system_env()
    jumps: list[float] = []

    class Clock:
        now = staticmethod(system.clock.now)

        @staticmethod
        def monotonic() -> float:
            return system.clock.monotonic() + sum(jumps)

    app = make_app(env=dataclasses.replace(system, clock=Clock()), concurrency=4)
    polls: list[str] = []

    class CountingStore(AsyncStore):
        async def run(self, op: Op, session: Any = None) -> Any:
            polls.extend([op.name] if op.name == "find_due" else [])
            return await super().run(op, session)

    workflow = app.workflow("w", steps={"a": lambda ctx: 1})
    workflow.start_many(range(20), start_at=100)

    async def play() -> None:
        app.connections.use(CountingStore(app.where, app.env))
        async with Pool(app) as pool:
            await pool.until(lambda: pool.statuses()[0].idle)
            pool.stop_waking_up()
            polls.clear()
            jumps.append(200.0)  # what the host takes for the server's time is now so much ahead of it
            pool.workers[0].wake_up()
            await pool.until(lambda: len(polls) > 2)
            await pool.until_idle()  # it has read the server's clock again

    asyncio.run(play())
    assert len(polls) < 20
    assert app.runs.count_documents({"token": 0}) == 20


def test_a_run_in_the_slots_of_a_worker_that_is_full_does_not_wait_for_the_end_of_the_backlog(app: Streamline, flow: Workflow) -> None:
    """The other worker may be busy for hours, or be kept for a suspect. Here the backlog in this worker's own slots never ends."""
    urgent = flow.start(priority=9)
    others = [run.id for run in flow.start_many([None] * 80)]
    app.runs.update_one({"_id": urgent.id}, {"$set": {"slot": 1}})
    app.runs.update_many({"_id": {"$in": others}}, {"$set": {"slot": 0}})

    async def use(watch: Watch) -> None:
        watch.clock.cost_s = 0.5
        taken = [run_id for _ in range(20) for run_id in await watch.take(3)]
        assert urgent.id in taken

    watch(app, use, workers=2)


def test_many_runs_that_cannot_be_claimed_hide_no_run_behind_them(app: Streamline, flow: Workflow) -> None:
    """With more of them than the poller remembered, each poll showed those that it had forgotten, and never a run behind them."""
    refused = {run.id for run in flow.start_many([None] * 300)}
    good = flow.start()

    async def use(watch: Watch) -> None:
        shown: list[str] = []
        while refused - set(shown):
            rows, _ = await watch.poller.poll(watch.store, 50, None)
            shown += (row["_id"] for row in rows)
            assert len(shown) <= len(refused) + 1, "some were shown twice"
            watch.poller.skip_for_now(row["_id"] for row in rows)  # as after a claim that the server has refused
        assert await watch.take(50) == [good.id]

    watch(app, use)


@pytest.mark.parametrize("concurrency", [1, 10])
def test_a_worker_gets_past_many_runs_that_the_server_refuses(make_app: Callable[..., Streamline], concurrency: int) -> None:
    """The pauses after polls without success are for runs that another worker has claimed. Here each poll brings it further."""
    app = make_app(concurrency=concurrency)
    flow = app.workflow("flow", steps={"only": lambda ctx: None})
    flow.start_many([0] * 12 * concurrency)
    good = flow.start(1)
    app.client[app.runs.database.name].command("collMod", app.runs.name, validator={"input": {"$ne": 0}})

    async def main() -> None:
        async with Pool(app) as pool:
            await pool.until(lambda: app.runs.count_documents({"_id": good.id, "status": "done"}), timeout=5)

    asyncio.run(main())
