"""Every decision of the supervisor, without a process: what happens is told, what it does about it is looked at."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import Any

import pytest
from pool_script import LIMITS, STEWARD, Script, beat

from streamline_pool.supervisor.ipc.messages import (
    BootFailed,
    CheckRun,
    Circuit,
    Close,
    Died,
    Drain,
    Gate,
    Hold,
    IdleCheck,
    Parked,
    Probe,
    Released,
    Reslot,
    RunChanged,
    ServeSubscribers,
    StewardBeat,
    Stop,
    Subscribers,
    SubscribersServed,
    TimersFired,
    WakeUp,
    WorkDue,
)
from streamline_pool.supervisor.pool.decide import decide
from streamline_pool.supervisor.pool.state import Dump, Event, Exit, ForkFailed, Garbled, Heard, Kill, Log, Measured, Spawn, Tick

# ---- starting ------------------------------------------------------------------------------------------------------


def test_the_first_tick_starts_one_steward_and_all_workers() -> None:
    script = Script(workers=3)
    script.send(Tick())
    assert [(s.role, s.index, s.total, s.first) for s in script.did(Spawn)] == [
        ("steward", -1, 3, True),
        ("worker", 0, 3, True),
        ("worker", 1, 3, True),
        ("worker", 2, 3, True),
    ]


def test_ready_is_said_once_when_everybody_is() -> None:
    """Whoever waits for that line sends work as soon as it appears."""
    script = Script(workers=2)
    script.send(Tick())
    script.beat(101)
    script.beat(102, state="starting")
    assert "ready" not in script.logged()
    script.on_message(STEWARD, StewardBeat(ready=False))
    script.on_message(STEWARD, StewardBeat(ready=True))
    script.beat(102)
    (ready,) = [log for log in script.did(Log) if log.event == "ready"]
    assert ready.fields == {"workers": 2, "pids": [101, 102]}
    script.beat(102)
    assert "ready" not in script.logged()


def test_a_child_that_cannot_start_stops_the_pool_with_its_exit_code() -> None:
    """An import error would otherwise be a crash loop."""
    script = Script(workers=2)
    script.send(Tick())
    script.on_message(STEWARD, BootFailed(exit_code=3, message="no database"))
    assert [log.fields["error"] for log in script.did(Log) if log.event == "boot_failed"] == ["no database"]
    assert [pid for pid, _ in script.sent(Stop)] == [101, 102]
    script.on_message(101, BootFailed(exit_code=1, message="also no database"))
    for pid in (STEWARD, 101, 102):
        script.dies(pid, exit_code=64)
    assert script.did(Exit) == [Exit(code=3)]


def test_a_restarted_child_that_misses_the_database_is_tried_again_free_of_charge() -> None:
    """A worker that crashes during an outage must come back after it, and an outage is nobody's crash."""
    script = Script(workers=1, restart_budget=1).started()
    script.dies(101)
    script.wait(1.0)
    for attempt in range(3):
        pid = 102 + attempt
        script.on_message(pid, BootFailed(exit_code=3, message="no database"))
        script.dies(pid, exit_code=64)
        script.wait(1.0)
        assert script.did(Spawn), f"after attempt {attempt}"
    assert script.state.ending is None


def test_a_fork_that_fails_is_tried_again_within_the_budget() -> None:
    script = Script(restart_budget=2)
    script.state, _ = decide(script.state, Tick(), script.now)
    script.send(ForkFailed(role="worker", index=1, error="EAGAIN", jitter=0.5))
    assert script.state.ending is None
    script.wait(0.3)
    assert [(s.role, s.index) for s in script.did(Spawn)] == [("worker", 1)]


# ---- rings ---------------------------------------------------------------------------------------------------------


def test_one_due_run_rings_one_hungry_worker() -> None:
    """Sixteen workers that look for one run are fifteen wasted queries."""
    script = Script(workers=3).started()
    script.beat(101, idle=False)
    script.on_message(STEWARD, WorkDue(lane="l", run_id="r", count=1))
    assert script.sent(WakeUp) == [(102, WakeUp(lane="l", run_id="r"))]


