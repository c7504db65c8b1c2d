"""The databases of the tests. Most tests leave one as the engine makes it, and another test can have it once it is empty.

To make the collections and indexes of a database takes longer than most tests do. Owns which databases may be used again: those
whose collections and indexes are what the engine makes.
"""

from __future__ import annotations

from collections import deque
from typing import Any
from uuid import uuid4

from pymongo import MongoClient

from streamline_pool import Streamline

__all__ = ["Databases"]

Shape = dict[str, Any]  # collection -> its options and indexes
_RESTING = 6  # databases that rest, so that a late write of a process that has just been killed meets no other test
_HINTS = "workflow_signals"  # a capped collection, which cannot be emptied


class Databases:
    """Gives each test a database that only it uses."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._client = MongoClient[dict[str, Any]](uri)
        self._resting: deque[str] = deque()
        self._made_by_engine = self._examine()

    def new(self) -> str:
        """The name of a database that does not exist."""
        return f"streamline_test_{uuid4().hex[:12]}"

    def take(self) -> str:
        """The name of an empty database. It may have the engine's collections."""
        if len(self._resting) <= _RESTING:
            return self.new()
        name = self._resting.popleft()
        for collection in self._client[name].list_collection_names():
            if collection == _HINTS:
                self._client[name].drop_collection(collection)
            else:
                self._client[name][collection].delete_many({})
        return name

    def give_back(self, name: str) -> None:
        """The test is over."""
        shape = self._shape(name)
        if all(self._made_by_engine.get(collection) == found for collection, found in shape.items()):
            self._resting.append(name)
        else:
            self.drop(name)

    def drop(self, name: str) -> None:
        """Remove a database."""
        for collection in self._client[name].list_collection_names():  # `dropDatabase` would wait a tenth of a second for the journal
            self._client[name].drop_collection(collection)

    def close(self) -> None:
        """Remove what rests."""
        for name in self._resting:
            self.drop(name)
        self._client.close()

    def _examine(self) -> Shape:
        """What the engine makes."""
        name = self.new()
        app = Streamline(self._uri, database=name)
        try:
            store = app.connections.store()
            store.drive(store.ensuring())
            return self._shape(name)
        finally:
            app.close()
            self.drop(name)

    def _shape(self, name: str) -> Shape:
        database = self._client[name]
        collections = {found["name"]: found.get("options") for found in database.list_collections()}
        return {
            collection: (options, {index["name"]: index for index in database[collection].list_indexes()})
            for collection, options in collections.items()
        }
