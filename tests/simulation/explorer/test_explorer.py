"""The explorer finds no broken promise, repeats a schedule exactly, and does find planted bugs.

1 000 schedules here, 20 000 more in the long suite. `STREAMLINE_EXPLORER_SHARE=20` plays every twentieth part of these, other parts on
other days; CI has no time for all. `python -m tests.simulation.explorer` plays any number.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest

from streamline_pool.protocol import commits

from .schedule import play, shrink, tell
from .server import Server
from .side_by_side import playing

QUICK_PARTS, QUICK = 20, 50
SLOW_PARTS, SLOW, SLOW_FIRST = 100, 200, 1_000_000
SHARE_VARIABLE = "STREAMLINE_EXPLORER_SHARE"


@pytest.fixture(scope="module")
def server(mongodb_uri: str) -> Iterator[Server]:
    """The explorer's databases on the tests' server."""
    server = Server(mongodb_uri, f"streamline_explorer_{uuid4().hex[:8]}")
    yield server
    server.close()


def explore(server: Server, uri: str, first: int, count: int) -> None:
    """Play these schedules. A failure shows the shortest schedule that was found, as a story."""
    began, operations = time.monotonic(), 0
    for seed in range(first, first + count):
        played = play(server, uri, seed)
        operations += played.operations
        if played.violation is not None:
            pytest.fail(tell(shrink(server, uri, played)) + f"\nreplay: python -m tests.simulation.explorer --replay --seed {seed}")
    seconds = time.monotonic() - began
    print(f"{count} schedules from seed {first}: {count / seconds:.1f} per second, {operations} operations")


@pytest.mark.parametrize("part", range(QUICK_PARTS))
def test_no_schedule_breaks_a_promise(server: Server, mongodb_uri: str, part: int) -> None:
    """Whatever the order of operations and whatever fails, every invariant holds."""
    explore(server, mongodb_uri, 1 + part * QUICK, QUICK)


CODE_SEEDS = (256, 271, *range(1, 25))
"""For schedules of durable functions; 256 and 271 have found an answer of `patched` that was lost, and a rewind of a later generation."""


@pytest.mark.parametrize("seeds", [CODE_SEEDS, pytest.param(range(1_000, 1_600), marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_no_schedule_of_a_durable_function_breaks_a_promise(server: Server, mongodb_uri: str, seeds: Sequence[int]) -> None:
    """The same for a workflow written as code, which is not among those that are drawn."""
    for seed in seeds:
        played = play(server, mongodb_uri, seed, kinds=("code",))
        if played.violation is not None:
            pytest.fail(tell(played) + f"\nreplay: python -m tests.simulation.explorer --replay --kinds code --seed {seed}")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(SLOW_PARTS))
def test_no_schedule_of_many_breaks_a_promise(server: Server, mongodb_uri: str, part: int) -> None:
    """The same for more schedules, of other seeds."""
    share = int(os.environ.get(SHARE_VARIABLE, "1"))
    if part % share != datetime.now(UTC).timetuple().tm_yday % share:
        pytest.skip(f"not in the share of this day: one part in {share}, by {SHARE_VARIABLE}")
    explore(server, mongodb_uri, SLOW_FIRST + part * SLOW, SLOW)


def test_a_schedule_repeats_exactly(server: Server, mongodb_uri: str) -> None:
    """A seed that failed must fail again, or it could not be examined."""
    for seed in (3, 4, 5, 302, 314, 320):
        first, second = play(server, mongodb_uri, seed), play(server, mongodb_uri, seed)
        assert first == second
        assert play(server, mongodb_uri, seed, first.record) == first


@pytest.mark.slow
def test_processes_side_by_side_play_the_same_schedules(server: Server, mongodb_uri: str) -> None:
    """Their figures are those of the reliability page."""
    played = []
    for processes in (1, 2):
        with playing(server, mongodb_uri, range(1, 31), (), processes) as schedules:
            played.append(list(schedules))
    assert played[0] == played[1]


def test_replies_that_are_not_asked_for_again_are_right(server: Server, mongodb_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """memory.py answers frequent searches for the server. With every operation performed, the same happens."""
    seeds = range(7_000, 7_012)
    quick = [play(server, mongodb_uri, seed) for seed in seeds]
    monkeypatch.setattr(server, "remembers", False)
    assert quick == [play(server, mongodb_uri, seed) for seed in seeds]


def test_a_missing_fence_is_found_shrunk_and_told(server: Server, mongodb_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proof that cannot fail is none: without `lease.id` and `rev` in the filter, some schedule shows a stale write."""
    fenced = commits._fenced

    def without_fence(*arguments: Any, **keywords: Any) -> dict[str, Any]:
        return {name: value for name, value in fenced(*arguments, **keywords).items() if name not in ("lease.id", "rev")}

    monkeypatch.setattr(commits, "_fenced", without_fence)
    failed = next(played for seed in range(1, 500) if (played := play(server, mongodb_uri, seed)).violation is not None)
    shrunk = shrink(server, mongodb_uri, failed, tries=25)
    assert shrunk.violation is not None
    assert sum(map(bool, shrunk.record)) <= sum(map(bool, failed.record))
    assert "ENTERS" in tell(shrunk)
    assert play(server, mongodb_uri, shrunk.seed, shrunk.record) == shrunk


@pytest.mark.slow
def test_every_kind_of_fault_is_met(server: Server, mongodb_uri: str) -> None:
    """A fault that never happens proves nothing."""
    from .faults import KINDS

    met: set[str] = set()
    for seed in range(2_000, 2_400):
        met |= set(play(server, mongodb_uri, seed).faults)
        if met >= set(KINDS):
            return
    pytest.fail(f"never met: {set(KINDS) - met}; seed of the process: {os.environ.get('PYTHONHASHSEED')}")
