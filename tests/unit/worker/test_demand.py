"""What a worker wants to claim: each rule by example. test_demand_sequences.py checks any sequence of inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from demands import SUSPECT, idle_demand, names, new_demand, perform

from streamline_pool.worker.demand import Chosen, Claim, ClaimDue, ClaimNamed, Demand

# --- who may claim ------------------------------------------------------------------------------------------------------


def test_a_worker_claims_nothing_before_it_has_reached_the_database() -> None:
    demand = new_demand()
    demand.wake_up("r0")
    assert demand.next_claim(0) is None
    assert (demand.state, demand.wants_claim(0), demand.is_idle(0)) == ("starting", False, False)
    demand.start()
    assert (demand.state, demand.wants_claim(0)) == ("ready", True)


def test_a_worker_that_drains_claims_nothing_any_more() -> None:
    demand = idle_demand()
    demand.drain()
    demand.start()
    demand.wake_up("r0")
    demand.timers_fired(["r1"])
    assert (demand.state, demand.wants_claim(0), demand.room(0), demand.is_idle(0)) == ("draining", False, 0, False)
    assert demand.next_claim(0) is None
    assert demand.next_timer_claim(()) is None


def test_a_held_worker_claims_nothing_until_it_is_released() -> None:
    demand = idle_demand()
    demand.hold(True)
    demand.wake_up("r0")
    assert (demand.state, demand.next_claim(0), demand.is_idle(0)) == ("holding", None, False)
    demand.hold(False)
    assert demand.state == "ready"
    perform(demand, demand.next_claim(0))
    assert demand.next_claim(0) == ClaimDue(limit=16, crashes_below=None, from_start=False), "the supervisor sent no wake-ups meanwhile"


def test_an_operators_hold_before_the_start_counts_after_it() -> None:
    demand = new_demand()
    demand.hold(True)
    assert demand.state == "starting"
    demand.start()
    assert (demand.state, demand.next_claim(0)) == ("holding", None)


def test_a_closed_gate_stops_claims_and_an_open_one_starts_with_a_poll() -> None:
    demand = idle_demand()
    demand.set_gate("closed")
    assert (demand.is_idle(0), demand.wants_claim(0), demand.room(0)) == (False, False, 0)
    demand.set_gate("open")
    assert demand.wants_claim(0)
    assert isinstance(demand.next_claim(0), ClaimDue)


def test_gate_one_lets_one_batch_through() -> None:
    """More than one would load a database that has only just returned."""
    demand = idle_demand()
    demand.set_gate("one")
    perform(demand, demand.next_claim(0), more=True)
    assert demand.next_claim(0) is None
    assert demand.room(0) == 0


def test_gate_one_stays_until_a_batch_succeeds() -> None:
    demand = idle_demand()
    demand.set_gate("one")
    claim = demand.next_claim(0)
    assert claim is not None
    demand.claim_ended(claim, (), failed=True)
    demand.claims_failed()
    assert isinstance(demand.next_claim(0), ClaimDue)


def test_a_gate_that_opens_during_a_claim_stays_open() -> None:
    demand = idle_demand()
    demand.set_gate("one")
    claim = demand.next_claim(0)
    demand.set_gate("open")
    perform(demand, claim)
    assert demand.room(0) == 16


# --- announced runs and the backlog -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("announced", "wanted"),
    [
        (["r0"], ClaimNamed(run_ids=("r0",), crashes_below=SUSPECT)),
        # Suspects are claimed one at a time: among several names the poll must choose them.
        (["r0", "r1"], ClaimNamed(run_ids=("r0", "r1"), crashes_below=SUSPECT)),
        ([None], ClaimDue(limit=16, crashes_below=None, from_start=False)),
        ([None, "r0"], ClaimNamed(run_ids=("r0",), crashes_below=SUSPECT)),
    ],
)
def test_what_a_wake_up_leads_to(announced: list[str | None], wanted: Claim) -> None:
    demand = idle_demand()
    for run_id in announced:
        demand.wake_up(run_id)
    assert demand.wants_claim(0)
    assert not demand.is_idle(0)
    assert demand.next_claim(0) == wanted


def test_a_claim_brings_no_more_runs_than_there_is_room_for() -> None:
    demand = idle_demand(concurrency=4)
    for run_id in names(5):
        demand.wake_up(run_id)
    claim = demand.next_claim(1)
    assert claim == ClaimNamed(run_ids=("r0", "r1", "r2"), crashes_below=SUSPECT)
    demand.wake_up(None)
    perform(demand, claim)
    assert demand.next_claim(4) is None
    assert (demand.wants_claim(4), demand.is_idle(4)) == (False, False)
    perform(demand, demand.next_claim(0))
    assert demand.next_claim(2) == ClaimDue(limit=2, crashes_below=None, from_start=False)


def test_one_claim_is_of_200_runs_at_most() -> None:
    """Larger claims only make their first run wait."""
    demand = idle_demand(concurrency=1_000)
    for run_id in names(300):
        demand.wake_up(run_id)
    claim = demand.next_claim(0)
    assert isinstance(claim, ClaimNamed)
    assert len(claim.run_ids) == 200
    perform(demand, claim)
    demand.wake_up(None)
    assert demand.next_claim(200) == ClaimDue(limit=200, crashes_below=None, from_start=False)


def test_announced_runs_and_polls_alternate() -> None:
    """New runs must not starve the backlog, nor the backlog a new run, as long as there is room."""
    demand = idle_demand(concurrency=1_000)
    for run_id in [*names(300), None]:
        demand.wake_up(run_id)
    kinds = []
    for more in (False, True, False, False):
        claim = demand.next_claim(0)
        kinds.append(type(claim))
        perform(demand, claim, more=more)
    assert kinds == [ClaimNamed, ClaimDue, ClaimDue, ClaimNamed]
    assert demand.next_claim(0) is None


def test_names_beyond_the_bound_are_left_to_a_poll() -> None:
    """A wake-up that is dropped is a run that waits for the steward's sweep."""
    demand = idle_demand(concurrency=2_000)
    for run_id in names(1_001):
        demand.wake_up(run_id)
    named: list[str] = []
    kinds = []
    while (claim := demand.next_claim(0)) is not None:
        kinds.append(type(claim))
        named += claim.run_ids if isinstance(claim, ClaimNamed) else []
        perform(demand, claim)
    assert named == names(1_000)
    assert ClaimDue in kinds


