"""The shapes in which operations on the database are handed around. What they say is in ops.py, who runs them in store.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from streamline_pool.domain.errors import ValidationError

__all__ = ["Command", "Fence", "Find", "Op", "Reply", "Signal", "Statement", "Tail", "all_or_refused", "change_one", "update_matching"]

Document = dict[str, Any]
Reply = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One database command. `verb` names the command and takes the collection; `parse` makes the result of the reply."""

    name: str  # how logs, errors and fault injection call it
    collection: str  # without the prefix; "" for a command of the database itself
    verb: str
    body: Mapping[str, Any]
    parse: Callable[[Reply], Any] = lambda reply: None
    writes: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Find:
    """One query; yields a list of documents."""

    name: str
    collection: str
    filter: Mapping[str, Any]
    projection: Mapping[str, Any] | None = None
    sort: Sequence[tuple[str, int]] = field(default_factory=tuple)
    limit: int = 0
    hint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tail:
    """A tailing read of the signals written from `since` on; for store.py's `tail`."""

    filter: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """One hint: inserted without waiting for an answer, never repeated, never part of a transaction."""

    name: str
    document: Mapping[str, Any]


Op = Command | Find | Signal


class Fence(NamedTuple):
    """What a holder's write must find unchanged: the run, its own claim, and the count of its writes."""

    run_id: str
    lease_id: str  # the claim id; new at every claim attempt, so no other holder ever has it
    rev: int
    token: int  # unchanged for as long as nobody else has claimed, recovered or acted on the run


class Statement(NamedTuple):
    """One fenced write of a holder, as the group committer sends it together with others."""

    fence: Fence
    update: dict[str, Any]  # {"q", "u"}: an element of the `update` command
    size: int  # estimated bytes


def update_matching(name: str, query: Document, update: list[Document] | Document) -> Command:
    """Update whatever matches. Yields how many did; to be run by multi_update.py."""
    body = {"updates": [{"q": query, "u": update, "multi": True}]}
    return Command(name=name, collection="runs", verb="update", body=body, parse=all_or_refused)


def all_or_refused(reply: Reply) -> int:
    """How many matched; a ValidationError if the server refused one, whatever had been updated by then (`n` is 0)."""
    if reply.get("writeErrors"):
        raise ValidationError(f"MongoDB refuses to update one of the runs: {str(reply['writeErrors'][0].get('errmsg'))[:500]}")
    return int(reply["n"])


def change_one(name: str, query: Document, update: list[Document]) -> Command:
    body: Document = {"query": query, "update": update, "new": True}
    return Command(name=name, collection="runs", verb="findAndModify", body=body, parse=lambda reply: reply.get("value"))
