"""What a store sends for an operation, and what the reply means, as data.

Owns the concerns of reads and writes. Does no I/O: store.py passes these values to PyMongo.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamline_pool.domain.errors import StoreUnavailableError
from streamline_pool.protocol.operations import Command, Find

from .target import DatabaseTarget

__all__ = ["WRITE_CONCERN", "command_document", "command_result", "find_arguments", "milliseconds"]

WRITE_CONCERN: Mapping[str, Any] = {"w": "majority", "j": True}
"""A decision counts only once it cannot be rolled back."""


def command_document(op: Command, where: DatabaseTarget, *, in_transaction: bool) -> dict[str, Any]:
    """The command as the server takes it. Within a transaction the transaction has the write concern."""
    target: Any = where.collection(op.collection) if op.collection else 1
    document: dict[str, Any] = {op.verb: target, **op.body}
    if op.writes and not in_transaction:
        document["writeConcern"] = WRITE_CONCERN
    return document


def command_result(op: Command, reply: Mapping[str, Any]) -> Any:
    """What the operation yields. Raises StoreUnavailableError for a write that a majority did not acknowledge."""
    failed = reply.get("writeConcernError")
    if failed:
        # Applied, but not known to be durable: the outcome is unknown, as after a lost reply.
        raise StoreUnavailableError(f"{op.name}: not acknowledged by a majority: {failed.get('errmsg')}", transient=True)
    return op.parse(reply)


def find_arguments(op: Find) -> dict[str, Any]:
    """Keyword arguments of PyMongo's `find`."""
    limits = {"limit": op.limit, "max_time_ms": None if op.seconds_max is None else milliseconds(op.seconds_max)}
    return {"filter": op.filter, "projection": op.projection, "sort": op.sort or None, "hint": op.hint, **limits}


def milliseconds(wait_s: float) -> int:
    """Whole milliseconds, at least 1: the server takes 0 for its own default."""
    return max(1, round(wait_s * 1000))
