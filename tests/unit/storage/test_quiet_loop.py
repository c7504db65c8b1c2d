"""The event loop of a pool's processes: which pauses it rounds, and that the driver still has the tasks that it looks for."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from pymongo import network_layer
from pymongo.asynchronous import mongo_client, monitor

from streamline_pool.storage.quiet_loop import QuietEventLoop


@contextmanager
def quiet_loop() -> Iterator[QuietEventLoop]:
    loop = QuietEventLoop()
    try:
        yield loop
    finally:
        loop.close()


async def planned(delay_s: float) -> float:
    """When a timer that this task sets would fire, by the loop's clock."""
    handle = asyncio.get_running_loop().call_later(delay_s, print)
    handle.cancel()
    return handle.when()


async def _poll_cancellation(delay_s: float) -> float:
    """Has the name of the driver's coroutine."""
    return await planned(delay_s)


def test_the_drivers_periodic_tasks_wake_up_at_common_instants() -> None:
    """Each process has three of them at least, twice a second each; apart, they are most of what an idle worker does."""

    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        names = ("pymongo_kill_cursors_thread", "pymongo_server_rtt_task")
        rare = [await loop.create_task(planned(delay_s), name=name) for name in names for delay_s in (0.5, 0.6)]
        return [*rare, await loop.create_task(_poll_cancellation(0.5))]

    with quiet_loop() as loop:
        started = loop.time()
        *rare, often = loop.run_until_complete(main())
    assert max(rare) - min(rare) in (0.0, pytest.approx(5.0)), "5: the common instant passed while they were started"
    assert started + 0.5 <= min(rare) <= started + 5.6
    assert started + 0.5 <= often <= started + 1.6
    assert (min(rare) - often) % 1.0 == pytest.approx(0.0, abs=1e-6) or (min(rare) - often) % 1.0 == pytest.approx(1.0, abs=1e-6)


def test_no_other_timer_is_rounded() -> None:
    """A handler's `asyncio.sleep(0.5)` takes half a second, and the driver looks for a server that is away twice a second."""

    async def main() -> list[tuple[float, float]]:
        loop = asyncio.get_running_loop()
        cases = [("handler", 0.5), ("pymongo_server_monitor_task", 0.5), ("pymongo_kill_cursors_thread", 0.01)]
        return [(loop.time() + delay_s, await loop.create_task(planned(delay_s), name=name)) for name, delay_s in cases]

    with quiet_loop() as loop:
        for expected, when in loop.run_until_complete(main()):
            assert when == pytest.approx(expected, abs=0.2)
        handle = loop.call_later(0.5, print)
        assert handle.when() == pytest.approx(loop.time() + 0.5, abs=0.2), "outside of a task"
        handle.cancel()


def test_the_driver_has_tasks_of_these_names() -> None:
    """If a release of PyMongo renames them, idle workers wake up more often, and nothing else would show it."""
    assert "pymongo_kill_cursors_thread" in inspect.getsource(mongo_client)
    assert "pymongo_server_rtt_task" in inspect.getsource(monitor)
    assert "_poll_cancellation" in inspect.getsource(network_layer)
