"""Events in this process: subscriptions by event name, and the one thread that calls the subscribers.

Publishing costs nothing while there is no subscriber. Engine and client publish an event only after the write that it
reports is durable. How events reach other processes is left to publisher.py and stream.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from streamline_pool.domain.errors import ValidationError

from .event import Event, check_subscribed
from .stream import EventStream

__all__ = ["EventBus", "OpenStream", "Subscriber", "global_event_bus"]

log = logging.getLogger("streamline_pool")

_BACKLOG_MAX = 10_000  # events that the subscribers have not taken yet; beyond it the oldest are dropped and counted

Subscriber = Callable[[Event], object]
"""A function of one argument. Its result is ignored."""

OpenStream = Callable[[frozenset[str] | None, str | None], EventStream]
"""Opens a stream of the events with these names (None: all names) and of this run (None: all runs)."""


class EventBus:
    """Subscriptions by event name; `"*"` is every name. One thread calls the subscribers, one after another.

    `open_stream` connects `stream` with the database of one application. Without it, `stream` raises ValidationError.
    """

    def __init__(self, open_stream: OpenStream | None = None) -> None:
        self._open_stream = open_stream
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._subscribers: dict[str, list[tuple[Subscriber, bool]]] = {}  # name -> (subscriber, for one event only)
        self._backlog: queue.Queue[Event | threading.Event | None] = queue.Queue(_BACKLOG_MAX)
        self._thread: threading.Thread | None = None
        self.dropped = 0

    @property
    def active(self) -> bool:
        """True if there is a subscriber. Publishers ask this first, so that they build no event in vain."""
        return bool(self._subscribers)

    def on(self, name: str, subscriber: Subscriber) -> Subscriber:
        """Call `subscriber(event)` for every event of that name (`"*"`: of any name). Returns `subscriber`, for use with `off`.

        Raises ValidationError for a name that begins as those of the engine do, such as `workflow:`, and is not one of them.
        """
        return self._add(name, subscriber, once=False)

    def once(self, name: str, subscriber: Subscriber) -> Subscriber:
        """Like `on`, for the first such event only."""
        return self._add(name, subscriber, once=True)

    def _add(self, name: str, subscriber: Subscriber, *, once: bool) -> Subscriber:
        if not isinstance(name, str) or not name:
            raise ValidationError(f"event name {name!r}: expected text such as 'workflow:completed' or '*'")
        if not callable(subscriber):
            raise ValidationError(f"events.on({name!r}): the subscriber must be a function of one argument, not {subscriber!r}")
        check_subscribed(name, "events.on")
        with self._lock:
            self._subscribers.setdefault(name, []).append((subscriber, once))
        return subscriber

    def off(self, name: str, subscriber: Subscriber) -> None:
        """Undo `on` or `once`. Does nothing if there is no such subscription."""
        with self._lock:
            # Compared by equality: each access to a bound method makes a new object.
            kept = [entry for entry in self._subscribers.get(name, []) if entry[0] != subscriber]
            if kept:
                self._subscribers[name] = kept
            else:
                self._subscribers.pop(name, None)

    def publish(self, event: Event) -> None:
        """Queue an event for the subscribers' thread. Never blocks, never raises; a full queue drops its oldest event."""
        if not self._subscribers:
            return
        self._ensure_thread()
        while True:
            try:
                self._backlog.put_nowait(event)
                return
            except queue.Full:
                try:
                    self._backlog.get_nowait()
                    self.dropped += 1
                except queue.Empty:
                    continue

    def _ensure_thread(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._deliver, name="streamline-events", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError as exc:
                    # The system has no thread left. The event is queued, and the next one tries again.
                    log.warning("subscribers_wait", extra={"error": str(exc)})

    def _deliver(self) -> None:
        """The thread: call the subscribers of each event, until `close` queues None."""
        while (event := self._backlog.get()) is not None:
            if isinstance(event, threading.Event):
                event.set()  # `flush` waits for it
                continue
            for name in (event.name, "*"):
                for subscriber, once in list(self._subscribers.get(name, ())):
                    if once:
                        self.off(name, subscriber)
                    try:
                        subscriber(event)
                    except Exception:
                        # User code may raise anything. The other subscribers still get the event.
                        log.exception("subscriber_failed", extra={"event": event.name, "run_id": event.run_id})

    def stream(self, names: str | Iterable[str] | None = None, *, run_id: str | None = None) -> EventStream:
        """The events of the whole cluster from now on: from every worker on every host, and from programs such as this one.

        names: one name or several; None or "*" for all.
        run_id: only the events of that run; None for all runs.

        Iterate over the result with `for` or `async for`. Close it, or use it in `with` or `async with`.

        The stream is subscribed when this returns. That takes some hundredths of a second. A pool that does not answer
        makes it two seconds, and a warning is logged.

        Raises ValidationError for malformed or misspelt names and on `global_event_bus`; StoreUnavailableError without a database.
        """
        wanted = _checked_names(names)
        if run_id is not None and (not isinstance(run_id, str) or not run_id):
            raise ValidationError(f"events.stream: run_id {run_id!r} is not the id of a run; leave it out for the events of all runs")
        if self._open_stream is None:
            raise ValidationError("events.stream: this bus has no database; call `app.events.stream(…)` of the Streamline that is meant")
        stream = self._open_stream(wanted, run_id)
        self._streams.add(stream)
        return stream

    async def stream_async(self, names: str | Iterable[str] | None = None, *, run_id: str | None = None) -> EventStream:
        """See `stream`. Does not block the event loop."""
        return await asyncio.to_thread(self.stream, names, run_id=run_id)

    def close_streams(self) -> None:
        """Close every stream that was opened from this bus."""
        for stream in list(self._streams):
            stream.close()

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Wait until the subscribers have got everything published so far; False after `timeout_s`. Not for use in a subscriber."""
        if self._thread is None:
            return True
        reached = threading.Event()
        with contextlib.suppress(queue.Full):
            self._backlog.put(reached, timeout=timeout_s)
        return reached.wait(timeout_s)

    def close(self, timeout_s: float = 5.0) -> None:
        """Close the streams, deliver the queued events, then end the thread. The bus can be used again afterwards."""
        self.close_streams()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            with contextlib.suppress(queue.Full):  # a subscriber hangs; its thread is a daemon
                self._backlog.put(None, timeout=timeout_s)
                thread.join(timeout_s)


def _checked_names(names: object) -> frozenset[str] | None:
    if names is None:
        return None
    wanted: list[Any] = list(names) if isinstance(names, Iterable) and not isinstance(names, str) else [names]
    if not wanted or not all(isinstance(name, str) and name for name in wanted):
        raise ValidationError(
            f"events.stream: names {names!r}: expected names such as 'workflow:completed'; leave it out for events of all names"
        )
    for name in wanted:
        check_subscribed(name, "events.stream")
    return None if "*" in wanted else frozenset(wanted)


global_event_bus = EventBus()
"""Receives the events of every `Streamline` in this process."""
