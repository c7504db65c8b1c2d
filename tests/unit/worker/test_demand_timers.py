"""When a worker claims runs whose timers have fired. test_demand.py has the other rules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from demands import SUSPECT, idle_demand, names, new_demand, perform

from streamline_pool.worker.demand import ClaimDue, Demand


def test_a_full_worker_claims_runs_with_fired_timers_in_additional_places() -> None:
    demand = idle_demand(concurrency=16)
    demand.timers_fired(names(3))
    claim = demand.next_timer_claim([f"a{number}" for number in range(16)])
    assert claim is not None
    assert (claim.batch.run_ids, claim.crashes_below) == (["r0", "r1"], SUSPECT)
    assert demand.wants_timer_claim(), "the third waits for a place"
    demand.claim_ended(claim, ["r0", "r1", *(f"a{number}" for number in range(16))])
    assert demand.room(18) == 0
    assert demand.next_timer_claim(["r0", "r1", *(f"a{number}" for number in range(16))]) is None
    demand.run_finished("r0")
    claim = demand.next_timer_claim(["r1", *(f"a{number}" for number in range(16))])
    assert claim is not None
    assert claim.batch.run_ids == ["r2"]


def test_a_fired_timer_that_finds_no_place_is_also_left_to_a_poll() -> None:
    demand = idle_demand(concurrency=1)
    demand.timers_fired(["r0"])
    assert demand.next_timer_claim(["a"]) is None
    assert isinstance(demand.next_claim(0), ClaimDue)


def test_free_places_belong_to_the_backlog_first() -> None:
    demand = idle_demand(concurrency=7)
    demand.wake_up(None)
    demand.timers_fired(["r0"])
    assert demand.next_timer_claim(()) is None
    claim = demand.next_claim(0)
    assert demand.next_timer_claim(()) is None, "the claim under way may fill the room"
    perform(demand, claim)  # that poll may have found the run that has found no place
    assert demand.next_claim(0) is None
    assert demand.next_timer_claim(()) is not None


def test_a_slow_claim_of_one_timer_does_not_make_the_worker_poll_for_another_without_a_pause() -> None:
    """The worker sent a thousand polls a second until the slow claim was answered. (The explorer's seed 1000197.)"""
    demand = idle_demand(concurrency=4)
    demand.timers_fired(["r0"])
    slow = demand.next_timer_claim(())
    assert slow is not None
    demand.timers_fired(["r1"])
    polls = 0
    for _ in range(5):
        assert demand.next_timer_claim(()) is None, "the places may be taken by what the slow claim brings"
        if (poll := demand.next_claim(0)) is not None:
            perform(demand, poll)
            polls += 1
    assert polls == 1
    demand.claim_ended(slow, ["r0"])
    claim = demand.next_timer_claim(["r0"])
    assert claim is not None
    assert claim.batch.run_ids == ["r1"]


def test_places_promised_to_a_timer_claim_are_not_filled_by_others() -> None:
    demand = idle_demand(concurrency=1)
    demand.timers_fired(["r0"])
    claim = demand.next_timer_claim(())
    assert claim is not None
    demand.wake_up("r1")
    assert (demand.next_claim(0), demand.wants_claim(0)) == (None, False)
    demand.claim_ended(claim, ())
    assert demand.wants_claim(0)


@pytest.mark.parametrize(
    "forbid",
    [lambda demand: demand.hold(True), lambda demand: demand.set_gate("closed"), lambda demand: demand.set_gate("one")],
)
def test_fired_timers_are_left_to_a_poll_while_claiming_is_restricted(forbid: Callable[[Demand], None]) -> None:
    """Once claiming is allowed again, the poll comes first, so their names are not needed."""
    demand = idle_demand()
    forbid(demand)
    demand.timers_fired(["r0"])
    assert demand.next_timer_claim(()) is None
    assert not demand.wants_timer_claim()
    demand.hold(False)
    demand.set_gate("open")
    assert isinstance(demand.next_claim(0), ClaimDue)


def test_timers_that_fire_before_the_start_are_left_to_the_first_poll() -> None:
    demand = new_demand()
    demand.timers_fired(["r0"])
    assert demand.next_timer_claim(()) is None
    assert not demand.wants_timer_claim()


def test_fired_timers_beyond_the_bound_are_left_to_a_poll() -> None:
    demand = idle_demand()
    demand.timers_fired(names(1_001))
    assert demand.wants_claim(0)


def test_a_worker_with_fired_timers_to_claim_is_not_idle() -> None:
    demand = idle_demand()
    demand.timers_fired(["r0"])
    assert not demand.is_idle(0)
    claim = demand.next_timer_claim(())
    assert claim is not None
    assert not demand.is_idle(0), "a claim is under way"
    demand.claim_ended(claim, ())
    assert demand.is_idle(0)


def test_a_failure_leaves_fired_timers_to_the_poll_after_the_pause() -> None:
    """Asked again at once, a database that fails at once would be asked without a pause, name after name."""
    demand = idle_demand()
    demand.timers_fired(["r0"])
    claim = demand.next_timer_claim(())
    assert claim is not None
    demand.timers_fired(["r1"])
    demand.claims_failed()
    demand.claim_ended(claim, ())
    assert (demand.next_timer_claim(()), demand.wants_timer_claim()) == (None, False)
    demand.pause_over()
    assert isinstance(demand.next_claim(0), ClaimDue)


def test_announcements_that_are_never_followed_by_a_run_are_forgotten() -> None:
    """A worker that runs for months must not keep an entry for every announcement whose repetition was dropped."""
    demand = idle_demand()
    for number in range(5_000):
        demand.named_tried([f"r{number}"], {f"r{number}"})
    assert len(demand._expected) <= 1_000
