"""The breaker of a host: when it opens, and that it always closes again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamline_pool.supervisor.pool.circuit_breaker import FAILURES_TO_OPEN, TRIAL_S, Breaker, Tally, after_probe, after_tally, trial_lost

OPEN = Breaker(state="open", since=10.0)
HALF = Breaker(state="half-open", since=10.0)


def failed(count: int) -> Tally:
    return Tally(ok=0, failed=count, trailing=count)


def test_failures_in_a_row_open_it() -> None:
    """Also when they are those of several workers, of which each has too few."""
    breaker = Breaker()
    for _ in range(FAILURES_TO_OPEN - 1):
        breaker = after_tally(breaker, failed(1), 1.0)
    assert breaker.state == "closed"
    assert after_tally(breaker, failed(1), 2.0) == Breaker(state="open", since=2.0)


def test_a_success_in_between_starts_the_count_again() -> None:
    """A worker that fails now and then among thousands of successes is no outage."""
    breaker = after_tally(Breaker(), failed(FAILURES_TO_OPEN - 1), 1.0)
    breaker = after_tally(breaker, Tally(ok=1, failed=3, trailing=1), 1.0)
    assert breaker == Breaker(failures=1)


def test_one_failed_probe_opens_it_and_one_good_probe_half_opens_it() -> None:
    assert after_probe(Breaker(), False, 3.0) == Breaker(state="open", since=3.0)
    assert after_probe(OPEN, True, 11.0) == Breaker(state="half-open", since=11.0)
    assert after_probe(OPEN, False, 11.0) == OPEN


def test_what_workers_report_while_it_is_open_changes_nothing() -> None:
    """Such a success may be older than the failure that opened the breaker."""
    assert after_tally(OPEN, Tally(ok=9, failed=0, trailing=0), 11.0) == OPEN


@pytest.mark.parametrize(
    ("tally", "becomes"),
    [
        (Tally(ok=1, failed=0, trailing=0), "closed"),
        (Tally(ok=1, failed=2, trailing=0), "closed"),
        (Tally(ok=0, failed=1, trailing=1), "open"),
        (Tally(ok=1, failed=1, trailing=1), "open"),
        (Tally(ok=0, failed=0, trailing=0), "half-open"),
    ],
)
def test_the_trial_decides(tally: Tally, becomes: str) -> None:
    assert after_tally(HALF, tally, 11.0, trial=True).state == becomes


def test_other_workers_do_not_decide_a_trial() -> None:
    """They report failures from before it began."""
    assert after_tally(HALF, failed(20), 11.0, trial=False) == HALF


def test_a_trial_that_finds_nothing_to_do_ends_with_a_later_probe() -> None:
    """Otherwise a pool without work would stay half-open, and look broken, until a client starts a run."""
    assert after_probe(HALF, True, 10.0 + TRIAL_S / 2) == HALF
    assert after_probe(HALF, True, 10.0 + TRIAL_S).state == "closed"


def test_a_dead_trial_worker_opens_it_again() -> None:
    assert trial_lost(HALF, 12.0) == Breaker(state="open", since=12.0)
    assert trial_lost(Breaker(), 12.0) == Breaker()


tallies = st.builds(Tally, ok=st.integers(0, 3), failed=st.integers(0, 9), trailing=st.integers(0, 9))


@given(st.lists(st.tuples(tallies, st.booleans()) | st.booleans()))
def test_after_any_history_it_closes_when_the_database_is_back(history: list[tuple[Tally, bool] | bool]) -> None:
    """An outage of any length and shape ends with work resumed, without help."""
    breaker, now = Breaker(), 0.0
    for event in history:
        now += 0.4
        breaker = after_probe(breaker, event, now) if isinstance(event, bool) else after_tally(breaker, event[0], now, trial=event[1])
    for _ in range(6):
        now += 0.5
        breaker = after_probe(breaker, True, now)
    assert breaker.state == "closed"
