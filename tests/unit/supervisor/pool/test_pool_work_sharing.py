"""Which worker gets a wake-up, a run whose timer fired, or a cancellation."""

from __future__ import annotations

import signal
from dataclasses import replace

from pool_script import STEWARD, Script

from streamline_pool.supervisor.ipc.messages import (
    CheckRun,
    Parked,
    Probe,
    RunChanged,
    TimersFired,
    WakeUp,
    WorkDue,
)


def test_one_due_run_wakes_up_one_idle_worker() -> None:
    """Sixteen workers that poll for one run are fifteen wasted queries."""
    script = Script(workers=3).started()
    script.beat(101, idle=False)
    script.on_message(STEWARD, WorkDue(run_id="r", count=1))
    assert script.sent(WakeUp) == [(102, WakeUp(run_id="r"))]


def test_wake_ups_go_to_the_workers_in_turn() -> None:
    script = Script(workers=3).started()
    woken = []
    for _ in range(6):
        script.now += 0.001
        script.on_message(STEWARD, WorkDue(run_id="r", count=1))
        woken += [pid for pid, _ in script.sent(WakeUp)]
    assert woken == [101, 102, 103, 101, 102, 103]


def test_several_due_runs_wake_up_as_many_workers_and_name_no_run() -> None:
    script = Script(workers=3).started()
    script.on_message(STEWARD, WorkDue(run_id="r", count=2))
    assert script.sent(WakeUp) == [(101, WakeUp()), (102, WakeUp())]
    script.on_message(STEWARD, WorkDue(run_id=None, count=50))
    assert len(script.sent(WakeUp)) == 3


def test_a_wake_up_that_finds_no_idle_worker_is_owed_to_the_next_idle_one() -> None:
    """A worker in the middle of a poll may have just missed the run: the run would wait until the sweep."""
    script = Script(workers=1).started()
    script.beat(101, idle=False)
    script.on_message(STEWARD, WorkDue(run_id="r", count=1))
    assert not script.sent(WakeUp)
    script.beat(101, idle=True)
    assert script.sent(WakeUp) == [(101, WakeUp())]
    script.beat(101, idle=True)
    assert not script.sent(WakeUp)


def test_each_worker_that_becomes_idle_gets_an_owed_wake_up() -> None:
    """With one owed wake-up for several runs, all workers but the first would stay idle until a sweep, beside due runs."""
    script = Script(workers=3).started()
    for pid in (101, 102, 103):
        script.beat(pid, idle=False)
    for _ in range(20):
        script.on_message(STEWARD, WorkDue(run_id="r", count=1))
    woken = []
    for pid in (102, 101, 103):
        script.beat(pid, idle=True)
        woken += [pid for pid, _ in script.sent(WakeUp)]
        script.beat(pid, idle=False)
    assert woken == [102, 101, 103]
    script.beat(102, idle=True)
    assert not script.sent(WakeUp), "no more wake-ups are owed than there are workers"


def test_wake_ups_beyond_the_idle_workers_are_owed_to_the_others() -> None:
    script = Script(workers=3).started()
    script.beat(102, idle=False)
    script.on_message(STEWARD, WorkDue(run_id=None, count=3))
    assert [pid for pid, _ in script.sent(WakeUp)] == [101, 103]
    script.beat(101, idle=False)
    script.beat(103, idle=False)
    script.beat(102, idle=True)
    assert [pid for pid, _ in script.sent(WakeUp)] == [102]


def test_an_owed_wake_up_for_overdue_runs_is_not_narrowed_by_later_ones() -> None:
    """Released runs are older than the point where a poll for one lane's new runs begins."""
    script = Script(workers=2).started()
    for pid in (101, 102):
        script.beat(pid, idle=False)
    script.on_message(STEWARD, WorkDue(run_id=None, count=1, overdue=True))
    script.on_message(STEWARD, WorkDue(run_id="r", count=1))
    script.beat(101, idle=True)
    assert script.sent(WakeUp) == [(101, WakeUp(overdue=True))]


