"""Events in process: who hears of which transition, off the hot path. `stream` opens a window on the whole cluster's.

Owns subscriptions and the one thread that runs subscribers. Publishing costs nothing while nobody listens. Events
are published only after the write that they report is durable; engine.py and client.py see to that. How events travel
between processes is the business of broadcast.py and stream.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from streamline_pool.domain.errors import ValidationError

if TYPE_CHECKING:
    from .stream import EventStream

__all__ = ["ENGINE_EVENTS", "Event", "EventBus", "global_event_bus"]

log = logging.getLogger("streamline_pool")

ENGINE_EVENTS = frozenset(
    [f"workflow:{what}" for what in ["started", "completed", "failed", "waiting", "resumed", "cancelled", "recovered", "retry", "paused"]]
    + [f"step:{what}" for what in ["started", "completed", "failed", "waiting", "skipped", "retry-scheduled"]]
    + ["engine:error", "scheduler:error", "scheduler:circuit-open", "scheduler:circuit-closed"]
)
"""Names that only the engine publishes."""

_BACKLOG_MAX = 10_000  # events waiting for slow subscribers; beyond it the oldest are dropped and counted

Subscriber = Callable[["Event"], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that has happened, durably."""

    name: str
    run_id: str | None
    workflow_id: str | None
    step_id: str | None
    data: Any
    at: datetime  # aware UTC


OpenStream = Callable[[frozenset[str] | None, str | None], "EventStream"]
"""Makes a stream of events with these names (None: of all) and of this run (None: of all)."""


class EventBus:
    """Subscriptions by event name; `"*"` hears everything. Subscribers run one after another on one thread.

    `open_stream` is what lets `stream` reach the database of one application.
    """

    def __init__(self, open_stream: OpenStream | None = None) -> None:
        self._open_stream = open_stream
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._subscribers: dict[str, list[tuple[Subscriber, bool]]] = {}
        self._backlog: queue.Queue[Event | threading.Event | None] = queue.Queue(_BACKLOG_MAX)
        self._thread: threading.Thread | None = None
        self.dropped = 0

    @property
    def active(self) -> bool:
        """True if anybody listens to anything; publishers ask first, so that silence is free."""
        return bool(self._subscribers)

    def on(self, name: str, subscriber: Subscriber) -> Subscriber:
        """Call `subscriber(event)` for every event of that name (`"*"`: of any). Returns it, so it works as `off`'s handle."""
        return self._add(name, subscriber, once=False)

    def once(self, name: str, subscriber: Subscriber) -> Subscriber:
        """Like `on`, for the first such event only."""
        return self._add(name, subscriber, once=True)

    def _add(self, name: str, subscriber: Subscriber, *, once: bool) -> Subscriber:
        if not isinstance(name, str) or not name:
            raise ValidationError(f"event name {name!r}: expected text such as 'workflow:completed' or '*'")
        if not callable(subscriber):
            raise ValidationError(f"events.on({name!r}): the subscriber must be a function of one argument, not {subscriber!r}")
        with self._lock:
            self._subscribers.setdefault(name, []).append((subscriber, once))
        return subscriber

    def off(self, name: str, subscriber: Subscriber) -> None:
        """Undo `on` or `once`; does nothing if that was never said."""
        with self._lock:
            # Equal, not identical: each look at a bound method makes a new object.
            kept = [entry for entry in self._subscribers.get(name, []) if entry[0] != subscriber]
            if kept:
                self._subscribers[name] = kept
            else:
                self._subscribers.pop(name, None)

    def publish(self, event: Event) -> None:
        """Hand an event to the subscribers' thread. Never blocks, never raises."""
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
                self._thread.start()

    def _deliver(self) -> None:
        while (event := self._backlog.get()) is not None:
            if isinstance(event, threading.Event):
                event.set()
                continue
            for name in (event.name, "*"):
                for subscriber, once in list(self._subscribers.get(name, ())):
                    if once:
                        self.off(name, subscriber)
                    try:
                        subscriber(event)
                    except Exception:
                        # A subscriber is a guest: its failure is logged and is nobody else's.
                        log.exception("subscriber_failed", extra={"event": event.name, "run_id": event.run_id})

    def stream(self, names: str | Iterable[str] | None = None, *, run_id: str | None = None) -> EventStream:
        """The events of the whole cluster, from now on: of every worker on every host, and of programs such as this one.

        `names`: one name or several; None or "*" for all. `run_id`: that run's only. Iterate what is returned with `for` or
        `async for`, and close it, or use it in `with` or `async with`. It is subscribed when this returns, which takes some
        hundredths of a second, and two seconds where a pool does not answer (a warning is logged then). Raises
        ValidationError for names that cannot be meant and on `global_event_bus`, StoreUnavailableError without a database.
        """
        wanted = _wanted(names)
        if run_id is not None and (not isinstance(run_id, str) or not run_id):
            raise ValidationError(f"events.stream: run_id {run_id!r} is not the id of a run; leave it out to hear of all runs")
        if self._open_stream is None:
            raise ValidationError("events.stream: this bus has no database; call `app.events.stream(…)` of the Streamline that is meant")
        stream = self._open_stream(wanted, run_id)
        self._streams.add(stream)
        return stream

    async def stream_async(self, names: str | Iterable[str] | None = None, *, run_id: str | None = None) -> EventStream:
        """See `stream`; the event loop goes on while the stream is being subscribed."""
        return await asyncio.to_thread(self.stream, names, run_id=run_id)

    def close_streams(self) -> None:
        """End every stream that was opened here."""
        for stream in list(self._streams):
            stream.close()

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Return once what was published before has been delivered; False if that takes longer. Not for subscribers."""
        if self._thread is None:
            return True
        reached = threading.Event()
        with contextlib.suppress(queue.Full):
            self._backlog.put(reached, timeout=timeout_s)
        return reached.wait(timeout_s)

    def close(self, timeout_s: float = 5.0) -> None:
        """End the streams, deliver what waits, then end the thread. The bus can be used again afterwards."""
        self.close_streams()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            with contextlib.suppress(queue.Full):  # a subscriber that hangs; its thread is a daemon
                self._backlog.put(None, timeout=timeout_s)
                thread.join(timeout_s)


def _wanted(names: object) -> frozenset[str] | None:
    if names is None:
        return None
    wanted: list[Any] = list(names) if isinstance(names, Iterable) and not isinstance(names, str) else [names]
    if not wanted or not all(isinstance(name, str) and name for name in wanted):
        raise ValidationError(f"events.stream: names {names!r}: expected names such as 'workflow:completed'; leave it out to hear of all")
    return None if "*" in wanted else frozenset(wanted)


global_event_bus = EventBus()
"""Hears the events of every `Streamline` in this process."""
