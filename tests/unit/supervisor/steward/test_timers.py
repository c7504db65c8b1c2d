"""The instants at which runs become due."""

from __future__ import annotations

from streamline_pool.supervisor.steward.timers import Timers


def test_instants_come_out_in_order_when_they_are_due() -> None:
    timers = Timers()
    for at_ms, run_id in ((30, "r3"), (10, "r1"), (20, None)):
        timers.add(at_ms, run_id)
    assert timers.next_at_ms() == 10
    assert timers.pop_due(20) == ["r1", None]
    assert timers.pop_due(29) == []
    assert timers.pop_due(30) == ["r3"]
    assert timers.next_at_ms() is None


def test_an_instant_added_twice_is_kept_once() -> None:
    """A worker reports a sleep, and each sweep finds it again; a claim of a run that was just claimed costs two round trips."""
    timers = Timers()
    timers.add(10, "r1")
    timers.add(10, "r1")
    assert len(timers) == 1
    assert timers.pop_due(10) == ["r1"]


def test_runs_due_at_one_instant_are_all_named() -> None:
    timers = Timers()
    timers.add(10, "r1")
    timers.add(10, "r2")
    assert timers.pop_due(10) == ["r1", "r2"]


def test_when_full_the_latest_instants_are_dropped() -> None:
    """The sweep finds those again long before they are due; for the nearest ones it would be too late."""
    timers = Timers(size_max=2)
    for at_ms in (30, 20, 10, 40):
        timers.add(at_ms, f"r{at_ms}")
    assert timers.pop_due(99) == ["r10", "r20"]
    assert len(timers) == 0


def test_runs_due_at_one_instant_are_bounded_too() -> None:
    """A million runs scheduled for midnight are not a million names in the steward."""
    timers = Timers(size_max=3)
    for number in range(1_000):
        timers.add(10, f"r{number}")
    assert len(timers) == 3


def test_an_instant_beyond_32_bits_of_milliseconds_is_kept_and_not_due() -> None:
    """The seed's long timers overflowed, and fired at once."""
    timers = Timers()
    century_ms = 100 * 366 * 86_400_000
    timers.add(century_ms, "r1")
    assert timers.pop_due(2**31) == []
    assert timers.pop_due(century_ms - 1) == []
    assert timers.pop_due(century_ms) == ["r1"]
