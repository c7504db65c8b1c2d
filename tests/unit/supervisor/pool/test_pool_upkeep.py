"""When the supervisor replaces workers on purpose, and how it changes the size of the pool or holds it."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from pool_script import LIMITS, STEWARD, Script, beat

from streamline_pool.supervisor.ipc.messages import (
    Died,
    Drain,
    Hold,
    PoolFacts,
    Reslot,
    Stop,
    WakeUp,
    WorkDue,
)
from streamline_pool.supervisor.pool.state import Dump, Event, ForkFailed, Kill, Measured, Received, Spawn, Tick


@pytest.mark.parametrize(
    ("limits", "events"),
    [
        ({"max_rss_bytes": 100}, [Measured(rss_bytes={101: 101, 102: 99})]),
        ({"max_runs_per_worker": 5}, [Received(pid=101, message=beat(runs_total=5))]),
        ({}, [Received(pid=101, message=beat(recycle="a stuck thread"))]),
    ],
)
def test_only_the_worker_with_a_reason_is_recycled(limits: dict[str, Any], events: list[Event]) -> None:
    script = Script(**limits).started()
    script.send(*events)
    assert [pid for pid, _ in script.sent(Drain)] == [101]
    assert [s.index for s in script.did(Spawn)] == [0], "its successor starts at once"
    script.dies(101, exit_code=0)
    assert not script.did(Spawn)
    assert not script.sent(Died), "it has released its runs itself"


def test_the_steward_gets_the_facts_at_once_when_the_pool_is_ready() -> None:
    """A command that looked within the next second found no pool, and advised to start one."""
    script = Script().started()
    ((pid, facts),) = script.sent(PoolFacts)
    assert (pid, facts.ready) == (STEWARD, True)


def test_at_most_a_quarter_of_the_pool_is_recycled_at_once() -> None:
    """A leak hits all workers at the same time; replacing all of them at once would be an outage."""
    script = Script(workers=8, max_rss_bytes=100).started()
    script.send(Measured(rss_bytes=dict.fromkeys(script.workers, 101)))
    assert [pid for pid, _ in script.sent(Drain)] == [101, 102]
    script.send(Tick())
    assert not script.sent(Drain)
    script.dies(101, exit_code=0)
    assert [pid for pid, _ in script.sent(Drain)] == [103]


def test_a_recycled_worker_that_does_not_exit_is_stopped_then_killed() -> None:
    """A stuck thread in a handler must not keep the old worker beside the new one for ever."""
    script = Script(workers=1).started()
    script.beat(101, recycle="a stuck thread")
    script.wait(LIMITS.drain_timeout_s)
    assert [pid for pid, _ in script.sent(Stop)] == [101]
    script.wait(4.5)
    assert script.did(Kill) == [Kill(pid=101, signum=signal.SIGKILL)]
    script.dies(101)
    assert script.sent(Died), "the steward releases what it held"
    assert script.state.crashes == ()
    assert script.state.shutdown is None


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


TTIN, TTOU = signal.SIGTTIN, signal.SIGTTOU


@pytest.mark.parametrize(
    ("signums", "left"),
    [
        pytest.param([TTIN, TTOU], {0: 2, 1: 2}, id="up and down"),
        pytest.param([TTIN, TTOU, TTOU], {0: 1}, id="up and down twice"),
        pytest.param([TTIN, TTOU, TTIN], {0: 3, 1: 3, 2: 3}, id="up, down and up"),
        pytest.param([TTIN, TTIN], {0: 4, 1: 4, 2: 4, 3: 4}, id="up twice"),
    ],
)
def test_several_changes_of_size_in_one_turn_leave_as_many_workers_as_wanted(signums: list[signal.Signals], left: dict[int, int]) -> None:
    """The second signal is handled between the fork for the first one and the event that makes the new worker known."""
    script = Script(workers=2).started()
    script.signal(*signums)
    totals = {101: 2, 102: 2} | {102 + n: spawn.total for n, spawn in enumerate(script.did(Spawn), 1)}
    totals |= {pid: message.total for pid, message in script.sent(Reslot)}
    drained = {pid for pid, _ in script.sent(Drain)}
    assert {m.index: totals[m.pid] for m in script.state.active_workers} == left, "each worker knows the size of the pool"
    assert len(script.workers) - len(drained) == len(left)
    for pid in drained:
        script.dies(pid, exit_code=0)
    script.wait(1.0)
    assert not script.did(Spawn)


def test_a_fork_that_fails_after_the_pool_has_shrunk_is_not_repeated() -> None:
    script = Script(workers=2).started()
    script.signal(TTOU)
    script.dies(102, exit_code=0)
    script.send(ForkFailed(role="worker", index=1, error="no room", jitter=0.5))
    script.wait(10.0)
    assert not script.did(Spawn)


def test_ttou_removes_a_vacant_place_first() -> None:
    """Shrinking while the last worker waits for its restart must not start it again."""
    script = Script(workers=2).started()
    script.dies(102)
    script.signal(signal.SIGTTOU)
    assert not script.sent(Drain)
    script.wait(1.0)
    assert not script.did(Spawn)


def test_hold_and_resume_reach_workers_that_are_forked_in_between() -> None:
    script = Script(workers=1).started()
    script.signal(signal.SIGTSTP)
    assert script.sent(Hold) == [(101, Hold(held=True))]
    script.beat(101, state="holding")
    script.signal(signal.SIGTTIN)
    assert script.sent(Hold) == [(102, Hold(held=True))]
    script.on_message(STEWARD, WorkDue(run_id="r", count=1))
    assert not script.sent(WakeUp)
    script.signal(signal.SIGCONT)
    assert script.sent(Hold) == [(101, Hold(held=False)), (102, Hold(held=False))]


def test_usr1_dumps_stacks() -> None:
    script = Script().started()
    script.signal(signal.SIGUSR1)
    assert script.did(Dump) == [Dump()]