def test_rings_go_round() -> None:
    script = Script(workers=3).started()
    rung = []
    for _ in range(6):
        script.now += 0.001
        script.on_message(STEWARD, WorkDue(lane="l", run_id="r", count=1))
        rung += [pid for pid, _ in script.sent(WakeUp)]
    assert rung == [101, 102, 103, 101, 102, 103]


def test_several_due_runs_ring_as_many_workers_and_name_none() -> None:
    script = Script(workers=3).started()
    script.on_message(STEWARD, WorkDue(lane="l", run_id="r", count=2))
    assert script.sent(WakeUp) == [(101, WakeUp(lane="l")), (102, WakeUp(lane="l"))]
    script.on_message(STEWARD, WorkDue(lane="l", run_id=None, count=50))
    assert len(script.sent(WakeUp)) == 3


def test_a_ring_that_finds_nobody_hungry_is_kept_for_the_next_who_is() -> None:
    """A worker in the middle of its look may have just missed the run: it would lie there until the sweep."""
    script = Script(workers=1).started()
    script.beat(101, idle=False)
    script.on_message(STEWARD, WorkDue(lane="l", run_id="r", count=1))
    assert not script.sent(WakeUp)
    script.beat(101, idle=True)
    assert script.sent(WakeUp) == [(101, WakeUp(lane="l"))]
    script.beat(101, idle=True)
    assert not script.sent(WakeUp)


def test_each_worker_that_gets_room_is_rung_while_rings_are_owed() -> None:
    """With one ring kept for several runs, all workers but the first to get room would be idle until a sweep, beside due runs."""
    script = Script(workers=3).started()
    for pid in (101, 102, 103):
        script.beat(pid, idle=False)
    for _ in range(20):
        script.on_message(STEWARD, WorkDue(lane="l", run_id="r", count=1))
    rung = []
    for pid in (102, 101, 103):
        script.beat(pid, idle=True)
        rung += [pid for pid, _ in script.sent(WakeUp)]
        script.beat(pid, idle=False)
    assert rung == [102, 101, 103]
    script.beat(102, idle=True)
    assert not script.sent(WakeUp), "no more are owed than there are workers"


def test_rings_beyond_the_hungry_are_kept_for_the_others() -> None:
    script = Script(workers=3).started()
    script.beat(102, idle=False)
    script.on_message(STEWARD, WorkDue(lane="l", run_id=None, count=3))
    assert [pid for pid, _ in script.sent(WakeUp)] == [101, 103]
    script.beat(101, idle=False)
    script.beat(103, idle=False)
    script.beat(102, idle=True)
    assert [pid for pid, _ in script.sent(WakeUp)] == [102]


def test_a_kept_ring_for_any_lane_is_not_narrowed_by_later_ones() -> None:
    """Runs that were given back stand where a look for one lane's new runs does not begin."""
    script = Script(workers=2).started()
    for pid in (101, 102):
        script.beat(pid, idle=False)
    script.on_message(STEWARD, WorkDue(lane=None, run_id=None, count=1))
    script.on_message(STEWARD, WorkDue(lane="l", run_id="r", count=1))
    script.beat(101, idle=True)
    assert script.sent(WakeUp) == [(101, WakeUp())]


def test_parked_instants_go_to_the_steward() -> None:
    script = Script().started()
    script.beat(101, parked=(("l", 5, "r"),))
    assert script.sent(Parked) == [(STEWARD, Parked(instants=(("l", 5, "r"),)))]


def test_runs_whose_instants_have_come_are_shared_out_among_busy_workers() -> None:
    """With nobody hungry, a ring is kept: a sleep would end when the backlog does."""
    script = Script(workers=3).started()
    for pid in (101, 102, 103):
        script.beat(pid, idle=False)
    script.on_message(STEWARD, TimersFired(run_ids=("a", "b", "c", "d")))
    assert script.sent(TimersFired) == [
        (101, TimersFired(run_ids=("a", "d"))),
        (102, TimersFired(run_ids=("b",))),
        (103, TimersFired(run_ids=("c",))),
    ]
    assert script.state.unserved == 0, "no look for what is due is owed"


