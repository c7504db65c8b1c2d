"""Due runs that a poll finds and does not choose must be found by the next poll, without a sweep in between."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from workers import Pool

from streamline_pool import StoreUnavailableError, Streamline, Workflow


@pytest.fixture
def flow(app: Streamline) -> Workflow:
    return app.workflow("flow", steps={"only": lambda ctx: None})


def make_old(app: Streamline) -> None:
    """As if these runs had been released by a lost worker: they keep their places in the queue."""
    app.runs.update_many({}, {"$set": {"wakeAt": app.store().now() - timedelta(hours=1)}})


def done(app: Streamline) -> int:
    return int(app.runs.count_documents({"status": "done"}))


def test_a_worker_takes_the_shares_of_other_workers_that_do_not_claim(app: Streamline, flow: Workflow) -> None:
    """The other workers may be full, or one may be kept for a suspect. One wake-up is enough for all runs."""
    flow.start_many(range(40))
    make_old(app)

    async def play() -> None:
        async with Pool(app, workers=4) as pool:
            for worker in pool.workers[1:]:
                worker.hold(True)
            pool.stop_waking_up()
            pool.workers[0].wake_up(overdue=True)
            await pool.until(lambda: done(app) == 40, timeout=4)

    asyncio.run(play())


def test_an_overdue_run_is_found_although_polls_begin_behind_its_place(app: Streamline, flow: Workflow) -> None:
    """Polls from the beginning of a long queue are expensive, and rare. A run that was released has its old place there."""

    async def play() -> None:
        async with Pool(app) as pool:
            pool.stop_waking_up()
            store = app.store_async()
            run = store.run
            polls: list[str] = []

            async def slow(op: Any, session: Any = None) -> Any:
                if op.name == "find_due" and not polls:
                    polls.append("begun")
                    await asyncio.sleep(0.4)  # so for twenty seconds no further poll begins there
                    rows = await run(op, session)
                    polls.append("answered")
                    return rows
                return await run(op, session)

            store.run = slow  # type: ignore[method-assign]
            pool.workers[0].wake_up()
            await pool.until(lambda: len(polls) == 2)
            await asyncio.to_thread(flow.start)
            await asyncio.to_thread(make_old, app)
            pool.workers[0].wake_up(overdue=True)
            await pool.until(lambda: done(app) == 1, timeout=8)

    asyncio.run(play())


def test_the_runs_beside_a_suspect_are_found_after_another_worker_has_claimed_it(app: Streamline, flow: Workflow) -> None:
    """All runs of a killed worker are due since long. The two workers that poll next choose the same suspect."""
    runs = flow.start_many(range(10))
    suspect = runs[0].id
    app.runs.update_one({"_id": suspect}, {"$set": {"crashes": 2}})
    make_old(app)

    async def play() -> None:
        async with Pool(app) as pool:
            pool.stop_waking_up()
            store = app.store_async()
            run = store.run

            async def faster(op: Any, session: Any = None) -> Any:
                if op.name == "claim_runs":
                    # Another worker claims the suspect first.
                    claimed = {"$unset": {"wakeAt": ""}, "$set": {"lease": {"id": "other", "owner": "other"}}}
                    await asyncio.to_thread(app.runs.update_one, {"_id": suspect}, claimed)
                return await run(op, session)

            store.run = faster  # type: ignore[method-assign]
            await pool.until(lambda: done(app) == 9, timeout=4)

    asyncio.run(play())


def test_the_runs_of_a_claim_that_failed_are_found_by_the_next_poll(app: Streamline, flow: Workflow) -> None:
    """Full polls are expensive here, so that the next one is seconds away."""
    flow.start_many(range(10))
    make_old(app)

    async def play() -> None:
        async with Pool(app) as pool:
            pool.stop_waking_up()
            store = app.store_async()
            run, faults = store.run, [StoreUnavailableError("no answer", transient=True)]

            async def failing(op: Any, session: Any = None) -> Any:
                if op.name == "find_due":
                    await asyncio.sleep(0.1)
                if op.name == "claim_runs" and faults:
                    raise faults.pop()
                return await run(op, session)

            store.run = failing  # type: ignore[method-assign]
            await pool.until(lambda: done(app) == 10, timeout=3)

    asyncio.run(play())
