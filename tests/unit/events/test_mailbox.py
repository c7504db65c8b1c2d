"""The mailbox of a stream."""

from __future__ import annotations

import asyncio
import contextlib

from streamline_pool.events.mailbox import Mailbox


def test_readers_that_give_up_leave_nothing_behind() -> None:
    """A program that asks a quiet stream again and again, each time for a moment, kept one future for each time."""

    async def ask() -> int:
        box = Mailbox()
        for _ in range(50):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(box.get_async(), 0.0005)
        return len(box._waiting)

    assert asyncio.run(ask()) == 0
