"""The instants at which runs become due."""

from __future__ import annotations

from streamline_pool.supervisor.timers import DueLane, Timers


def test_instants_come_out_in_order_when_they_are_due() -> None:
    timers = Timers()
    for at_ms, lane in ((30, "b"), (10, "a"), (20, "a")):
        timers.add(lane, at_ms)
    assert timers.next_at_ms() == 10
    assert timers.pop_due(20) == [DueLane("a", None, 1), DueLane("a", None, 1)]
    assert timers.pop_due(29) == []
    assert timers.pop_due(30) == [DueLane("b", None, 1)]
    assert timers.next_at_ms() is None


def test_a_run_told_of_twice_wakes_one_worker() -> None:
    """Its worker tells of its sleep, and each sweep finds it again; a worker woken for nothing costs a query."""
    timers = Timers()
    timers.add("a", 10)
    timers.add("a", 10, "r1")
    timers.add("a", 10, "r1")
    assert timers.pop_due(10) == [DueLane("a", "r1", 1)]


def test_runs_due_at_one_instant_wake_as_many_workers() -> None:
    timers = Timers()
    timers.add("a", 10, "r1")
    timers.add("a", 10, "r2")
    assert timers.pop_due(10) == [DueLane("a", None, 2)]


def test_when_full_the_latest_instants_are_dropped() -> None:
    """The sweep finds those again long before they are due; the nearest ones nobody would tell in time."""
    timers = Timers(size_max=2)
    for at_ms in (30, 20, 10, 40):
        timers.add("a", at_ms, f"r{at_ms}")
    assert [due.run_id for due in timers.pop_due(99)] == ["r10", "r20"]
    assert len(timers) == 0
