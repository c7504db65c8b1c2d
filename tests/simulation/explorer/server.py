"""The database of a schedule: a real mongod, whose time is virtual and whose last writes can be rolled back.

Owns how an operation reaches the server. Everything is written with `w: 1`, which is quick. What a majority has is the
database itself, or, while replication lags, a copy that was made when the lag began: reads by majority go to that copy, and a
fail-over puts it back. So each operation's own read and write concern decides what it sees and when it is acknowledged.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from bson.codec_options import CodecOptions
from pymongo import MongoClient, WriteConcern

from streamline_pool.protocol import engine_indexes
from streamline_pool.protocol.codec import CODEC
from streamline_pool.protocol.operations import Command, Find
from streamline_pool.protocol.retention import ARCHIVE
from streamline_pool.storage.requests import find_arguments

from .memory import COMPARING, Memory

__all__ = ["COLLECTIONS", "EPOCH", "Server"]

EPOCH = datetime(2030, 1, 1, tzinfo=UTC)
"""The server's time at the start of every schedule."""

COLLECTIONS = ("runs", "events", "outputs", "hosts", ARCHIVE)
_PREFIX = "workflow_"
_FOUND_MAX = 1_000  # no schedule has as many documents
EVENTS_FORGOTTEN_AFTER = timedelta(hours=1)
FORGETTING = ("find_outdated_events", "forget_events")
_DATA = ("insert", "update", "delete", "findAndModify", "find", "aggregate", "count", "distinct")


