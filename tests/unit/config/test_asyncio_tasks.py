"""Tasks end when they are cancelled, also a task that loses a cancellation on the way."""

from __future__ import annotations

import asyncio

from streamline_pool.config.asyncio_tasks import end_tasks


def test_a_task_that_loses_its_first_cancellation_is_ended_nevertheless() -> None:
    """A driver turned the cancellation into an error. The task took that for an outage and continued, so `close` never returned."""
    losses: list[str] = []

    async def stubborn() -> None:
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if losses:
                    raise
                losses.append("lost")

    async def main() -> asyncio.Task[None]:
        task = asyncio.create_task(stubborn())
        await asyncio.sleep(0)
        await end_tasks([task])
        return task

    assert asyncio.run(asyncio.wait_for(main(), 10)).cancelled()
    assert losses == ["lost"]


def test_what_an_ended_task_raised_is_not_raised_again() -> None:
    """Closing must not fail with what has failed before."""

    async def broken() -> None:
        raise ValueError("why")

    async def main() -> None:
        task = asyncio.create_task(broken())
        await asyncio.sleep(0)
        await end_tasks([task])

    asyncio.run(main())
