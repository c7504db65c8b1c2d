"""One subscription to the events of the cluster: its record in the database and the thread that reads the signals.

Owns the call to the pools, its renewal and its end. Puts the wanted events into a mailbox. Counting what is missing is
left to ledger.py, iterating to stream.py. The publishing side is publisher.py.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import threading
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from streamline_pool.config.env import Env
from streamline_pool.domain.backoff import Backoff
from streamline_pool.domain.errors import WorkflowError
from streamline_pool.protocol import event_stream, signals
from streamline_pool.protocol.event_stream import SUBSCRIBER_TTL_S
from streamline_pool.storage.procedures import Procedure
from streamline_pool.storage.store import Store

from .event import Event
from .ledger import Ledger
from .mailbox import Mailbox

__all__ = ["Subscription"]

log = logging.getLogger("streamline_pool")

_RENEW_S = SUBSCRIBER_TTL_S / 3  # two renewals may fail before the pools stop to publish for this subscriber
_SUBSCRIBE_S = 2.0  # how long `subscribe` waits for the pools that are alive
_CALL_AGAIN_S = 0.25  # a signal may be lost
_POOL_SEEN_S = 65.0  # a pool writes every 30 s that it is alive; twice that, and some
_TAIL_S = 1.0  # how long one read of the signals waits; a stream that was dropped without `close` ends within it
_RETRY = Backoff(0.05, 1.0)
_FAILURES_WARNED = 5  # a guess: the fifth failure in a row is no short failover
_CLOSE_S = 2.0


class Subscription:
    """A subscriber of events in this process: its record, its thread, and what it knows of the publishers."""

    def __init__(self, store: Store, env: Env, names: frozenset[str] | None, run_id: str | None) -> None:
        self.id = f"listener:{env.new_id()}"
        self.mailbox = Mailbox()
        self.ledger = Ledger()
        self._pid = os.getpid()
        self._store = store
        self._env = env
        self._names = names
        self._run_id = run_id
        self._began = False  # our own call was read: in the order of the signals, events after it are ours
        self._pools: set[str] = set()  # pools that publish for us
        self._answered = threading.Condition()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read, name="streamline-stream", daemon=True)

    # --- subscribing -----------------------------------------------------------------------------------------------

    def subscribe(self) -> None:
        """Ask the pools for their events. Return when every pool that is alive has answered, or after `_SUBSCRIBE_S`."""
        self._store.drive(self._store.ensuring())
        self._position = signals.tick_of(self._store.drive(_find_latest()))
        self._store.drive(self._announce())
        self._thread.start()
        deadline = self._env.clock.monotonic() + _SUBSCRIBE_S
        while True:
            pools = {row["_id"] for row in self._store.drive(_find_pools())}
            with self._answered:
                if self._answered.wait_for(functools.partial(self._has_answers_of, pools), _CALL_AGAIN_S):
                    return
                silent = sorted(pools - self._pools)
            if self._env.clock.monotonic() > deadline:
                log.warning("stream_incomplete", extra={"pools": silent, "advice": "they do not answer; their events may be missing"})
                return
            self._store.run(event_stream.announce_subscriber(self.id, self._store.now()))

    def _has_answers_of(self, pools: set[str]) -> bool:
        return self._began and pools <= self._pools

    def _announce(self) -> Procedure[None]:
        """Write the record and call the pools. Repeated every `_RENEW_S`, because both expire."""
        self._renew_at = self._env.clock.monotonic() + _RENEW_S
        yield event_stream.put_subscriber(self.id, socket.gethostname(), os.getpid())
        yield event_stream.announce_subscriber(self.id, self._store.now())

    # --- reading ---------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """The thread: follow the signals until the subscription is closed; after a failure, open the tail again."""
        failures = 0
        try:
            while not self._closing.is_set():
                position = self._position
                try:
                    self._follow()
                except WorkflowError as exc:
                    # Events that are lost until the tail is open again are counted by the ledger.
                    failures = 1 if self._position > position else failures + 1
                    level = logging.WARNING if failures == _FAILURES_WARNED else logging.DEBUG
                    log.log(level, "stream_broken", extra={"error": exc.message})
                    self._closing.wait(_RETRY.delay_s(failures, self._env.random()))
        except Exception:
            log.exception("stream_failed")
        finally:
            self.mailbox.close()
            with contextlib.suppress(WorkflowError):  # the record then expires
                self._store.run(event_stream.remove_subscriber(self.id))
                self._store.run(event_stream.unlisten(self.id, self._store.now()))

    def _follow(self) -> None:
        tail = self._store.tail(event_stream.stream_tail(self.id, self._position), _TAIL_S)
        with contextlib.closing(tail):
            for signal in tail:
                if self._closing.is_set():
                    return
                if signal is not None:
                    self._on_signal(signal)
                if self._env.clock.monotonic() >= self._renew_at:
                    self._store.drive(self._announce())

    def _on_signal(self, signal: Mapping[str, Any]) -> None:
        try:
            self._position = signals.beyond(self._position, signal)
            match signal["kind"]:
                case "events":
                    self._on_batch(signal)
                case "listen":
                    self._on_answer(None)
                case "heard":
                    self._on_answer(signal["pool"])
        except (LookupError, TypeError) as exc:
            log.warning("signal_malformed", extra={"signal": str(signal)[:500], "error": f"{type(exc).__name__}: {exc}"})

    def _on_answer(self, pool: str | None) -> None:
        """Our own call was read (`pool` is None), or this pool publishes for us now."""
        with self._answered:
            if not self._began:
                self._began = True
                self.ledger.begin()
            if pool is not None:
                self._pools.add(pool)
            self._answered.notify_all()

    def _on_batch(self, signal: Mapping[str, Any]) -> None:
        publisher, first, events = signal["publisher"], signal["first"], signal["events"]
        for greeting in signal["greets"]:
            if greeting["listener"] == self.id:
                self.ledger.expect(publisher, greeting["number"])
        new = self.ledger.receive(publisher, first, len(events))
        wanted = [_parse_event(events[place]) for place in new if self._is_wanted(events[place])]
        if self._began and wanted:
            self.mailbox.put(wanted)

    def _is_wanted(self, document: Mapping[str, Any]) -> bool:
        return (self._names is None or document["name"] in self._names) and self._run_id in (None, document["runId"])

    # --- closing ---------------------------------------------------------------------------------------------------

    def abandon(self) -> None:
        """End without waiting. The thread removes the subscription within `_TAIL_S`."""
        if self._pid != os.getpid():
            return  # the copy in a forked child, in which a lock may be held for ever
        self._closing.set()
        self.mailbox.close()

    def close(self) -> None:
        """End, and wait until the pools can know it; `_CLOSE_S` at most."""
        self.abandon()
        if self._thread.ident is None or self._thread is threading.current_thread():
            return
        if self._thread.is_alive():
            with contextlib.suppress(WorkflowError):
                self._store.run(event_stream.unlisten(self.id, self._store.now()))  # wakes our own thread, too
            self._thread.join(_CLOSE_S)


def _find_latest() -> Procedure[list[dict[str, Any]]]:
    latest: list[dict[str, Any]] = yield signals.latest_signal()
    return latest


def _find_pools() -> Procedure[list[dict[str, Any]]]:
    pools: list[dict[str, Any]] = yield event_stream.find_pools(_POOL_SEEN_S)
    return pools


def _parse_event(document: Mapping[str, Any]) -> Event:
    at: datetime = document["at"]
    return Event(
        name=document["name"],
        run_id=document["runId"],
        workflow_id=document["workflowId"],
        step_id=document["stepId"],
        data=document["data"],
        at=at,
    )
