"""The grouping of calls: what waits goes together, up to a size, and each caller gets its own outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from streamline_pool.config.asyncio_tasks import end_tasks
from streamline_pool.engine import group_outputs
from streamline_pool.engine.group_outputs import _Group


def test_calls_that_wait_go_together_and_each_gets_its_own_outcome() -> None:
    batches: list[list[int]] = []

    async def send(items: list[int]) -> Sequence[int | Exception]:
        batches.append(items)
        await asyncio.sleep(0)
        return [ValueError(str(item)) if item == 3 else -item for item in items]

    async def work() -> list[int | BaseException]:
        group: _Group[int, int] = _Group(send, lambda item: item)
        first = group.call(1)
        sender = asyncio.get_running_loop().create_task(group.run())
        await first
        results = await asyncio.gather(*(group.call(item) for item in (2, 3, 4)), return_exceptions=True)
        await end_tasks([sender])
        return results

    two, three, four = asyncio.run(work())
    assert batches == [[1], [2, 3, 4]]
    assert (two, four) == (-2, -4)
    assert isinstance(three, ValueError)


def test_a_batch_ends_at_its_size_but_a_single_item_may_be_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_outputs, "_BATCH_BYTES_MAX", 10)
    batches: list[list[int]] = []

    async def send(items: list[int]) -> Sequence[int | Exception]:
        batches.append(items)
        return items

    async def work() -> None:
        group: _Group[int, int] = _Group(send, lambda item: item)
        calls = [group.call(item) for item in (6, 4, 1, 30, 2)]
        sender = asyncio.get_running_loop().create_task(group.run())
        await asyncio.gather(*calls)
        await end_tasks([sender])

    asyncio.run(work())
    assert batches == [[6, 4], [1], [30], [2]]


def test_calls_that_are_not_sent_are_cancelled_by_the_close_and_a_defect_reaches_every_caller() -> None:
    async def send(items: list[int]) -> Sequence[int | Exception]:
        raise RuntimeError("a defect")

    async def work() -> None:
        group: _Group[int, int] = _Group(send, lambda item: item)
        closed: _Group[int, int] = _Group(send, lambda item: item)
        waiting = closed.call(1)
        closed.close()
        for call in (waiting, closed.call(1)):
            with pytest.raises(asyncio.CancelledError):
                await call
        calls = [group.call(1), group.call(2)]
        sender = asyncio.get_running_loop().create_task(group.run())
        for call in calls:
            with pytest.raises(RuntimeError):
                await call
        await end_tasks([sender])

    asyncio.run(work())
