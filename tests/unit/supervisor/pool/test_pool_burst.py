"""How `--burst` proves that no work is left."""

from __future__ import annotations

from pool_script import STEWARD, Script

from streamline_pool.supervisor.ipc.messages import (
    CheckDue,
    Drain,
    DueCount,
    IdleCheck,
    StewardBeat,
    WakeUp,
)
from streamline_pool.supervisor.pool.state import Exit, Tick


def burst_until_check(script: Script) -> int:
    """Every worker answers the first question as idle; the number of the check that follows."""
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
    assert script.state.shutdown is None, "one worker has not confirmed"
    script.beat(102, idle_check=seq, runs_total=3)
    assert [pid for pid, _ in script.sent(Drain)] == [101, 102]
    for pid in (101, 102, STEWARD):
        script.dies(pid, exit_code=0)
    assert script.did(Exit) == [Exit(code=0)]


def test_burst_does_not_end_when_a_run_was_driven_between_the_questions() -> None:
    """It was claimed before the check and has ended since: it may have started another one in between."""
    script = Script(workers=2, burst=True).started()
    script.on_message(STEWARD, DueCount(seq=burst_until_check(script), due=0))
    seq = script.sent(IdleCheck)[0][1].seq
    script.beat(101, idle_check=seq, runs_total=3)
    script.beat(102, idle_check=seq, runs_total=4)
    assert script.state.shutdown is None


def test_burst_goes_on_while_something_is_due() -> None:
    script = Script(workers=2, burst=True).started()
    script.on_message(STEWARD, DueCount(seq=burst_until_check(script), due=1))
    assert len(script.sent(WakeUp)) == 1
    assert script.state.burst is None
    assert not script.sent(IdleCheck), "the next proof begins after a pause"


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
    assert script.state.shutdown is None
