"""The places of runs whose timers have fired, in a worker that may be full."""

from __future__ import annotations

from streamline_pool.worker.timer_claims import TimerClaims


def names(count: int, prefix: str = "r") -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


def test_a_full_worker_has_a_few_places_more() -> None:
    """Behind a backlog every worker is full; without these places no timer would be on time."""
    timer_claims = TimerClaims(concurrency=16)
    timer_claims.add(names(5))
    first = timer_claims.take(0, ())
    assert (first.run_ids, first.spare) == (["r0", "r1"], 0)
    assert timer_claims.take(0, ()).run_ids == [], "the claim under way may bring them all"
    timer_claims.claimed(first, {"r0", "r1"})
    assert timer_claims.take(0, {"r0", "r1"}).run_ids == [], "they are active"
    timer_claims.finished("r0")
    assert timer_claims.take(0, {"r1"}).run_ids == ["r2"]


def test_runs_ahead_of_their_turn_take_no_place_from_the_others() -> None:
    """Timers without end must not starve the backlog, however short the sleeps."""
    timer_claims = TimerClaims(concurrency=16)
    timer_claims.add(names(2))
    batch = timer_claims.take(0, ())
    timer_claims.claimed(batch, {"r0", "r1"})
    assert timer_claims.places_taken(active_runs=18) == 16
    timer_claims.finished("r0")
    assert timer_claims.places_taken(active_runs=17) == 16


def test_free_places_are_taken_first_and_are_promised_while_the_claim_is_under_way() -> None:
    """A poll that runs beside the claim must not fill the same places once more."""
    timer_claims = TimerClaims(concurrency=16)
    timer_claims.add(names(4))
    batch = timer_claims.take(3, ())
    assert (len(batch.run_ids), batch.spare) == (4, 3)
    assert timer_claims.places_taken(active_runs=13) == 16
    timer_claims.claimed(batch, {"r0", "r1", "r2", "r3"})
    assert timer_claims.places_taken(active_runs=17) == 16


def test_what_the_claim_did_not_bring_takes_no_place() -> None:
    timer_claims = TimerClaims(concurrency=16)
    timer_claims.add(names(2))
    batch = timer_claims.take(0, ())
    timer_claims.claimed(batch, {"r1"})
    assert timer_claims.places_taken(active_runs=17) == 16
    timer_claims.add(["r2"])
    assert timer_claims.take(0, {"r1"}).run_ids == ["r2"]


def test_a_worker_with_a_small_concurrency_has_no_additional_places() -> None:
    """A concurrency of 1 may mean that there is one graphics card."""
    timer_claims = TimerClaims(concurrency=7)
    timer_claims.add(names(3))
    assert timer_claims.take(0, ()).run_ids == []
    assert timer_claims.take(1, ()).run_ids == ["r0"]


def test_a_run_that_is_active_already_is_claimed_and_takes_no_additional_place() -> None:
    """The worker may have lost it without knowing. It may also hold it, in a place that is free to all."""
    timer_claims = TimerClaims(concurrency=16)
    timer_claims.add(["r0", "r1"])
    batch = timer_claims.take(0, {"r0"})
    assert batch.run_ids == ["r0", "r1"]
    timer_claims.claimed(batch, {"r0", "r1"})
    assert timer_claims.places_taken(active_runs=2) == 1


def test_names_beyond_the_bound_are_left_to_polls() -> None:
    """A million runs scheduled for midnight are not a million names in a worker."""
    timer_claims = TimerClaims(concurrency=16)
    assert timer_claims.add(names(999))
    assert not timer_claims.add(names(2, "s"))
    taken = [run_id for _ in range(6) for run_id in timer_claims.take(10_000, ()).run_ids]
    assert len(taken) == 1_000
