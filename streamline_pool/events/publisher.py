"""The publishing side of `app.events.stream()`: sends the events of this process to the subscribers in the cluster.

Owns the backlog of one publisher (an engine, a steward, the control operations of a program), the numbers by which
subscribers count what they miss, and the batches in which events are sent. While there is no subscriber, an engine and
a steward read one attribute and do nothing more. The supervisor, or the database, says who subscribes. The receiving
side is subscription.py.
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
from streamline_pool.domain.backoff import Backoff
from streamline_pool.domain.errors import ValidationError, WorkflowError
from streamline_pool.protocol import event_stream
from streamline_pool.protocol.codec import check_payload, packed
from streamline_pool.protocol.operations import Signal
from streamline_pool.storage.store import AsyncStore

from .event import Event

__all__ = ["EVENT_DATA_BYTES_MAX", "ControlEvents", "EventPublisher"]

log = logging.getLogger("streamline_pool")

EVENT_DATA_BYTES_MAX = 32 * 1024
"""Larger data is left out of an event; the run document has it. The signals are a capped collection of 16 MiB, which
also carries the wake-ups of the pools."""

_BACKLOG_MAX = 10_000  # events not sent yet; beyond it, or beyond the bytes, the oldest are dropped, which subscribers see by the numbers
_BACKLOG_BYTES_MAX = 8 * 1024 * 1024
_BATCH_MAX = 1_000
_BATCH_BYTES_MAX = 128 * 1024
_BATCH_PAUSE_S = 0.02  # between batches: with their size it bounds one publisher to some 6 MB/s; a busy publisher sends few batches
_RETRY = Backoff(_BATCH_PAUSE_S, 1.0)
_FLUSH_POLLS, _FLUSH_POLL_S = 200, 0.005  # `close` waits so long for what is not sent yet: a second
_PLAIN = frozenset({type(None), bool, float, datetime})  # immutable and of known size
_PLAIN_BYTES, _NAME_MAX = 500, 100
_POLL_EVERY_S = 5.0  # for a program with local executions, to which no supervisor sends the subscribers


class EventPublisher:
    """Sends the events of one engine or steward to the subscribers. `start` it in its event loop, `close` it at the end."""

    def __init__(self, store: AsyncStore, env: Env) -> None:
        self.active = False  # there is a subscriber; ask before making an event
        self._store = store
        self._env = env
        self._publisher = env.new_id()
        self._lock = threading.Lock()  # handlers emit from their threads
        self._backlog: deque[tuple[Any, int]] = deque()  # stored form and its bytes
        self._backlog_bytes = 0
        self._next = 0  # the number of the next event
        self._subscribers: dict[str, float] = {}  # id -> when it expires unless renewed; monotonic seconds
        self._greetings: dict[str, int] = {}  # new subscriber -> the number of the first event that it is to get
        self._wake_up: asyncio.Event | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False

    def start(self) -> None:
        """Begin to send, in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._wake_up = asyncio.Event()
        self._tasks = [self._loop.create_task(self._send_batches(), name="event-publisher")]

    async def close(self) -> None:
        """Send the backlog, for a second at most, and stop."""
        for _ in range(_FLUSH_POLLS):
            if not (self.active and (self._backlog or self._greetings)):
                break
            await self._env.async_sleep(_FLUSH_POLL_S)
        self._closed, self.active = True, False
        await end_tasks(self._tasks)

    # --- subscribers -----------------------------------------------------------------------------------------------

    def serve_subscribers(self, subscribers: Iterable[tuple[str, float]]) -> None:
        """Publish for these subscribers and no others: ids, each with the seconds until it expires unless renewed."""
        now = self._env.clock.monotonic()
        self._serve({subscriber: now + left_s for subscriber, left_s in subscribers if left_s > 0})

    async def poll(self) -> None:
        """Read the subscribers from the database. If that fails, the known subscribers stay; only events can be lost."""
        known = set(self._subscribers)
        try:
            found = await self._store.run(event_stream.find_subscribers())
        except WorkflowError as exc:
            log.debug("subscribers_unknown", extra={"error": str(exc)})
            return
        if not found and not self._subscribers:
            return
        # Subscribers that the supervisor sent during the read are not in its result.
        sent_meanwhile = {subscriber: until for subscriber, until in self._subscribers.items() if subscriber not in known}
        now, monotonic = self._store.now(), self._env.clock.monotonic()
        self._serve({row["_id"]: monotonic + (row["expireAt"] - now) / timedelta(seconds=1) for row in found} | sent_meanwhile)

    def poll_while(self, busy: Callable[[], bool]) -> None:
        """`poll` every few seconds while `busy()` is true: for a publisher to which no supervisor sends the subscribers."""

        async def poll_repeatedly() -> None:
            while True:
                await asyncio.sleep(_POLL_EVERY_S)
                if busy():
                    await self.poll()

        self._tasks.append(self._loop.create_task(poll_repeatedly(), name="event-publisher-poll"))

    def _serve(self, subscribers: Mapping[str, float]) -> None:
        if self._closed:
            return
        now = self._env.clock.monotonic()
        with self._lock:
            known, self._subscribers = self._subscribers, {subscriber: until for subscriber, until in subscribers.items() if until > now}
            self._greetings = {subscriber: number for subscriber, number in self._greetings.items() if subscriber in self._subscribers}
            self._greetings |= {subscriber: self._next for subscriber in self._subscribers if subscriber not in known}
            self.active = bool(self._subscribers)
            if not self.active:
                self._backlog.clear()
                self._backlog_bytes = 0
        if self.active and self._wake_up is not None:
            self._wake_up.set()
            self._loop.call_later(max(self._subscribers.values()) - now + 0.01, self._expire)

    def _expire(self) -> None:
        if self.active and max(self._subscribers.values()) <= self._env.clock.monotonic():
            self._serve({})

    # --- events ----------------------------------------------------------------------------------------------------

    def publish(self, event: Event) -> None:
        """Queue an event, from any thread. Never blocks, never raises; a full backlog drops its oldest events."""
        if not self.active:
            return
        encoded = _encode(event)
        with self._lock:
            idle = not self._backlog
            self._backlog.append(encoded)
            self._backlog_bytes += encoded[1]
            self._next += 1
            while len(self._backlog) > _BACKLOG_MAX or self._backlog_bytes > _BACKLOG_BYTES_MAX:
                self._backlog_bytes -= self._backlog.popleft()[1]
        if idle and self._wake_up is not None:
            if threading.get_ident() == self._loop_thread:
                self._wake_up.set()
            else:
                with contextlib.suppress(RuntimeError):  # the loop has been closed
                    self._loop.call_soon_threadsafe(self._wake_up.set)

    async def _send_batches(self) -> None:
        assert self._wake_up is not None, "made by `start`"
        failures = 0
        while True:
            if not self._backlog and not self._greetings:
                self._wake_up.clear()
                await self._wake_up.wait()
                continue
            try:
                await self._send_batch()
                failures = 0
            except WorkflowError as exc:
                failures += 1
                log.debug("events_held_up", extra={"events": len(self._backlog), "error": exc.message})
            except Exception:
                # The batch is lost, which subscribers see by the numbers. The runs that it reports are stored.
                log.exception("events_lost")
            await self._env.async_sleep(_RETRY.delay_s(failures, self._env.random()) if failures else _BATCH_PAUSE_S)

    async def _send_batch(self) -> None:
        """Send the oldest events. They leave the backlog only when they are stored, or when the server refuses them."""
        with self._lock:
            first = self._next - len(self._backlog)
            batch: list[Any] = []
            size = 0
            for document, document_bytes in self._backlog:
                size += document_bytes
                if batch and (size > _BATCH_BYTES_MAX or len(batch) >= _BATCH_MAX):
                    break
                batch.append(document)
            greetings = dict(self._greetings)
        try:
            await self._store.run(event_stream.send_events(self._publisher, first, batch, greetings, self._store.now()))
        except WorkflowError as exc:
            if not exc.context.get("transient"):
                self._remove_sent(first + len(batch), {})
            raise
        self._remove_sent(first + len(batch), greetings)

    def _remove_sent(self, up_to: int, greetings: Mapping[str, int]) -> None:
        """Remove the events with numbers below `up_to` from the backlog, and these greetings."""
        with self._lock:
            while self._backlog and self._next - len(self._backlog) < up_to:  # some may have been dropped during the write
                self._backlog_bytes -= self._backlog.popleft()[1]
            for subscriber in greetings:
                self._greetings.pop(subscriber, None)


