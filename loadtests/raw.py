"""What the engine's throughput is compared with: processes that only store fenced step results, as durably as a worker does.

The documents are runs that are held. Each goes through its steps, and each update is the one by which a worker stores a step, as
protocol/commits.py builds it. Only its values are filled in here, so the client does as little as possible. There are two
comparisons:

- the driver's default way: `bulk_write` in batches of 100 from two processes, retryable and ordered, because PyMongo does it so;
- the limit: unordered and without retryable writes, with the batch size and the number of connections that were the fastest
  when they were measured here (`RawWriters.find_limit`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, cast

from pymongo import MongoClient, UpdateOne
from pymongo.write_concern import WriteConcern

from streamline_pool.chaos.ending import end_with_parent
from streamline_pool.domain import transitions
from streamline_pool.domain.document import RunDocument
from streamline_pool.protocol import commits
from streamline_pool.protocol.engine_indexes import RUN_INDEXES
from streamline_pool.protocol.operations import Fence
from streamline_pool.protocol.run_document import new_run

from .app import noop
from .common import Server, report_progress
from .payload import text_of

__all__ = ["DRIVER_DEFAULT", "RawWriters", "Way", "raw_writers"]

_PROCESSES = 4
_CONNECTIONS = (1, 2, 3, 4)
_BATCHES = (25, 50, 100, 200, 500, 1_000)
_COMMAND_BYTES_MAX = 12 * 1024 * 1024  # the driver sends no command above 16 MiB
_FINALISTS = 4  # ways that are measured again, because one short measurement is not exact
_FINAL_ROUNDS = 3
_COLLECTION = "raw_runs"
_DOCUMENTS = 2_000  # for each process, unless `prepare` says otherwise: as many as a fast worker has active or cached
_WARM_S = 0.3
_LEASE_ID = "0" * 32
_PATIENCE_S = 120.0
_STEPS = len(noop.definition.steps)
_CONCERN = {"w": "majority", "j": True}  # as the engine's writes


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How to write the same updates."""

    connections: int  # processes that write at once, each with one connection
    batch: int  # updates in one command
    driver_default: bool = False  # `bulk_write`, ordered, retryable; otherwise one unordered `update` command, not retryable

    def __str__(self) -> str:
        kind = "bulk_write, ordered, retryable" if self.driver_default else "update command, unordered, not retryable"
        return f"{self.connections} connections, {self.batch} updates in a command ({kind})"


DRIVER_DEFAULT = Way(connections=2, batch=100, driver_default=True)


class RawWriters:
    """The writer processes, warmed up; see `raw_writers`. `output_bytes`: of the output that each update stores; 0 for None."""

    def __init__(self, server: Server, pipes: Sequence[Connection], output_bytes: int) -> None:
        self._server = server
        self._pipes = pipes
        self._output_bytes = output_bytes

    def prepare(self, documents: int) -> None:
        """Give each process so many new documents, without outputs. A process that has used all of them begins again."""
        self._ask(self._pipes, ("prepare", documents))

    def rate(self, seconds: float, way: Way) -> dict[str, float]:
        """Let as many of the processes as the way needs write for so long.

        Returns their updates per second, and the microseconds of processor time per update.
        """
        mongod_s = self._server.cpu_seconds()
        answers = self._ask(self._pipes[: way.connections], ("write", seconds, way))
        updates = sum(count for count, _, _ in answers)
        return {
            "per_second": sum(count / taken_s for count, taken_s, _ in answers),
            "mongod_us": (self._server.cpu_seconds() - mongod_s) / updates * 1e6,
            "clients_us": sum(cpu_s for _, _, cpu_s in answers) / updates * 1e6,
        }

    def find_limit(self, seconds: float, documents: int | None = None) -> Way:
        """Measure many ways for so long, then the fastest of them again in turn. With 0 seconds, some way without a search.

        `documents`: how many to prepare before each measurement.
        """
        if not seconds:
            return Way(connections=2, batch=100)
        ways = [
            Way(connections=connections, batch=batch)
            for connections in _CONNECTIONS
            for batch in _BATCHES
            if batch * max(1, self._output_bytes) <= _COMMAND_BYTES_MAX
        ]
        found = {way: self._prepared_rate(seconds, way, documents) for way in ways}
        finalists = sorted(ways, key=lambda way: -found[way])[:_FINALISTS]
        again: dict[Way, list[float]] = {way: [] for way in finalists}
        for _ in range(_FINAL_ROUNDS):
            for way in finalists:
                again[way].append(self._prepared_rate(seconds, way, documents))
        best = max(finalists, key=lambda way: median(again[way]))
        report_progress(f"raw limit: {median(again[best]):.0f}/s by {best}")
        return best

    def _prepared_rate(self, seconds: float, way: Way, documents: int | None) -> float:
        if documents is not None:
            self.prepare(documents)
        return self.rate(seconds, way)["per_second"]

    def _ask(self, pipes: Sequence[Connection], order: tuple[Any, ...]) -> list[Any]:
        for pipe in pipes:
            pipe.send(order)
        return [_receive(pipe) for pipe in pipes]


