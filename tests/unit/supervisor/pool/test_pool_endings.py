"""How the supervisor ends the pool, how `--burst` proves that nothing is left to do, and that nothing can confuse it."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_script import LIMITS, STEWARD, Script

from streamline_pool.supervisor.ipc.messages import (
    Beat,
    BootFailed,
    CheckDue,
    Close,
    Died,
    Drain,
    DueCount,
    IdleCheck,
    PoolFacts,
    Probe,
    Released,
    RunChanged,
    StewardBeat,
    Stop,
    TimersFired,
    WakeUp,
    WorkDue,
)
from streamline_pool.supervisor.pool.decide import pause_s, pool_facts
from streamline_pool.supervisor.pool.state import Exit, Kill, Log, Measured, Send, Spawn, Tick

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


def test_who_presses_ctrl_c_is_told_what_the_pool_waits_for() -> None:
    """A pool that is silent after ^C gets a second one, which gives up the work that it was about to finish."""
    script = Script(workers=2).started()
    script.beat(101, in_flight=2)
    script.beat(102, in_flight=1)
    script.signal(signal.SIGINT)
    (ends,) = [log for log in script.did(Log) if log.event == "pool_ends"]
    assert (ends.fields["finishing_runs"], ends.fields["at_most_s"]) == (3, LIMITS.drain_timeout_s)
    script.signal(signal.SIGINT)
    (ends,) = [log for log in script.did(Log) if log.event == "pool_ends"]
    assert "finishing_runs" not in ends.fields, "it waits for them no longer"


def test_a_worker_killed_before_it_began_is_no_crash_to_look_into() -> None:
    """Without a database the reason would otherwise stand above as many errors as there are workers."""
    script = Script(workers=1)
    script.send(Tick())
    script.on_message(STEWARD, BootFailed(exit_code=3, message="no database"))
    script.wait(60)
    script.dies(101, signal="SIGKILL")
    assert "child_left" in script.logged()
    assert "child_died" not in script.logged()


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
    script.on_message(STEWARD, Released(owner="h:101:n", runs=1))
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
    assert script.did(Exit) == [Exit(code=137)]


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
        script.beat(pid, idle_check=seq, runs_total=3)
    ((to, check),) = script.sent(CheckDue)
    assert to == STEWARD
    return check.seq


def test_burst_ends_when_idle_nothing_due_and_still_idle() -> None:
    script = Script(workers=2, burst=True).started()
    script.on_message(STEWARD, DueCount(seq=burst_until_check(script), due=0))
    seq = script.sent(IdleCheck)[0][1].seq
    script.beat(101, idle_check=seq, runs_total=3)
    assert script.state.ending is None, "one worker has not confirmed"
    script.beat(102, idle_check=seq, runs_total=3)
    assert [pid for pid, _ in script.sent(Drain)] == [101, 102]
    for pid in (101, 102, STEWARD):
        script.dies(pid, exit_code=0)
    assert script.did(Exit) == [Exit(code=0)]


def test_burst_does_not_end_when_a_run_passed_between_the_questions() -> None:
    """It was claimed before the check and has ended since: it may have started another one in between."""
    script = Script(workers=2, burst=True).started()
    script.on_message(STEWARD, DueCount(seq=burst_until_check(script), due=0))
    seq = script.sent(IdleCheck)[0][1].seq
    script.beat(101, idle_check=seq, runs_total=3)
    script.beat(102, idle_check=seq, runs_total=4)
    assert script.state.ending is None


def test_burst_goes_on_while_something_is_due() -> None:
    script = Script(workers=2, burst=True).started()
    script.on_message(STEWARD, DueCount(seq=burst_until_check(script), due=1))
    assert len(script.sent(WakeUp)) == 1
    assert script.state.burst is None
    assert not script.sent(IdleCheck), "not at once again"


def test_burst_waits_for_the_release_of_a_dead_workers_runs() -> None:
    script = Script(workers=1, burst=True)
    script.send(Tick())
    script.on_message(STEWARD, StewardBeat(ready=True))
    script.beat(101, in_flight=1, idle=False)
    script.dies(101)
    script.wait(0.5)
    script.beat(102)
    script.wait(5.0)
    assert script.state.burst is None


def test_work_that_appears_during_the_check_starts_the_proof_again() -> None:
    script = Script(workers=2, burst=True).started()
    seq = burst_until_check(script)
    script.beat(101, in_flight=1, idle=False, runs_total=4)
    script.on_message(STEWARD, DueCount(seq=seq, due=0))
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
    idle=st.booleans(),
    recycle=st.sampled_from([None, None, "stuck"]),
    lru=st.just({}),
    parked=st.just((("l", 1, "r"),)),
    idle_check=st.integers(0, 9),
    **counters,
)
words = st.one_of(
    st.just(StewardBeat(ready=True)),
    st.builds(WorkDue, lane=st.just("l"), run_id=st.none(), count=st.integers(0, 3)),
    st.builds(TimersFired, run_ids=st.sampled_from([("a",), ("a", "b", "c")])),
    st.builds(RunChanged, run_id=st.just("r"), owner=st.none(), reason=st.just("cancelled")),
    st.builds(Released, owner=st.builds("h:{}:n".format, pids), runs=st.integers(0, 2)),
    st.builds(DueCount, seq=st.integers(0, 9), due=st.integers(0, 1)),
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
            script.on_message(what, more)
        case "word" if script.state.steward is not None:
            script.on_message(script.state.steward.pid, more)
        case "dies" if what in script.alive:
            script.dies(what, exit_code=more)
        case "wait":
            script.wait(what)
        case "signal":
            script.signal(what)
        case "rss":
            script.send(Measured(rss_bytes={what: more}))


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


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(happenings, max_size=30), st.booleans())
def test_whatever_happens_the_pool_stays_whole_and_can_be_ended(story: list[tuple[str, Any, Any]], burst: bool) -> None:
    """No order of deaths, signals and messages may lose a place, start two for one, or leave a pool that cannot end."""
    script = Script(workers=3, burst=burst, max_rss_bytes=100, restart_budget=20)
    script.send(Tick())
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
