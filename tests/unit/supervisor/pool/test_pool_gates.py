"""What workers and steward get to know when the circuit breaker changes."""

from __future__ import annotations

import signal

from pool_script import STEWARD, Script

from streamline_pool.supervisor.ipc.messages import (
    Circuit,
    Gate,
    IdleCheck,
    Probe,
    WakeUp,
    WorkDue,
)


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
    assert script.state.breaker.state == "half-open", "that one is, too"
    script.beat(101, ops_ok=1, ops_failed=4, idle_check=idle_check.seq)
    assert "scheduler:circuit-closed" in script.logged()
    assert script.sent(Gate) == [(101, Gate(state="open")), (102, Gate(state="open"))]


def test_failures_that_workers_report_open_the_circuit() -> None:
    script = Script(workers=2).started()
    script.beat(101, ops_ok=10, ops_failed=3, consecutive_failures=3)
    script.beat(102, ops_ok=0, ops_failed=2, consecutive_failures=2)
    assert script.state.breaker.state == "open"


def test_no_wake_up_passes_an_open_circuit_and_a_new_worker_gets_a_closed_gate() -> None:
    script = Script(workers=1).started()
    script.on_message(STEWARD, Probe(ok=False))
    script.on_message(STEWARD, WorkDue(run_id="r", count=1))
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
