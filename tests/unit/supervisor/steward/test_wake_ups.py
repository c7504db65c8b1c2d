"""How wake-ups that wait to be sent are merged."""

from __future__ import annotations

from streamline_pool.supervisor.ipc.messages import WorkDue
from streamline_pool.supervisor.steward.wake_ups import PendingWakeUps


def test_one_run_is_named_and_several_are_counted() -> None:
    """A worker that gets a name claims that run; with several, it polls."""
    pending = PendingWakeUps()
    pending.add("r1", 1, overdue=True)
    pending.add("r2", 1, overdue=False)
    pending.add("r3", 1, overdue=False)
    assert pending.take() == [
        WorkDue(run_id="r1", count=1, overdue=True),
        WorkDue(run_id=None, count=2),
    ]
    pending.add("r4", 2, overdue=True)
    assert pending.take() == [WorkDue(run_id=None, count=2, overdue=True)]


def test_what_was_taken_is_not_sent_again() -> None:
    pending = PendingWakeUps()
    pending.add("r1", 1, overdue=False)
    assert pending
    pending.take()
    assert not pending
    assert pending.take() == []
