"""The host records, by which a pool shows that it is alive, as data. Owns when a record expires."""

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


def put_host(record: Mapping[str, Any], ttl_s: float) -> Command:
    """Store what a pool reports about itself. The record expires `ttl_s` seconds after the last call."""
    fields = {name: {"$literal": value} for name, value in record.items() if name != "_id"}
    update = [{"$set": {**fields, "seenAt": "$$NOW", "expireAt": server_time_in(ttl_s)}}]
    body = {"updates": [{"q": {"_id": record["_id"]}, "u": update, "upsert": True}]}
    return Command(name="put_host", collection="hosts", verb="update", body=body)


def remove_host(host_id: str) -> Command:
    """Remove the record of a pool that has stopped."""
    return Command(name="remove_host", collection="hosts", verb="delete", body={"deletes": [{"q": {"_id": host_id}, "limit": 1}]})


def list_hosts() -> Find:
    """The records of all pools, by id. An expired record may still be among them."""
    return Find(name="list_hosts", collection="hosts", filter={"listener": {"$exists": False}}, sort=(("_id", 1),))
