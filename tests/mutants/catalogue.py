"""All mutants. Owns the list, and the tenth of it that a day's run takes."""

from __future__ import annotations

from collections.abc import Sequence

from . import claims, control, events, fence, group_commit, leases, outputs_and_cleanup, recovery, starting, waits_and_hooks, waking
from .mutant import Mutant

__all__ = ["MUTANTS", "named", "tenth"]

MUTANTS: tuple[Mutant, ...] = (
    *fence.MUTANTS,
    *claims.MUTANTS,
    *leases.MUTANTS,
    *recovery.MUTANTS,
    *control.MUTANTS,
    *waits_and_hooks.MUTANTS,
    *events.MUTANTS,
    *starting.MUTANTS,
    *group_commit.MUTANTS,
    *outputs_and_cleanup.MUTANTS,
    *waking.MUTANTS,
)


def named(names: Sequence[str]) -> list[Mutant]:
    """The mutants of these names, in this order. Raises KeyError for a name that none has."""
    by_name = {mutant.name: mutant for mutant in MUTANTS}
    return [by_name[name] for name in names]


def tenth(mutants: Sequence[Mutant], number: int) -> list[Mutant]:
    """Every tenth of the mutants, from `number` (0 to 9) on. Ten numbers in a row have them all, and each has some of every part."""
    return list(mutants[number % 10 :: 10])
