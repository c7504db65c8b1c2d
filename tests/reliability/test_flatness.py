"""The judge of the soak finds what it is there for, and is not alarmed by what is no leak."""

from __future__ import annotations

import random

import pytest

from .flatness import judge


def series(value_of: object, runs: int = 1_000_000, points: int = 300) -> list[tuple[float, float]]:
    chance = random.Random(1)
    return [(at := runs * n / points, value_of(at) + chance.gauss(0, 0.3)) for n in range(1, points + 1)]  # type: ignore[operator]


def test_a_planted_leak_of_memory_is_not_flat() -> None:
    """A judge that passes every series proves nothing: one mebibyte for 100 000 runs, below the noise of a reading."""
    verdict = judge("worker 1 uss_mib", series(lambda runs: 40 + runs / 100_000))
    assert not verdict.flat
    assert verdict.slope == pytest.approx(1.0, abs=0.1)


def test_a_leaked_descriptor_in_ten_thousand_runs_is_not_flat() -> None:
    verdict = judge("client descriptors", [(runs, 40 + runs // 10_000) for runs in range(1000, 200_001, 1000)])
    assert not verdict.flat


def test_noise_and_a_rise_during_the_warm_up_are_flat() -> None:
    """A cache that fills, and then stays full, is no leak."""
    assert judge("worker 1 uss_mib", series(lambda runs: 40 + 10 * min(1.0, runs / 190_000))).flat


def test_a_few_wild_readings_are_flat() -> None:
    """One large output that is in memory while the reading is made."""
    points = [(runs, value + (30 if n % 50 == 49 else 0)) for n, (runs, value) in enumerate(series(lambda runs: 40))]
    assert judge("worker 1 uss_mib", points).flat


def test_connections_that_come_and_go_are_flat() -> None:
    assert judge("server connections", [(runs, 100 + runs // 1000 % 2) for runs in range(1000, 200_001, 1000)]).flat


def test_too_few_readings_are_refused() -> None:
    """Three readings are always flat."""
    with pytest.raises(ValueError, match="at least 9"):
        judge("client threads", [(1, 1), (2, 2), (3, 3)])
