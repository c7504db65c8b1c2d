"""The table of mutants and what finds them. Owns its lines, its JSON form, and when a run of the command has failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .detectors import Finding, Verdict
from .mutant import Mutant

__all__ = ["Row", "as_json", "has_failed", "line", "summary"]

_NAME_WIDTH = 52


@dataclass(frozen=True, slots=True)
class Row:
    """One mutant, and what each detector that ran has found. A mutant of None is the tree as it is."""

    mutant: Mutant | None
    findings: Mapping[str, Finding]

    @property
    def is_found(self) -> bool:
        """True if a detector has found something."""
        return any(finding.verdict is Verdict.FOUND for finding in self.findings.values())

    @property
    def is_broken(self) -> bool:
        """True if a detector could not run, which says nothing about the mutant."""
        return any(finding.verdict is Verdict.BROKEN for finding in self.findings.values())


def line(row: Row) -> str:
    """One line of the table."""
    name = "(no mutant)" if row.mutant is None else row.mutant.name
    marked = f"{name} (equivalent)" if row.mutant is not None and row.mutant.equivalent else name
    words = {Verdict.MISSED: "green"} if row.mutant is None else {}  # there is nothing to be found
    findings = row.findings.items()
    cells = [
        f"{detector} {words.get(found.verdict, found.verdict)} {found.seconds:.1f} s {found.by}".rstrip() for detector, found in findings
    ]
    return f"{marked:<{_NAME_WIDTH}} {' | '.join(cells)}"


def has_failed(rows: Sequence[Row]) -> bool:
    """True if a mutant that is a bug was found by no detector, or a detector could not run, or the tree as it is was not green."""
    return any(row.is_broken or _is_wrong(row) for row in rows)


def _is_wrong(row: Row) -> bool:
    if row.mutant is None:
        return any(finding.verdict is not Verdict.MISSED for finding in row.findings.values())
    return not row.is_found and row.mutant.equivalent is None


def summary(rows: Sequence[Row]) -> str:
    """The last line: how many were found, and the names of those that were not."""
    mutants = [row for row in rows if row.mutant is not None]
    missed = [row.mutant.name for row in mutants if row.mutant is not None and _is_wrong(row)]
    equivalent = sum(row.mutant is not None and row.mutant.equivalent is not None and not row.is_found for row in mutants)
    found = sum(row.is_found for row in mutants)
    text = f"{len(mutants)} mutants: {found} found, {len(missed)} missed, {equivalent} equivalent"
    return f"{text}; missed: {', '.join(missed)}" if missed else text


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The table for programs."""
    return [
        {
            "name": None if row.mutant is None else row.mutant.name,
            "part": None if row.mutant is None else row.mutant.part,
            "harm": None if row.mutant is None else row.mutant.harm,
            "equivalent": None if row.mutant is None else row.mutant.equivalent,
            "beyond_explorer": None if row.mutant is None else row.mutant.beyond_explorer,
            "found": row.is_found,
            "detectors": {
                detector: {"verdict": str(finding.verdict), "seconds": round(finding.seconds, 1), "by": finding.by}
                for detector, finding in row.findings.items()
            },
        }
        for row in rows
    ]
