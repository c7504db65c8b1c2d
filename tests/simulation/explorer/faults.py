"""What can go wrong at one operation, as data.

Owns the kinds of faults and how likely each is at which operation. world.py performs them.
"""

from __future__ import annotations

from typing import NamedTuple

from .choices import Choices
from .duels import Duel
from .store import Request

__all__ = ["CORE", "KINDS", "Theme", "draw_fault", "draw_theme"]

KINDS = (
    "request lost",  # the server never gets it; the sender gets an error
    "reply lost",  # the server performs it; the sender gets an error
    "late",  # the sender gets an error; the server performs it later
    "half done",  # a write of several documents changes some of them; the sender gets an error
    "slow reply",  # performed, but the reply comes some time later
    "crash before",  # the sender dies; the server never gets it
    "crash after",  # the sender dies; the server performs it
    "freeze before",  # the sender stops for some time, then its request is performed
    "freeze after",  # performed, then the sender stops for some time
    "outage",  # this operation and all others of some time fail
    "outage after",  # the server performs it; the sender gets an error, and so do all others for some time
    "lag",  # from now on no write reaches a majority; this ends by catching up or by a fail-over
    "majority too late",  # the same, and the server says that this write was not acknowledged in time
    "clock jump",  # the clock of the sender's host jumps
    "full",  # the server refuses a commit, because the document would outgrow 16 MiB
    "driver lost",  # a defect ends what drives a run; at any time, and at no operation
    "server clock",  # the clock of the server is set back, or a primary takes over whose clock is behind
)

CORE = frozenset(
    {
        "claim_run", "claim_runs", "read_claimed", "commit_runs", "read_fences", "read_held", "renew", "recover_expired", "release_owner",
        "cancel_run", "pause_run", "unpause_run", "rewind_run", "answer_wait", "answer_hook", "deliver_event", "deliver_to_waiters",
        "record_event", "settle_event", "find_event_for", "insert_runs", "get_run", "find_waiters", "read_delivered",
    }
)  # fmt: skip
"""Names of the operations by which the protocol decides. Faults prefer them."""
_HARMFUL = (
    "late",
    "late",
    "freeze before",
    "freeze before",
    "freeze after",
    "crash after",
    "reply lost",
    "lag",
    "majority too late",
    "outage",
)
"""Kinds that have found the most planted bugs: themes prefer them."""
_AT_OPERATIONS = tuple(kind for kind in KINDS if kind != "driver lost")
_OF_WRITES = ("late", "lag", "majority too late", "reply lost", "half done", "outage after")
"""Kinds that mean little for a read: a theme of these leaves reads alone."""
_FIRST, _AGAIN = 0.8, 0.25  # the chances of a fault that strikes one operation only: until it has, and after that

_OF_COMMITS = ("full", "server clock")
"""Kinds that matter at the commits of lease holders."""


class Theme(NamedTuple):
    """The one kind of fault of a schedule."""

    kind: str
    at: str | None  # the name of the only operations that it strikes; None: any


def draw_theme(choices: Choices, duel: Duel | None) -> Theme | None:
    """The theme of a schedule that has one."""
    if choices.profile.name != "themed":
        return None
    drawn = choices.fixed.choice((*KINDS, *_HARMFUL))
    if duel is None or duel.theme is None:
        return Theme(drawn, None)
    kind, _, at = duel.theme.partition(" at ")
    return Theme(kind, at or None)


def draw_fault(choices: Choices, request: Request, theme: Theme | None, *, has_struck: bool) -> str | None:
    """The fault at this operation, or None. `has_struck`: there was one in this schedule."""
    profile = choices.profile
    if theme is not None and theme.at is not None:
        chance = _AGAIN if has_struck and theme.kind != "full" else _FIRST  # a full document stays full
        return theme.kind if request.name == theme.at and choices.happens(chance) else None
    kind = None if theme is None else theme.kind
    if kind in _OF_WRITES and not request.writes:
        return None
    if kind in _OF_COMMITS and request.name != "commit_runs":
        return None
    chance = profile.near_writes if request.name in CORE else profile.fault
    if request.call is not None and request.name in CORE:
        chance *= 2  # a client makes few calls
    if not chance or not choices.happens(chance):
        return None
    fault = kind or choices.one_of(_AT_OPERATIONS)
    return fault if fault in _AT_OPERATIONS and (fault not in _OF_COMMITS or request.name == "commit_runs") else None
