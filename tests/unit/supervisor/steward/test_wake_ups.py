"""How wake-ups that wait to be sent are merged."""

from __future__ import annotations

from streamline_pool.supervisor.ipc.messages import WorkDue
from streamline_pool.supervisor.steward.wake_ups import PendingWakeUps


def test_one_run_is_named_and_several_are_counted() -> None:
    """A worker that gets a name claims that run; with several, it polls the lane."""
    pending = PendingWakeUps()
    pending.add("a", "r1", 1)
    pending.add("b", "r2", 1)
    pending.add("b", "r3", 1)
    pending.add(None, "r4", 2)
    assert pending.take() == [
        WorkDue(lane="a", run_id="r1", count=1),
        WorkDue(lane="b", run_id=None, count=2),
        WorkDue(lane=None, run_id=None, count=2),
    ]


def test_what_was_taken_is_not_sent_again() -> None:
    pending = PendingWakeUps()
    pending.add("a", "r1", 1)
    assert pending
    pending.take()
    assert not pending
    assert pending.take() == []
