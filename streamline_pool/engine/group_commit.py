"""Group commit: the writes of all active runs in a process, sent together, each with its own outcome.

Owns a lease holder's write from the call of `write` until the database has shown its outcome. Statements that arrive
while one command is under way go into the next (as databases do with their logs), so a busy worker pays one round
trip for hundreds of steps, and in an idle one a statement waits for no other.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from streamline_pool.config.asyncio_tasks import end_tasks
from streamline_pool.config.env import Env
from streamline_pool.domain.backoff import Backoff
from streamline_pool.domain.errors import StoreUnavailableError, ValidationError
from streamline_pool.protocol import commits
from streamline_pool.protocol.operations import Statement, error_text
from streamline_pool.protocol.server_codes import TOO_LARGE, WILL_BE_REFUSED_AGAIN
from streamline_pool.protocol.too_large import document_too_large
from streamline_pool.storage.store import AsyncStore

from .write_outcome import WriteOutcome, resolve_write

__all__ = ["GroupCommitter", "refusal"]

log = logging.getLogger("streamline_pool")

_SENDERS = 2  # commands under way at once: one is prepared here while the server works on the other; measured: 3 gain nothing
_BATCH_MAX = 100  # statements in one; measured: larger ones make the senders take turns instead of overlapping
_BATCH_BYTES_MAX = 8 * 1024 * 1024  # MongoDB takes 48 MB in a message; smaller ones keep others from waiting
_REFUSALS_MAX = 8  # in a row, about three seconds: a statement that the server refused so often must not hold up others
_BACKOFF = Backoff(base_s=0.02, ceiling_s=1.0)  # so that work resumes within moments of the database's return


_Item = tuple[Statement, "asyncio.Future[WriteOutcome]"]
_Batch = list[_Item]


class _Queue:
    """Statements that wait to be sent."""

    def __init__(self) -> None:
        self.items: deque[_Item] = deque()
        self.filled = asyncio.Event()
        self.closed = False

    def close(self) -> None:
        """Cancel what was not sent, and what still comes. The outcome of these statements is unknown."""
        self.closed = True
        for _, future in self.items:
            future.cancel()
        self.items.clear()


class GroupCommitter:
    """Takes fenced statements, sends them in groups. `start` it in the loop it serves, `close` it at the end."""

    def __init__(self, store: AsyncStore, env: Env, on_answer: Callable[[bool], None] = lambda _ok: None) -> None:
        self._store = store
        self._env = env
        self._on_answer = on_answer  # called for each command: did the database answer?
        self._queue = _Queue()
        self._urgent = _Queue()
        self._senders: list[asyncio.Task[None]] = []
        self.commands = 0
        self.statements = 0

    def start(self) -> None:
        """Begin to send."""
        loop = self._loop = asyncio.get_running_loop()
        queues = [*[self._queue] * _SENDERS, self._urgent]
        self._senders = [loop.create_task(self._run(queue), name=f"group-committer-{number}") for number, queue in enumerate(queues)]

    async def close(self) -> None:
        """Stop sending; statements still waiting are cancelled, their outcome unknown."""
        await end_tasks(self._senders)
        for queue in (self._queue, self._urgent):
            queue.close()

    def write(self, statement: Statement, *, urgent: bool = False) -> asyncio.Future[WriteOutcome]:
        """Queue a statement. Its outcome comes when the database has shown it, however long that takes.

        `urgent` statements do not queue behind the others, and go in commands of their own: for the few that a timer started.
        The future raises PayloadTooLargeError when the document would outgrow MongoDB's limit, ValidationError when
        the server refuses it for another reason that lies in the document.
        """
        future: asyncio.Future[WriteOutcome] = self._loop.create_future()
        queue = self._urgent if urgent else self._queue
        if queue.closed:
            future.cancel()
            return future
        queue.items.append((statement, future))
        queue.filled.set()
        return future

    async def _run(self, queue: _Queue) -> None:
        try:
            await self._send_batches(queue)
        finally:
            # `asyncio.run` cancels all tasks when its main one ends. A driver must not wait for a sender that is gone.
            queue.close()

    async def _send_batches(self, queue: _Queue) -> None:
        while True:
            while not queue.items:
                queue.filled.clear()
                await queue.filled.wait()
            batch = _next_batch(queue.items)
            try:
                await self._send_until_resolved(batch)
            except Exception as exc:
                # A defect of ours: it ends the drivers of these runs only, and their leases expire.
                log.exception("commit_failed", extra={"runs": len(batch)})
                for _, future in batch:
                    _fail(future, exc)
            except BaseException:
                for _, future in batch:
                    future.cancel()
                raise

    async def _send_until_resolved(self, batch: _Batch) -> None:
        """Repeat a batch until every statement in it has its outcome. Repeating is safe: each names the `rev` that it follows."""
        failures = refusals = 0
        while batch:
            try:
                reply = await self._send([statement for statement, _ in batch])
                if reply["n"] == len(batch):
                    # All in one turn of the loop, though it is a long one. If they were resolved a few at a time, the next statements
                    # would come a few at a time, and the other sender would send them so; measured: a sixth of the throughput.
                    for _, future in batch:
                        _resolve(future, WriteOutcome.COMMITTED)
                    return
                errors = reply.get("writeErrors", ())
                refusals = refusals + 1 if errors else 0
                batch = self._refuse(batch, errors, for_good=refusals >= _REFUSALS_MAX)
                batch = await self._resolve_by_read(batch)
                if not batch:
                    return
            except ValidationError as exc:
                if len(batch) == 1:
                    _fail(batch[0][1], exc)
                    return
                # The server refused the whole command for one of its statements: each is sent alone.
                for item in batch:
                    await self._send_until_resolved([item])
                return
            except StoreUnavailableError:
                self._on_answer(False)
            failures += 1
            await self._env.async_sleep(_BACKOFF.delay_s(failures, self._env.random()))

    async def _send(self, statements: list[Statement]) -> Mapping[str, Any]:
        self.commands += 1
        self.statements += len(statements)
        reply: Mapping[str, Any] = await self._store.run(commits.write_statements(statements))
        self._on_answer(True)
        return reply

    def _refuse(self, batch: _Batch, errors: Any, *, for_good: bool) -> _Batch:
        """Take out statements that the server can never store, so that they do not hold up the others."""
        refused = {error["index"]: error for error in errors if for_good or error.get("code") in WILL_BE_REFUSED_AGAIN}
        for index, error in refused.items():
            statement, future = batch[index]
            _fail(future, refusal(statement, error))
        return [item for index, item in enumerate(batch) if index not in refused]

    async def _resolve_by_read(self, batch: _Batch) -> _Batch:
        """One majority read shows the outcome of each statement. Returns those that must be sent again."""
        found = await self._store.run(commits.read_fences([statement.fence.run_id for statement, _ in batch]))
        documents = {document["_id"]: document for document in found}
        again = []
        for statement, future in batch:
            outcome = resolve_write(statement, documents.get(statement.fence.run_id))
            if outcome is None:
                again.append((statement, future))
            else:
                _resolve(future, outcome)
        return again


def _next_batch(items: deque[_Item]) -> _Batch:
    batch: _Batch = []
    size = 0
    while items and len(batch) < _BATCH_MAX and (not batch or size + items[0][0].size <= _BATCH_BYTES_MAX):
        batch.append(items.popleft())
        size += batch[-1][0].size
    return batch


def _resolve(future: asyncio.Future[WriteOutcome], outcome: WriteOutcome) -> None:
    if not future.done():
        future.set_result(outcome)


def _fail(future: asyncio.Future[WriteOutcome], exc: Exception) -> None:
    if not future.done():
        future.set_exception(exc)


def refusal(statement: Statement, error: Mapping[str, Any]) -> ValidationError:
    """The error of one statement that the server refused."""
    run_id = statement.fence.run_id
    if error.get("code") in TOO_LARGE:
        return document_too_large(f"run {run_id}", error_text(error), run_id=run_id)
    return ValidationError(f"run {run_id}: MongoDB refuses to store it: {error_text(error)}", run_id=run_id)