def test_a_wake_up_during_a_poll_is_followed_by_another_poll() -> None:
    """The run may have been inserted just after the poll has passed its place."""
    demand = idle_demand()
    demand.wake_up(None)
    claim = demand.next_claim(0)
    demand.wake_up(None)
    perform(demand, claim)
    assert isinstance(demand.next_claim(0), ClaimDue)


def test_a_poll_that_may_have_missed_runs_is_followed_by_another() -> None:
    demand = idle_demand()
    demand.wake_up(None)
    perform(demand, demand.next_claim(0), more=True)
    perform(demand, demand.next_claim(0), more=False)
    assert demand.next_claim(0) is None


def test_a_worker_is_not_idle_while_a_claim_is_under_way() -> None:
    demand = idle_demand()
    demand.wake_up("r0")
    claim = demand.next_claim(0)
    assert not demand.is_idle(0)
    perform(demand, claim)
    assert demand.is_idle(0)


# --- announced, but not inserted yet ------------------------------------------------------------------------------------


def test_an_announced_run_that_is_absent_is_announced_again_after_growing_pauses_then_left_to_a_poll() -> None:
    """A wake-up may arrive before the insert that it announces."""
    demand = idle_demand()
    pauses = [demand.named_tried(["r0"], ["r0"])["r0"] for _ in range(9)]
    assert pauses == [0.001 * 2**tries for tries in range(9)]
    assert demand.is_idle(0), "the caller announces it again"
    assert demand.named_tried(["r0"], ["r0"]) == {}
    assert isinstance(demand.next_claim(0), ClaimDue)


def test_tries_are_counted_anew_once_the_run_was_there() -> None:
    demand = idle_demand()
    demand.named_tried(["r0"], ["r0"])
    assert demand.named_tried(["r0"], []) == {}
    assert demand.named_tried(["r0"], ["r0"]) == {"r0": 0.001}


def test_several_absent_runs_may_be_suspects_so_a_poll_follows() -> None:
    demand = idle_demand()
    assert demand.named_tried(["r0", "r1"], ["r1"]) == {"r1": 0.001}
    assert isinstance(demand.next_claim(0), ClaimDue)


def test_several_names_that_were_all_found_need_no_poll() -> None:
    demand = idle_demand()
    assert demand.named_tried(["r0", "r1"], []) == {}
    assert demand.is_idle(0)


# --- suspects -----------------------------------------------------------------------------------------------------------


