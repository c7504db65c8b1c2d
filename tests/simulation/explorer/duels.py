"""Duels: short sequences of calls, each with the fault that it needs, that have met planted bugs. Data.

Owns these sequences. workload.py draws one of them, or calls at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["DUELS", "LONG", "WAITING", "WHEN", "Duel"]


@dataclass(frozen=True, slots=True, init=False)
class Duel:
    """A sequence of calls that has met planted bugs, and the one kind of fault that it needs, if it needs one.

    A call is `kind`, then perhaps the place of a step or of a token, then perhaps when: `early`, `soon`, `at commit`, `at claim`,
    `after hook` (a handler has made one), `waiting` (once a run waits).
    """

    theme: str | None
    calls: tuple[str, ...]
    rival: tuple[str, ...]  # of another client at the same time

    def __init__(self, theme: str | None, *calls: str, rival: tuple[str, ...] = ()) -> None:
        object.__setattr__(self, "theme", theme)
        object.__setattr__(self, "calls", calls)
        object.__setattr__(self, "rival", rival)


SOON = ("done", "call")
WAITING = ("run", "waits")
COMMIT, CLAIM = ("sent", "commit_runs"), ("done", "claim")
DUELS: dict[str, tuple[Duel, ...]] = {
    "wait": (
        Duel("late", "answer waiting", "rewind", "answer waiting"),
        Duel("late", "answer waiting", "rewind", "pause waiting"),
        Duel("late", "pause", "resume", "pause"),
        Duel(None, "pause", "resume", "answer"),
        Duel(None, "answer waiting", rival=("cancel waiting",)),
        Duel(None, "pause waiting", "stray wake-up"),
    ),
    "waits": (
        Duel("late", "answer waiting", "answer waiting"),
        Duel("late", "answer waiting", "rewind", "answer waiting"),
        Duel("reply lost", "answer waiting", "answer waiting"),
    ),
    "hook": (
        Duel("late", "hook waiting", "rewind", "hook 1 waiting"),
        Duel("late", "hook waiting", "rewind", "hook waiting"),
        Duel(None, "hook", "rewind", "hook 1 waiting"),
        Duel(None, "hook 1", "hook"),
        Duel(None, "pause", "hook", "resume"),
        Duel(None, "forged hook early", "forged hook waiting"),
        Duel(None, "hook after hook", "rewind", "hook waiting"),
        Duel("late", "hook after hook", "rewind", "pause after hook"),
        Duel(None, "hook after hook", rival=("hook after hook",)),
        Duel(None, "hook waiting", rival=("cancel waiting",)),
        Duel(None, "hook 1 waiting"),
    ),
    "hooks": (
        Duel("late", "hook waiting", "hook waiting"),
        Duel(None, "hook", "hook 1 waiting", "hook"),
        Duel(None, "hook after hook", "hook 1 waiting", "hook 1 waiting"),
        Duel("late", "hook after hook", "hook waiting"),
    ),
    "event": (
        Duel("late", "event waiting", "rewind", "event waiting"),
        Duel(None, "event to all", "rewind"),
        Duel(None, "pause", "event", "resume"),
        Duel("server clock", "event", "pause", "resume"),
        Duel("server clock"),
        Duel(None, "event waiting", rival=("cancel waiting",)),
        Duel(None, "event to all early", "start 1", "start 1"),
        Duel(None, "resume waiting", "pause at claim", "resume"),
        Duel(None, "event to all early", "clean up expired", "rewind"),
        Duel("crash after", "event to all early", rival=("clean up expired", "clean up expired", "rewind")),
    ),
    "events": (
        Duel("late", "event to all waiting", "event to all waiting"),
        Duel(None, "event early", "event early"),
        Duel(None, "event to all early", "start 1", "event to all"),
        Duel("crash after", "event to all early", "start 1"),
        Duel(None, "event to all early", "event to all early", rival=("event to all early",)),
        Duel("reply lost", "event", "event waiting"),
        Duel("late", "event waiting", "event waiting"),
        Duel("crash after", "event to all", "rewind 1"),
    ),
    "chain": (
        Duel(None, "start mine early", rival=("start mine early",)),
        Duel(None, "start again 1", "start again 1"),
        Duel("late", "pause", "resume", "pause"),
        Duel("late", "resume", "pause", "resume"),
        Duel("late", "rewind", "rewind 1", "rewind"),
        Duel(None, "pause at commit", "resume at commit"),
        Duel(None, "pause at claim"),
        Duel(None, "cancel at commit"),
        Duel(None, "cancel at claim"),
        Duel("reply lost", "pause", "pause", rival=("resume soon", "resume soon")),
        Duel("reply lost", "rewind", "pause", rival=("pause soon", "resume soon")),
        Duel("reply lost", "cancel"),
        Duel(None, "rewind 1", "clean up", "rewind"),
        Duel(None, "clean up", "start again"),
        Duel(None, "archive", "rewind", "archive"),
        Duel("late", "rewind", "archive", "archive"),
        Duel(None, "clean up expired", "clean up expired"),
        Duel("majority too late", "pause", "resume", "rewind"),
        Duel("majority too late", "cancel"),
        Duel("driver lost"),
        Duel("full", "rewind at commit", "rewind at commit"),
        Duel("full", "cancel at commit"),
        Duel(None, "stray wake-up", "pause", "stray wake-up", "stray wake-up"),
    ),
    "large": (Duel("crash after", "rewind 2", "archive"), Duel(None, "clean up", "rewind")),
    "mixed": (
        Duel(None, "hook", "event", "rewind 1"),
        Duel(None, "event", "hook"),
        Duel("lag", "cancel at commit", "rewind"),
        Duel("late", "rewind", "hook"),
    ),
    "sleep": (
        Duel(None, "resume waiting", "pause at claim", "resume"),
        Duel("slow reply", "resume waiting", "rewind at claim"),
        Duel("slow reply", "resume waiting", "rewind at claim", "rewind waiting"),
        Duel(None, "pause", "resume"),
        Duel(None, "rewind", "execute"),
        Duel("server clock"),
        Duel("server clock", "pause", "resume"),
    ),
    "retry": (
        Duel("server clock"),
        Duel("slow reply", "rewind at claim", "rewind at claim"),
        Duel("lag", "pause at commit", "resume at commit"),
    ),
    "poison": (Duel(None, "rewind", "pause"), Duel("crash after"), Duel("freeze after", "cancel")),
}
"""By the kind of the first workflow."""

WHEN: Mapping[str, tuple[str, str] | float] = {
    "early": 0.0,
    "soon": SOON,
    "at commit": COMMIT,
    "at claim": CLAIM,
    "after hook": ("done", "hook"),
    "waiting": WAITING,
}
"""The words of a call → when it is made."""

LONG = (
    Duel("outage"),
    Duel("outage", "cancel"),
    Duel("slow reply"),
    Duel("slow reply"),
    Duel("freeze after"),
    Duel("freeze before", "rewind"),
    Duel("late"),
    Duel("majority too late"),
    Duel("majority too late", "pause", "resume"),
    Duel("driver lost"),
    Duel("driver lost", "rewind"),
    Duel("reply lost", "cancel"),
    Duel("reply lost", "rewind", "cancel"),
    Duel(None, "cancel"),
    Duel(None, "rewind", "rewind", "rewind"),
    Duel(None, "rewind at claim", "rewind at commit", "cancel"),
)
"""For every kind of workflow, with handlers that work for longer than renewals and faults take."""
