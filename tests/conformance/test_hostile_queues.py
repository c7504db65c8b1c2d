"""Runs that a worker must find although it remembers where its last poll began."""

from __future__ import annotations

import asyncio

from streamline_pool import Streamline
from streamline_pool.protocol import claims
from streamline_pool.worker.poller import Poller


def test_runs_of_a_priority_never_seen_before_are_found_by_the_next_poll(app: Streamline) -> None:
    """The danger: a poll starts where the last one began, and asks for the priorities seen so far. Measured: such runs
    waited six seconds for a sweep, beside idle workers."""
    workflow = app.workflow("w", steps={"one": lambda ctx: None})

    async def poll() -> None:
        async with app:
            store = app.store_async()
            await store.ensure()
            poller = Poller(app.lanes(), 0, 2, app.env)
            assert await poller.poll(store, 10, None) == ([], False)
            for trail in poller._scan_starts.values():
                trail.full_at += 3600
            higher = await workflow.start_many_async([None] * 3, priority=7)
            lower = await workflow.start_many_async([None] * 3, priority=-7)
            usual = await workflow.start_many_async([None] * 3)
            found: list[str] = []
            while len(found) < 9:
                rows, _ = await poller.poll(store, 10, None)
                ids = [row["_id"] for row in rows if row["_id"] not in found]
                assert ids, f"nothing more found after {len(found)} runs"
                found += ids
                await store.run(claims.claim_runs(ids, None, "lease", "me", 30.0))
            assert set(found) == {run.id for run in (*higher, *usual, *lower)}

    asyncio.run(poll())
