"""The bounded queue of one event stream: one thread puts events in, other threads or asyncio tasks take them out."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Sequence

from .event import Event

__all__ = ["Mailbox"]

_EVENTS_MAX = 10_000  # beyond it the oldest events are dropped and counted


class Mailbox:
    """A queue that never blocks the writer. Readers wait in a thread (`get`) or in an event loop (`get_async`)."""

    def __init__(self) -> None:
        self.dropped = 0
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._waiting: list[asyncio.Future[None]] = []

    def put(self, events: Sequence[Event]) -> None:
        """Add events. When the queue is full, the oldest are dropped."""
        with self._changed:
            self._events.extend(events)
            while len(self._events) > _EVENTS_MAX:
                self._events.popleft()
                self.dropped += 1
            self._wake_readers()

    def close(self) -> None:
        """Drop what is queued. From now on, readers get None."""
        with self._changed:
            self._closed = True
            self._events.clear()
            self._wake_readers()

    def _wake_readers(self) -> None:
        self._changed.notify_all()
        for future in self._waiting:
            with contextlib.suppress(RuntimeError):  # its loop has been closed
                future.get_loop().call_soon_threadsafe(_resolve, future)
        self._waiting.clear()

    def get(self) -> Event | None:
        """Wait for the next event; None once the mailbox is closed."""
        with self._changed:
            while not self._events and not self._closed:
                self._changed.wait()
            return None if self._closed else self._events.popleft()

    async def get_async(self) -> Event | None:
        """See `get`."""
        while True:
            with self._changed:
                if self._events or self._closed:
                    return None if self._closed else self._events.popleft()
                future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._waiting.append(future)
            try:
                await future
            finally:
                with self._changed, contextlib.suppress(ValueError):
                    self._waiting.remove(future)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