def test_parked_instants_go_to_the_steward() -> None:
    script = Script().started()
    script.beat(101, parked=((5, "r"),))
    assert script.sent(Parked) == [(STEWARD, Parked(instants=((5, "r"),)))]


def test_runs_whose_timers_fired_are_divided_among_busy_workers() -> None:
    """As owed wake-ups they would wait: a sleep would end when the backlog does."""
    script = Script(workers=3).started()
    for pid in (101, 102, 103):
        script.beat(pid, idle=False)
    script.on_message(STEWARD, TimersFired(run_ids=("a", "b", "c", "d")))
    assert script.sent(TimersFired) == [
        (101, TimersFired(run_ids=("a", "d"))),
        (102, TimersFired(run_ids=("b",))),
        (103, TimersFired(run_ids=("c",))),
    ]
    assert script.state.owed_wake_ups == 0, "no wake-up is owed"


def test_fired_timers_go_to_the_workers_in_turn() -> None:
    """Each worker has only a few places for such runs."""
    script = Script(workers=3).started()
    sent = []
    for name in "abcdef":
        script.now += 0.001
        script.on_message(STEWARD, TimersFired(run_ids=(name,)))
        sent += [(pid, *fired.run_ids) for pid, fired in script.sent(TimersFired)]
    assert sent == [(101, "a"), (102, "b"), (103, "c"), (101, "d"), (102, "e"), (103, "f")]


def test_idle_workers_get_the_runs_whose_timers_fired() -> None:
    script = Script(workers=3).started()
    script.beat(101, idle=False)
    script.on_message(STEWARD, TimersFired(run_ids=("a", "b", "c")))
    assert script.sent(TimersFired) == [(102, TimersFired(run_ids=("a", "c"))), (103, TimersFired(run_ids=("b",)))]


def test_no_fired_timer_goes_to_a_worker_that_may_not_claim() -> None:
    """A draining worker would release the run; a worker that is not ready polls all that is due when it is."""
    script = Script(workers=2).started()
    script.dies(101)
    script.wait(1.0)
    script.on_message(STEWARD, TimersFired(run_ids=("a", "b")))
    assert script.sent(TimersFired) == [(102, TimersFired(run_ids=("a", "b")))], "the successor is not ready"
    script.signal(signal.SIGTSTP)
    script.on_message(STEWARD, TimersFired(run_ids=("c",)))
    assert not script.sent(TimersFired), "the pool is held"
    script.signal(signal.SIGCONT)
    script.on_message(STEWARD, Probe(ok=False))
    script.state = replace(script.state, breaker=replace(script.state.breaker, state="open"))
    script.on_message(STEWARD, TimersFired(run_ids=("d",)))
    assert not script.sent(TimersFired), "the circuit is open"
    script = Script(workers=1).started()
    script.signal(signal.SIGTERM)
    script.on_message(STEWARD, TimersFired(run_ids=("e",)))
    assert not script.sent(TimersFired), "every worker is draining"


def test_a_cancellation_goes_to_the_lease_holder_or_to_all() -> None:
    script = Script().started()
    script.on_message(STEWARD, RunChanged(run_id="r", owner="h:102:n"))
    assert script.sent(CheckRun) == [(102, CheckRun(run_id="r"))]
    script.on_message(STEWARD, RunChanged(run_id="r", owner=None))
    assert [pid for pid, _ in script.sent(CheckRun)] == [101, 102]


def test_no_timer_goes_to_a_worker_that_is_kept_for_a_suspect() -> None:
    """It claims nothing for as long as the suspect takes, so the run would wait behind the backlog of the other workers."""
    script = Script(workers=2).started()
    script.beat(101, idle=False, kept=True)
    script.beat(102, idle=False)
    for _ in range(2):
        script.now += 0.001
        script.on_message(STEWARD, TimersFired(run_ids=("a", "b")))
        assert script.sent(TimersFired) == [(102, TimersFired(run_ids=("a", "b")))]
    script.beat(102, idle=False, kept=True)
    script.on_message(STEWARD, TimersFired(run_ids=("a",)))
    assert len(script.sent(TimersFired)) == 1, "with no other worker, one of them keeps it"
