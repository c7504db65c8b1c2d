"""How a pool starts, and what the supervisor does about children that die, stall, cannot start or send nonsense."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest
from pool_script import LIMITS, STEWARD, Script, beat

from streamline_pool.supervisor.ipc.messages import (
    BootFailed,
    Close,
    Died,
    Released,
    StewardBeat,
    Stop,
    WakeUp,
)
from streamline_pool.supervisor.pool.decide import decide
from streamline_pool.supervisor.pool.state import Exit, ForkFailed, InvalidMessage, Kill, Log, Measured, Spawn, Tick


def test_the_first_tick_starts_one_steward_and_all_workers() -> None:
    script = Script(workers=3)
    script.send(Tick())
    assert [(s.role, s.index, s.total, s.first) for s in script.did(Spawn)] == [
        ("steward", -1, 3, True),
        ("worker", 0, 3, True),
        ("worker", 1, 3, True),
        ("worker", 2, 3, True),
    ]


def test_ready_is_logged_once_when_every_child_is_ready() -> None:
    """A program that waits for that line starts runs as soon as it appears."""
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


def test_a_restarted_child_that_misses_the_database_is_restarted_without_counting_as_a_crash() -> None:
    """A worker that crashes during an outage must be replaced after it, and an outage is not a crash."""
    script = Script(workers=1, restart_budget=1).started()
    script.dies(101)
    script.wait(1.0)
    for attempt in range(3):
        pid = 102 + attempt
        script.on_message(pid, BootFailed(exit_code=3, message="no database"))
        script.dies(pid, exit_code=64)
        script.wait(1.0)
        assert script.did(Spawn), f"after attempt {attempt}"
    assert script.state.shutdown is None


def test_a_failed_fork_is_repeated_within_the_budget() -> None:
    script = Script(restart_budget=2)
    script.state, _ = decide(script.state, Tick(), script.now)
    script.send(ForkFailed(role="worker", index=1, error="EAGAIN", jitter=0.5))
    assert script.state.shutdown is None
    script.wait(0.3)
    assert [(s.role, s.index) for s in script.did(Spawn)] == [("worker", 1)]


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


def test_a_death_is_reported_to_every_new_steward_until_one_acknowledges_it() -> None:
    """Otherwise a steward that dies before the release would leave the runs until their leases expire."""
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


def test_released_runs_wake_up_idle_workers() -> None:
    """The runs of a dead worker restart elsewhere at once, not at the next sweep."""
    script = Script(workers=3).started()
    script.dies(103)
    script.on_message(STEWARD, Released(owner="h:103:n", runs=2))
    assert script.sent(WakeUp) == [(101, WakeUp(overdue=True)), (102, WakeUp(overdue=True))]


def test_crashes_are_restarted_with_growing_pauses_up_to_the_budget() -> None:
    script = Script(workers=1, restart_budget=4).started()
    pauses, pid = [], 101
    for _ in range(4):
        script.dies(pid)
        pauses.append(script.state.vacancies[0].due_at - script.now)
        script.wait(1.0)
        pid += 1
        script.beat(pid)
    assert pauses == pytest.approx([0.075, 0.15, 0.3, 0.6])
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
    assert script.state.shutdown is None


def test_a_worker_that_exits_without_an_order_is_a_crash_even_with_code_0() -> None:
    """A handler that calls sys.exit in the wrong thread must not shrink the pool."""
    script = Script(workers=1).started()
    script.dies(101, exit_code=0)
    assert script.sent(Died)
    assert script.state.vacancies


@pytest.mark.parametrize("pid", [STEWARD, 101])
def test_a_child_that_sends_nothing_is_aborted_then_killed(pid: int) -> None:
    """A blocked loop does not renew its leases, but it could go on later in the middle of a step."""
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


def test_no_child_is_called_stalled_after_the_supervisor_itself_was_stopped() -> None:
    """After a suspended laptop or a SIGSTOP of the whole group, every heartbeat is late and every child is well."""
    script = Script().started()
    script.now += 3600
    script.send(Tick())
    assert not script.did(Kill)


def test_a_child_that_writes_nonsense_is_killed() -> None:
    script = Script().started()
    script.send(InvalidMessage(pid=101, error="not a message"))
    assert script.did(Kill) == [Kill(pid=101, signum=signal.SIGKILL)]
