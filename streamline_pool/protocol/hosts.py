"""The records by which pools say that they are alive, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .expressions import server_time_in
from .operations import Command, Find

__all__ = [
    "list_hosts",
    "put_host",
    "remove_host",
]

Document = dict[str, Any]


def put_host(record: Mapping[str, Any], ttl_s: float) -> Command:
    """Store what a pool on some host says of itself; it vanishes `ttl_s` seconds after its last word."""
    fields = {name: {"$literal": value} for name, value in record.items() if name != "_id"}
    update = [{"$set": {**fields, "seenAt": "$$NOW", "expireAt": server_time_in(ttl_s)}}]
    return Command(
        name="put_host", collection="hosts", verb="update", body={"updates": [{"q": {"_id": record["_id"]}, "u": update, "upsert": True}]}
    )


def remove_host(host_id: str) -> Command:
    """The pool is gone in good order."""
    return Command(name="remove_host", collection="hosts", verb="delete", body={"deletes": [{"q": {"_id": host_id}, "limit": 1}]})


def list_hosts() -> Find:
    """Every pool that has spoken lately."""
    return Find(name="list_hosts", collection="hosts", filter={"listener": {"$exists": False}}, sort=(("_id", 1),))
