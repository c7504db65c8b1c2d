"""The one back-off formula."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamline_pool.domain.backoff import Backoff, jittered


@given(st.integers(1, 100_000), st.floats(0, 1, exclude_max=True))
def test_a_delay_is_at_most_the_ceiling_and_at_least_half_of_the_undisturbed_delay(failures: int, chance: float) -> None:
    """After hours of an outage the formula must neither overflow nor return more than its ceiling."""
    pause = Backoff(base_s=0.05, ceiling_s=1.0).delay_s(failures, chance)
    due = min(0.05 * 2.0 ** min(failures, 30), 1.0)
    assert due / 2 <= pause <= 1.0


def test_each_failure_in_a_row_doubles_the_delay() -> None:
    backoff = Backoff(base_s=0.1, ceiling_s=100.0)
    assert [backoff.delay_s(failures, 0.0) for failures in (1, 2, 3)] == pytest.approx([0.1, 0.2, 0.4])


def test_jitter_subtracts_up_to_half() -> None:
    assert (jittered(2.0, 0.0), jittered(2.0, 0.5)) == (1.0, 1.5)
