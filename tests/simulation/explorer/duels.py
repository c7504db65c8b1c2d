"""Duels: short sequences of calls, each with the fault that it needs, that have met planted bugs. Data.

Owns these sequences. workload.py draws one of them, or calls at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["DUELS", "ENDED", "LONG", "PARKED", "WAITING", "WHEN", "Duel"]


@dataclass(frozen=True, slots=True)
class Duel:
    """A sequence of calls that has met planted bugs, and the one kind of fault that it needs, if it needs one; perhaps `at` one operation.

    A call is `kind`, then perhaps the place of a step or of a token, then perhaps when: `early`, `soon`, `at commit`, `at claim`,
    `at claiming` (a worker has sent a claim), `at call` (another client has sent a write), `at copying` (to the archive),
    `after hook` (a handler has made one),
    `waiting`, `parked` or `ended` (once a run waits, waits without a lease, or has ended).
    """

    theme: str | None
    calls: tuple[str, ...]
    rival: tuple[str, ...]  # of another client at the same time
    is_long: bool  # several runs side by side, whose handlers work for longer than renewals and faults take


def _duel(theme: str | None, *calls: str, rival: tuple[str, ...] = (), is_long: bool = False) -> Duel:
    return Duel(theme, calls, rival, is_long)


SOON = ("done", "call")
WAITING, PARKED, ENDED = ("run", "waits"), ("run", "parks"), ("run", "ends")
COMMIT, CLAIM = ("sent", "commit_runs"), ("done", "claim")
DUELS: dict[str, tuple[Duel, ...]] = {
    "wait": (
        _duel("late", "answer waiting", "rewind", "answer waiting"),
        _duel("late", "answer waiting", "rewind", "pause waiting"),
        _duel("late at pause_run", "pause", "resume", "pause"),
        _duel(None, "pause", "resume", "answer"),
        _duel(None, "answer waiting", rival=("cancel waiting",)),
        _duel(None, "pause waiting", "stray wake-up"),
        _duel(None, "event waiting", "pause at commit", "resume"),
        _duel(None, "stray wake-up waiting", "answer"),
        _duel(None, "stray wake-up waiting", "pause at commit", "resume"),
        _duel("late at answer_wait", "answer waiting", "rewind", "pause waiting"),
        _duel("late at answer_wait", "answer waiting", "rewind", "answer waiting"),
        _duel("server clock"),
        _duel("reply lost at rewind_run", "rewind waiting", rival=("pause waiting", "resume soon", "pause soon")),
        _duel("reply lost at pause_run", "pause waiting", rival=("resume soon", "pause soon")),
    ),
    "code": (
        _duel("late", "answer waiting", "rewind", "answer waiting"),
        _duel("late", "rewind 1 at commit", "pause at commit", "resume"),
        _duel("late at pause_run", "pause at commit", "resume at commit"),
        _duel("reply lost", "answer waiting", rival=("pause waiting", "resume soon")),
        _duel(None, "rewind 2 at commit", rival=("pause at commit", "resume soon")),
        _duel(None, "drain"),
        _duel(None, "cancel at commit"),
    ),
    "waits": (
        _duel("late", "answer waiting", "answer waiting"),
        _duel("late", "answer waiting", "rewind", "answer waiting"),
        _duel("reply lost", "answer waiting", "answer waiting"),
    ),
    "hook": (
        _duel("late", "hook waiting", "rewind", "hook 1 waiting"),
        _duel("late", "hook waiting", "rewind", "hook waiting"),
        _duel(None, "hook", "rewind", "hook 1 waiting"),
        _duel(None, "hook 1", "hook"),
        _duel(None, "pause", "hook", "resume"),
        _duel(None, "forged hook early", "forged hook waiting"),
        _duel(None, "hook after hook", "rewind", "hook waiting"),
        _duel("late", "hook after hook", "rewind", "pause after hook"),
        _duel(None, "hook after hook", rival=("hook after hook",)),
        _duel(None, "hook waiting", rival=("cancel waiting",)),
        _duel(None, "hook 1 waiting"),
        _duel(None, "hook after hook", rival=("rewind at call",)),
        _duel("slow reply", "hook after hook", rival=("rewind at call", "rewind after hook")),
    ),
    "hooks": (
        _duel("late", "hook waiting", "hook waiting"),
        _duel(None, "hook", "hook 1 waiting", "hook"),
        _duel(None, "hook after hook", "hook 1 waiting", "hook 1 waiting"),
        _duel("late", "hook after hook", "hook waiting"),
    ),
    "event": (
        _duel("late", "event waiting", "rewind", "event waiting"),
        _duel(None, "event to all", "rewind"),
        _duel(None, "pause", "event", "resume"),
        _duel("server clock", "event", "pause", "resume"),
        _duel("server clock"),
        _duel(None, "event waiting", rival=("cancel waiting",)),
        _duel(None, "event to all early", "start 1", "start 1"),
        _duel(None, "resume waiting", "pause at claim", "resume"),
        _duel(None, "event to all early", "clean up expired", "rewind"),
        _duel(None, "event to all waiting", "event to all ended", "clean up expired", "rewind"),
        _duel(None, "stray wake-up waiting", "pause at commit", "resume"),
        _duel("crash after", "event to all early", rival=("clean up expired", "clean up expired", "rewind")),
        _duel("crash after", "event to all early", rival=("start 1 at call", "start 1")),
        _duel(None, "stray wake-up waiting", "event"),
        _duel("crash after", "event to all waiting"),
        _duel("crash before", "event to all waiting"),
        _duel("crash after at record_event", "event to all early", rival=("start 1 at call", "start 1")),
        _duel("crash after at settle_event", "event to all parked"),
        _duel("crash before at find_waiters", "event to all parked"),
        _duel("crash before at find_event_for", "event to all early"),
        _duel("crash after at commit_runs", "event to all early"),
        _duel("crash after at commit_runs"),
        _duel(None, "event to all at commit"),
        _duel(None, "event waiting", rival=("cancel at call",)),
        _duel("freeze before at commit_runs"),
    ),
    "events": (
        _duel("late", "event to all waiting", "event to all waiting"),
        _duel(None, "event early", "event early"),
        _duel(None, "event to all early", "start 1", "event to all"),
        _duel("crash after", "event to all early", "start 1"),
        _duel(None, "event to all early", "event to all early", rival=("event to all early",)),
        _duel("reply lost", "event", "event waiting"),
        _duel("late", "event waiting", "event waiting"),
        _duel("crash after", "event to all", "rewind 1"),
        _duel("crash after", "event to all early", rival=("start 1 at call", "start 1")),
    ),
    "chain": (
        _duel(None, "start mine early", rival=("start mine early",)),
        _duel("request lost", "start mine early", rival=("start mine early",)),
        _duel(None, "start again 1", "start again 1"),
        _duel("late at pause_run", "pause", "resume"),
        _duel("late", "resume", "pause", "resume"),
        _duel("late", "rewind", "rewind 1", "rewind"),
        _duel(None, "pause at commit", "resume at commit"),
        _duel(None, "pause at claim"),
        _duel(None, "cancel at commit"),
        _duel(None, "cancel at claim"),
        _duel("reply lost", "pause", "pause", rival=("resume soon", "resume soon")),
        _duel("reply lost", "rewind", "pause", rival=("pause soon", "resume soon")),
        _duel("reply lost", "cancel"),
        _duel("late", "cancel at commit", "rewind"),
        _duel(None, "rewind 1", "clean up", "rewind"),
        _duel(None, "clean up", "start again"),
        _duel(None, "archive", "rewind", "archive"),
        _duel("late", "rewind", "archive", "archive"),
        _duel(None, "clean up expired", "clean up expired"),
        _duel("majority too late", "pause", "resume", "rewind"),
        _duel("majority too late", "cancel"),
        _duel("lag", "pause", rival=("pause soon", "pause soon")),
        _duel("lag", "pause", "resume", rival=("cancel soon", "resume soon", "resume soon")),
        _duel("driver lost"),
        _duel("full", "rewind at commit", "rewind at commit"),
        _duel("full", "cancel at commit"),
        _duel(None, "stray wake-up", "pause", "stray wake-up", "stray wake-up"),
        _duel(None, "pause early", "stray wake-up early", "execute early"),
        _duel(None, "stray wake-up ended", "execute early"),
        _duel("driver lost", "rewind"),
        _duel("late at cancel_run", "rewind 2 ended", "cancel at commit", "rewind ended", "pause"),
        _duel(None, "cancel at claiming", "stray wake-up early"),
        _duel(None, "pause at claiming", "stray wake-up early"),
        _duel(None, "start later"),
        _duel("freeze before at commit_runs"),
        _duel("reply lost at commit_runs"),
        _duel(None, "clean up expired ended", rival=("rewind at call",)),
        _duel(None, "clean up ended", rival=("rewind at call",)),
    ),
    "large": (
        _duel("crash after", "rewind 2", "archive"),
        _duel(None, "clean up", "rewind"),
        _duel("freeze before"),
        _duel(None, "start mine early", rival=("start mine early",)),
        _duel("driver lost", is_long=True),
        _duel("crash after at commit_runs"),
        _duel("crash after at copy_runs", "archive ended", rival=("rewind at call",)),
        _duel("crash after at copy_runs", "archive ended", rival=("rewind 2 at call",)),
        _duel(None, "archive ended", "archive", "archive", rival=("rewind at copying",)),
    ),
    "mixed": (
        _duel(None, "hook", "event", "rewind 1"),
        _duel(None, "event", "hook"),
        _duel("lag", "cancel at commit", "rewind"),
        _duel("late", "rewind", "hook"),
        _duel("freeze before", "rewind 1"),
        _duel("outage after at commit_runs"),
        _duel("reply lost at commit_runs"),
    ),
    "sleep": (
        _duel(None, "resume waiting", "pause at claim", "resume"),
        _duel("slow reply", "resume waiting", "rewind at claim"),
        _duel("slow reply", "resume waiting", "rewind at claim", "rewind waiting"),
        _duel(None, "pause", "resume"),
        _duel(None, "stray wake-up waiting", "pause at commit", "resume"),
        _duel(None, "rewind", "execute"),
        _duel("server clock"),
        _duel("server clock", "pause", "resume"),
    ),
    "retry": (
        _duel("server clock"),
        _duel("slow reply", "rewind at claim", "rewind at claim"),
        _duel("lag", "pause at commit", "resume at commit"),
        _duel(None, "pause at commit", "resume at commit", rival=("pause at commit", "resume at commit")),
        _duel("full at commit_runs", "cancel at commit"),
        _duel("full at commit_runs", "rewind at commit"),
        _duel("freeze before at commit_runs"),
    ),
    "poison": (
        _duel(None, "rewind", "pause"),
        _duel("crash after"),
        _duel("freeze after", "cancel"),
        _duel("freeze after", is_long=True),
    ),
    "choice": (
        _duel(None, "pause at claim", "resume"),
        _duel(None, "pause at commit", "resume at commit"),
        _duel("freeze after"),
        _duel("late at commit_runs", "pause at commit", "resume"),
        _duel("late at commit_runs", "pause at commit", "resume at commit"),
    ),
}
"""By the kind of the first workflow."""

WHEN: Mapping[str, tuple[str, str] | float] = {
    "early": 0.0,
    "soon": SOON,
    "at commit": COMMIT,
    "at claim": CLAIM,
    "at claiming": ("sent", "claim"),
    "after hook": ("done", "hook"),
    "at call": ("sent", "call"),
    "at copying": ("done", "copy_runs"),
    "waiting": WAITING,
    "parked": PARKED,
    "ended": ENDED,
}
"""The words of a call → when it is made."""

LONG = (
    _duel("outage"),
    _duel("outage", "cancel"),
    _duel("slow reply"),
    _duel("slow reply"),
    _duel("freeze after"),
    _duel("freeze before", "rewind"),
    _duel("late"),
    _duel("majority too late"),
    _duel("majority too late", "pause", "resume"),
    _duel("driver lost"),
    _duel("driver lost"),
    _duel("driver lost", "rewind"),
    _duel("reply lost", "cancel"),
    _duel("reply lost", "cancel"),
    _duel("reply lost", "rewind", "cancel"),
    _duel(None, "cancel"),
    _duel(None, "rewind", "rewind", "rewind"),
    _duel(None, "rewind at claim", "rewind at commit", "cancel"),
    _duel("reply lost at cancel_run", "cancel"),
    _duel("driver lost"),
)
"""For every kind of workflow, with handlers that work for longer than renewals and faults take."""
