"""How long calls may block an event loop: one time for all calls of a turn, less than any lease and than the supervisor's patience."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from streamline_pool.config.env import system_env
from streamline_pool.domain.errors import InvalidStateError, StoreUnavailableError
from streamline_pool.engine.loop_blocking import LoopBlocking, LoopsBlocking


class Clock:
    """A monotonic clock that stands still until it is set."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> Any:
        raise NotImplementedError


class Calls:
    """Makes blocking calls in a new event loop."""

    def __init__(self, blocking: LoopBlocking, clock: Clock) -> None:
        self.blocking = blocking
        self.clock = clock
        self.runs = itertools.count()

    def call(self, takes_s: float, *, is_answered: bool = True, run_id: str | None = None) -> float | None:
        """A call, of a run of its own. How long it could have taken; None: it was refused."""
        run_id = run_id or f"run-{next(self.runs)}"
        try:
            self.blocking.admit(run_id)
        except StoreUnavailableError:
            return None
        seconds = 0.0
        try:
            with self.blocking.waiting(run_id) as seconds:
                self.clock.seconds += min(takes_s, seconds)
                if not is_answered:
                    raise StoreUnavailableError("no answer")
        except StoreUnavailableError:
            pass
        return seconds


def on_a_loop(test: Callable[[Calls], Awaitable[None]], *deadlines: float, silence_s: float = 30.0) -> None:
    """Run `test` in a new event loop, in which leases end at these instants. The clock stands at 100 s."""

    async def main() -> None:
        clock = Clock()
        blocking = LoopsBlocking(dataclasses.replace(system_env(), clock=clock)).here(silence_s)
        blocking.watch(lambda: deadlines[:1])
        blocking.watch(lambda: deadlines[1:])  # of another engine
        await test(Calls(blocking, clock))

    asyncio.run(main())


@pytest.mark.parametrize(
    ("deadlines", "silence_s", "seconds"),
    [((), 30.0, 10.0), ((120.0, 104.0), 30.0, 3.5), ((90.0,), 30.0, 1.0), ((120.0,), 6.0, 2.0), ((90.0,), 0.3, 0.1)],
    ids=["no lease", "first lease", "a lease that is over", "patience", "little patience and no lease"],
)
def test_a_call_ends_before_the_first_lease_and_in_a_part_of_the_supervisors_patience(
    deadlines: tuple[float, ...], silence_s: float, seconds: float
) -> None:
    async def test(calls: Calls) -> None:
        assert calls.call(0.0) == pytest.approx(seconds)

    on_a_loop(test, *deadlines, silence_s=silence_s)


def test_after_a_call_that_has_failed_at_once_the_next_one_may_wait() -> None:
    """A handler that tries again finds the database back."""

    async def test(calls: Calls) -> None:
        assert calls.call(0.5, is_answered=False) == 10.0
        assert calls.call(0.5) == 9.5

    on_a_loop(test)


def test_after_a_call_without_an_answer_no_call_of_the_same_turn_waits() -> None:
    async def test(calls: Calls) -> None:
        assert calls.call(20.0, is_answered=False) == 10.0
        assert [calls.call(0.0) for _ in range(3)] == [None] * 3

    on_a_loop(test)


def test_answered_calls_of_one_turn_share_two_thirds_of_the_supervisors_patience() -> None:
    """A database that is slow, and many handlers that are ready at once. Each call has a moment."""

    async def test(calls: Calls) -> None:
        assert [calls.call(6.0) for _ in range(12)] == pytest.approx([10.0, 4.0, *[1.0] * 10])
        assert calls.call(0.0) is None

    on_a_loop(test)


def test_what_a_handler_computes_between_two_calls_does_not_count() -> None:
    async def test(calls: Calls) -> None:
        assert calls.call(0.01) == 10.0
        calls.clock.seconds += 25.0
        assert calls.call(0.01) == pytest.approx(9.99)

    on_a_loop(test)