def test_alarms_go_round() -> None:
    """Each worker has only a few places for them."""
    script = Script(workers=3).started()
    told = []
    for name in "abcdef":
        script.now += 0.001
        script.on_message(STEWARD, TimersFired(run_ids=(name,)))
        told += [(pid, *alarm.run_ids) for pid, alarm in script.sent(TimersFired)]
    assert told == [(101, "a"), (102, "b"), (103, "c"), (101, "d"), (102, "e"), (103, "f")]


def test_hungry_workers_get_the_runs_whose_instants_have_come() -> None:
    script = Script(workers=3).started()
    script.beat(101, idle=False)
    script.on_message(STEWARD, TimersFired(run_ids=("a", "b", "c")))
    assert script.sent(TimersFired) == [(102, TimersFired(run_ids=("a", "c"))), (103, TimersFired(run_ids=("b",)))]


def test_no_alarm_goes_to_a_worker_that_may_not_claim() -> None:
    """A draining worker would give the run back; one that is not ready looks at all that is due when it is."""
    script = Script(workers=2).started()
    script.dies(101)
    script.wait(1.0)
    script.on_message(STEWARD, TimersFired(run_ids=("a", "b")))
    assert script.sent(TimersFired) == [(102, TimersFired(run_ids=("a", "b")))], "the successor has not said that it is ready"
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
    assert not script.sent(TimersFired), "all are on their way out"


def test_a_cancellation_is_passed_to_the_holder_or_to_all() -> None:
    script = Script().started()
    script.on_message(STEWARD, RunChanged(run_id="r", owner="h:102:n", reason="cancelled"))
    assert script.sent(CheckRun) == [(102, CheckRun(run_id="r", reason="cancelled"))]
    script.on_message(STEWARD, RunChanged(run_id="r", owner=None, reason="cancelled"))
    assert [pid for pid, _ in script.sent(CheckRun)] == [101, 102]


# ---- deaths --------------------------------------------------------------------------------------------------------


def test_a_dead_workers_leases_are_released_and_its_place_refilled() -> None:
    script = Script().started()
    script.beat(102, in_flight=1, running=(("r", "s"),))
    script.send(Measured(rss_bytes={102: 7}))
    script.dies(102)
    ((to, died),) = script.sent(Died)
    assert (to, died.owner) == (STEWARD, "h:102:n")
    assert (died.evidence.signal, died.evidence.rss_bytes, died.evidence.running) == ("SIGKILL", 7, (("r", "s"),))
    script.wait(0.2)
    assert [(s.role, s.index, s.first) for s in script.did(Spawn)] == [("worker", 1, False)]


def test_the_notice_is_repeated_to_a_new_steward_until_it_is_acknowledged() -> None:
    """A steward that dies between the notice and the release would leave the runs to the lease's expiry."""
    script = Script().started()
    script.dies(STEWARD)
    script.dies(102)
    assert not script.sent(Died)
    script.wait(0.5)
    (steward,) = [m.pid for m in script.state.members.values() if m.role == "steward"]
    assert [pid for pid, _ in script.sent(Died)] == [steward]
    script.on_message(steward, Released(owner="h:102:n", runs=2))
    script.dies(steward)
    script.wait(0.5)
    assert not script.sent(Died)


def test_released_runs_ring_idle_workers() -> None:
    """The runs of a dead worker restart elsewhere at once, not at the next sweep."""
    script = Script(workers=3).started()
    script.dies(103)
    script.on_message(STEWARD, Released(owner="h:103:n", runs=2))
    assert script.sent(WakeUp) == [(101, WakeUp()), (102, WakeUp())]


def test_crashes_are_restarted_with_growing_pauses_up_to_the_budget() -> None:
    script = Script(workers=1, restart_budget=4).started()
    pauses, pid = [], 101
    for _ in range(4):
        script.dies(pid)
        pauses.append(script.state.vacancies[0].due_at - script.now)
        script.wait(pauses[-1])
        pid += 1
        script.beat(pid)
    assert pauses == pytest.approx([0.05, 0.1, 0.2, 0.4])
    script.dies(pid)
    assert "restart_budget_exceeded" in script.logged()
    for owner in script.state.unacknowledged:
        script.on_message(STEWARD, Released(owner=owner, runs=0))
    assert script.sent(Close)
    script.dies(STEWARD, exit_code=0)
    assert script.did(Exit) == [Exit(code=1)]