class Server:
    """Two databases on one mongod: what the primary has, and what a majority had when replication began to lag."""

    def __init__(self, uri: str, name: str) -> None:
        self.client: MongoClient[dict[str, Any]] = MongoClient(uri, tz_aware=True)
        options: CodecOptions[Any] = CODEC
        quick = WriteConcern(w=1)
        self.primary = self.client.get_database(name, options, write_concern=quick)
        self.majority = self.client.get_database(f"{name}_majority", options, write_concern=quick)
        self.name = name
        self.lags = False
        self.clock_s = 0.0  # virtual seconds; the world sets it
        self.behind_s = 0.0  # the server's clock was set back by so much
        self.remembers = True  # False: every operation is performed, also those whose replies are known
        self._memory = Memory()
        self._runs: dict[str, dict[str, Any]] | None = None  # as they are stored; None: not read since the last write
        self._info: dict[str, Any] | None = None
        self._written = set(COLLECTIONS)  # collections that may hold documents
        for database in (self.primary, self.majority):
            database.drop_collection(_PREFIX + ARCHIVE)
            database.create_collection(_PREFIX + ARCHIVE)  # so that it is there in every schedule, not only after the first that archives
            for collection in COLLECTIONS[:-1]:
                body = engine_indexes.ensure_indexes(collection).body
                database.command({"createIndexes": _PREFIX + collection, **body})

    def now(self) -> datetime:
        """The server's time."""
        return EPOCH + timedelta(milliseconds=round((self.clock_s - self.behind_s) * 1000))

    def _now_of(self, op: Command | Find) -> datetime:
        """The time for this operation. Events to all are forgotten after an hour, and no schedule takes so long before it settles."""
        return self.now() + (EVENTS_FORGOTTEN_AFTER if op.name in FORGETTING else timedelta())

    def clear(self) -> None:
        """An empty database, for the next schedule."""
        self.clock_s = self.behind_s = 0.0
        self._changed()
        for collection in self._written:
            self.primary[_PREFIX + collection].delete_many({})
        self._written.clear()
        self._end_lag()

    def close(self) -> None:
        """Drop both databases."""
        for database in (self.primary, self.majority):
            self.client.drop_database(database.name)
        self.client.close()

    # --- operations --------------------------------------------------------------------------------------------------

    def command(self, op: Command, document: Mapping[str, Any]) -> dict[str, Any]:
        """Perform a command, which is sent as `document`. Raises PyMongoError."""
        verb = next(iter(document))
        # By default a write waits for a majority, which takes five times as long. A real read by majority would not show these
        # quick writes at once, so the level of a read is not sent, and decides here which database is read.
        sent = {**document, "writeConcern": {"w": 1}} if op.writes else dict(document)
        by_majority = sent.pop("readConcern", {}).get("level") == "majority"
        database = self.majority if by_majority and self.lags else self.primary
        if verb in ("create", "createIndexes", "convertToCapped", "collMod"):
            return {"ok": 1.0}  # the explorer has made what the engine needs
        if verb not in _DATA:
            return self._about(op, sent)
        key = self._memory.key(sent, self.now(), self.runs().values()) if self.remembers and op.name in COMPARING else None
        known: dict[str, Any] | None = None if key is None else self._memory.get(key)
        if known is not None:
            return dict(known)
        self._written.add(str(sent[verb]).removeprefix(_PREFIX))
        if op.name == "copy_runs":
            self._written.add(ARCHIVE)
        reply: dict[str, Any] | None = None
        try:
            now = self._now_of(op)
            reply = dict(database.command(sent if verb == "insert" else _with_time(sent, now), codec_options=CODEC))
        finally:
            if op.writes and (reply is None or reply.get("n") != 0):
                self._changed()
        if key is not None and reply.get("n") == 0:
            self._memory.put(key, dict(reply))
        return reply

    def _about(self, op: Command, sent: dict[str, Any]) -> dict[str, Any]:
        """What a command says about the server itself, which stays the same but for the time."""
        if self._info is None or op.name != "server_info" or not self.remembers:
            reply = dict(self.primary.command(sent, codec_options=CODEC))
            if op.name != "server_info":
                return reply
            self._info = reply
        return {**self._info, "localTime": self.now()} if "localTime" in self._info else dict(self._info)

    def find(self, op: Find, *, by_majority: bool) -> list[dict[str, Any]]:
        """Perform a query."""
        if self.remembers and op.collection not in self._written:
            return []
        lagged = by_majority and self.lags
        if lagged or not self.remembers or op.name not in COMPARING:
            return self._search(op, self.majority if lagged else self.primary)
        key = (op.name, self._memory.key([op.filter, op.limit], self.now(), self.runs().values()))
        found = self._memory.get(key)
        if found is None:
            found = self._search(op, self.primary)
            self._memory.put(key, found)
        return copy.deepcopy(list(found))

    def _search(self, op: Find, database: Any) -> list[dict[str, Any]]:
        given = find_arguments(op)
        command: dict[str, Any] = {"find": _PREFIX + op.collection, "filter": _with_time(given["filter"], self._now_of(op))}
        for name in ("projection", "limit", "hint"):
            if given[name]:
                command[name] = given[name]
        if given["sort"]:
            command["sort"] = dict(given["sort"])
        return _all_found(database, command)

    def runs(self) -> dict[str, dict[str, Any]]:
        """All stored runs by id, as the primary has them."""
        if self._runs is None:
            self._runs = {run["_id"]: run for run in self.all_of("runs")}
        return self._runs

    def _changed(self) -> None:
        self._runs = None
        self._memory.forget()

    def all_of(self, collection: str) -> list[dict[str, Any]]:
        """All documents of a collection, as the primary has them."""
        return _all_found(self.primary, {"find": _PREFIX + collection}) if collection in self._written else []

    def set_wake_at(self, run_id: str) -> None:
        """What another program does."""
        self.primary[_PREFIX + "runs"].update_one({"_id": run_id}, {"$set": {"wakeAt": self.now()}})
        self._changed()

    # --- replication -------------------------------------------------------------------------------------------------

    def begin_lag(self) -> None:
        """From now on no write reaches a majority."""
        for collection in COLLECTIONS:
            _copy(self.primary[_PREFIX + collection], self.majority[_PREFIX + collection])
        self.lags = True

    def catch_up(self) -> None:
        """Every write has reached a majority."""
        self._end_lag()

    def roll_back(self) -> None:
        """A fail-over: the new primary has what the majority had."""
        for collection in COLLECTIONS:
            _copy(self.majority[_PREFIX + collection], self.primary[_PREFIX + collection])
        self._changed()
        self._end_lag()

    def _end_lag(self) -> None:
        if self.lags:
            for collection in COLLECTIONS:
                self.majority[_PREFIX + collection].delete_many({})
        self.lags = False


def _all_found(database: Any, command: dict[str, Any]) -> list[dict[str, Any]]:
    reply = database.command({**command, "batchSize": _FOUND_MAX, "singleBatch": True}, codec_options=database.codec_options)
    return list(reply["cursor"]["firstBatch"])


def _copy(source: Any, target: Any) -> None:
    target.delete_many({})
    documents = list(source.find())
    if documents:
        target.insert_many(documents)


def _with_time(value: Any, now: datetime) -> Any:
    """The same operation with the virtual time in the place of `$$NOW`."""
    kind = type(value)
    if kind is str:
        return now if value == "$$NOW" else value
    if kind is dict:
        return value if "$literal" in value else {name: _with_time(part, now) for name, part in value.items()}
    if kind is list or kind is tuple:
        return [_with_time(part, now) for part in value]
    return value
