"""The page is what the command makes of the stored results, and says nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from . import results
from .page import PAGE, PLOT, render, render_plot
from .promises import CLOCKS, PROMISES

MUTANT = {"harm": "two holders", "topic": "commit", "equivalent": False, "argument": ""}
EXAMPLES = {
    "explorer": {"schedules": 20000, "seconds": 100.0, "per_second": 200.0, "operations": 1234567, "faults": {"crash": 7}, "violations": 0},
    "mutants": [
        {**MUTANT, "name": "no-fence", "found": {"explorer": 2.5, "chaos": None}},
        {**MUTANT, "name": "same", "equivalent": True, "argument": "the index is unique", "found": {"explorer": None}},
        {**MUTANT, "name": "not-the-same", "equivalent": True, "argument": "refuted by the explorer", "found": {"explorer": 7.0}},
        {**MUTANT, "name": "unseen", "harm": "a | b", "topic": "wait", "found": {"chaos": None}},
    ],
    "nemesis": {
        **{"runs": 4000, "seconds": 600, "lost": 0, "wedged": 0, "duplicates": 0, "recovery_p50_s": 0.1, "recovery_p99_s": 2.25},
        "faults": [
            {"name": "step-down", "times": 9, "lost": 0, "wedged": 0, "duplicates": 0, "recovery_p50_s": 1.5, "recovery_p99_s": None}
        ],
        "left_out": {"disk-full": "needs root"},
    },
    "soak": {
        **{"runs": 1000000, "seconds": 3600.0, "runs_per_second": 277.8, "workers": 2},
        **{"seen": {"plain": 9}, "wrong": [], "not_flat": ["client threads"]},
        "verdicts": [{"name": "client threads", "flat": False, "thirds": [1, 2, 3], "slope_per_100k_runs": 2.0}],
        "series": {"client threads": [[1, 1.0], [2, 2.0]], "server connections": [[1, 3.0]]},
    },
}  # fmt: skip


def test_the_committed_page_and_plot_are_what_the_stored_results_give() -> None:
    """A figure that was edited by hand is no measurement."""
    assert PAGE.read_text("utf-8") == render(), "make reliability RELIABILITY_ARGS='--part page'"
    drawn = render_plot()
    assert drawn is None or PLOT.read_text("utf-8") == drawn


def test_every_test_that_the_page_names_exists() -> None:
    named = {test for promise in PROMISES for test in promise.tests} | {test for _, test in CLOCKS}
    assert named <= set(re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", render()))
    for test in named:
        path, _, name = test.partition("::")
        text = (results.ROOT / path).read_text("utf-8")
        assert re.search(rf"def {name or 'test_'}", text), test


def test_a_part_that_was_not_measured_says_so(tmp_path: Path) -> None:
    assert render(tmp_path).count("Not measured.\n") >= len(EXAMPLES)
    assert render_plot(tmp_path) is None


def test_every_figure_of_a_result_is_on_the_page(tmp_path: Path) -> None:
    for part, result in EXAMPLES.items():
        results.store(part, result, {"commit": "abc", "date": "2026-11-29", "machine": "2 cores"}, tmp_path)

    page = render(tmp_path)

    assert "\nNot measured.\n" not in page
    assert "20,000 schedules with 1,234,567 operations in 100 s (200 a second). Violations: **0**" in page
    assert "4 mutants: 2 found, 1 equivalent, **1** not found" in page
    assert "| `no-fence` | commit | two holders | 2.50 s | no |" in page
    assert "| `unseen` | wait | a \\| b |  | no |" in page
    assert "| `same` | the index is unique |" in page
    assert "refuted by the explorer" not in page
    assert "| step-down | 9 | 0 | 0 | 0 | 1.50 s | – |" in page
    assert "- disk-full: needs root" in page
    assert "Series that are not flat: **client threads**" in page


def test_the_plot_is_light_and_has_a_line_for_each_series(tmp_path: Path) -> None:
    """A plot is stored with every soak, so a heavy one would soon be most of the repository."""
    results.store("soak", EXAMPLES["soak"], {}, tmp_path)
    drawn = render_plot(tmp_path)
    assert drawn is not None and drawn.count("<polyline") == 2
    assert not PLOT.exists() or PLOT.stat().st_size < 100 * 1024