def test_old_crashes_do_not_count() -> None:
    script = Script(workers=1, restart_budget=1).started()
    for pid in (101, 102, 103):
        script.dies(pid)
        script.wait(61.0)
        script.beat(pid + 1)
    assert script.state.ending is None


def test_a_worker_that_exits_uninvited_is_a_crash_even_with_code_0() -> None:
    """A handler that calls sys.exit in the wrong thread must not shrink the pool."""
    script = Script(workers=1).started()
    script.dies(101, exit_code=0)
    assert script.sent(Died)
    assert script.state.vacancies


@pytest.mark.parametrize("pid", [STEWARD, 101])
def test_a_silent_child_is_aborted_then_killed(pid: int) -> None:
    """A blocked loop holds leases for ever: it renews them no more, but it could wake up in the middle of a step."""
    script = Script(workers=1).started()
    script.now += LIMITS.stall_timeout_s
    script.state = replace(script.state, ticked_at=script.now)
    other = 101 if pid == STEWARD else STEWARD
    script.on_message(other, StewardBeat(ready=True) if other == STEWARD else beat())
    script.now += 0.1
    script.send(Tick())
    assert script.did(Kill) == [Kill(pid=pid, signum=signal.SIGABRT)]
    script.now += 1.0
    assert not any(isinstance(action, Kill) for action in script.send(Tick()))
    script.now += 1.1
    script.send(Tick())
    assert script.did(Kill) == [Kill(pid=pid, signum=signal.SIGKILL)]


def test_nobody_is_called_silent_after_the_supervisor_itself_was_stopped() -> None:
    """After a suspended laptop or a SIGSTOP of the whole group, every beat is late and nobody is ill."""
    script = Script().started()
    script.now += 3600
    script.send(Tick())
    assert not script.did(Kill)


def test_a_child_that_writes_nonsense_is_killed() -> None:
    script = Script().started()
    script.send(Garbled(pid=101, error="not a message"))
    assert script.did(Kill) == [Kill(pid=101, signum=signal.SIGKILL)]


# ---- recycling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "events"),
    [
        ({"max_rss_bytes": 100}, [Measured(rss_bytes={101: 101, 102: 99})]),
        ({"max_runs_per_worker": 5}, [Heard(pid=101, message=beat(runs_total=5))]),
        ({}, [Heard(pid=101, message=beat(recycle="a stuck thread"))]),
    ],
)
def test_only_the_offender_is_recycled(limits: dict[str, Any], events: list[Event]) -> None:
    script = Script(**limits).started()
    script.send(*events)
    assert [pid for pid, _ in script.sent(Drain)] == [101]
    assert [s.index for s in script.did(Spawn)] == [0], "its successor starts at once"
    script.dies(101, exit_code=0)
    assert not script.did(Spawn)
    assert not script.sent(Died), "it has released its runs itself"


def test_at_most_a_quarter_of_the_pool_is_recycled_at_once() -> None:
    """A leak hits all workers at the same time; replacing all of them at once would be an outage."""
    script = Script(workers=8, max_rss_bytes=100).started()
    script.send(Measured(rss_bytes=dict.fromkeys(script.workers, 101)))
    assert [pid for pid, _ in script.sent(Drain)] == [101, 102]
    script.send(Tick())
    assert not script.sent(Drain)
    script.dies(101, exit_code=0)
    assert [pid for pid, _ in script.sent(Drain)] == [103]


