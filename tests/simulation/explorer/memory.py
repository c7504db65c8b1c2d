"""Replies of the server that need not be asked for again, because nothing has changed that they depend on.

Most operations of a schedule are the same few searches, which find the same while nothing is written. Owns the proof that a
reply is still right: the documents are the same, and each instant of the operation, the server's time among them, has the same
stored instants before and after it. That is enough for operations that only compare instants; test_explorer.py checks it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

__all__ = ["COMPARING", "Memory"]

COMPARING = frozenset({"find_due", "find_due_before", "find_listeners", "recover_expired"})
"""Frequent operations on the runs that do nothing with instants but compare them with stored ones."""


class Memory:
    """The last replies of comparing operations, for the documents as they are now."""

    def __init__(self) -> None:
        self._instants: list[datetime] | None = None
        self._replies: dict[Any, Any] = {}

    def forget(self) -> None:
        """Something was written."""
        self._instants = None
        self._replies.clear()

    def key(self, operation: Any, now: datetime, stored: Iterable[Mapping[str, Any]]) -> Any:
        """What the reply to `operation` depends on, beside the `stored` documents, which are the same until `forget`."""
        if self._instants is None:
            self._instants = sorted({instant for document in stored for instant in _instants_of(document)})
        return _with_places(operation, now, self._instants)

    def get(self, key: Any) -> Any:
        """The reply, or None."""
        return self._replies.get(key)

    def put(self, key: Any, reply: Any) -> None:
        """A reply by which nothing was written."""
        self._replies[key] = reply


def _instants_of(value: Any) -> Iterator[datetime]:
    if isinstance(value, datetime):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _instants_of(part)
    elif isinstance(value, list):
        for part in value:
            yield from _instants_of(part)


def _with_places(value: Any, now: datetime, instants: list[datetime]) -> Any:
    """A hashable form of the operation. An instant becomes its place among the stored ones."""
    kind = type(value)
    if kind is str and value != "$$NOW":
        return value
    if kind is dict:
        return tuple([(name, _with_places(part, now, instants)) for name, part in value.items()])
    if kind is list or kind is tuple:
        return tuple([_with_places(part, now, instants) for part in value])
    if kind is datetime or kind is str:
        instant = value if kind is datetime else now
        return bisect_left(instants, instant), bisect_right(instants, instant)
    return kind, repr(value)
