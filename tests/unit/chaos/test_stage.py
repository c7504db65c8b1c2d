"""Recovery times, and the report: what is counted from when, and when the exit code is 1."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from streamline_pool.chaos.audit import Audit, Story
from streamline_pool.chaos.faults.catalogue import CATALOGUE, chosen, left_out
from streamline_pool.chaos.report import is_clean, table
from streamline_pool.chaos.stage import Turn, percentile


def audit_of(**went_on: list[float]) -> Audit:
    stories = {run_id: Story(run_id, "plain_0", status="running", went_on=times) for run_id, times in went_on.items()}
    return cast(Audit, SimpleNamespace(stories=stories))


def test_recovery_counts_from_the_end_of_the_fault_until_the_run_goes_on() -> None:
    turn = Turn("partition", begun=10.0, ended=14.0, affected={"during", "after", "never", "ended"})
    audit = audit_of(during=[9.0, 12.0], after=[9.0, 14.5, 20.0], never=[9.0], ended=[9.0])
    audit.stories["ended"].status = "cancelled"
    found, never = turn.recoveries(audit)

    assert sorted(found) == [0.0, 0.5]
    assert never == 1


def test_percentiles_are_values_that_were_measured() -> None:
    assert percentile([], 0.5) is None
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(n) for n in range(1, 101)], 0.99) == 99.0


def report(**changes: Any) -> dict[str, Any]:
    row = {"turns": 1, "affected": 2, "lost": 0, "wedged": 0, "duplicates": 0, "recovery_p50_s": 0.5, "recovery_p99_s": None}
    counts = dict.fromkeys(("lost", "wedged", "duplicates", "early"), 0)
    rest = {"left_out": {"disk-full": "needs root"}, "no_turn": {}, "findings": [], "untrue_exit_codes": [], "audit_complete": True}
    return {
        **counts,
        **rest,
        "runs": 9,
        "ends": {"done": 9, "failed": 1},
        "recovery_p50_s": 0.5,
        "recovery_p99_s": 1.0,
        "faults": {"partition": row},
        **changes,
    }


@pytest.mark.parametrize(
    ("change", "clean"),
    [
        ({}, True),
        *(({name: 1}, False) for name in ("lost", "wedged", "duplicates", "early")),
        ({"untrue_exit_codes": ["host a"]}, False),
        ({"audit_complete": False}, False),
        ({"faults": {"partition": {"turns": 0}}}, False),
    ],
)
def test_each_broken_rule_makes_the_report_unclean(change: dict[str, Any], clean: bool) -> None:
    assert is_clean(report(**change)) is clean


def test_the_table_has_a_row_per_fault_and_names_what_was_left_out() -> None:
    lines = table(report())

    assert lines[1].split() == ["partition", "1", "2", "0", "0", "0", "0.50", "s", "-"]
    assert "left out: disk-full: needs root" in lines


def test_a_fault_is_left_out_with_the_words_for_each_need_that_is_missing() -> None:
    fault = next(fault for fault in CATALOGUE if fault.name == "clock-ahead")

    assert left_out(fault, {}) == ""
    assert left_out(fault, {"faketime": "needs libfaketime", "disk": "needs root"}) == "needs libfaketime"
    assert [one.name for one in chosen(["kill-worker"])] == ["kill-worker"]
    with pytest.raises(KeyError, match="kill-all"):
        chosen(["kill-all"])


def test_each_fault_has_a_name_of_its_own_and_lasts_as_long_as_it_needs() -> None:
    assert len({fault.name for fault in CATALOGUE}) == len(CATALOGUE)
    for fault in CATALOGUE:
        for lease_s in (2.0, 5.0, 30.0):
            assert fault.hold_s(lease_s, 0.0) == fault.hold_min(lease_s), fault.name
            assert fault.hold_s(lease_s, 1000.0) == max(fault.hold_min(lease_s), fault.hold_max), fault.name