def test_a_recycled_worker_that_does_not_go_is_stopped_then_killed() -> None:
    """A stuck thread in a handler must not keep the old worker beside the new one for ever."""
    script = Script(workers=1).started()
    script.beat(101, recycle="a stuck thread")
    script.wait(LIMITS.drain_timeout_s)
    assert [pid for pid, _ in script.sent(Stop)] == [101]
    script.wait(4.5)
    assert script.did(Kill) == [Kill(pid=101, signum=signal.SIGKILL)]
    script.dies(101)
    assert script.sent(Died), "what it held is released for it"
    assert script.state.crashes == ()
    assert script.state.ending is None


def test_hup_recycles_one_by_one() -> None:
    script = Script(workers=2).started()
    script.signal(signal.SIGHUP)
    assert [pid for pid, _ in script.sent(Drain)] == [101]
    script.dies(101, exit_code=0)
    assert not script.sent(Drain), "its successor is not ready yet"
    script.beat(103)
    assert [pid for pid, _ in script.sent(Drain)] == [102]
    script.beat(104)
    script.dies(102, exit_code=0)
    script.wait(60.0)
    assert not script.did(Spawn)
    assert script.workers == [103, 104]


# ---- size and hold -------------------------------------------------------------------------------------------------


def test_ttin_and_ttou_change_the_size_down_to_one() -> None:
    script = Script(workers=1).started()
    script.signal(signal.SIGTTIN)
    assert [(s.index, s.total) for s in script.did(Spawn)] == [(1, 2)]
    assert script.sent(Reslot) == [(101, Reslot(index=0, total=2))]
    script.beat(102)
    script.signal(signal.SIGTTOU)
    assert [pid for pid, _ in script.sent(Drain)] == [102]
    assert script.sent(Reslot) == [(101, Reslot(index=0, total=1))]
    script.dies(102, exit_code=0)
    assert not script.state.vacancies
    script.signal(signal.SIGTTOU)
    assert not script.sent(Drain)


def test_ttou_takes_a_vacant_place_first() -> None:
    """Shrinking while the last worker waits for its restart must not start it again."""
    script = Script(workers=2).started()
    script.dies(102)
    script.signal(signal.SIGTTOU)
    assert not script.sent(Drain)
    script.wait(1.0)
    assert not script.did(Spawn)


def test_hold_and_resume_reach_workers_that_are_born_in_between() -> None:
    script = Script(workers=1).started()
    script.signal(signal.SIGTSTP)
    assert script.sent(Hold) == [(101, Hold(held=True))]
    script.beat(101, state="holding")
    script.signal(signal.SIGTTIN)
    assert script.sent(Hold) == [(102, Hold(held=True))]
    script.on_message(STEWARD, WorkDue(lane="l", run_id="r", count=1))
    assert not script.sent(WakeUp)
    script.signal(signal.SIGCONT)
    assert script.sent(Hold) == [(101, Hold(held=False)), (102, Hold(held=False))]


def test_usr1_dumps_stacks() -> None:
    script = Script().started()
    script.signal(signal.SIGUSR1)
    assert script.did(Dump) == [Dump()]


# ---- the breaker ---------------------------------------------------------------------------------------------------


def test_an_open_circuit_closes_every_gate_and_a_trial_opens_them_again() -> None:
    script = Script(workers=2).started()
    script.on_message(STEWARD, Probe(ok=False, error="gone"))
    assert "scheduler:circuit-open" in script.logged()
    assert script.sent(Circuit) == [(STEWARD, Circuit(state="open"))]
    assert script.sent(Gate) == [(101, Gate(state="closed")), (102, Gate(state="closed"))]
    script.on_message(STEWARD, Probe(ok=True))
    assert script.sent(Gate) == [(101, Gate(state="one"))]
    ((_, idle_check),) = script.sent(IdleCheck)
    script.beat(101, ops_failed=4, consecutive_failures=4)
    assert script.state.breaker.state == "half-open", "that failure is older than the trial"
    script.beat(101, ops_failed=4, consecutive_failures=4, idle_check=idle_check.seq)
    assert script.state.breaker.state == "half-open", "that one, too"
    script.beat(101, ops_ok=1, ops_failed=4, idle_check=idle_check.seq)
    assert "scheduler:circuit-closed" in script.logged()
    assert script.sent(Gate) == [(101, Gate(state="open")), (102, Gate(state="open"))]


