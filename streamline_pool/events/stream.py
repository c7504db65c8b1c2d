"""The reading side of `app.events.stream()`: the events of the whole cluster, in this process.

Owns a stream's subscription, the one thread that reads the signals for it, the count of what it has missed, and the
bounded queue from which both `for` and `async for` take. A slow reader therefore delays nobody. broadcast.py is the
other side.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Self

from streamline_pool.config.env import Env
from streamline_pool.domain.errors import InvalidStateError, WorkflowError
from streamline_pool.protocol import event_stream
from streamline_pool.protocol.event_stream import LISTENER_TTL_S
from streamline_pool.storage.procedures import Procedure
from streamline_pool.storage.store import Store

from .bus import Event

__all__ = ["EventStream", "Ledger", "open_stream"]

log = logging.getLogger("streamline_pool")

_QUEUE_MAX = 10_000  # events that the reader of a stream has not taken yet; beyond it the oldest are dropped and counted
_RENEW_S = LISTENER_TTL_S / 3  # two renewals may fail before the pools stop to publish for us
_SUBSCRIBE_S = 2.0  # how long `stream()` waits for the pools that are alive
_ASK_AGAIN_S = 0.25  # a signal may be lost
_POOL_SEEN_S = 65.0  # a pool says every 30 s that it is alive; twice that, and some
_TAIL_S = 1.0  # how long one read of the signals waits; a stream that was dropped without `close` ends within it
_OVERLAP = timedelta(seconds=2)  # clocks differ; what is read twice is known by its number
_RETRY_FIRST_S, _RETRY_MAX_S = 0.05, 1.0
_CLOSE_S = 2.0
_PUBLISHERS_MAX = 10_000
_HOLES_MAX = 100


class Ledger:
    """What has been received of each publisher, by the numbers it gives to its events. Counts what is missing.

    Batches may come twice (a tail that was opened again), and those of programs, sent without waiting, in another order.
    """

    def __init__(self) -> None:
        self.missed = 0
        self._next: dict[str, int] = {}  # publisher -> the number that comes next
        self._holes: dict[str, deque[range]] = {}  # publisher -> numbers that were passed over

    def begin(self) -> None:
        """What was missed so far was of no interest."""
        self.missed = 0
        self._holes.clear()

    def expect(self, publisher: str, number: int) -> None:
        """The publisher owes everything from this number on; unless it is known, and owes more already."""
        if publisher not in self._next:
            if len(self._next) >= _PUBLISHERS_MAX:  # processes come and go; the one heard of first is the likeliest to be gone
                oldest = next(iter(self._next))
                del self._next[oldest]
                self._holes.pop(oldest, None)
            self._next[publisher] = number

    def receive(self, publisher: str, first: int, count: int) -> list[int]:
        """The places in a batch, numbered from `first` on, of events that are new."""
        self.expect(publisher, first)
        following = self._next[publisher]
        if first > following:
            self.missed += first - following
            self._holes.setdefault(publisher, deque(maxlen=_HOLES_MAX)).append(range(following, first))
            following = first
        self._next[publisher] = max(following, first + count)
        late = [number for number in range(first, min(following, first + count)) if self._fill(publisher, number)]
        return [number - first for number in (*late, *range(max(first, following), first + count))]

    def _fill(self, publisher: str, number: int) -> bool:
        """True for a number that was missing so far."""
        holes = self._holes.get(publisher, ())
        for place, hole in enumerate(holes):
            if number in hole:
                rest = [part for part in (range(hole.start, number), range(number + 1, hole.stop)) if part]
                self._holes[publisher] = deque([*list(holes)[:place], *rest, *list(holes)[place + 1 :]], maxlen=_HOLES_MAX)
                self.missed -= 1
                return True
        return False


class _Mailbox:
    """A bounded queue between the reading thread and whoever iterates, in a thread or in an event loop."""

    def __init__(self) -> None:
        self.dropped = 0
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._waiting: list[asyncio.Future[None]] = []

    def put(self, events: Sequence[Event]) -> None:
        """Never waits: the oldest events make room."""
        with self._changed:
            self._events.extend(events)
            while len(self._events) > _QUEUE_MAX:
                self._events.popleft()
                self.dropped += 1
            self._wake()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._events.clear()
            self._wake()

    def _wake(self) -> None:
        self._changed.notify_all()
        for future in self._waiting:
            with contextlib.suppress(RuntimeError):  # its loop has been closed
                future.get_loop().call_soon_threadsafe(_set, future)
        self._waiting.clear()

    def get(self) -> Event | None:
        """The next event; None once it is closed."""
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
            await future


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _Reader:
    """One subscription: its record, its thread, and what it knows of the publishers."""

    def __init__(self, store: Store, env: Env, names: frozenset[str] | None, run_id: str | None) -> None:
        self.id = f"listener:{env.new_id()}"
        self.mailbox = _Mailbox()
        self.ledger = Ledger()
        self._pid = os.getpid()
        self._store = store
        self._env = env
        self._names = names
        self._run_id = run_id
        self._began = False  # our own call has been read: in the order of the signals, events from here on are ours
        self._pools: set[str] = set()  # that publish for us
        self._heard = threading.Condition()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read, name="streamline-stream", daemon=True)

    # --- subscribing -----------------------------------------------------------------------------------------------

    def subscribe(self) -> None:
        """Call for events; return once every pool that is alive has answered, or time is up."""
        self._store.drive(self._store.ensuring())
        self._since = self._store.now()
        self._store.drive(self._calling())
        self._thread.start()
        until = self._env.clock.monotonic() + _SUBSCRIBE_S
        while True:
            pools = {row["_id"] for row in self._store.drive(_finding_pools())}
            with self._heard:
                if self._heard.wait_for(functools.partial(self._all_heard, pools), _ASK_AGAIN_S):
                    return
                silent = sorted(pools - self._pools)
            if self._env.clock.monotonic() > until:
                log.warning("stream_incomplete", extra={"pools": silent, "advice": "they do not answer; their events may be missing"})
                return
            self._store.run(event_stream.listen(self.id, self._store.now()))

    def _all_heard(self, pools: set[str]) -> bool:
        return self._began and pools <= self._pools

    def _calling(self) -> Procedure[None]:
        self._renew_at = self._env.clock.monotonic() + _RENEW_S
        yield event_stream.put_listener(self.id, socket.gethostname(), os.getpid())
        yield event_stream.listen(self.id, self._store.now())

    # --- reading ---------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        failures = 0
        try:
            while not self._closing.is_set():
                since = self._since
                try:
                    self._follow()
                except WorkflowError as exc:
                    # What passes by until the tail is open again is seen by the numbers.
                    failures = 1 if self._since > since else failures + 1
                    log.log(logging.WARNING if failures == 5 else logging.DEBUG, "stream_broken", extra={"error": exc.message})
                    self._closing.wait(min(_RETRY_FIRST_S * 2.0 ** min(failures, 10), _RETRY_MAX_S))
        except Exception:
            log.exception("stream_failed")
        finally:
            self.mailbox.close()
            with contextlib.suppress(WorkflowError):  # then the record vanishes by itself
                self._store.run(event_stream.remove_listener(self.id))
                self._store.run(event_stream.unlisten(self.id, self._store.now()))

    def _follow(self) -> None:
        tail = self._store.tail(event_stream.stream_tail(self.id, self._since - _OVERLAP), _TAIL_S)
        with contextlib.closing(tail):
            for signal in tail:
                if self._closing.is_set():
                    return
                if signal is not None:
                    self._take(signal)
                if self._env.clock.monotonic() >= self._renew_at:
                    self._store.drive(self._calling())

    def _take(self, signal: Mapping[str, Any]) -> None:
        try:
            self._since = max(self._since, min(signal["at"], self._store.now()))
            match signal["kind"]:
                case "events":
                    self._take_batch(signal)
                case "listen" | "heard" as kind:
                    self._take_answer(signal["pool"] if kind == "heard" else None)
        except (LookupError, TypeError) as exc:
            log.warning("signal_malformed", extra={"signal": str(signal)[:500], "error": f"{type(exc).__name__}: {exc}"})

    def _take_answer(self, pool: str | None) -> None:
        with self._heard:
            if not self._began:
                self._began = True
                self.ledger.begin()
            if pool is not None:
                self._pools.add(pool)
            self._heard.notify_all()

    def _take_batch(self, signal: Mapping[str, Any]) -> None:
        publisher, first, events = signal["publisher"], signal["first"], signal["events"]
        for greeting in signal["greets"]:
            if greeting["listener"] == self.id:
                self.ledger.expect(publisher, greeting["number"])
        fresh = self.ledger.receive(publisher, first, len(events))
        wanted = [_event(events[place]) for place in fresh if self._is_wanted(events[place])]
        if self._began and wanted:
            self.mailbox.put(wanted)

    def _is_wanted(self, document: Mapping[str, Any]) -> bool:
        return (self._names is None or document["name"] in self._names) and self._run_id in (None, document["runId"])

    # --- closing ---------------------------------------------------------------------------------------------------

    def abandon(self) -> None:
        """End without waiting for it: within moments, the thread does the rest."""
        if self._pid != os.getpid():
            return  # a fork's copy, in which a lock may be held for ever
        self._closing.set()
        self.mailbox.close()

    def close(self) -> None:
        """End, and wait until the pools may know."""
        self.abandon()
        if self._thread.ident is None or self._thread is threading.current_thread():
            return
        if self._thread.is_alive():
            with contextlib.suppress(WorkflowError):
                self._store.run(event_stream.unlisten(self.id, self._store.now()))  # wakes our own thread, too
            self._thread.join(_CLOSE_S)


class EventStream:
    """The events of the whole cluster, as they happen. Made by `app.events.stream(…)`.

    Iterate it with `for` or `async for`: events of one publisher come in their order, those of different ones as they were
    stored. `missed` counts what was lost on the way. Iteration ends when it is closed, by `close`, the end of its `with`
    block, or `app.close`. Several threads or tasks may iterate one stream; each event goes to one of them.
    """

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader
        self._pid = os.getpid()
        self._forget = weakref.finalize(self, reader.abandon)
        self._forget.atexit = False

    @property
    def missed(self) -> int:
        """Events that this stream should have got and did not: some process or this one's reader was too slow.

        Those that the publishers or the database dropped are counted whatever their names and runs, because nobody knows these.
        """
        return self._reader.ledger.missed + self._reader.mailbox.dropped

    def close(self) -> None:
        """End the stream and whoever iterates it."""
        if self._pid == os.getpid():  # else it is the parent's
            self._forget.detach()
            self._reader.close()

    async def aclose(self) -> None:
        """See `close`; the event loop goes on meanwhile."""
        await asyncio.to_thread(self.close)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        self._check_process()
        event = self._reader.mailbox.get()
        if event is None:
            raise StopIteration
        return event

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        self._check_process()
        event = await self._reader.mailbox.get_async()
        if event is None:
            raise StopAsyncIteration
        return event

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise InvalidStateError("events.stream: this stream was opened before a fork and belongs to the parent; open another one here")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


def open_stream(store: Store, env: Env, names: frozenset[str] | None, run_id: str | None) -> EventStream:
    """Subscribe to the events with these names (None: all) of this run (None: of all)."""
    reader = _Reader(store, env, names, run_id)
    try:
        reader.subscribe()
    except BaseException:
        reader.close()
        raise
    return EventStream(reader)


def _finding_pools() -> Procedure[list[dict[str, Any]]]:
    pools: list[dict[str, Any]] = yield event_stream.find_pools(_POOL_SEEN_S)
    return pools


def _event(document: Mapping[str, Any]) -> Event:
    at: datetime = document["at"]
    return Event(
        name=document["name"],
        run_id=document["runId"],
        workflow_id=document["workflowId"],
        step_id=document["stepId"],
        data=document["data"],
        at=at,
    )
