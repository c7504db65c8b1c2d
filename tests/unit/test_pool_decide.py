"""Every decision of the supervisor, without a process: what happens is told, what it does about it is looked at."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamline_pool.supervisor.decide import decide, initial, pause_s, pool_facts
from streamline_pool.supervisor.messages import (
    AbortHint,
    AbortRun,
    Beat,
    BootFailed,
    Check,
    Checked,
    Circuit,
    Close,
    Died,
    Drain,
    Gate,
    Hold,
    Parked,
    Poke,
    PoolFacts,
    Probe,
    Released,
    Reslot,
    Ring,
    StewardBeat,
    Stop,
    Wake,
)
from streamline_pool.supervisor.state import (
    Action,
    Dump,
    Event,
    Exit,
    Exited,
    Forked,
    ForkFailed,
    Garbled,
    Heard,
    Kill,
    Limits,
    Log,
    Measured,
    Send,
    Signalled,
    Spawn,
    State,
    Tick,
)

LIMITS = Limits(drain_timeout_s=30.0, stall_timeout_s=10.0, restart_budget=3, max_rss_bytes=None, max_runs_per_worker=None, burst=False)
STEWARD = 100
A = TypeVar("A")


class Script:
    """Tells `decide` what happens and plays the part of a system in which every fork succeeds at once."""

    def __init__(self, workers: int = 2, **limits: Any) -> None:
        self.now = 1000.0
        self.state: State = initial(workers, replace(LIMITS, **limits), self.now)
        self.actions: list[Action] = []  # of the last call
        self.alive: set[int] = set()
        self._next_pid = STEWARD

    def tell(self, *events: Event) -> list[Action]:
        """All that is done about these events and the forks that follow from them."""
        self.actions, queue = [], list(events)
        while queue:
            self.state, actions = decide(self.state, queue.pop(0), self.now)
            self.actions += actions
            for spawn in (action for action in actions if isinstance(action, Spawn)):
                queue.append(Forked(pid=self._next_pid, owner=f"h:{self._next_pid}:n", role=spawn.role, index=spawn.index))
                self.alive.add(self._next_pid)
                self._next_pid += 1
        return self.actions

    def wait(self, seconds: float) -> list[Action]:
        """Time passes in which every living child beats and nothing else happens."""
        actions = []
        for _ in range(round(seconds / 0.5) or 1):
            self.now += seconds if seconds < 0.5 else 0.5
            self.state = replace(
                self.state,
                members={pid: replace(m, heard_at=self.now) for pid, m in self.state.members.items() if m.phase != "dying"}
                | {pid: m for pid, m in self.state.members.items() if m.phase == "dying"},
            )
            actions += self.tell(Tick())
        self.actions = actions
        return actions

    def hear(self, pid: int, message: Any) -> list[Action]:
        return self.tell(Heard(pid=pid, message=message))

    def beat(self, pid: int, **fields: Any) -> list[Action]:
        return self.hear(pid, beat(**fields))

    def dies(self, pid: int, exit_code: int | None = None, signal: str | None = "SIGKILL") -> list[Action]:
        self.alive.discard(pid)
        return self.tell(Exited(pid=pid, exit_code=exit_code, signal=None if exit_code is not None else signal, dump=None, jitter=0.5))

    def signal(self, signum: signal.Signals) -> list[Action]:
        return self.tell(Signalled(signum=signum))

    def started(self) -> Script:
        self.tell(Tick())
        self.hear(STEWARD, StewardBeat(ready=True))
        for pid in self.workers:
            self.beat(pid)
        assert self.state.ready
        return self

    @property
    def workers(self) -> list[int]:
        return [m.pid for m in self.state.workers]

    def sent(self, kind: type[A]) -> list[tuple[int, A]]:
        """Who was sent messages of that kind by the last call."""
        return [(a.pid, a.message) for a in self.actions if isinstance(a, Send) and isinstance(a.message, kind)]

    def did(self, kind: type[A]) -> list[A]:
        return [action for action in self.actions if isinstance(action, kind)]

    def logged(self) -> list[str]:
        return [action.event for action in self.did(Log)]


def beat(**fields: Any) -> Beat:
    usual: dict[str, Any] = {
        "state": "ready", "hungry": True, "in_flight": 0, "runs_total": 0, "steps_total": 0, "ops_ok": 0, "ops_failed": 0,
        "consecutive_failures": 0, "lru": {},
    }  # fmt: skip
    return Beat(**{**usual, **fields})


# ---- starting ------------------------------------------------------------------------------------------------------


def test_the_first_tick_starts_one_steward_and_all_workers() -> None:
    script = Script(workers=3)
    script.tell(Tick())
    assert [(s.role, s.index, s.total, s.first) for s in script.did(Spawn)] == [
        ("steward", -1, 3, True),
        ("worker", 0, 3, True),
        ("worker", 1, 3, True),
        ("worker", 2, 3, True),
    ]


def test_ready_is_said_once_when_everybody_is() -> None:
    """Whoever waits for that line sends work as soon as it appears."""
    script = Script(workers=2)
    script.tell(Tick())
    script.beat(101)
    script.beat(102, state="starting")
    assert "ready" not in script.logged()
    script.hear(STEWARD, StewardBeat(ready=False))
    script.hear(STEWARD, StewardBeat(ready=True))
    script.beat(102)
    (ready,) = [log for log in script.did(Log) if log.event == "ready"]
    assert ready.fields == {"workers": 2, "pids": [101, 102]}
    script.beat(102)
    assert "ready" not in script.logged()


def test_a_child_that_cannot_start_stops_the_pool_with_its_exit_code() -> None:
    """An import error would otherwise be a crash loop."""
    script = Script(workers=2)
    script.tell(Tick())
    script.hear(STEWARD, BootFailed(exit_code=3, message="no database"))
    assert [log.fields["error"] for log in script.did(Log) if log.event == "boot_failed"] == ["no database"]
    assert [pid for pid, _ in script.sent(Stop)] == [101, 102]
    script.hear(101, BootFailed(exit_code=1, message="also no database"))
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
        script.hear(pid, BootFailed(exit_code=3, message="no database"))
        script.dies(pid, exit_code=64)
        script.wait(1.0)
        assert script.did(Spawn), f"after attempt {attempt}"
    assert script.state.ending is None


def test_a_fork_that_fails_is_tried_again_within_the_budget() -> None:
    script = Script(restart_budget=2)
    script.state, _ = decide(script.state, Tick(), script.now)
    script.tell(ForkFailed(role="worker", index=1, error="EAGAIN", jitter=0.5))
    assert script.state.ending is None
    script.wait(0.3)
    assert [(s.role, s.index) for s in script.did(Spawn)] == [("worker", 1)]


# ---- rings ---------------------------------------------------------------------------------------------------------


def test_one_due_run_rings_one_hungry_worker() -> None:
    """Sixteen workers that look for one run are fifteen wasted queries."""
    script = Script(workers=3).started()
    script.beat(101, hungry=False)
    script.hear(STEWARD, Wake(lane="l", run_id="r", count=1))
    assert script.sent(Ring) == [(102, Ring(lane="l", run_id="r"))]


def test_rings_go_round() -> None:
    script = Script(workers=3).started()
    rung = []
    for _ in range(6):
        script.now += 0.001
        script.hear(STEWARD, Wake(lane="l", run_id="r", count=1))
        rung += [pid for pid, _ in script.sent(Ring)]
    assert rung == [101, 102, 103, 101, 102, 103]


def test_several_due_runs_ring_as_many_workers_and_name_none() -> None:
    script = Script(workers=3).started()
    script.hear(STEWARD, Wake(lane="l", run_id="r", count=2))
    assert script.sent(Ring) == [(101, Ring(lane="l")), (102, Ring(lane="l"))]
    script.hear(STEWARD, Wake(lane="l", run_id=None, count=50))
    assert len(script.sent(Ring)) == 3


def test_a_ring_that_finds_nobody_hungry_is_kept_for_the_next_who_is() -> None:
    """A worker in the middle of its look may have just missed the run: it would lie there until the sweep."""
    script = Script(workers=1).started()
    script.beat(101, hungry=False)
    script.hear(STEWARD, Wake(lane="l", run_id="r", count=1))
    assert not script.sent(Ring)
    script.beat(101, hungry=True)
    assert script.sent(Ring) == [(101, Ring())]
    script.beat(101, hungry=True)
    assert not script.sent(Ring)


def test_parked_instants_go_to_the_steward() -> None:
    script = Script().started()
    script.beat(101, parked=(("l", 5),))
    assert script.sent(Parked) == [(STEWARD, Parked(instants=(("l", 5),)))]


def test_a_cancellation_is_passed_to_the_holder_or_to_all() -> None:
    script = Script().started()
    script.hear(STEWARD, AbortHint(run_id="r", owner="h:102:n", reason="cancelled"))
    assert script.sent(AbortRun) == [(102, AbortRun(run_id="r", reason="cancelled"))]
    script.hear(STEWARD, AbortHint(run_id="r", owner=None, reason="cancelled"))
    assert [pid for pid, _ in script.sent(AbortRun)] == [101, 102]


# ---- deaths --------------------------------------------------------------------------------------------------------


def test_a_dead_workers_leases_are_released_and_its_place_refilled() -> None:
    script = Script().started()
    script.beat(102, in_flight=1, running=(("r", "s"),))
    script.tell(Measured(rss_bytes={102: 7}))
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
    script.hear(steward, Released(owner="h:102:n", runs=2))
    script.dies(steward)
    script.wait(0.5)
    assert not script.sent(Died)


def test_released_runs_ring_idle_workers() -> None:
    """The runs of a dead worker restart elsewhere at once, not at the next sweep."""
    script = Script(workers=3).started()
    script.dies(103)
    script.hear(STEWARD, Released(owner="h:103:n", runs=2))
    assert script.sent(Ring) == [(101, Ring()), (102, Ring())]


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
        script.hear(STEWARD, Released(owner=owner, runs=0))
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
    script.hear(other, StewardBeat(ready=True) if other == STEWARD else beat())
    script.now += 0.1
    script.tell(Tick())
    assert script.did(Kill) == [Kill(pid=pid, signum=signal.SIGABRT)]
    script.now += 1.0
    assert not any(isinstance(action, Kill) for action in script.tell(Tick()))
    script.now += 1.1
    script.tell(Tick())
    assert script.did(Kill) == [Kill(pid=pid, signum=signal.SIGKILL)]


def test_nobody_is_called_silent_after_the_supervisor_itself_was_stopped() -> None:
    """After a suspended laptop or a SIGSTOP of the whole group, every beat is late and nobody is ill."""
    script = Script().started()
    script.now += 3600
    script.tell(Tick())
    assert not script.did(Kill)


def test_a_child_that_writes_nonsense_is_killed() -> None:
    script = Script().started()
    script.tell(Garbled(pid=101, error="not a message"))
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
    script.tell(*events)
    assert [pid for pid, _ in script.sent(Drain)] == [101]
    assert [s.index for s in script.did(Spawn)] == [0], "its successor starts at once"
    script.dies(101, exit_code=0)
    assert not script.did(Spawn)
    assert not script.sent(Died), "it has released its runs itself"


def test_at_most_a_quarter_of_the_pool_is_recycled_at_once() -> None:
    """A leak hits all workers at the same time; replacing all of them at once would be an outage."""
    script = Script(workers=8, max_rss_bytes=100).started()
    script.tell(Measured(rss_bytes=dict.fromkeys(script.workers, 101)))
    assert [pid for pid, _ in script.sent(Drain)] == [101, 102]
    script.tell(Tick())
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
    script.hear(STEWARD, Wake(lane="l", run_id="r", count=1))
    assert not script.sent(Ring)
    script.signal(signal.SIGCONT)
    assert script.sent(Hold) == [(101, Hold(held=False)), (102, Hold(held=False))]


def test_usr1_dumps_stacks() -> None:
    script = Script().started()
    script.signal(signal.SIGUSR1)
    assert script.did(Dump) == [Dump()]


# ---- the breaker ---------------------------------------------------------------------------------------------------


def test_an_open_circuit_closes_every_gate_and_a_trial_opens_them_again() -> None:
    script = Script(workers=2).started()
    script.hear(STEWARD, Probe(ok=False, error="gone"))
    assert "scheduler:circuit-open" in script.logged()
    assert script.sent(Circuit) == [(STEWARD, Circuit(state="open"))]
    assert script.sent(Gate) == [(101, Gate(state="closed")), (102, Gate(state="closed"))]
    script.hear(STEWARD, Probe(ok=True))
    assert script.sent(Gate) == [(101, Gate(state="one"))]
    ((_, poke),) = script.sent(Poke)
    script.beat(101, ops_failed=4, consecutive_failures=4)
    assert script.state.breaker.state == "half-open", "that failure is older than the trial"
    script.beat(101, ops_failed=4, consecutive_failures=4, poke=poke.seq)
    assert script.state.breaker.state == "half-open", "that one, too"
    script.beat(101, ops_ok=1, ops_failed=4, poke=poke.seq)
    assert "scheduler:circuit-closed" in script.logged()
    assert script.sent(Gate) == [(101, Gate(state="open")), (102, Gate(state="open"))]


def test_failures_that_workers_report_open_the_circuit() -> None:
    script = Script(workers=2).started()
    script.beat(101, ops_ok=10, ops_failed=3, consecutive_failures=3)
    script.beat(102, ops_ok=0, ops_failed=2, consecutive_failures=2)
    assert script.state.breaker.state == "open"


def test_no_ring_passes_a_closed_gate_and_a_newborn_finds_it_closed() -> None:
    script = Script(workers=1).started()
    script.hear(STEWARD, Probe(ok=False))
    script.hear(STEWARD, Wake(lane="l", run_id="r", count=1))
    assert not script.sent(Ring)
    script.signal(signal.SIGTTIN)
    assert script.sent(Gate) == [(102, Gate(state="closed"))]
    script.dies(STEWARD)
    script.wait(0.5)
    assert [message for _, message in script.sent(Circuit)] == [Circuit(state="open")], "a new steward must probe"


def test_a_trial_worker_that_dies_is_followed_by_another() -> None:
    script = Script(workers=2).started()
    script.hear(STEWARD, Probe(ok=False))
    script.hear(STEWARD, Probe(ok=True))
    script.dies(101)
    assert script.state.breaker.state == "open"
    script.hear(STEWARD, Probe(ok=True))
    assert script.sent(Gate) == [(102, Gate(state="one"))]


# ---- endings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_term_and_int_drain_then_close_the_steward_then_exit_0(signum: signal.Signals) -> None:
    script = Script(workers=2).started()
    script.signal(signum)
    assert [pid for pid, _ in script.sent(Drain)] == [101, 102]
    script.dies(101, exit_code=0)
    assert not script.did(Spawn)
    script.dies(102, exit_code=0)
    assert script.sent(Close) == [(STEWARD, Close())]
    script.dies(STEWARD, exit_code=0)
    assert script.did(Exit) == [Exit(code=0)]


def test_a_drain_that_takes_too_long_releases_and_exits_4() -> None:
    script = Script(workers=1).started()
    script.signal(signal.SIGTERM)
    script.wait(LIMITS.drain_timeout_s - 0.5)
    assert not script.sent(Stop)
    script.wait(0.5)
    assert script.sent(Stop) == [(101, Stop(grace_s=1.0))]
    script.dies(101, exit_code=0)
    script.dies(STEWARD, exit_code=0)
    assert script.did(Exit) == [Exit(code=4)]


def test_a_worker_that_cannot_even_stop_is_killed_and_released_by_the_steward() -> None:
    script = Script(workers=1).started()
    script.signal(signal.SIGTERM)
    script.wait(LIMITS.drain_timeout_s + 4.5)
    assert Kill(pid=101, signum=signal.SIGKILL) in script.did(Kill)
    script.dies(101)
    assert [pid for pid, _ in script.sent(Died)] == [STEWARD]
    assert not script.sent(Close), "the steward still has something to release"
    script.hear(STEWARD, Released(owner="h:101:n", runs=1))
    assert script.sent(Close)
    script.dies(STEWARD, exit_code=0)
    assert script.did(Exit) == [Exit(code=4)]


def test_leases_that_cannot_be_released_do_not_delay_the_end_for_ever() -> None:
    """The database may be away for good; the leases expire by themselves."""
    script = Script(workers=1).started()
    script.dies(101)
    script.signal(signal.SIGTERM)
    assert not script.sent(Close)
    script.wait(3.5)
    assert script.sent(Close)


def test_a_steward_that_dies_during_the_drain_is_replaced_while_it_is_needed() -> None:
    script = Script(workers=1).started()
    script.signal(signal.SIGTERM)
    script.dies(STEWARD)
    script.wait(0.5)
    assert [s.role for s in script.did(Spawn)] == ["steward"]
    script.dies(101)
    assert script.sent(Died)


def test_the_second_int_cancels_and_the_third_kills() -> None:
    script = Script(workers=2).started()
    script.signal(signal.SIGINT)
    script.signal(signal.SIGINT)
    assert script.sent(Stop) == [(101, Stop(grace_s=5.0)), (102, Stop(grace_s=5.0))]
    script.dies(101, exit_code=0)
    assert script.state.ending is not None
    assert script.state.ending.code == 4
    script.signal(signal.SIGINT)
    assert {kill.pid for kill in script.did(Kill)} == {STEWARD, 102}
    script.dies(STEWARD)
    assert not script.did(Spawn)
    script.dies(102)
    script.wait(0.1)
    assert Exit(code=137) in script.actions or script.state.members == {}


def test_an_int_after_term_is_the_first_one() -> None:
    script = Script(workers=1).started()
    script.signal(signal.SIGTERM)
    script.signal(signal.SIGINT)
    assert not script.sent(Stop)
    script.signal(signal.SIGINT)
    assert script.sent(Stop)


# ---- burst ---------------------------------------------------------------------------------------------------------


def burst_until_check(script: Script) -> int:
    """Everybody answers the first question as idle; the number of the check that follows."""
    assert script.state.burst is not None
    seq = script.state.burst.seq
    for pid in script.workers:
        script.beat(pid, poke=seq, runs_total=3)
    ((to, check),) = script.sent(Check)
    assert to == STEWARD
    return check.seq


def test_burst_ends_when_idle_nothing_due_and_still_idle() -> None:
    script = Script(workers=2, burst=True).started()
    script.hear(STEWARD, Checked(seq=burst_until_check(script), due=0))
    seq = script.sent(Poke)[0][1].seq
    script.beat(101, poke=seq, runs_total=3)
    assert script.state.ending is None, "one worker has not confirmed"
    script.beat(102, poke=seq, runs_total=3)
    assert [pid for pid, _ in script.sent(Drain)] == [101, 102]
    for pid in (101, 102, STEWARD):
        script.dies(pid, exit_code=0)
    assert script.did(Exit) == [Exit(code=0)]


def test_burst_does_not_end_when_a_run_passed_between_the_questions() -> None:
    """It was claimed before the check and has ended since: it may have started another one in between."""
    script = Script(workers=2, burst=True).started()
    script.hear(STEWARD, Checked(seq=burst_until_check(script), due=0))
    seq = script.sent(Poke)[0][1].seq
    script.beat(101, poke=seq, runs_total=3)
    script.beat(102, poke=seq, runs_total=4)
    assert script.state.ending is None


def test_burst_goes_on_while_something_is_due() -> None:
    script = Script(workers=2, burst=True).started()
    script.hear(STEWARD, Checked(seq=burst_until_check(script), due=1))
    assert len(script.sent(Ring)) == 1
    assert script.state.burst is None
    assert not script.sent(Poke), "not at once again"


def test_burst_waits_for_the_release_of_a_dead_workers_runs() -> None:
    script = Script(workers=1, burst=True)
    script.tell(Tick())
    script.hear(STEWARD, StewardBeat(ready=True))
    script.beat(101, in_flight=1, hungry=False)
    script.dies(101)
    script.wait(0.5)
    script.beat(102)
    script.wait(5.0)
    assert script.state.burst is None


def test_work_that_appears_during_the_check_starts_the_proof_again() -> None:
    script = Script(workers=2, burst=True).started()
    seq = burst_until_check(script)
    script.beat(101, in_flight=1, hungry=False, runs_total=4)
    script.hear(STEWARD, Checked(seq=seq, due=0))
    assert script.state.burst is None
    assert script.state.ending is None


# ---- facts and pauses ----------------------------------------------------------------------------------------------


def test_facts_count_what_gone_workers_did() -> None:
    """A counter that drops at every restart is useless to Prometheus."""
    script = Script(workers=1).started()
    script.beat(101, runs_total=5, steps_total=9)
    script.dies(101)
    script.wait(0.5)
    script.beat(102, runs_total=1, steps_total=2)
    facts = pool_facts(script.state, script.now)
    assert (facts.runs_total, facts.steps_total, facts.restarts) == (6, 11, 1)
    assert [worker.pid for worker in facts.workers] == [102]


def test_facts_are_sent_each_second() -> None:
    script = Script().started()
    script.wait(10.0)
    assert 9 <= len(script.sent(PoolFacts)) <= 11


def test_an_idle_pool_sleeps_longer_than_a_busy_supervisor() -> None:
    script = Script(workers=1).started()
    assert pause_s(script.state) == 0.5
    script.dies(101)
    assert pause_s(script.state) < 0.05


# ---- anything ------------------------------------------------------------------------------------------------------

pids = st.integers(STEWARD, STEWARD + 8)
counters = {name: st.integers(0, 9) for name in ("in_flight", "runs_total", "steps_total", "ops_ok", "ops_failed", "consecutive_failures")}
beats = st.builds(
    Beat,
    state=st.sampled_from(["starting", "ready", "holding", "draining"]),
    hungry=st.booleans(),
    recycle=st.sampled_from([None, None, "stuck"]),
    lru=st.just({}),
    parked=st.just((("l", 1),)),
    poke=st.integers(0, 9),
    **counters,
)
words = st.one_of(
    st.just(StewardBeat(ready=True)),
    st.builds(Wake, lane=st.just("l"), run_id=st.none(), count=st.integers(0, 3)),
    st.builds(AbortHint, run_id=st.just("r"), owner=st.none(), reason=st.just("cancelled")),
    st.builds(Released, owner=st.builds("h:{}:n".format, pids), runs=st.integers(0, 2)),
    st.builds(Checked, seq=st.integers(0, 9), due=st.integers(0, 1)),
    st.builds(Probe, ok=st.booleans()),
)
SIGNALS = [signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGTSTP, signal.SIGCONT, signal.SIGUSR1]
happenings = st.one_of(
    st.tuples(st.just("beat"), pids, beats),
    st.tuples(st.just("word"), pids, words),
    st.tuples(st.just("dies"), pids, st.sampled_from([None, 0, 1, 64])),
    st.tuples(st.just("wait"), st.sampled_from([0.1, 1.0, 40.0]), st.none()),
    st.tuples(st.just("signal"), st.sampled_from(SIGNALS), st.none()),
    st.tuples(st.just("rss"), pids, st.integers(0, 200)),
)


def play(script: Script, kind: str, what: Any, more: Any) -> None:
    match kind:
        case "beat" if what in script.state.members and script.state.members[what].role == "worker":
            script.hear(what, more)
        case "word" if script.state.steward is not None:
            script.hear(script.state.steward.pid, more)
        case "dies" if what in script.alive:
            script.dies(what, exit_code=more)
        case "wait":
            script.wait(what)
        case "signal":
            script.signal(what)
        case "rss":
            script.tell(Measured(rss_bytes={what: more}))


def check_invariants(script: Script) -> None:
    state = script.state
    assert set(state.members) == script.alive
    for action in script.actions:
        if isinstance(action, Send | Kill):
            assert action.pid >= STEWARD, "only children are spoken to"
    if state.ending is None:
        places = sorted([m.index for m in state.staying] + [v.index for v in state.vacancies if v.role == "worker"])
        assert places == list(range(state.target)), "every place is taken or about to be, once"
        stewards = [m for m in state.members.values() if m.role == "steward"] + [v for v in state.vacancies if v.role == "steward"]
        assert len(stewards) == 1


@settings(max_examples=300, deadline=None)
@given(st.lists(happenings, max_size=30), st.booleans())
def test_whatever_happens_the_pool_stays_whole_and_can_be_ended(story: list[tuple[str, Any, Any]], burst: bool) -> None:
    """No order of deaths, signals and messages may lose a place, start two for one, or leave a pool that cannot end."""
    script = Script(workers=3, burst=burst, max_rss_bytes=100, restart_budget=20)
    script.tell(Tick())
    for kind, what, more in story:
        play(script, kind, what, more)
        check_invariants(script)
        if not script.alive and script.state.ending is not None:
            return
    script.signal(signal.SIGTERM)
    exits: list[Exit] = []
    for _ in range(100):
        for kill in script.did(Kill):
            if kill.signum == signal.SIGKILL and kill.pid in script.alive:
                script.dies(kill.pid)
                exits += script.did(Exit)
        script.wait(1.0)
        exits += script.did(Exit)
        if exits:
            break
    assert exits, "children that obey nothing are killed in the end"
    assert not script.alive