def test_failures_that_workers_report_open_the_circuit() -> None:
    script = Script(workers=2).started()
    script.beat(101, ops_ok=10, ops_failed=3, consecutive_failures=3)
    script.beat(102, ops_ok=0, ops_failed=2, consecutive_failures=2)
    assert script.state.breaker.state == "open"


def test_no_ring_passes_a_closed_gate_and_a_newborn_finds_it_closed() -> None:
    script = Script(workers=1).started()
    script.on_message(STEWARD, Probe(ok=False))
    script.on_message(STEWARD, WorkDue(lane="l", run_id="r", count=1))
    assert not script.sent(WakeUp)
    script.signal(signal.SIGTTIN)
    assert script.sent(Gate) == [(102, Gate(state="closed"))]
    script.dies(STEWARD)
    script.wait(0.5)
    assert [message for _, message in script.sent(Circuit)] == [Circuit(state="open")], "a new steward must probe"


def test_a_trial_worker_that_dies_is_followed_by_another() -> None:
    script = Script(workers=2).started()
    script.on_message(STEWARD, Probe(ok=False))
    script.on_message(STEWARD, Probe(ok=True))
    script.dies(101)
    assert script.state.breaker.state == "open"
    script.on_message(STEWARD, Probe(ok=True))
    assert script.sent(Gate) == [(102, Gate(state="one"))]


# ---- who streams ---------------------------------------------------------------------------------------------------


def test_the_steward_hears_that_all_publish_when_the_last_one_does() -> None:
    """A stream that is told too early misses what the last worker does."""
    script = Script(workers=2).started()
    script.on_message(STEWARD, Subscribers(subscribers=(("l", 90.0),)))
    told = script.sent(ServeSubscribers)
    assert [(pid, message.subscribers) for pid, message in told] == [(101, (("l", 90.0),)), (102, (("l", 90.0),))]
    seq = told[0][1].seq
    script.beat(101, publish=seq)
    script.beat(102, publish=seq - 1)
    assert not script.sent(SubscribersServed)
    script.beat(102, publish=seq)
    assert script.sent(SubscribersServed) == [(STEWARD, SubscribersServed(subscribers=("l",)))]
    script.beat(101, publish=seq)
    assert not script.sent(SubscribersServed), "once"


def test_a_worker_that_dies_is_not_waited_for_and_its_successor_is_told() -> None:
    script = Script(workers=2).started()
    script.on_message(STEWARD, Subscribers(subscribers=(("l", 90.0),)))
    seq = script.sent(ServeSubscribers)[0][1].seq
    script.beat(101, publish=seq)
    script.dies(102)
    assert script.sent(SubscribersServed) == [(STEWARD, SubscribersServed(subscribers=("l",)))]
    script.wait(10.0)
    script.beat(103)
    script.signal(signal.SIGTTIN)
    ((pid, publish),) = script.sent(ServeSubscribers)
    assert (pid, publish.seq) == (104, seq)
    ((subscriber, left_s),) = publish.subscribers
    assert (subscriber, round(left_s)) == ("l", 80), "ten seconds of it have passed"


def test_workers_born_when_the_last_listener_has_gone_are_told_of_nobody() -> None:
    script = Script(workers=1).started()
    script.on_message(STEWARD, Subscribers(subscribers=(("l", 1.0),)))
    script.wait(2.0)
    script.signal(signal.SIGTTIN)
    assert [message.subscribers for _, message in script.sent(ServeSubscribers)] == [()]
    script.on_message(STEWARD, Subscribers(subscribers=()))
    assert [message.subscribers for _, message in script.sent(ServeSubscribers)] == [(), ()]


def test_a_draining_worker_publishes_to_its_end() -> None:
    """Its last steps are events like any others."""
    script = Script(workers=1).started()
    script.signal(signal.SIGTERM)
    script.on_message(STEWARD, Subscribers(subscribers=(("l", 90.0),)))
    ((pid, publish),) = script.sent(ServeSubscribers)
    script.beat(pid, publish=publish.seq, state="draining")
    assert script.sent(SubscribersServed)
