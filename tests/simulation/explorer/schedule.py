"""Schedules by seed: played, replayed, shrunk, and told as a story.

Owns the life of a schedule around the world that plays it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from .choices import Choices
from .ledger import Violation
from .server import Server
from .world import World

__all__ = ["Played", "play", "shrink", "tell"]

SHRINK_TRIES = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What became of a schedule."""

    seed: int
    kinds: tuple[str, ...]
    violation: str | None
    record: tuple[int, ...]
    story: tuple[str, ...]
    operations: int
    faults: dict[str, int]
    entries: int
    virtual_s: float


def play(server: Server, uri: str, seed: int, record: Sequence[int] | None = None, kinds: Sequence[str] = ()) -> Played:
    """Play one schedule.

    `record`: the choices of an earlier one, instead of those of the seed. `kinds`: of its first workflow; empty: any.
    """
    choices = Choices(seed, record, kinds)
    world = World(server, uri, choices)
    logging.disable(logging.CRITICAL)
    violation = None
    try:
        world.run()
    except Violation as exc:
        violation = str(exc)
    finally:
        logging.disable(logging.NOTSET)
    return Played(
        seed=seed,
        kinds=tuple(kinds),
        violation=violation,
        record=tuple(choices.record),
        story=tuple(world.ledger.story),
        operations=world.operations,
        faults=world.harm.counts,
        entries=len(world.ledger.entries),
        virtual_s=world.loop.time(),
    )


def shrink(server: Server, uri: str, failed: Played, tries: int = SHRINK_TRIES) -> Played:
    """A shorter schedule that breaks a promise, too: choices are set to 0 in ever smaller groups, and the end is cut off."""
    best = failed
    size = max(1, len(best.record) // 2)
    while size and tries > 0:
        place = 0
        while place < len(best.record) and tries > 0:
            group = best.record[place : place + size]
            if any(group):
                tries -= 1
                found = play(server, uri, best.seed, _without(best.record, place, size), best.kinds)
                if found.violation is not None and _weight(found) < _weight(best):
                    best = found
            place += size
        size //= 2
    return best


def _without(record: Sequence[int], place: int, size: int) -> list[int]:
    changed = [*record[:place], *[0] * size, *record[place + size :]]
    while changed and changed[-1] == 0:
        changed.pop()
    return changed


def _weight(played: Played) -> tuple[int, int]:
    return sum(1 for choice in played.record if choice), len(played.story)


def tell(played: Played) -> str:
    """The schedule as a story that a person can read."""
    lines = [f"seed {played.seed}: {played.violation or 'no violation'}", *played.story]
    return "\n".join(lines)
