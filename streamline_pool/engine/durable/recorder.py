"""Stores the calls of one durable function: what begins or ends while one write is under way goes into the next one.

Owns the order of these writes, of which a run has one at a time. (Group commit, for the calls of a run; group_commit.py does it for the
runs of a process.)
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, cast

from streamline_pool.domain import journal
from streamline_pool.domain.change import Change, ChangeEvent
from streamline_pool.domain.document import StepDocument
from streamline_pool.domain.errors import ValidationError
from streamline_pool.domain.model import ENDED_STEPS
from streamline_pool.engine.active_run import STATEMENT_BYTES, ActiveRun
from streamline_pool.engine.intents import Intents, ReleaseSuspension
from streamline_pool.protocol.codec import encode_document
from streamline_pool.protocol.too_large import above_limit

from .results import ignore_result

__all__ = ["Entry", "Recorder"]

_STATEMENTS_BYTES_MAX = 4 * 1024 * 1024  # of one write; a guess, far below what a message may have


class Entry(NamedTuple):
    """One call as it is to be stored."""

    place: int
    call: StepDocument
    size: int = 0  # bytes of its payload
    events: tuple[ChangeEvent, ...] = ()
    sets: Mapping[str, Any] = {}  # context keys to store with it


Store = Callable[[ActiveRun, Change, int], Awaitable[bool]]
"""See RunWriter.record."""

_Item = tuple[Entry, "asyncio.Future[None]"]


class Recorder:
    """Takes entries, in the event loop. Each is durable when its future is done."""

    def __init__(
        self,
        active: ActiveRun,
        intents: Intents,
        store: Store,
        monotonic: Callable[[], float],
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self._active = active
        self._intents = intents  # of the function: what `ctx.set` was given
        self._sets_stored: dict[str, Any] = {}
        self._sets_bytes_stored = 0
        self._run_bytes = len(encode_document(active.document))
        self._store = store
        self._monotonic = monotonic
        self._waiting: deque[_Item] = deque()
        self._task: asyncio.Task[None] | None = None
        self.results = 0  # that were stored
        self.stored_at = 0.0  # when a write was last accepted, which shows whether the run is paused; monotonic
        self.is_closed = False  # nothing more is stored

    def add(self, entry: Entry) -> asyncio.Future[None]:
        """Store an entry. The future raises ValidationError if the server can never store it, ReleaseSuspension if the run is lost."""
        future: asyncio.Future[None] = self.loop.create_future()
        if self.is_closed:
            future.set_exception(ReleaseSuspension())
            return future
        self._waiting.append((entry, future))
        if self._task is None:
            self._task = self.loop.create_task(self._store_all())
        return future

    async def store_result(self, entry: Entry, intents: Intents | None = None) -> None:
        """Store a result, and what `ctx.set` was given until now, in the function or in the call (`intents`). As `add`.

        Raises PayloadTooLargeError if the run has no room for it.
        """
        if intents is not None:
            self._intents.sets.update(intents.sets)
            self._intents.sets_bytes += intents.sets_bytes
        sets = {key: value for key, value in self._intents.sets.items() if self._sets_stored.get(key, self) is not value}
        size = entry.size + self._intents.sets_bytes - self._sets_bytes_stored
        self.check_room(entry.call["stepId"], size)
        self._run_bytes += size + STATEMENT_BYTES
        self._sets_stored.update(sets)
        self._sets_bytes_stored = self._intents.sets_bytes
        await self.add(entry._replace(size=size, sets=sets))

    def check_room(self, name: str, size: int = 0) -> None:
        """Raise PayloadTooLargeError if the run has no room for so many bytes of this call."""
        if self._run_bytes + size + STATEMENT_BYTES > journal.RUN_BYTES_MAX:
            found = f"run {self._active.run_id}: with the call {name!r} it would take {self._run_bytes + size} bytes"
            remedy = "let a long loop end with ctx.continue_as_new(input), and store a large input elsewhere"
            raise above_limit(found, journal.RUN_BYTES_MAX, remedy)

    def save_checkpoint(self, place: int, value: Any, size: int) -> asyncio.Future[None]:
        """Store a checkpoint of the call at `place`. As `add`."""
        steps = self._active.document["steps"]
        steps[place] = cast(StepDocument, {**steps[place], "checkpoint": value})
        done = self.add(Entry(place, steps[place], size))
        done.add_done_callback(ignore_result)  # the call need not await it
        return done

    async def settled(self) -> None:
        """Return once nothing is under way."""
        while self._task is not None:
            await asyncio.wait([self._task])

    async def _store_all(self) -> None:
        batch: list[_Item] = []
        try:
            while self._waiting:
                batch = self._next_batch()
                await self._store_batch(batch)
        except BaseException as exc:
            for _, future in (*batch, *self._waiting):  # a defect of ours, or the engine has been closed: no call may wait for ever
                _fail(future, exc if isinstance(exc, Exception) else ReleaseSuspension())
            raise
        finally:
            self._waiting.clear()
            self._task = None

    def _next_batch(self) -> list[_Item]:
        """What waits, in its order; the later entry of a place goes into the next write."""
        batch: list[_Item] = []
        places: set[int] = set()
        size = 0
        while self._waiting:
            entry = self._waiting[0][0]
            if entry.place in places or (batch and size + entry.size > _STATEMENTS_BYTES_MAX):
                break
            batch.append(self._waiting.popleft())
            places.add(entry.place)
            size += entry.size
        return batch

    async def _store_batch(self, batch: list[_Item]) -> None:
        try:
            is_held = await self._send([entry for entry, _ in batch])
        except ValidationError as exc:
            if len(batch) == 1:
                _fail(batch[0][1], exc)
                return
            # One of them is too large, or the run has become so: each is sent alone.
            for item in batch:
                await self._store_batch([item])
            return
        for entry, future in batch:
            if is_held:
                self.results += entry.call["status"] in ENDED_STEPS
                if not future.done():
                    future.set_result(None)
            else:
                _fail(future, ReleaseSuspension())
        self.stored_at = self._monotonic()
        if not is_held:
            self._active.abort("lease-lost")

    async def _send(self, entries: list[Entry]) -> bool:
        if self._active.lost is not None:
            return False
        sets = {key: value for entry in entries for key, value in entry.sets.items()}
        events = tuple(event for entry in entries for event in entry.events)
        calls = {entry.place: entry.call for entry in entries}
        change = journal.record(self._active.document, calls, sets, events)
        return await self._store(self._active, change, sum(entry.size for entry in entries))


def _fail(future: asyncio.Future[None], exc: BaseException) -> None:
    if not future.done():
        future.set_exception(exc)
