"""How the supervisor ends the pool, and what it reports of itself."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest
from pool_script import LIMITS, STEWARD, Script

from streamline_pool.supervisor.ipc.messages import (
    BootFailed,
    Close,
    Died,
    Drain,
    PoolFacts,
    Released,
    Stop,
)
from streamline_pool.supervisor.pool.decide import decide, pause_s
from streamline_pool.supervisor.pool.facts import pool_facts
from streamline_pool.supervisor.pool.state import Exit, Forked, Kill, Log, Spawn, Tick


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


def test_after_ctrl_c_the_log_says_what_the_pool_waits_for() -> None:
    """A pool that logs nothing after Ctrl-C gets a second one, which aborts the work that it was about to finish."""
    script = Script(workers=2).started()
    script.beat(101, in_flight=2)
    script.beat(102, in_flight=1)
    script.signal(signal.SIGINT)
    (ends,) = [log for log in script.did(Log) if log.event == "pool_ends"]
    assert (ends.fields["finishing_runs"], ends.fields["at_most_s"]) == (3, LIMITS.drain_timeout_s)
    script.signal(signal.SIGINT)
    (ends,) = [log for log in script.did(Log) if log.event == "pool_ends"]
    assert "finishing_runs" not in ends.fields, "it does not wait for them any more"


def test_a_worker_killed_before_it_started_is_not_logged_as_a_crash() -> None:
    """Otherwise the reason, such as a missing database, would be followed by as many errors as there are workers."""
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


def test_leases_that_cannot_be_released_delay_the_end_only_so_long() -> None:
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
    assert script.state.shutdown is not None
    assert script.state.shutdown.code == 4
    script.signal(signal.SIGINT)
    assert {kill.pid for kill in script.did(Kill)} == {STEWARD, 102}
    script.dies(STEWARD)
    assert not script.did(Spawn)
    script.dies(102)
    assert script.did(Exit) == [Exit(code=137)]


def test_an_int_after_term_counts_as_the_first_one() -> None:
    script = Script(workers=1).started()
    script.signal(signal.SIGTERM)
    script.signal(signal.SIGINT)
    assert not script.sent(Stop)
    script.signal(signal.SIGINT)
    assert script.sent(Stop)


def test_facts_count_what_ended_workers_did() -> None:
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


def test_the_supervisor_of_an_idle_pool_sleeps_longer() -> None:
    script = Script(workers=1).started()
    assert pause_s(script.state, script.now) == 1.0
    script.dies(101)
    assert pause_s(script.state, script.now) < 0.05


def test_the_supervisor_wakes_up_when_the_next_child_would_be_stalled() -> None:
    """An idle pool is looked at once a second, but a silent child must not live for a second more than its stall timeout."""
    script = Script(workers=1).started()
    silent_s = script.state.limits.stall_timeout_s - 0.25
    heard = {pid: replace(member, last_message_at=script.now - silent_s) for pid, member in script.state.members.items()}
    script.state = replace(script.state, members=heard)
    assert pause_s(script.state, script.now) == pytest.approx(0.25)
    assert pause_s(script.state, script.now + 5.0) > 0, "the loop never spins"


def test_a_worker_forked_just_before_term_is_drained_too() -> None:
    """The signal may be handled between the fork and its event: a worker without an order would keep the pool alive for ever."""
    script = Script(workers=1).started()
    script.dies(101)
    script.now += 1.0
    script.state, actions = decide(script.state, Tick(), script.now)
    assert [action.role for action in actions if isinstance(action, Spawn)] == ["worker"]
    script.signal(signal.SIGTERM)
    script.send(Forked(pid=102, owner="h:102:n", role="worker", index=0, total=1))
    assert [pid for pid, _ in script.sent(Drain)] == [102]


def test_a_worker_forked_just_before_the_second_int_is_stopped_and_not_drained() -> None:
    """Drained, it could keep a pool alive for the whole drain timeout after the operator has asked to cancel now."""
    script = Script(workers=1).started()
    script.dies(101)
    script.now += 1.0
    script.state, _ = decide(script.state, Tick(), script.now)
    script.signal(signal.SIGINT)
    script.signal(signal.SIGINT)
    script.send(Forked(pid=102, owner="h:102:n", role="worker", index=0, total=1))
    assert ([pid for pid, _ in script.sent(Stop)], script.sent(Drain)) == ([102], [])


def test_a_child_forked_just_before_the_third_int_is_killed_too() -> None:
    script = Script(workers=1).started()
    script.dies(101)
    script.now += 1.0
    script.state, _ = decide(script.state, Tick(), script.now)
    for _ in range(3):
        script.signal(signal.SIGINT)
    script.send(Forked(pid=102, owner="h:102:n", role="worker", index=0, total=1))
    assert script.did(Kill) == [Kill(pid=102, signum=signal.SIGKILL)]