def rows(crashes: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"_id": f"r{number}", "crashes": count} for number, count in enumerate(crashes)]


@pytest.mark.parametrize(
    ("crashes", "chosen"),
    [
        ([0, 1, 0], Chosen(["r0", "r1", "r2"], SUSPECT)),
        ([0, 2, 1, 2, 5, 0], Chosen(["r1"], None)),
        ([0, "many", None], Chosen(["r0", "r1", "r2"], None)),  # another program has written these, and no limit matches them
        ([0, True], Chosen(["r0", "r1"], None)),  # a truth value is a number in Python and none in MongoDB
        (["many", 2], Chosen(["r1"], None)),
        ([], Chosen([], SUSPECT)),
    ],
)
def test_of_what_a_poll_has_found_a_suspect_is_claimed_alone(crashes: list[Any], chosen: Chosen) -> None:
    demand = idle_demand()
    demand.wake_up(None)
    demand.next_claim(0)
    assert demand.choose(rows(crashes)) == chosen


def test_a_run_without_a_count_of_crashes_is_no_suspect() -> None:
    assert idle_demand().choose([{"_id": "r0"}, {"_id": "r1", "crashes": 1}]) == Chosen(["r0", "r1"], None)


@pytest.mark.parametrize(("max_crashes", "suspect_from"), [(1, 1), (2, 1), (3, 2), (10, 9)])
def test_which_runs_are_suspects(max_crashes: int, suspect_from: int) -> None:
    assert Demand(concurrency=1, max_crashes=max_crashes).suspect_from == suspect_from


def claim_suspect(demand: Demand, *, won: bool = True) -> None:
    demand.wake_up(None)
    claim = demand.next_claim(0)
    assert claim is not None
    chosen = demand.choose(rows([0, SUSPECT, 0, SUSPECT]))
    assert chosen.run_ids == ["r1"]
    demand.polled(more=False, tried=1, won=int(won))
    demand.claim_ended(claim, chosen.run_ids if won else (), suspect="r1" if won else None)


@pytest.mark.parametrize("announce", [lambda demand: demand.wake_up("r9"), lambda demand: demand.wake_up(None)])
def test_beside_an_active_suspect_nothing_is_claimed(announce: Callable[[Demand], None]) -> None:
    demand = idle_demand()
    claim_suspect(demand)
    announce(demand)
    demand.timers_fired(["r8"])
    assert (demand.next_claim(1), demand.next_timer_claim(["r1"])) == (None, None)
    assert (demand.wants_claim(1), demand.room(1), demand.is_idle(1)) == (False, 0, False)


def test_after_a_suspect_the_other_runs_have_their_turn_then_the_next_suspect() -> None:
    """A worker that has lost others twice at a hundred runs would otherwise run one suspect after the other, and nothing else."""
    demand = idle_demand()
    claim_suspect(demand)
    demand.run_finished("other")
    assert demand.next_claim(1) is None
    demand.run_finished("r1")
    claim = demand.next_claim(0)
    assert claim == ClaimDue(limit=16, crashes_below=SUSPECT, from_start=False)
    perform(demand, claim)
    claim = demand.next_claim(0)
    assert claim == ClaimDue(limit=16, crashes_below=None, from_start=True), "suspects may be older than where the next poll would start"
    perform(demand, claim)
    assert demand.is_idle(0)


def test_a_suspect_that_another_worker_has_claimed_is_followed_by_another_poll() -> None:
    demand = idle_demand()
    claim_suspect(demand, won=False)
    assert demand.next_claim(0) == ClaimDue(limit=16, crashes_below=None, from_start=False)


def test_a_run_that_was_rewound_before_its_claim_is_no_suspect_any_more() -> None:
    """The engine does not run it alone. The worker claimed nothing beside it, for as long as it ran."""
    demand = new_demand()
    demand.start()
    claim = demand.next_claim(0)
    assert demand.choose(rows([SUSPECT])).run_ids == ["r0"]
    demand.polled(more=False, tried=1, won=1)
    assert claim is not None
    demand.claim_ended(claim, {"r0"}, suspect=None)
    demand.wake_up("r9")
    assert isinstance(demand.next_claim(1), ClaimDue | ClaimNamed)


