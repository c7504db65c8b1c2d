"""Group commit: the writes of all runs in flight in a process, sent together, each with its own verdict.

Owns the fate of a holder's write from the moment it is handed in until the database has shown what became of it.
Whatever has gathered while one command was under way goes into the next (as databases themselves do with their
logs), so a busy worker pays one round trip for hundreds of steps and an idle one waits for nobody.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from streamline_pool.config.asyncio_tasks import end_tasks
from streamline_pool.config.env import Env
from streamline_pool.domain.errors import PayloadTooLargeError, StoreUnavailableError, ValidationError
from streamline_pool.domain.transitions import arrived
from streamline_pool.protocol import commits
from streamline_pool.protocol.operations import Statement
from streamline_pool.storage.store import AsyncStore

__all__ = ["GroupCommitter", "WriteOutcome", "lease_id_of", "refusal", "resolve_write"]

log = logging.getLogger("streamline_pool")

_PUMPS = 2  # commands under way at once: one is prepared here while the server works on the other; measured: 3 gain nothing
_BATCH_MAX = 100  # statements in one; measured: larger ones make the pumps take turns instead of overlapping
_BATCH_BYTES_MAX = 8 * 1024 * 1024  # MongoDB takes 48 MB in a message; smaller ones keep others from waiting
_REFUSALS_MAX = 8  # in a row, some three seconds: what the server has refused so often, for whatever reason, holds up others no longer
_BACKOFF_MAX_S = 1.0  # so that work resumes within moments of the database's return
_TOO_LARGE_CODES = frozenset({10334, 17419, 17420})
# What the server will say of this document again: a bad value or type, too deep, a path through something else than a document,
# a validator or a unique index that users have put on the collection.
_REFUSED_CODES = frozenset({2, 9, 14, 15, 22, 28, 52, 55, 56, 57, 121, 11000})


class WriteOutcome(Enum):
    """What became of a fenced write."""

    COMMITTED = "committed"
    COMMITTED_BY_READ = "committed by read"  # known from a later read, not from a reply: go on from the document, not from memory
    FENCED = "fenced"  # the lease is gone: write nothing more
    PAUSED = "paused"  # not stored, the run is paused: send the twin
    RESUMED = "resumed"  # the twin was not stored, the run is no longer paused: send the first form
    NOT_YET = "not yet"  # not stored: by the server's clock its instant has not come
    ARRIVED = "arrived"  # not stored: what the run is about to wait for is in its inbox


_Item = tuple[Statement, "asyncio.Future[WriteOutcome]"]
_Batch = list[_Item]


class _Queue:
    """Statements that wait to be sent."""

    def __init__(self) -> None:
        self.items: deque[_Item] = deque()
        self.filled = asyncio.Event()


class GroupCommitter:
    """Takes fenced statements, sends them in groups. `start` it in the loop it serves, `close` it at the end."""

    def __init__(self, store: AsyncStore, env: Env, on_outcome: Callable[[bool], None] = lambda ok: None) -> None:
        self._store = store
        self._env = env
        self._on_outcome = on_outcome  # told of each command: did the database answer?
        self._queue = _Queue()
        self._express = _Queue()
        self._pumps: list[asyncio.Task[None]] = []
        self.commands = 0
        self.statements = 0

    def start(self) -> None:
        """Begin to send."""
        loop = self._loop = asyncio.get_running_loop()
        queues = [*[self._queue] * _PUMPS, self._express]
        self._pumps = [loop.create_task(self._run(queue), name=f"group-committer-{number}") for number, queue in enumerate(queues)]

    async def close(self) -> None:
        """Stop sending; statements still waiting are cancelled, their outcome unknown."""
        await end_tasks(self._pumps)
        for queue in (self._queue, self._express):
            for _, future in queue.items:
                future.cancel()
            queue.items.clear()

    def write(self, statement: Statement, *, express: bool = False) -> asyncio.Future[WriteOutcome]:
        """Hand in a statement. Its verdict comes when the database has shown it, however long that takes.

        `express` ones do not queue behind the others, and go in commands of their own: for the few that somebody times.
        The future raises PayloadTooLargeError when the document would outgrow MongoDB's limit, ValidationError when
        the server refuses it for another reason that lies in the document.
        """
        future: asyncio.Future[WriteOutcome] = self._loop.create_future()
        queue = self._express if express else self._queue
        queue.items.append((statement, future))
        queue.filled.set()
        return future

    async def _run(self, queue: _Queue) -> None:
        while True:
            while not queue.items:
                queue.filled.clear()
                await queue.filled.wait()
            batch = _next_batch(queue.items)
            try:
                await self._send_until_resolved(batch, doubtful=False)
            except Exception as exc:
                # A defect of ours: it ends the drivers of these runs, whose leases run out, and nobody else's.
                log.exception("commit_failed", extra={"runs": len(batch)})
                for _, future in batch:
                    _fail(future, exc)
            except BaseException:
                for _, future in batch:
                    future.cancel()
                raise

    async def _send_until_resolved(self, batch: _Batch, *, doubtful: bool) -> None:
        """Repeat a batch until every statement in it has its verdict. Repeating is safe: each names the `rev` it follows."""
        failures = refusals = 0
        while batch:
            try:
                reply = await self._send([statement for statement, _ in batch])
                if reply["n"] == len(batch) and not doubtful:
                    # All in one turn of the loop, though it is a long one: given a few at a time, the next statements come a few at
                    # a time too, and the other pump sends them so; measured: a sixth of the throughput.
                    for _, future in batch:
                        _resolve(future, WriteOutcome.COMMITTED)
                    return
                errors = reply.get("writeErrors", ())
                refusals = refusals + 1 if errors else 0
                batch = self._refuse(batch, errors, for_good=refusals >= _REFUSALS_MAX)
                batch = await self._resolve_by_read(batch, doubtful)
                if not batch:
                    return
            except ValidationError as exc:
                if len(batch) == 1:
                    _fail(batch[0][1], exc)
                    return
                # The command as a whole was refused for one of its statements: each goes alone.
                for item in batch:
                    await self._send_until_resolved([item], doubtful=doubtful)
                return
            except StoreUnavailableError:
                self._on_outcome(False)
                doubtful = True
            failures += 1
            await self._env.async_sleep(min(0.02 * 2.0 ** min(failures, 10), _BACKOFF_MAX_S) * (0.5 + self._env.random() / 2))

    async def _send(self, statements: list[Statement]) -> Mapping[str, Any]:
        self.commands += 1
        self.statements += len(statements)
        reply: Mapping[str, Any] = await self._store.run(commits.write_statements(statements))
        self._on_outcome(True)
        return reply

    def _refuse(self, batch: _Batch, errors: Any, *, for_good: bool) -> _Batch:
        """Take out statements that the server can never store; one run's trouble is not its neighbours'."""
        refused = {error["index"]: error for error in errors if for_good or error.get("code") in _TOO_LARGE_CODES | _REFUSED_CODES}
        for index, error in refused.items():
            statement, future = batch[index]
            _fail(future, refusal(statement, error))
        return [item for index, item in enumerate(batch) if index not in refused]

    async def _resolve_by_read(self, batch: _Batch, doubtful: bool) -> _Batch:
        """One majority read tells what became of each statement. Returns those that must be sent again."""
        found = await self._store.run(commits.read_fences([statement.fence.run_id for statement, _ in batch]))
        documents = {document["_id"]: document for document in found}
        again = []
        for statement, future in batch:
            outcome = resolve_write(statement, documents.get(statement.fence.run_id))
            if outcome is None:
                again.append((statement, future))
            else:
                # Without a lost reply only one copy was sent, so memory is as good as the document.
                _resolve(future, WriteOutcome.COMMITTED if outcome is WriteOutcome.COMMITTED_BY_READ and not doubtful else outcome)
        return again


def _next_batch(items: deque[_Item]) -> _Batch:
    batch: _Batch = []
    size = 0
    while items and len(batch) < _BATCH_MAX and (not batch or size + items[0][0].size <= _BATCH_BYTES_MAX):
        batch.append(items.popleft())
        size += batch[-1][0].size
    return batch


def resolve_write(statement: Statement, document: Mapping[str, Any] | None) -> WriteOutcome | None:
    """What a majority read shows of a statement that was sent, or None if it did not land and may be sent again."""
    fence = statement.fence
    if document is None:
        return WriteOutcome.FENCED
    lease_id = lease_id_of(document)
    committed = document.get("rev") == fence.rev + 1
    if lease_id != fence.lease_id:
        # Nobody has claimed, released or acted since (the token stands): the lease went with this very write.
        gave_up = lease_id is None and committed and document.get("token") == fence.token and _releases(statement)
        return WriteOutcome.COMMITTED_BY_READ if gave_up else WriteOutcome.FENCED
    if committed and not _releases(statement):
        return WriteOutcome.COMMITTED_BY_READ
    if document.get("rev") != fence.rev:
        return WriteOutcome.FENCED
    wanted = statement.update["q"].get("paused")
    if wanted is True and document.get("paused") is not True:
        return WriteOutcome.RESUMED
    if isinstance(wanted, dict) and document.get("paused") is True:
        return WriteOutcome.PAUSED
    if "$expr" in statement.update["q"]:
        return WriteOutcome.NOT_YET
    inbox = statement.update["q"].get("inbox")
    return WriteOutcome.ARRIVED if inbox is not None and arrived(document, inbox["$not"]["$elemMatch"]) is not None else None


def _releases(statement: Statement) -> bool:
    return "lease" in statement.update["u"].get("$unset", ())


def _resolve(future: asyncio.Future[WriteOutcome], outcome: WriteOutcome) -> None:
    if not future.done():
        future.set_result(outcome)


def _fail(future: asyncio.Future[WriteOutcome], exc: Exception) -> None:
    if not future.done():
        future.set_exception(exc)


def lease_id_of(document: Mapping[str, Any]) -> Any:
    """The claim id of whoever holds the run, or None; whatever another program has made of the field."""
    lease = document.get("lease")
    return lease.get("id") if isinstance(lease, Mapping) else None


def refusal(statement: Statement, error: Mapping[str, Any]) -> ValidationError:
    """What it means that the server refused one statement of a command."""
    run_id, said = statement.fence.run_id, str(error.get("errmsg"))[:500]
    if error.get("code") in _TOO_LARGE_CODES:
        return PayloadTooLargeError(f"run {run_id}: it would grow above MongoDB's 16 MiB: {said}", run_id=run_id)
    return ValidationError(f"run {run_id}: MongoDB refuses to store it: {said}", run_id=run_id)
