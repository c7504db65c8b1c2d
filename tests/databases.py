"""The databases of the tests. Most tests leave one as the engine makes it, and another test can have it once it is empty.

To make the collections and indexes of a database takes longer than most tests do. Owns which databases may be used again: those
whose collections and indexes are what the engine makes.
"""

from __future__ import annotations

from collections import deque
from typing import Any
from uuid import uuid4

from pymongo import MongoClient
from pymongo.database import Database

from streamline_pool import Streamline

__all__ = ["Databases"]

Shape = dict[str, Any]  # collection -> its options and indexes
_RESTING = 6  # databases that rest, so that a late write of a process that has just been killed meets no other test
_HINTS = "workflow_signals"  # a capped collection, which cannot be emptied


class Databases:
    """Gives each test a database that only it uses. Keeps no connection: tests count sockets, and stop the server."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._resting: deque[str] = deque()
        self._made_by_engine = self._examine()

    def new(self) -> str:
        """The name of a database that does not exist."""
        return f"streamline_test_{uuid4().hex[:12]}"

    def take(self) -> str:
        """The name of an empty database. It may have the engine's collections."""
        while len(self._resting) > _RESTING:
            name = self._resting.popleft()
            with MongoClient[Any](self._uri) as client:
                if self._is_as_made(_shape(client[name])):
                    _empty(client[name])
                    return name
                _drop(client[name])
        return self.new()

    def give_back(self, name: str) -> None:
        """The test is over."""
        self._resting.append(name)

    def drop(self, *names: str) -> None:
        """Remove databases."""
        with MongoClient[Any](self._uri) as client:
            for name in names:
                _drop(client[name])

    def close(self) -> None:
        """Remove what rests."""
        self.drop(*self._resting)

    def _is_as_made(self, shape: Shape) -> bool:
        return all(self._made_by_engine.get(collection) == found for collection, found in shape.items())

    def _examine(self) -> Shape:
        """What the engine makes."""
        name = self.new()
        app = Streamline(self._uri, database=name)
        try:
            store = app.connections.store()
            store.drive(store.ensuring())
            return _shape(app.client[name])
        finally:
            app.close()
            self.drop(name)


def _shape(database: Database[Any]) -> Shape:
    collections = {found["name"]: found.get("options") for found in database.list_collections()}
    return {
        collection: (options, {index["name"]: index for index in database[collection].list_indexes()})
        for collection, options in collections.items()
    }


def _empty(database: Database[Any]) -> None:
    for collection in database.list_collection_names():
        if collection == _HINTS:
            database.drop_collection(collection)
        else:
            database[collection].delete_many({})


def _drop(database: Database[Any]) -> None:
    for collection in database.list_collection_names():  # `dropDatabase` would wait a tenth of a second for the journal
        database.drop_collection(collection)
