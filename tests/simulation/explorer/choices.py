"""The decisions of one schedule: drawn from a seed, recorded, and replayed from a record.

Owns the record. A decision is a whole number; 0 always means "nothing special". So a schedule is shrunk by making numbers 0
and by cutting the end off.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["PROFILES", "THEMED", "Choices", "Profile"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """How a schedule is drawn."""

    name: str
    fault: float  # chance of a fault at an operation
    near_writes: float  # the same for writes of the protocol's core: claims, commits, renewals, recoveries, clients' calls
    reorder: float  # chance that another operation than the oldest is next
    delay: float  # chance that time passes although operations are under way


PROFILES = (
    Profile(name="uniform", fault=0.04, near_writes=0.04, reorder=0.5, delay=0.03),
    Profile(name="biased", fault=0.004, near_writes=0.10, reorder=0.25, delay=0.01),
    Profile(name="rare", fault=0.002, near_writes=0.025, reorder=0.15, delay=0.005),
    Profile(name="themed", fault=0.0, near_writes=0.2, reorder=0.2, delay=0.01),  # one kind of fault only
    Profile(name="orders", fault=0.0, near_writes=0.0, reorder=0.7, delay=0.04),
    Profile(name="calm", fault=0.0, near_writes=0.0, reorder=0.3, delay=0.0),  # every hint arrives: see promptness.py
)
THEMED = next(profile for profile in PROFILES if profile.name == "themed")
_SHARES = (1, 2, 1, 3, 1, 1)  # of these profiles


class Choices:
    """Decisions by a seed, or by the record of an earlier schedule (then 0 after its end)."""

    def __init__(self, seed: int, record: Sequence[int] | None = None, kinds: Sequence[str] = ()) -> None:
        self.seed = seed
        self.kinds = kinds  # the first workflow is of one of these kinds; empty: of any
        self.record: list[int] = []
        self._given = record
        self._random = random.Random(seed)
        # Drawn apart from the record, so that a shrunken record keeps the schedule's profile and workload.
        self.fixed = random.Random(seed ^ 0x5EED)
        self.profile = self.fixed.choices(PROFILES, weights=_SHARES)[0]

    def happens(self, chance: float) -> bool:
        """True with this chance."""
        return bool(self._decide(lambda: int(self._random.random() < chance), 1))

    def number(self, below: int) -> int:
        """Uniform in [0, below)."""
        return self._decide(lambda: self._random.randrange(below), below - 1)

    def one_of(self, options: Sequence[T]) -> T:
        """One of these. The first is what a shrunken schedule takes."""
        return options[self.number(len(options))]

    def _decide(self, draw: object, highest: int) -> int:
        place = len(self.record)
        if self._given is None:
            value = draw()  # type: ignore[operator]
        else:
            value = min(self._given[place], highest) if place < len(self._given) else 0
        self.record.append(value)
        return int(value)
