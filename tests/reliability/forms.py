"""Brings what the measuring programs write to the form that is stored and rendered. Owns these two forms; it measures nothing.

A mutant: `{name, topic, harm, equivalent, argument, beyond_explorer, found: {detector: seconds or None}}`. The nemesis: its totals, and
`faults` as a list of `{name, times, lost, wedged, duplicates, recovery_p50_s, recovery_p99_s}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["mutants_of", "nemesis_of"]

_TOTALS = ("runs", "seconds", "lost", "wedged", "duplicates", "recovery_p50_s", "recovery_p99_s")
_OF_FAULT = ("lost", "wedged", "duplicates", "recovery_p50_s", "recovery_p99_s")


def mutants_of(*tables: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tables of `python -m tests.mutants`, joined by mutant, without the row of the tree as it is. A later finding of a detector counts."""
    mutants: dict[str, dict[str, Any]] = {}
    for row in (row for table in tables for row in table if row["name"] is not None):
        mutant = _mutant(row)
        mutants[row["name"]] = {**mutant, "found": {**mutants.get(row["name"], mutant)["found"], **mutant["found"]}}
    return list(mutants.values())


def _mutant(row: Mapping[str, Any]) -> dict[str, Any]:
    detectors = row["detectors"]
    found = {name: finding["seconds"] if finding["verdict"] == "found" else None for name, finding in detectors.items()}
    argument = row["equivalent"] or ""
    return {
        **{"name": row["name"], "topic": row["part"], "harm": row["harm"]},
        **{"equivalent": bool(argument), "argument": argument, "beyond_explorer": row.get("beyond_explorer") or "", "found": found},
    }


def nemesis_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report of `streamline-pool chaos`: figures and the list of faults. `left_out` says why a fault was not made here."""
    faults = [{"name": name, "times": row["turns"], **{key: row[key] for key in _OF_FAULT}} for name, row in report["faults"].items()]
    return {**{key: report[key] for key in _TOTALS}, "faults": faults, "left_out": dict(report.get("left_out", {}))}
