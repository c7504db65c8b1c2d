"""How long calls may block an event loop: one time for all calls of a turn, less than any lease and than the supervisor's patience."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from streamline_pool.config.env import system_env
from streamline_pool.engine.loop_blocking import LoopBlocking


class Clock:
    """A monotonic clock that stands still until it is set."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> Any:
        raise NotImplementedError


def on_a_loop(test: Callable[[LoopBlocking, Clock], Awaitable[None]], *deadlines: float, silence_s: float = 30.0) -> None:
    """Run `test` with the time of a new event loop."""

    async def main() -> None:
        clock = Clock()
        env = dataclasses.replace(system_env(), clock=clock)
        await test(LoopBlocking(env, asyncio.get_running_loop(), lambda: deadlines, silence_s), clock)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("deadlines", "silence_s", "seconds"),
    [((), 30.0, 10.0), ((104.0, 120.0), 30.0, 4.0), ((90.0,), 30.0, 1.0), ((120.0,), 6.0, 2.0), ((90.0,), 0.3, 0.1)],
    ids=["no lease", "first lease", "a lease that is over", "patience", "little patience and no lease"],
)
def test_the_time_ends_before_the_first_lease_and_in_a_part_of_the_supervisors_patience(
    deadlines: tuple[float, ...], silence_s: float, seconds: float
) -> None:
    async def test(blocking: LoopBlocking, clock: Clock) -> None:
        assert blocking.left_s() == pytest.approx(seconds)

    on_a_loop(test, *deadlines, silence_s=silence_s)


def test_the_calls_of_one_turn_share_its_time_whether_they_succeed_or_not() -> None:
    async def test(blocking: LoopBlocking, clock: Clock) -> None:
        left = []
        for _ in range(5):
            left.append(blocking.left_s())
            clock.seconds += 3.0
        assert left == pytest.approx([10.0, 7.0, 4.0, 1.0, 0.0])

    on_a_loop(test)


def test_the_next_call_has_its_time_only_after_what_the_loop_had_to_do_meanwhile() -> None:
    """The timers of renewals, beats and self-fences are due by then: they come first, and so does what they wake."""

    async def test(blocking: LoopBlocking, clock: Clock) -> None:
        left: list[tuple[str, float]] = []

        async def saves_in_each_turn() -> None:
            while left[-1:] != [("handler", 10.0)]:
                await asyncio.sleep(0)
                left.append(("handler", blocking.left_s()))

        async def beats() -> None:
            await asyncio.sleep(0.001)
            left.append(("beat", 0.0))

        beat = asyncio.create_task(beats())
        await asyncio.sleep(0)
        assert blocking.left_s() == 10.0
        clock.seconds += 10.0
        time.sleep(0.005)  # the call blocks the loop, and the timer of the beat is due
        await asyncio.create_task(saves_in_each_turn())
        await beat
        assert left.index(("beat", 0.0)) < left.index(("handler", 10.0))

    on_a_loop(test)


def test_threads_do_not_share_the_time_of_the_loop() -> None:
    async def test(blocking: LoopBlocking, clock: Clock) -> None:
        blocking.left_s()
        clock.seconds += 10.0
        assert blocking.left_s() == 0.0
        assert not await asyncio.to_thread(lambda: blocking.on_loop)
        assert await asyncio.to_thread(blocking.left_s) == 10.0

    on_a_loop(test)
