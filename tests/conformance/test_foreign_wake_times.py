"""Runs whose `wakeAt` another program has changed: they concern themselves alone, and workers go on with all others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson.datetime_ms import DatetimeMS
from workers import Pool

from streamline_pool import Streamline

LONG_AGO = timedelta(hours=1)


@pytest.mark.parametrize(
    ("changed", "count"),
    [
        pytest.param({"status": "done", "crashes": 2}, 1, id="one suspect that has ended"),
        pytest.param({"paused": True, "crashes": 2}, 1, id="one suspect that is paused"),
        pytest.param({"status": "done"}, 30, id="more ended runs than a worker has places"),
        pytest.param({"paused": True}, 30, id="more paused runs than a worker has places"),
    ],
)
def test_runs_that_no_claim_matches_keep_no_worker_from_others(
    make_app: Callable[..., Streamline], changed: dict[str, Any], count: int
) -> None:
    """Each poll found them first, and claimed none. The worker counted as busy for ever, and said nothing."""
    app = make_app(concurrency=10)
    flow = app.workflow("flow", steps={"a": lambda ctx: 1})
    stuck = [flow.start().id for _ in range(count)]
    app.runs.update_many({"_id": {"$in": stuck}}, {"$set": {**changed, "wakeAt": datetime.now(UTC) - LONG_AGO}})
    others = [flow.start().id for _ in range(3)]
    run_until_done(app, others)


@pytest.mark.parametrize("wake_at", [DatetimeMS(-62_200_000_000_000), [datetime(2020, 1, 1, tzinfo=UTC)]], ids=["year 0", "a list"])
def test_a_due_time_that_python_cannot_hold_ends_no_worker(make_app: Callable[..., Streamline], wake_at: Any) -> None:
    """A worker compared it with dates, and died of a TypeError; so did the next one."""
    app = make_app(concurrency=2)
    flow = app.workflow("flow", steps={"a": lambda ctx: 1})
    odd = flow.start().id
    app.runs.update_one({"_id": odd}, {"$set": {"wakeAt": wake_at}})
    others = [run.id for run in flow.start_many([{}] * 20)]
    run_until_done(app, others)


def run_until_done(app: Streamline, run_ids: list[str]) -> None:
    async def go() -> None:
        async with Pool(app) as pool:
            try:
                await pool.until(lambda: app.runs.count_documents({"_id": {"$in": run_ids}, "status": "done"}) == len(run_ids))
            finally:
                pool.workers[0].stop(0.1)

    asyncio.run(go())