class ControlEvents:
    """The events of a program's control operations. They are sent after each operation, even if there is no subscriber.

    To ask for subscribers first would cost a round trip for each operation. An operation sends two signals without an
    answer anyway; one more costs no round trip. A subscriber that has just begun misses none of these events.
    """

    def __init__(self, env: Env) -> None:
        self._publisher = env.new_id()
        self._lock = threading.Lock()
        self._next = 0
        self._unsent: deque[tuple[int, Event]] = deque(maxlen=_BACKLOG_MAX)

    def add(self, event: Event) -> None:
        """Keep an event for the next `take`."""
        with self._lock:
            self._unsent.append((self._next, event))
            self._next += 1

    def take(self) -> list[Signal]:
        """The signals to write now. Each event is in the result of one `take` only."""
        if not self._unsent:
            return []
        with self._lock:
            unsent, self._unsent = self._unsent, deque(maxlen=_BACKLOG_MAX)
        return [event_stream.events_signal(self._publisher, number, [_encode(event)[0]], event.at) for number, event in unsent]


def _encode(event: Event) -> tuple[Any, int]:
    """The stored form of an event, and its bytes.

    Encoded at once, because a handler may change the data that it emitted. It is not encoded a second time for its batch.
    """
    document: dict[str, Any] = {
        "name": event.name,
        "runId": event.run_id,
        "workflowId": event.workflow_id,
        "stepId": event.step_id,
        "data": event.data,
        "at": event.at,
    }
    if type(event.data) in _PLAIN and len(event.name) <= _NAME_MAX:
        return document, _PLAIN_BYTES  # measured: encoded together with its batch it costs a third
    data_bytes: int | None
    try:
        encoded = packed(document)
        if encoded[1] <= EVENT_DATA_BYTES_MAX:
            return encoded
        data_bytes = check_payload(event.data, "data")
        if data_bytes <= EVENT_DATA_BYTES_MAX:
            return encoded
    except ValidationError as exc:
        # None if the data cannot be stored at all; then no write that this event reports contains it.
        data_bytes = exc.context.get("size")
    document["data"] = {"$omitted": data_bytes}
    return packed(document)
