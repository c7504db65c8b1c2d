"""The machinery of the soak: every capability is used, every series is there, and nothing is wrong.

Whether the series are flat is for soaks of many more runs: after so few, all of it is warm-up.
"""

from __future__ import annotations

import sys

import pytest

from .flatness import judge_all
from .sampler import QUANTITIES
from .soak import CONNECTIONS, Options, measure
from .soak_app import SHARES

CALLS = {
    "answered by the client", "hook answered", "event sent to one", "event sent to all", "paused and resumed", "rewound by the client",
    "cancelled by the client", "started again by key", "clean-up", "waited for", "stream",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.skipif(sys.platform != "linux", reason="readings are from /proc")
def test_a_short_soak_uses_every_capability_and_reads_every_process() -> None:
    """A soak that leaves a capability out, or reads the wrong process, finds no leak there."""
    result = measure(Options(runs=4000, interval_s=0.3))

    assert result["runs"] == 4000
    assert result["wrong"] == []
    assert set(SHARES) | CALLS <= {name for name, times in result["seen"].items() if times}
    processes = ("worker 1", "worker 2", "steward", "supervisor", "client")
    assert set(result["series"]) == {f"{process} {quantity}" for process in processes for quantity in QUANTITIES} | {CONNECTIONS}
    assert all(max(value for _, value in points) > 0 for points in result["series"].values())
    assert (result["is_judged"], result["verdicts"], result["not_flat"]) == (False, [], []), "after so few runs there is no verdict"
    assert {verdict.name for verdict in judge_all(result["series"])} == set(result["series"])
