"""What the server says of itself. Owns the oldest version that is supported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamline_pool.domain.errors import StoreUnavailableError

from .target import DatabaseTarget

__all__ = ["SERVER_VERSION_MIN", "server_facts"]

SERVER_VERSION_MIN = (6, 0)
"""`$in` in a partial index (the TTL of terminal runs) needs 6.0."""


def server_facts(hello: Mapping[str, Any], build: Mapping[str, Any], where: DatabaseTarget) -> dict[str, Any]:
    """`{version, topology, database, uri}` as text, for banners, from the replies of `hello` and `buildInfo`.

    Raises StoreUnavailableError when the server is too old.
    """
    version = str(build.get("version", "0"))
    if tuple(int(part) for part in version.split(".")[:2]) < SERVER_VERSION_MIN:
        needed = ".".join(map(str, SERVER_VERSION_MIN))
        raise StoreUnavailableError(f"MongoDB at {where.shown} is version {version}; at least {needed} is needed", transient=False)
    if hello.get("setName"):
        topology = f"replica set {hello['setName']}"
    else:
        topology = "sharded cluster" if hello.get("msg") == "isdbgrid" else "standalone"
    return {"version": version, "topology": topology, "database": where.database, "uri": where.shown}
