"""The shapes of operations on the database, as frozen data.

Owns what a command, a query and a signal consist of. The other modules of this package make the operations, one module per
topic; storage/ performs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from streamline_pool.domain.errors import StoreUnavailableError, ValidationError

__all__ = [
    "Command", "Expression", "Fence", "Find", "Op", "Query", "Reply", "Signal", "Statement", "Tail", "Update",
    "all_or_refused", "change_one", "changed_document", "deleted", "error_text", "update_matching",
]  # fmt: skip

Query = dict[str, Any]
"""A filter."""

Expression = dict[str, Any]
"""An aggregation expression, or part of one."""

Update = dict[str, Any] | list[dict[str, Any]]
"""Update operators, or (a list) an update pipeline."""

Reply = Mapping[str, Any]
"""What the server answers to a command."""


def _ignored(_reply: Reply) -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One database command. `verb` names the command and takes the collection; `parse` turns the reply into the result."""

    name: str  # for logs, errors and fault injection
    collection: str  # without the prefix; "" for a command of the database itself
    verb: str
    body: Mapping[str, Any]
    parse: Callable[[Reply], Any] = _ignored
    writes: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Find:
    """One query. Yields a list of documents."""

    name: str
    collection: str
    filter: Mapping[str, Any]
    projection: Mapping[str, Any] | None = None
    sort: Sequence[tuple[str, int]] = field(default_factory=tuple)
    limit: int = 0  # 0: all
    hint: str | None = None  # name of the index
    seconds_max: float | None = None  # the server gives up after so long; None: no limit


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tail:
    """A tailing read of the signals that match `match`; for `Store.tail`.

    `after`: a tick that the server has given a signal; signals from about then on. None: all that the collection holds.
    """

    match: Mapping[str, Any]
    after: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """One hint. It is inserted without waiting for a reply, never repeated, and never part of a transaction."""

    name: str
    document: Mapping[str, Any]


Op = Command | Find | Signal


class Fence(NamedTuple):
    """What a lease holder's write must find unchanged: the run, the holder's claim, and the number of its writes."""

    run_id: str
    lease_id: str  # the claim id; new at every claim attempt, so no other holder ever has it
    rev: int
    token: int  # unchanged while no other process claims, recovers or controls the run


class Statement(NamedTuple):
    """One fenced write of a lease holder, as the group committer sends it together with others."""

    fence: Fence
    update: dict[str, Any]  # {"q", "u"}: an element of the `update` command
    size: int  # estimated bytes
    follows_form: bool = False  # another form of this write was sent before, and a late copy of it may be stored


def update_matching(name: str, query: Query, update: Update) -> Command:
    """Update every run that matches. Yields how many matched. `update_many` in storage/bulk_update.py performs it."""
    body = {"updates": [{"q": query, "u": update, "multi": True}]}
    return Command(name=name, collection="runs", verb="update", body=body, parse=all_or_refused)


def all_or_refused(reply: Reply) -> int:
    """How many runs matched. Raises ValidationError if the server refused one (`n` is then 0, although some may be updated)."""
    if reply.get("writeErrors"):
        raise ValidationError(f"MongoDB refuses to update one of the runs: {error_text(reply['writeErrors'][0])}")
    return int(reply["n"])


def change_one(name: str, query: Query, update: Update) -> Command:
    """Update one run. Yields the document as the update left it, or None when no run matched."""
    body = {"query": query, "update": update, "new": True}
    return Command(name=name, collection="runs", verb="findAndModify", body=body, parse=changed_document)


def changed_document(reply: Reply) -> Any:
    """The document in a reply of `findAndModify`, or None."""
    return reply.get("value")


def deleted(what: str) -> Callable[[Reply], int]:
    """The parser of a `delete` command. It yields how many documents there were. `what` names them in the StoreUnavailableError."""

    def parse(reply: Reply) -> int:
        if reply.get("writeErrors"):
            raise StoreUnavailableError(f"{what} could not be deleted: {error_text(reply['writeErrors'][0])}", transient=True)
        return int(reply["n"])

    return parse


def error_text(error: Mapping[str, Any]) -> str:
    """The server's words in an element of `writeErrors`, shortened."""
    return str(error.get("errmsg"))[:500]
