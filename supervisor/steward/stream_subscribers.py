"""Duty: know who subscribes to the event stream, and answer subscribers once every worker of this host publishes for them.

Owns the list of subscribers. It comes from signals and, for subscribers whose signal was lost or older than this steward,
from the database. The supervisor passes the list on to the workers; the steward's own events go through `DutyTools.publish`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from streamline_pool.domain.errors import WorkflowError
from streamline_pool.protocol import event_stream
from streamline_pool.protocol.event_stream import SUBSCRIBER_TTL_S
from streamline_pool.supervisor.ipc.messages import Subscribers, SubscribersServed
from streamline_pool.supervisor.steward.duty import READ_TIMEOUT_S, DutyTools

__all__ = ["SUBSCRIBER_SIGNALS", "StreamSubscribers"]

log = logging.getLogger("streamline_pool")

SUBSCRIBER_SIGNALS = ("listen", "unlisten")
_SAME_S = 5.0  # a subscriber's record and its signal may differ in time by so much and still mean the same renewal
_SUBSCRIBERS_MAX = 1_000  # a guess, far above any use; further ones are not served


class StreamSubscribers:
    """The subscribers that this host knows, each with the time until which it is served."""

    def __init__(self, tools: DutyTools) -> None:
        self._tools = tools
        self._clock = tools.env.clock
        self._until: dict[str, float] = {}  # id -> when it ceases to be served unless it renews; monotonic seconds
        self._served: asyncio.Queue[tuple[str, ...]] = asyncio.Queue()  # one entry for each `SubscribersServed`

    def on_signal(self, signal: Mapping[str, Any]) -> None:
        """A subscriber begins, renews or ends its subscription."""
        subscriber, now = signal.get("listener"), self._clock.monotonic()
        if not isinstance(subscriber, str):
            return
        if signal["kind"] == "unlisten":
            if self._until.pop(subscriber, None) is not None:
                self._notify(now)
        elif subscriber in self._until or len(self._until) < _SUBSCRIBERS_MAX:
            self._until[subscriber] = now + SUBSCRIBER_TTL_S
            self._notify(now)

    async def refresh(self) -> None:
        """Read from the database the subscribers whose signal was lost, or older than this steward."""
        found = await self._tools.run(event_stream.find_subscribers(), READ_TIMEOUT_S)
        now, server_now = self._clock.monotonic(), self._tools.store.now()
        until = {row["_id"]: now + (row["expireAt"] - server_now) / timedelta(seconds=1) for row in found[:_SUBSCRIBERS_MAX]}
        renewed = {subscriber: at for subscriber, at in until.items() if at > max(now, self._until.get(subscriber, 0.0) + _SAME_S)}
        if renewed:
            self._until |= renewed
            self._notify(now)

    def _notify(self, now: float) -> None:
        self._until = {subscriber: at for subscriber, at in self._until.items() if at > now}
        remaining = tuple((subscriber, at - now) for subscriber, at in self._until.items())
        self._tools.publisher.serve_subscribers(remaining)
        self._tools.send_latest(Subscribers(subscribers=remaining))

    def on_served(self, message: SubscribersServed) -> None:
        """Every worker publishes for these."""
        if message.subscribers:
            self._served.put_nowait(message.subscribers)

    async def run(self) -> None:
        """Answer subscribers. A subscriber whose answer is lost asks again."""
        store = self._tools.store
        while True:
            subscribers = await self._served.get()
            try:
                await store.run(event_stream.answer_subscribers(self._tools.boot.host_id, subscribers, store.now()))
            except WorkflowError as exc:
                log.debug("signal_lost", extra={"kind": "heard", "error": str(exc)})
