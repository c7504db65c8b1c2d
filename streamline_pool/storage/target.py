"""Which server, database and collections a store uses.

Owns the default database, the names of stored collections, and the client options that the engine relies on.
Opens no connection: store.py does.
"""

from __future__ import annotations

from typing import Any

import pymongo
import pymongo.errors

from streamline_pool.config.parsing import redact_text, redact_uri
from streamline_pool.domain.errors import ValidationError

__all__ = ["DatabaseTarget"]

_SELECTION_TIMEOUT_MS = 5_000  # how long one operation waits for a primary; the caller repeats it, with back-off
_SOCKET_TIMEOUT_MS = 20_000  # above the longest wait of a tailing read, below the lease

# A burst of operations opens connections, which the driver would keep for ever. It uses the one that was returned last, so those that
# are not needed become idle. Firewalls, too, drop connections that are idle for minutes, and tell neither side.
_IDLE_MAX_MS = 300_000


class DatabaseTarget:
    """Server, database and prefix of the collections. Resolved once.

    Raises ValidationError for a URI that PyMongo cannot parse. `uri` may hold a password; show `shown` instead.
    """

    def __init__(self, uri: str, database: str | None, prefix: str) -> None:
        try:
            parsed = pymongo.uri_parser.parse_uri(uri, validate=True, warn=False)
        except (pymongo.errors.PyMongoError, ValueError) as exc:
            raise ValidationError(f"mongodb_uri {redact_uri(uri)}: {redact_text(str(exc))}") from None
        self.uri = uri
        self.database = database or parsed.get("database") or "streamline"
        self.prefix = prefix
        self.shown = redact_uri(uri)

    def collection(self, name: str) -> str:
        """The stored name of the collection that operations call `name`. A name that begins with "/" is a stored name already."""
        return name[1:] if name.startswith("/") else self.prefix + name

    def client_options(self) -> dict[str, Any]:
        """Options of every client. An option that the URI sets is left out, so the URI decides."""
        given = {key.lower() for key in pymongo.uri_parser.parse_uri(self.uri, warn=False)["options"]}
        ours = {
            "serverSelectionTimeoutMS": _SELECTION_TIMEOUT_MS,
            "connectTimeoutMS": _SELECTION_TIMEOUT_MS,
            "socketTimeoutMS": _SOCKET_TIMEOUT_MS,
            "maxIdleTimeMS": _IDLE_MAX_MS,
            "appname": "streamline-pool",
        }
        return {key: value for key, value in ours.items() if key.lower() not in given}
