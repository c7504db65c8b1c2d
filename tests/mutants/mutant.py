"""One planted bug, as data: a text of the protocol code, and the text that replaces it.

Owns the form of a mutant, and how it is applied to a source text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

__all__ = ["DisarmedError", "Edit", "Mutant", "mutants_of", "mutated"]


class DisarmedError(Exception):
    """The text that a mutant replaces is not exactly once in its file: a change of the source has disarmed the mutant."""


class Edit(NamedTuple):
    """One replacement in one file."""

    file: str  # from the top of the repository
    old: str  # it stands in the file exactly once
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A small bug in the protocol. `python -m tests.mutants --names NAME` shows which tests find it."""

    name: str
    part: str  # of the protocol: the topic under which it stands
    file: str  # as in `Edit`; so are the next two
    old: str
    new: str
    harm: str  # one sentence: what goes wrong with a run
    also: tuple[Edit, ...] = ()  # further edits, without which it would be no bug
    likely: tuple[str, ...]  # test files, from `tests/`, that should find it; they are run first
    explorer: tuple[str, ...] = ()  # further arguments of the explorer
    beyond_explorer: str | None = None  # why no schedule of the explorer can show it; another test must find it
    equivalent: str | None = None  # why no test can find it: a second guard does the same; None: a test must find it

    def edits(self) -> tuple[Edit, ...]:
        """All replacements, in the order in which they are made."""
        return (Edit(self.file, self.old, self.new), *self.also)


def mutants_of(part: str, *likely: str, kinds: str = "") -> Callable[..., Mutant]:
    """`Mutant` for one part of the protocol, with the test files that are likely to find a mutant of it.

    `kinds`: the workflows of the explorer's schedules that use this part; empty: all.
    """
    return partial(Mutant, part=part, likely=likely, explorer=("--kinds", kinds) if kinds else ())


def mutated(texts: dict[str, str], edits: Sequence[Edit]) -> dict[str, str]:
    """The texts of the files that the edits change, after the edits. `texts` are those before, by file. Raises DisarmedError."""
    changed = dict(texts)
    for edit in edits:
        found = changed[edit.file].count(edit.old)
        if found != 1:
            raise DisarmedError(f"{edit.file}: this text is there {found} times, and must be there once:\n{edit.old}")
        changed[edit.file] = changed[edit.file].replace(edit.old, edit.new)
    return changed
