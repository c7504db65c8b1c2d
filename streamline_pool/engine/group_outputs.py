"""Outputs beside the runs: those of all active runs in a process are stored and loaded together.

Owns the grouping. What arrives while one command is under way goes into the next, as in group_commit.py. An output is durable
before its driver goes on to the commit that refers to it. So no document ever refers to an output that a fail-over has undone.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from streamline_pool.config.asyncio_tasks import end_tasks
from streamline_pool.config.env import Env
from streamline_pool.domain.errors import DataCorruptionError, StoreUnavailableError, ValidationError
from streamline_pool.protocol.outputs import DOCUMENT_BYTES_MAX, NewOutput, insert_outputs
from streamline_pool.storage.outputs import Wanted, putting_output, reading_outputs
from streamline_pool.storage.procedures import until_answered
from streamline_pool.storage.store import AsyncStore

from .loaded_outputs import LoadedOutputs

__all__ = ["GroupOutputs"]

log = logging.getLogger("streamline_pool")

T = TypeVar("T")
R = TypeVar("R")

_READERS = 2  # queries under way at once
_BATCH_MAX = 100  # outputs in one command
_BATCH_BYTES_MAX = (
    8 * 1024 * 1024
)  # MongoDB takes 48 MB in a message; measured: with 1 MiB a step of 100 KiB costs thrice as much, for the commits come as few


class _Group(Generic[T, R]):
    """Collects calls and makes them together. `send` returns one result, or the exception to raise, for each item."""

    def __init__(self, send: Callable[[list[T]], Awaitable[Sequence[R | Exception]]], size_of: Callable[[T], int]) -> None:
        self._send = send
        self._size_of = size_of  # in bytes
        self._items: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._filled = asyncio.Event()
        self._closed = False

    def call(self, item: T) -> asyncio.Future[R]:
        """Queue an item. The future has its result."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        if self._closed:
            future.cancel()
            return future
        self._items.append((item, future))
        self._filled.set()
        return future

    async def run(self) -> None:
        """Send batches without end."""
        try:
            await self._send_batches()
        finally:
            self.close()  # as in group_commit.py

    async def _send_batches(self) -> None:
        while True:
            while not self._items:
                self._filled.clear()
                await self._filled.wait()
            batch = self._next_batch()
            results: Sequence[R | Exception]
            try:
                results = await self._send([item for item, _ in batch])
            except Exception as exc:  # noqa: BLE001 -- each caller gets it
                results = [exc] * len(batch)
            except BaseException:
                _cancel(batch)
                raise
            for (_, future), result in zip(batch, results, strict=True):
                if future.done():
                    continue  # its driver was cancelled
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def close(self) -> None:
        """Cancel what was not sent, and what still comes."""
        self._closed = True
        _cancel(self._items)
        self._items.clear()

    def _next_batch(self) -> list[tuple[T, asyncio.Future[R]]]:
        batch: list[tuple[T, asyncio.Future[R]]] = []
        size = 0
        while self._items and len(batch) < _BATCH_MAX and (not batch or size + self._size_of(self._items[0][0]) <= _BATCH_BYTES_MAX):
            batch.append(self._items.popleft())
            size += self._size_of(batch[-1][0])
        return batch


def _cancel(items: Sequence[tuple[Any, asyncio.Future[Any]]] | deque[tuple[Any, asyncio.Future[Any]]]) -> None:
    for _, future in items:
        future.cancel()


class GroupOutputs:
    """Stores and loads outputs. `start` it in the loop it serves, `close` it at the end."""

    def __init__(self, store: AsyncStore, env: Env, on_answer: Callable[[bool], None] = lambda _ok: None) -> None:
        self._store = store
        self._env = env
        self._on_answer = on_answer  # called for each command: did the database answer?
        self._puts: _Group[NewOutput, None] = _Group(self._put_all, lambda output: len(output.content))
        self._reads: _Group[Wanted, bytes] = _Group(self._read_all, lambda _: 0)
        self._senders: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to send."""
        loop = asyncio.get_running_loop()
        # One insert at a time. Measured: a second one costs a tenth of the processor time of a step, and gains nothing.
        self._senders = [loop.create_task(self._puts.run(), name="output-writer")]
        for number in range(_READERS):
            self._senders.append(loop.create_task(self._reads.run(), name=f"output-reader-{number}"))

    async def close(self) -> None:
        """Stop sending. Calls that wait are cancelled."""
        await end_tasks(self._senders)
        self._puts.close()
        self._reads.close()

    async def put(self, output: NewOutput) -> None:
        """Store an output; durable on return, however long that takes. Raises ValidationError if the server refuses it."""
        if len(output.content) > DOCUMENT_BYTES_MAX:
            await self._until_stored(lambda: self._store.drive(putting_output(output)))
        else:
            await self._puts.call(output)

    async def load(self, document: Mapping[str, Any], output_ids: Sequence[str], into: LoadedOutputs) -> None:
        """Load these outputs of a run. Raises DataCorruptionError when one is missing or damaged."""
        calls = [self.read(Wanted(document, output_id)) for output_id in output_ids]
        for output_id, content in zip(output_ids, await asyncio.gather(*calls), strict=True):
            into.add(output_id, content)

    def read(self, wanted: Wanted) -> asyncio.Future[bytes]:
        """The content of one output. The future raises DataCorruptionError when it is missing or damaged."""
        return self._reads.call(wanted)

    async def _put_all(self, outputs: list[NewOutput]) -> list[Exception | None]:
        try:
            await self._until_stored(lambda: self._store.run(insert_outputs(outputs)))
        except ValidationError as exc:
            if len(outputs) == 1:
                return [exc]
            # The server refused one of them: each is sent alone.
            return [result for output in outputs for result in await self._put_all([output])]
        return [None] * len(outputs)

    async def _read_all(self, wanted: list[Wanted]) -> list[bytes | DataCorruptionError]:
        return await until_answered(lambda: self._store.drive(reading_outputs(wanted)), self._env)

    async def _until_stored(self, act: Callable[[], Awaitable[None]]) -> None:
        """As `until_answered`. Each attempt is reported, and the first one that fails is logged: it may never succeed."""
        failed = False

        async def attempt() -> None:
            nonlocal failed
            try:
                await act()
            except StoreUnavailableError as exc:
                if not failed:
                    log.warning("output_not_stored", extra={"reason": exc.message})
                failed = True
                self._on_answer(False)
                raise
            self._on_answer(True)

        await until_answered(attempt, self._env)
