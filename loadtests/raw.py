"""The baseline of `throughput`: processes that only send `bulk_write`s of fenced `update_one`s, with majority.

The documents are runs in the middle of their first step. Each update is the one by which a worker stores a step, as
protocol/commits.py builds it. Only its values are filled in here, so the client does as little as possible.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from typing import Any, cast

from pymongo import MongoClient, UpdateOne
from pymongo.write_concern import WriteConcern

from streamline_pool.domain import transitions
from streamline_pool.domain.document import RunDocument
from streamline_pool.protocol import commits
from streamline_pool.protocol.engine_indexes import RUN_INDEXES
from streamline_pool.protocol.operations import Fence
from streamline_pool.protocol.run_document import new_run

from .app import noop
from .common import Server

__all__ = ["BATCH", "PROCESSES", "RawWriters", "raw_writers"]

PROCESSES = 2
BATCH = 100
_COLLECTION = "raw_runs"
_DOCUMENTS = 2_000  # for each process: as many as a fast worker has active or cached
_WARM_S = 0.3
_LEASE_ID = "0" * 32
_PATIENCE_S = 60.0


class RawWriters:
    """The writer processes, warmed up; see `raw_writers`."""

    def __init__(self, server: Server, pipes: Sequence[Connection]) -> None:
        self._server = server
        self._pipes = pipes

    def rate(self, seconds: float, *, retryable: bool = True) -> dict[str, float]:
        """Let all of them write for so long. Returns their updates per second, and the processor time per update."""
        mongod_s = self._server.cpu_seconds()
        for pipe in self._pipes:
            pipe.send((seconds, retryable))
        answers = [_receive(pipe) for pipe in self._pipes]
        updates = sum(count for count, _, _ in answers)
        return {
            "per_second": sum(count / taken_s for count, taken_s, _ in answers),
            "mongod_us": (self._server.cpu_seconds() - mongod_s) / updates * 1e6,
            "clients_us": sum(cpu_s for _, _, cpu_s in answers) / updates * 1e6,
        }


@contextmanager
def raw_writers(server: Server, database: str) -> Iterator[RawWriters]:
    """`PROCESSES` writers, each on documents of its own in that database. They end with the block."""
    _prepare(server, database)
    spawn = multiprocessing.get_context("spawn")  # a fork would share this process's MongoClient
    pipes: list[Connection] = []
    processes = []
    try:
        for number in range(PROCESSES):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_write, args=(server.uri, database, number, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        writers = RawWriters(server, pipes)
        for retryable in (True, False):
            writers.rate(_WARM_S, retryable=retryable)
        yield writers
    finally:
        for pipe in pipes:
            pipe.close()  # which ends the writer
        for process in processes:
            process.join(1.0)
            if process.is_alive():
                process.kill()
                process.join()


def _receive(pipe: Connection) -> Any:
    if not pipe.poll(_PATIENCE_S):
        raise TimeoutError(f"a raw writer has sent no answer for {_PATIENCE_S:g} s")
    return pipe.recv()


def _prepare(server: Server, database: str) -> None:
    """Insert runs as a worker holds them, into a collection with the engine's indexes."""
    collection = server.client[database][_COLLECTION]
    collection.drop()
    server.client[database].command("createIndexes", _COLLECTION, indexes=[index.spec() for index in RUN_INDEXES])
    collection.insert_many([_held_run(f"{number}-{place}") for number in range(PROCESSES) for place in range(_DOCUMENTS)])


def _held_run(run_id: str) -> dict[str, Any]:
    now = datetime.now(UTC)
    document = cast(
        "dict[str, Any]",
        new_run(
            noop.definition,
            run_id=run_id,
            input=None,
            context={},
            meta=None,
            idempotency_key=None,
            priority=0,
            queue="default",
            due_at=now,
            user_id=None,
            tags=(),
            slot=0,
            now=now,
            start_id=_LEASE_ID,
        ),
    )
    del document["wakeAt"]
    document["token"] = 1
    document["lease"] = {"id": _LEASE_ID, "owner": "host:1:raw", "token": 1, "expiresAt": now + timedelta(minutes=10)}
    document["startedAt"] = now
    document["steps"][0] |= {"status": "running", "attempts": 1, "startedAt": now}
    return document


def _write(uri: str, database: str, number: int, pipe: Connection) -> None:
    """A writer process. Receives how long and how to write, sends the number of updates and the time. Ends with the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles ^C, and closes its end of the pipe
    revs = {f"{number}-{place}": 0 for place in range(_DOCUMENTS)}
    clients: list[MongoClient[dict[str, Any]]] = [MongoClient(uri), MongoClient(uri, retryWrites=False)]
    with clients[0] as default, clients[1] as plain:
        writers = {True: _Writer(default[database], revs), False: _Writer(plain[database], revs)}
        while True:
            try:
                seconds, retryable = pipe.recv()
            except EOFError:
                return
            started, cpu = time.perf_counter(), time.process_time()
            count = writers[retryable].write_until(started + seconds)
            pipe.send((count, time.perf_counter() - started, time.process_time() - cpu))


class _Writer:
    """Updates its documents in turn, one batch after the other."""

    def __init__(self, database: Any, revs: dict[str, int]) -> None:
        self._collection = database.get_collection(_COLLECTION, write_concern=WriteConcern("majority"))
        self._revs = revs  # by run id
        self._ids = list(revs)
        self._next = 0
        now = datetime.now(UTC)
        change = transitions.advance(cast(RunDocument, _held_run("template")), 0, None, {}, now)
        template = commits.commit(Fence("template", _LEASE_ID, 0, 1), change, now, 0).update
        self._filter, self._set = template["q"], template["u"]["$set"]

    def write_until(self, deadline: float) -> int:
        """Write until the deadline. Returns the number of updates, each of which matched."""
        count = 0
        while time.perf_counter() < deadline:
            ids = self._ids[self._next : self._next + BATCH]
            self._next = (self._next + BATCH) % len(self._ids)
            result = self._collection.bulk_write([self._update(run_id) for run_id in ids])
            assert result.matched_count == len(ids), "no other process writes these documents"
            count += len(ids)
        return count

    def _update(self, run_id: str) -> UpdateOne:
        rev = self._revs[run_id]
        self._revs[run_id] = rev + 1
        return UpdateOne({**self._filter, "_id": run_id, "rev": rev}, {"$set": {**self._set, "rev": rev + 1}})
