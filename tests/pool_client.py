"""The application of a pool, loaded in the test's own process as a client. Owns no worker: pool_process.py starts the pool."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from streamline_pool import Streamline

__all__ = ["loaded_app"]


@contextmanager
def loaded_app(text: str, uri: str, database: str) -> Iterator[Streamline]:
    """The `app` of the program `text`, on that server and database. It is closed with the block."""
    scope: dict[str, Any] = {"__name__": "pool_client_app"}
    exec(compile(text, "pool_client_app", "exec"), scope)
    app: Streamline = scope["app"]
    app.mongodb_uri, app.database = uri, database
    with app:
        yield app
