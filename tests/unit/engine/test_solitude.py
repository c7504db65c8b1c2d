"""Beside a suspect no run enters a further step, whichever of the two was claimed first."""

from __future__ import annotations

from typing import Any, cast

from streamline_pool.engine.active_run import ActiveRun
from streamline_pool.engine.active_runs import ActiveRuns
from streamline_pool.engine.solitude import Solitude


def admitted(*crashes: int) -> list[ActiveRun]:
    """Runs that have lost so many workers, claimed in this order by an engine whose suspects have lost two."""
    unused = cast(Any, None)
    runs = ActiveRuns()
    solitude = Solitude(runs, unused, unused, unused, suspect_from=2)
    made = [
        ActiveRun(unused, unused, cast(Any, {"_id": f"run {place}", "crashes": count}), "lease", 0.0) for place, count in enumerate(crashes)
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