def test_the_next_call_has_its_time_only_after_what_the_loop_had_to_do_meanwhile() -> None:
    """The timers of renewals, beats and self-fences are due by then: they come first, and so does what they wake."""

    async def test(calls: Calls) -> None:
        happened: list[str] = []

        async def saves_in_each_turn() -> None:
            while happened[-1:] != ["save"]:
                await asyncio.sleep(0)
                happened.append("refused" if calls.call(0.0) is None else "save")

        async def beats() -> None:
            await asyncio.sleep(0.001)
            happened.append("beat")

        beat = asyncio.create_task(beats())
        await asyncio.sleep(0)
        calls.call(10.0, is_answered=False)
        time.sleep(0.005)  # the call blocks the loop, and the timer of the beat is due
        await asyncio.create_task(saves_in_each_turn())
        await beat
        assert happened.index("beat") < happened.index("save")

    on_a_loop(test)


def test_a_handler_that_wakes_before_the_beat_does_not_block_before_it() -> None:
    """Both timers were due when the first call ended. The end of the turn is planned by a timer that is due before either."""

    async def main() -> None:
        blocking = LoopsBlocking(system_env()).here(3.0)
        happened: list[str] = []

        async def beats() -> None:
            await asyncio.sleep(0.05)
            happened.append("beat")

        async def saves(name: str, after_s: float) -> None:
            await asyncio.sleep(after_s)
            try:
                with blocking.waiting(name) as seconds:
                    happened.append(name)
                    time.sleep(0.1)
                    blocking._in_vain = True
                    assert seconds > 0
            except StoreUnavailableError:
                happened.append(f"{name} is refused")

        await asyncio.gather(beats(), saves("first", 0.01), saves("second", 0.03), saves("third", 0.04))
        assert happened == ["first", "second is refused", "third is refused", "beat"]

    asyncio.run(main())


def test_answered_calls_of_a_turn_end_with_the_first_lease() -> None:
    """Many handlers, and a slow database: after the end of the lease another worker may have the run."""

    async def test(calls: Calls) -> None:
        assert [calls.call(2.0) for _ in range(3)] == pytest.approx([3.5, 1.5, 1.0])
        assert calls.call(0.0) is None

    on_a_loop(test, 104.0, 120.0)


def test_a_handler_that_has_computed_beyond_its_lease_has_a_moment() -> None:
    async def test(calls: Calls) -> None:
        assert [calls.call(0.6) for _ in range(3)] == [1.0, 1.0, None]

    on_a_loop(test, 90.0)


def test_a_handler_whose_own_calls_took_the_time_of_the_turn_is_told_so() -> None:
    """Entered again, it would do the same: that is a failure of the handler, not of the database."""

    async def test(calls: Calls) -> None:
        calls.call(0.1, run_id="other")
        for _ in range(40):
            calls.call(0.5, run_id="mine")
        with pytest.raises(InvalidStateError, match=r"run mine: .* for 20\.0 s without a pause; await something"):
            calls.blocking.admit("mine")
        assert calls.call(0.1, run_id="other") is None

    on_a_loop(test)


def test_a_loop_that_has_ended_is_forgotten() -> None:
    loops = LoopsBlocking(system_env())

    async def save() -> None:
        with loops.here(30.0).waiting("r"):
            pass

    for _ in range(3):
        asyncio.run(save())
    gc.collect()
    assert len(loops._of) == 0


def test_threads_do_not_share_the_time_of_the_loop() -> None:
    async def test(calls: Calls) -> None:
        calls.call(10.0, is_answered=False)
        assert calls.call(0.0) is None
        assert await asyncio.to_thread(calls.call, 20.0, is_answered=False) == 10.0
        assert await asyncio.to_thread(calls.call, 0.0) == 10.0
        assert not await asyncio.to_thread(lambda: calls.blocking.on_loop)

    on_a_loop(test)


def test_the_engines_of_an_application_share_the_time_of_their_loop() -> None:
    async def main() -> None:
        loops = LoopsBlocking(system_env())
        assert loops.here(30.0) is loops.here(30.0)
        other = await asyncio.to_thread(lambda: asyncio.run(_here(loops)))
        assert other is not loops.here(30.0)

    async def _here(loops: LoopsBlocking) -> LoopBlocking:
        return loops.here(30.0)

    asyncio.run(main())
