"""Who streams events, as the steward of a host knows, and what the steward itself publishes for them.

Hears of listeners by signals, and finds in the database those whose signal was lost or was sent before this host was
there. Has the supervisor tell the workers, and answers for the host once all of them publish.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from streamline_pool.config.env import Env
from streamline_pool.domain.errors import WorkflowError
from streamline_pool.events.bus import global_event_bus
from streamline_pool.events.event import Event
from streamline_pool.events.publisher import EventPublisher
from streamline_pool.protocol import event_stream
from streamline_pool.protocol.event_stream import LISTENER_TTL_S
from streamline_pool.protocol.operations import Op
from streamline_pool.storage.store import AsyncStore
from streamline_pool.supervisor.ipc.messages import Subscribers, SubscribersServed

if TYPE_CHECKING:
    from streamline_pool.client.app import Streamline

__all__ = ["LISTENER_SIGNALS", "StreamSubscribers"]

log = logging.getLogger("streamline_pool")

LISTENER_SIGNALS = ("listen", "unlisten")
_SAME_S = 5.0  # a record and the signal that went with it may tell of times as different as that
_LISTENERS_MAX = 1_000  # a guess, far above any use; beyond it the next ones are not served


class StreamSubscribers:
    """The listeners that this host knows. `say` takes what the supervisor is to hear."""

    def __init__(self, app: Streamline, store: AsyncStore, env: Env, pool: str, send: Callable[[Subscribers], None]) -> None:
        self._bus = app.events
        self._store = store
        self._env = env
        self._pool = pool
        self._say = send
        self._until: dict[str, float] = {}  # id -> when its last word has worn out; monotonic seconds
        self._confirmed: asyncio.Queue[tuple[str, ...]] = asyncio.Queue()  # one for each `Audience`
        self.broadcast = EventPublisher(store, env)

    def on_signal(self, signal: Mapping[str, Any]) -> None:
        """Somebody begins to stream, goes on, or ends."""
        subscriber, now = signal.get("listener"), self._env.clock.monotonic()
        if not isinstance(subscriber, str):
            return
        if signal["kind"] == "unlisten":
            if self._until.pop(subscriber, None) is not None:
                self._notify(now)
        elif subscriber in self._until or len(self._until) < _LISTENERS_MAX:
            self._until[subscriber] = now + LISTENER_TTL_S
            self._notify(now)

    async def look(self, run: Callable[[Op], Awaitable[Any]]) -> None:
        """Look in the database for those whose signal was lost, or older than this steward."""
        found = await run(event_stream.find_listeners())
        now, server_now = self._env.clock.monotonic(), self._store.now()
        until = {row["_id"]: now + (row["expireAt"] - server_now) / timedelta(seconds=1) for row in found[:_LISTENERS_MAX]}
        news = {subscriber: at for subscriber, at in until.items() if at > max(now, self._until.get(subscriber, 0.0) + _SAME_S)}
        if news:
            self._until |= news
            self._notify(now)

    def _notify(self, now: float) -> None:
        self._until = {subscriber: at for subscriber, at in self._until.items() if at > now}
        left = tuple((subscriber, at - now) for subscriber, at in self._until.items())
        self.broadcast.serve_subscribers(left)
        self._say(Subscribers(subscribers=left))

    def confirmed(self, message: SubscribersServed) -> None:
        """Every worker publishes for these."""
        if message.subscribers:
            self._confirmed.put_nowait(message.subscribers)

    async def answer(self) -> None:
        """A duty of the steward: tell listeners that the workers publish for them. They ask again if that is lost."""
        while True:
            subscribers = await self._confirmed.get()
            try:
                await self._store.run(event_stream.heard(self._pool, subscribers, self._store.now()))
            except WorkflowError as exc:
                log.debug("signal_lost", extra={"kind": "heard", "error": str(exc)})

    def publish(self, name: str, data: Any = None) -> None:
        """Tell subscribers of something that the steward has seen. Here and not in the supervisor, which must not have their thread."""
        event = Event(name=name, run_id=None, workflow_id=None, step_id=None, data=data, at=self._store.now())
        self._bus.publish(event)
        global_event_bus.publish(event)
        self.broadcast.publish(event)