def test_an_earlier_execution_of_a_suspect_that_ends_during_its_claim_changes_nothing() -> None:
    """The explorer's seed 1002753: the worker took the next suspect, released it, and took it again, without a pause."""
    demand = idle_demand()
    demand.wake_up(None)
    claim = demand.next_claim(1)
    assert demand.choose(rows([SUSPECT, SUSPECT])).run_ids == ["r0"]
    demand.run_finished("r0")  # the worker had lost it, and claims it again
    demand.polled(more=False, tried=1, won=1)
    assert claim is not None
    demand.claim_ended(claim, {"r0"}, suspect="r0")
    assert demand.next_claim(1) is None
    demand.run_finished("r1")
    assert demand.next_claim(1) is None
    demand.run_finished("r0")
    assert demand.next_claim(0) == ClaimDue(limit=16, crashes_below=SUSPECT, from_start=False)


def test_a_poll_for_skipped_suspects_that_fails_is_made_again() -> None:
    demand = idle_demand()
    claim_suspect(demand)
    demand.run_finished("r1")
    perform(demand, demand.next_claim(0))
    fail(demand, demand.next_claim(0))
    demand.pause_over()
    assert demand.next_claim(0) == ClaimDue(limit=16, crashes_below=None, from_start=True)


# --- polls without a success --------------------------------------------------------------------------------------------


def test_polls_whose_runs_cannot_be_claimed_are_made_after_growing_pauses() -> None:
    """While a new primary's clock is behind, the host takes for due what the server does not: it would poll without a pause."""
    demand = idle_demand()
    demand.wake_up(None)
    pauses = []
    for _ in range(12):
        claim = demand.next_claim(0)
        assert isinstance(claim, ClaimDue)
        pauses.append(demand.polled(more=True, tried=16, won=0))
        demand.claim_ended(claim, ())
        assert demand.wants_claim(0) is not bool(pauses[-1])
        assert not demand.is_idle(0)
        demand.poll_pause_over()
    assert pauses == [0, 0, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0, 1.0]
    claim = demand.next_claim(0)
    assert demand.polled(more=True, tried=16, won=1) == 0


def test_announced_runs_are_claimed_during_such_a_pause() -> None:
    demand = idle_demand()
    demand.wake_up(None)
    for _ in range(3):
        claim = demand.next_claim(0)
        assert claim is not None
        demand.polled(more=True, tried=16, won=0)
        demand.claim_ended(claim, ())
    assert demand.next_claim(0) is None
    demand.wake_up("r0")
    assert isinstance(demand.next_claim(0), ClaimNamed)
    demand.wake_up(None)
    assert demand.next_claim(0) is None


# --- failures -----------------------------------------------------------------------------------------------------------


def fail(demand: Demand, claim: Claim | None) -> bool:
    assert claim is not None
    demand.claim_ended(claim, (), failed=True)
    return demand.claims_failed()


def test_what_could_not_be_claimed_by_name_is_found_by_a_poll_after_the_pause() -> None:
    demand = idle_demand()
    demand.wake_up("r0")
    fail(demand, demand.next_claim(0))
    assert (demand.wants_claim(0), demand.is_idle(0)) == (False, False)
    demand.pause_over()
    assert demand.wants_claim(0)
    assert isinstance(demand.next_claim(0), ClaimDue)


def test_only_the_first_failure_of_an_outage_is_news() -> None:
    """Subscribers get one `scheduler:error` for each outage."""
    demand = idle_demand()
    demand.wake_up("r0")
    news = [fail(demand, demand.next_claim(0)) for _ in range(3)]
    demand.claims_succeeded()
    assert [*news, demand.claims_failed()] == [True, False, False, True]


@pytest.mark.parametrize(
    ("happens", "ends"),
    [
        (lambda demand: demand.pause_over(), True),
        (lambda demand: demand.wake_up("r1"), True),
        (lambda demand: demand.wake_up(None), True),
        (lambda demand: demand.run_finished("r1"), True),
        (lambda demand: demand.set_gate("open"), True),
        (lambda demand: demand.set_gate("one"), True),
        (lambda demand: demand.hold(False), True),
        (lambda demand: demand.claims_succeeded(), True),
        (lambda demand: demand.timers_fired(["r1"]), False),
        (lambda demand: demand.named_tried(["r1", "r2"], ["r1"]), False),
        (lambda demand: demand.next_timer_claim(()), False),
    ],
)
def test_what_ends_the_pause_after_a_failure(happens: Callable[[Demand], object], ends: bool) -> None:
    demand = idle_demand()
    demand.wake_up("r0")
    fail(demand, demand.next_claim(0))
    happens(demand)
    assert demand.wants_claim(0) is ends
