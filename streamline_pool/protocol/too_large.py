"""The errors for what does not fit into MongoDB. Owns their texts; each caller owns its limit."""

from __future__ import annotations

from typing import Any

from streamline_pool.domain.errors import PayloadTooLargeError

__all__ = ["above_limit", "document_too_large", "no_room"]


def above_limit(found: str, limit: int, remedy: str = "store it elsewhere and pass a reference", **context: Any) -> PayloadTooLargeError:
    """A value above a limit of this package. `found` names the value and its size in bytes, `limit` is in bytes."""
    return PayloadTooLargeError(f"{found}, and the limit is {limit}; {remedy}", **context)


def document_too_large(what: str, server_text: str, **context: Any) -> PayloadTooLargeError:
    """A write that MongoDB refuses for the size of the document. `what` is the operation or the run."""
    return PayloadTooLargeError(f"{what}: the document would grow above MongoDB's 16 MiB: {server_text}", **context)


def no_room(purpose: str) -> str:
    """The message of a run whose document is full. Short, because it is stored in that document."""
    return f"no room in MongoDB's 16 MiB for {purpose}"
