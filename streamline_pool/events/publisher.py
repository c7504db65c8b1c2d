"""The publishing side of `app.events.stream()`: what happens in this process, for whoever streams.

Owns the backlog of one publisher (an engine, a steward, the outside acts of a program), the numbers by which readers
count what they miss, and the batches in which events are sent. While nobody streams, an engine and a steward ask one
attribute and do nothing. Who streams is told by the supervisor, or looked up. stream.py is the other side.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

from streamline_pool.config.asyncio_tasks import end_tasks
from streamline_pool.config.env import Env
from streamline_pool.domain.errors import ValidationError, WorkflowError
from streamline_pool.protocol import event_stream
from streamline_pool.protocol.codec import check_payload, packed
from streamline_pool.protocol.operations import Signal
from streamline_pool.storage.store import AsyncStore

from .bus import Event

__all__ = ["EVENT_DATA_BYTES_MAX", "ControlEvents", "EventPublisher"]

log = logging.getLogger("streamline_pool")

EVENT_DATA_BYTES_MAX = 32 * 1024
"""Larger data is left out: the run document has it, and the signals are a ring of 16 MiB that wakes the pools as well."""

_BACKLOG_MAX = 10_000  # events not sent yet; beyond it, or beyond the bytes, the oldest are dropped, which readers see by the numbers
_BACKLOG_BYTES_MAX = 8 * 1024 * 1024
_BATCH_MAX = 1_000
_BATCH_BYTES_MAX = 128 * 1024
_BATCH_PAUSE_S = 0.02  # between batches: with their size it bounds what a publisher writes, some 6 MB/s, and makes a busy one's few
_RETRY_MAX_S = 1.0
_FLUSH_POLLS, _FLUSH_POLL_S = 200, 0.005  # at the end of a publisher, for what it has not sent yet: a second
_PLAIN = frozenset({type(None), bool, float, datetime})  # nobody can change them, and their size is known
_PLAIN_BYTES, _NAME_MAX = 500, 100
_POLL_EVERY_S = 5.0  # for a program whose local executions go on while somebody begins to stream


class EventPublisher:
    """Sends the events of one engine or steward to whoever streams. `start` it in its loop, `close` it at the end."""

    def __init__(self, store: AsyncStore, env: Env) -> None:
        self.active = False  # somebody streams; ask before making an event
        self._store = store
        self._env = env
        self._publisher = env.new_id()
        self._lock = threading.Lock()  # handlers emit from their threads
        self._backlog: deque[tuple[Any, int]] = deque()  # stored form and its bytes
        self._backlog_bytes = 0
        self._next = 0  # the number of the next event
        self._listeners: dict[str, float] = {}  # id -> until when it is served, unless heard of again; monotonic seconds
        self._greets: dict[str, int] = {}  # new listeners, and the first event that each is owed
        self._filled: asyncio.Event | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False

    def start(self) -> None:
        """Begin to send, in the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._filled = asyncio.Event()
        self._tasks = [self._loop.create_task(self._pump(), name="broadcaster")]

    async def close(self) -> None:
        """Send what waits, if that is quickly done, and stop."""
        for _ in range(_FLUSH_POLLS):
            if not (self.active and (self._backlog or self._greets)):
                break
            await self._env.async_sleep(_FLUSH_POLL_S)
        self._closed, self.active = True, False
        await end_tasks(self._tasks)

    # --- who streams -----------------------------------------------------------------------------------------------

    def serve_subscribers(self, subscribers: Iterable[tuple[str, float]]) -> None:
        """Publish for these, and for nobody else: ids, each with the seconds for which it is served unless said again."""
        now = self._env.clock.monotonic()
        self._serve({subscriber: now + left_s for subscriber, left_s in subscribers if left_s > 0})

    async def poll(self) -> None:
        """Look in the database who streams. A failure costs nothing but events."""
        known = set(self._listeners)
        try:
            found = await self._store.run(event_stream.find_listeners())
        except WorkflowError as exc:
            log.debug("listeners_unknown", extra={"error": str(exc)})
            return
        if not found and not self._listeners:
            return
        # Whom others told us of in the meantime is not in what was read.
        told = {subscriber: until for subscriber, until in self._listeners.items() if subscriber not in known}
        now, monotonic = self._store.now(), self._env.clock.monotonic()
        self._serve({row["_id"]: monotonic + (row["expireAt"] - now) / timedelta(seconds=1) for row in found} | told)

    def poll_while(self, busy: Callable[[], bool]) -> None:
        """Look again and again while this holds: for a publisher that nobody tells who streams."""

        async def keep_looking() -> None:
            while True:
                await asyncio.sleep(_POLL_EVERY_S)
                if busy():
                    await self.poll()

        self._tasks.append(self._loop.create_task(keep_looking(), name="broadcaster-look"))

    def _serve(self, subscribers: Mapping[str, float]) -> None:
        if self._closed:
            return
        now = self._env.clock.monotonic()
        with self._lock:
            known, self._listeners = self._listeners, {subscriber: until for subscriber, until in subscribers.items() if until > now}
            self._greets = {subscriber: number for subscriber, number in self._greets.items() if subscriber in self._listeners}
            self._greets |= {subscriber: self._next for subscriber in self._listeners if subscriber not in known}
            self.active = bool(self._listeners)
            if not self.active:
                self._backlog.clear()
                self._backlog_bytes = 0
        if self.active and self._filled is not None:
            self._filled.set()
            self._loop.call_later(max(self._listeners.values()) - now + 0.01, self._expire)

    def _expire(self) -> None:
        if self.active and max(self._listeners.values()) <= self._env.clock.monotonic():
            self._serve({})

    # --- events ----------------------------------------------------------------------------------------------------

    def publish(self, event: Event) -> None:
        """Hand in an event, from any thread. Never blocks, never raises."""
        if not self.active:
            return
        packing = _packed(event)
        with self._lock:
            idle = not self._backlog
            self._backlog.append(packing)
            self._backlog_bytes += packing[1]
            self._next += 1
            while len(self._backlog) > _BACKLOG_MAX or self._backlog_bytes > _BACKLOG_BYTES_MAX:
                self._backlog_bytes -= self._backlog.popleft()[1]
        if idle and self._filled is not None:
            if threading.get_ident() == self._loop_thread:
                self._filled.set()
            else:
                with contextlib.suppress(RuntimeError):  # the loop has been closed
                    self._loop.call_soon_threadsafe(self._filled.set)

    async def _pump(self) -> None:
        assert self._filled is not None, "made by `start`"
        failures = 0
        while True:
            if not self._backlog and not self._greets:
                self._filled.clear()
                await self._filled.wait()
                continue
            try:
                await self._send_batch()
                failures = 0
            except WorkflowError as exc:
                failures += 1
                log.debug("events_held_up", extra={"events": len(self._backlog), "error": exc.message})
            except Exception:
                # The batch is lost, as readers see by the numbers; the runs that it tells of are not.
                log.exception("events_lost")
            ceiling = _BATCH_PAUSE_S * 2.0 ** min(failures, 10)
            await self._env.async_sleep(min(ceiling, _RETRY_MAX_S) * ((0.5 + self._env.random() / 2) if failures else 1.0))

    async def _send_batch(self) -> None:
        """Send the oldest events. They leave the backlog only when they have been stored, or the server does not want them."""
        with self._lock:
            first = self._next - len(self._backlog)
            batch: list[Any] = []
            size = 0
            for document, document_bytes in self._backlog:
                size += document_bytes
                if batch and (size > _BATCH_BYTES_MAX or len(batch) >= _BATCH_MAX):
                    break
                batch.append(document)
            greets = dict(self._greets)
        try:
            await self._store.run(event_stream.send_events(self._publisher, first, batch, greets, self._store.now()))
        except WorkflowError as exc:
            if not exc.context.get("transient"):
                self._settle(first + len(batch), {})
            raise
        self._settle(first + len(batch), greets)

    def _settle(self, up_to: int, greets: Mapping[str, int]) -> None:
        with self._lock:
            while self._backlog and self._next - len(self._backlog) < up_to:  # some may have been dropped in the meantime
                self._backlog_bytes -= self._backlog.popleft()[1]
            for subscriber in greets:
                self._greets.pop(subscriber, None)


