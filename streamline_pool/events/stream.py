"""`EventStream`, what `app.events.stream()` returns: the events of the whole cluster, for `for` and `async for`.

Owns the iteration and the end of a stream. Subscribing and reading are left to subscription.py.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from typing import Self

from streamline_pool.config.env import Env
from streamline_pool.domain.errors import InvalidStateError
from streamline_pool.storage.store import Store

from .event import Event
from .subscription import Subscription

__all__ = ["EventStream", "open_stream"]


class EventStream:
    """The events of the whole cluster, as they happen. Made by `app.events.stream(…)`.

    Iterate over it with `for` or `async for`. Events of one publisher come in their order; events of different publishers
    come in the order in which the database stored them. `missed` counts the events that were lost on the way.

    The iteration ends when the stream is closed: by `close`, by the end of its `with` block, or by `app.close`.
    Several threads or tasks may iterate over one stream; each event goes to one of them.
    """

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, subscription.abandon)
        self._finalizer.atexit = False

    @property
    def missed(self) -> int:
        """The number of events that this stream should have received and did not, because a process was too slow.

        An event that a publisher or the database dropped counts whatever its name and run: neither is known any more.
        """
        return self._subscription.ledger.missed + self._subscription.mailbox.dropped

    def close(self) -> None:
        """End the stream, and every iteration over it. Does nothing in a forked child: the stream belongs to the parent."""
        if self._pid == os.getpid():
            self._finalizer.detach()
            self._subscription.close()

    async def aclose(self) -> None:
        """See `close`. Does not block the event loop."""
        await asyncio.to_thread(self.close)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        self._check_process()
        event = self._subscription.mailbox.get()
        if event is None:
            raise StopIteration
        return event

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        self._check_process()
        event = await self._subscription.mailbox.get_async()
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
    """Subscribe to the events with these names (None: all names) of this run (None: all runs).

    Raises StoreUnavailableError if the database cannot be reached; nothing is left behind then.
    """
    subscription = Subscription(store, env, names, run_id)
    try:
        subscription.subscribe()
    except BaseException:
        subscription.close()
        raise
    return EventStream(subscription)
