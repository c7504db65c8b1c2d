"""What the programs write is what the page expects."""

from __future__ import annotations

from typing import Any

from mutants.catalogue import named

from .forms import mutants_of, nemesis_of
from .parts import FOR_THE_NEMESIS

FAULT = {
    "turns": 4,
    "affected": 9,
    "never_went_on": 0,
    "lost": 0,
    "wedged": 1,
    "duplicates": 0,
    "recovery_p50_s": 0.2,
    "recovery_p99_s": None,
}


def test_a_mutant_keeps_who_found_it_and_how_fast_and_the_control_is_left_out() -> None:
    finding = {"verdict": "found", "seconds": 3.5, "by": "seed 7"}
    table: list[dict[str, Any]] = [
        {"name": None, "part": None, "harm": None, "equivalent": None, "found": False, "detectors": {}},
        {
            **{"name": "no-fence", "part": "commit", "harm": "two holders", "equivalent": None, "found": True},
            "detectors": {"explorer": finding, "quick": {**finding, "verdict": "missed"}},
        },
        {"name": "same", "part": "claim", "harm": "none", "equivalent": "the index is unique", "found": False, "detectors": {}},
        {
            "name": "far",
            "part": "ttl",
            "harm": "gone",
            "equivalent": None,
            "beyond_explorer": "takes a day",
            "found": True,
            "detectors": {},
        },
    ]

    first, second, third = mutants_of(table)

    assert first == {
        **{"name": "no-fence", "topic": "commit", "harm": "two holders", "equivalent": False, "argument": "", "beyond_explorer": ""},
        "found": {"explorer": 3.5, "quick": None},
    }
    assert (second["equivalent"], second["argument"]) == (True, "the index is unique")
    assert third["beyond_explorer"] == "takes a day"


def test_tables_are_joined_by_mutant_and_a_later_finding_counts() -> None:
    def row(name: str, **verdicts: str) -> dict[str, Any]:
        detectors = {detector: {"verdict": verdict, "seconds": 2.0, "by": ""} for detector, verdict in verdicts.items()}
        return {"name": name, "part": "p", "harm": "h", "equivalent": None, "found": True, "detectors": detectors}

    first, second = mutants_of([row("a", explorer="missed", quick="found"), row("b", quick="found")], [row("a", explorer="found")])

    assert (first["name"], first["found"]) == ("a", {"explorer": 2.0, "quick": 2.0})
    assert (second["name"], second["found"]) == ("b", {"quick": 2.0})


def test_every_mutant_for_the_nemesis_exists() -> None:
    assert [mutant.name for mutant in named(FOR_THE_NEMESIS)] == list(FOR_THE_NEMESIS)


def test_the_nemesis_keeps_its_totals_each_fault_and_what_it_left_out() -> None:
    totals = {"runs": 5, "seconds": 9.0, "lost": 0, "wedged": 1, "duplicates": 0, "recovery_p50_s": 0.2, "recovery_p99_s": 1.0}

    result = nemesis_of({**totals, "faults": {"step-down": FAULT}, "left_out": {"disk-full": "needs root"}, "seed": 1})

    expected = {"name": "step-down", "times": 4, "lost": 0, "wedged": 1, "duplicates": 0, "recovery_p50_s": 0.2, "recovery_p99_s": None}
    assert result == {**totals, "faults": [expected], "left_out": {"disk-full": "needs root"}}
