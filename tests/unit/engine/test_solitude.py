"""Beside a suspect no run enters a further step, whichever of the two was claimed first."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, cast

from streamline_pool.engine.abort_signal import AbortSignal
from streamline_pool.engine.active_run import ActiveRun
from streamline_pool.engine.active_runs import ActiveRuns
from streamline_pool.engine.asking import Asking, ConditionStuckError
from streamline_pool.engine.run_writer import EngineState
from streamline_pool.engine.solitude import Solitude
from streamline_pool.engine.write_outcome import WriteOutcome
from streamline_pool.protocol.operations import Statement


def admitted(*crashes: int) -> list[ActiveRun]:
    """Runs that have lost so many workers, claimed in this order by an engine whose suspects have lost two."""
    unused = cast(Any, None)
    runs = ActiveRuns()
    solitude = Solitude(runs, unused, unused, unused, suspect_from=2)
    made = [
        ActiveRun(unused, unused, cast(Any, {"_id": f"run {place}", "crashes": count, "steps": []}), "lease", 0.0)
        for place, count in enumerate(crashes)
    ]
    for active in made:
        runs.add(active)
        solitude.admitted(active)
    return made


def test_a_run_that_was_claimed_before_a_suspect_is_released_after_its_step() -> None:
    assert [active.release_requested for active in admitted(0, 2)] == [True, False]


def test_a_run_whose_claim_ended_after_that_of_a_suspect_is_released() -> None:
    assert [active.release_requested for active in admitted(2, 0, 1)] == [False, True, True]


def test_the_second_of_two_suspects_is_released() -> None:
    assert [active.release_requested for active in admitted(2, 3)] == [False, True]


def test_runs_without_a_suspect_go_on() -> None:
    assert [active.release_requested for active in admitted(0, 1)] == [False, False]


class Marks:
    """Takes the mark of a suspect that is alone."""

    async def write(self, statement: Statement) -> WriteOutcome:
        return WriteOutcome.COMMITTED


def test_a_suspect_is_not_alone_beside_a_condition_that_goes_on() -> None:
    """It was cancelled in vain, and may still kill or hang the worker. The suspect waits until it is over."""
    unused = cast(Any, None)

    async def main() -> None:
        may_end = asyncio.Event()

        async def stubborn() -> bool:
            while not may_end.is_set():
                try:
                    await may_end.wait()
                except asyncio.CancelledError:
                    continue
            return True

        asking = Asking(stubborn, AbortSignal())
        with suppress(ConditionStuckError):
            await asking.answer(0.01)
        runs = ActiveRuns()
        solitude = Solitude(runs, cast(Any, Marks()), EngineState(), lambda: datetime.now(UTC), suspect_from=2)
        solitude.code_left(asking)
        document = {"_id": "suspect", "crashes": 2, "rev": 0, "token": 3, "steps": []}
        suspect = ActiveRun(unused, unused, cast(Any, document), "lease", 0.0)
        runs.add(suspect)
        solitude.admitted(suspect)
        reaching = asyncio.create_task(solitude.reach(suspect))
        await asyncio.sleep(0.01)
        assert not suspect.is_alone
        may_end.set()
        await reaching
        assert suspect.is_alone

    asyncio.run(main())