class ControlEvents:
    """The events of a program's outside acts, sent after each act whether somebody streams or not.

    To ask first would cost a round trip for each act; one more signal without an answer, beside the two that an act
    sends anyway, costs none, and nobody who has just begun to stream misses any.
    """

    def __init__(self, env: Env) -> None:
        self._publisher = env.new_id()
        self._lock = threading.Lock()
        self._next = 0
        self._unsent: deque[tuple[int, Event]] = deque(maxlen=_BACKLOG_MAX)

    def add(self, event: Event) -> None:
        """Have an event sent with the next `take`."""
        with self._lock:
            self._unsent.append((self._next, event))
            self._next += 1

    def take(self) -> list[Signal]:
        """What is to be written now; each event is in one answer only."""
        if not self._unsent:
            return []
        with self._lock:
            unsent, self._unsent = self._unsent, deque(maxlen=_BACKLOG_MAX)
        return [event_stream.events_signal(self._publisher, number, [_packed(event)[0]], event.at) for number, event in unsent]


def _packed(event: Event) -> tuple[Any, int]:
    """An event in its stored form: a handler may change what it emitted, and a busy worker encodes nothing twice."""
    document: dict[str, Any] = {
        "name": event.name,
        "runId": event.run_id,
        "workflowId": event.workflow_id,
        "stepId": event.step_id,
        "data": event.data,
        "at": event.at,
    }
    if type(event.data) in _PLAIN and len(event.name) <= _NAME_MAX:
        return document, _PLAIN_BYTES  # measured: encoded with its batch it costs a third
    data_bytes: int | None
    try:
        packing = packed(document)
        if packing[1] <= EVENT_DATA_BYTES_MAX:
            return packing
        data_bytes = check_payload(event.data, "data")
        if data_bytes <= EVENT_DATA_BYTES_MAX:
            return packing
    except ValidationError as exc:
        data_bytes = exc.context.get("size")  # or none: what cannot be stored was in no write that this event reports
    document["data"] = {"$omitted": data_bytes}
    return packed(document)