@contextmanager
def raw_writers(server: Server, database: str, output_bytes: int = 0) -> Iterator[RawWriters]:
    """The writer processes, each on documents of its own in that database. They end with the block, and with this process."""
    server.client[database].command("createIndexes", _COLLECTION, indexes=[index.spec() for index in RUN_INDEXES])
    spawn = multiprocessing.get_context("spawn")  # a fork would share this process's MongoClient
    pipes: list[Connection] = []
    processes = []
    try:
        for number in range(_PROCESSES):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_write, args=(os.getpid(), server.uri, database, number, output_bytes, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        writers = RawWriters(server, pipes, output_bytes)
        writers.prepare(_DOCUMENTS if output_bytes == 0 else 100)
        for way in (DRIVER_DEFAULT, Way(connections=_PROCESSES, batch=25)):
            writers.rate(_WARM_S, way)
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


def _held_run(run_id: str, place: int = 0) -> dict[str, Any]:
    """A run as a worker holds it, whose step at `place` is running."""
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
    document["steps"][place] |= {"status": "running", "attempts": 1, "startedAt": now}
    return document


# --- a writer process ----------------------------------------------------------------------------------------------


def _write(parent_pid: int, uri: str, database: str, number: int, output_bytes: int, pipe: Connection) -> None:
    """Carry out orders: prepare documents, or write for so long and send the number of updates and the times. Ends with the pipe."""
    end_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles ^C, and closes its end of the pipe
    with MongoClient[dict[str, Any]](uri) as default, MongoClient[dict[str, Any]](uri, retryWrites=False) as plain:
        writer = _Writer(default[database], plain[database], number, output_bytes)
        while True:
            try:
                order = pipe.recv()
            except EOFError:
                return
            if order[0] == "prepare":
                writer.prepare(order[1])
                pipe.send(None)
                continue
            _, seconds, way = order
            started, cpu = time.perf_counter(), time.process_time()
            count = writer.write_until(started + seconds, way)
            pipe.send((count, time.perf_counter() - started, time.process_time() - cpu))


class _Writer:
    """Takes its documents in turn through their steps: a batch of them through all steps, then the next batch."""

    def __init__(self, default: Any, plain: Any, number: int, output_bytes: int) -> None:
        self._number = number
        self._output_bytes = output_bytes
        self._revs: dict[str, int] = {}  # by run id
        self._ids: list[str] = []
        self._next = 0
        self._generation = 0
        self._collection = default.get_collection(_COLLECTION, write_concern=WriteConcern("majority", j=True))
        self._plain = plain
        self._filter, self._sets = _template()

    def prepare(self, documents: int) -> None:
        """Replace the documents by new ones."""
        while self._ids:
            batch, self._ids = self._ids[:5_000], self._ids[5_000:]
            self._collection.delete_many({"_id": {"$in": batch}})
        self._generation += 1
        self._ids = [f"{self._number}-{self._generation}-{place}" for place in range(documents)]
        self._revs = dict.fromkeys(self._ids, 0)
        self._next = 0
        if self._ids:
            document = _held_run("template")
            self._collection.insert_many(({**document, "_id": run_id} for run_id in self._ids), ordered=False)

    def write_until(self, deadline: float, way: Way) -> int:
        """Write until the deadline. Returns the number of updates, each of which matched."""
        count = 0
        write = self._by_bulk_write if way.driver_default else self._by_command
        while True:
            ids = self._ids[self._next : self._next + way.batch]
            self._next = (self._next + way.batch) % len(self._ids) if self._next + way.batch < len(self._ids) else 0
            for place in range(_STEPS):
                if time.perf_counter() >= deadline:
                    return count
                matched = write([self._update(run_id, place) for run_id in ids])
                assert matched == len(ids), "no other process writes these documents"
                count += len(ids)

    def _update(self, run_id: str, place: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The filter and the update of one step's result."""
        rev = self._revs[run_id]
        self._revs[run_id] = rev + 1
        sets = {**self._sets[place], "rev": rev + 1}
        if self._output_bytes:
            step = f"steps.{place}"
            sets[step] = {**sets[step], "output": text_of(self._output_bytes)}
        return {**self._filter, "_id": run_id, "rev": rev}, {"$set": sets}

    def _by_bulk_write(self, updates: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> int:
        matched: int = self._collection.bulk_write([UpdateOne(query, update) for query, update in updates]).matched_count
        return matched

    def _by_command(self, updates: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> int:
        statements = [{"q": query, "u": update} for query, update in updates]
        reply = self._plain.command({"update": _COLLECTION, "updates": statements, "ordered": False, "writeConcern": _CONCERN})
        assert "writeErrors" not in reply and "writeConcernError" not in reply, reply
        return int(reply["n"])


def _template() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The filter of a commit, and for each step the fields that it sets. The last one leaves the lease, so that the run can begin again."""
    now = datetime.now(UTC)
    query: dict[str, Any] = {}
    sets = []
    for place in range(_STEPS):
        change = transitions.advance(cast(RunDocument, _held_run("template", place)), place, None, {}, now)
        update = commits.commit(Fence("template", _LEASE_ID, 0, 1), change, now, 0).update
        query = update["q"]
        sets.append({name: value for name, value in update["u"]["$set"].items() if name != "output"})  # each output is written once
    return query, sets
