"""What client procedures may use of an application: ids, chance and clocks (`env`), the server's time, signals, events.

Owns this one seam. Procedures get a `Services` object instead of the application, so they can be read, and driven by
tests, without knowing the application.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from streamline_pool.config.env import Env
from streamline_pool.domain.errors import StoreUnavailableError
from streamline_pool.events.bus import EventBus, global_event_bus
from streamline_pool.events.event import Event
from streamline_pool.protocol import signals
from streamline_pool.storage.procedures import Procedure

from .connections import Connections

__all__ = ["Services"]

log = logging.getLogger("streamline_pool")


class Services:
    """The application as its procedures see it."""

    def __init__(self, env: Env, connections: Connections, events: EventBus) -> None:
        self.env = env
        self._connections = connections
        self._events = events

    def now(self) -> datetime:
        """The server's time: aware UTC, whole milliseconds. This host's clock before the first `ensure`."""
        return self._connections.driving_store().now()

    def ensure(self, session: Any = None) -> Procedure[None]:
        """Create the engine's indexes and read the server's clock, once per connection.

        Not every transaction can create collections. With a `session` in a transaction both are therefore done beside
        it, by the synchronous connection.
        """
        store = self._connections.driving_store()
        if session is None or not getattr(session, "in_transaction", False):
            yield from store.ensuring()
        elif not store.is_ensured or store.clock.stale:
            blocking = self._connections.store()
            blocking.drive(blocking.ensuring())
            store.adopt_ensured(blocking)

    def signal(self, kind: str, **fields: Any) -> Procedure[None]:
        """Send a signal to other processes; kinds and fields are in protocol/signals.py. A failure costs only latency: it is logged."""
        try:
            yield signals.send_signal(kind, self.now(), **fields)
        except StoreUnavailableError as exc:
            log.debug("signal_lost", extra={"kind": kind, "error": str(exc)})

    def publish(self, document: Mapping[str, Any], name: str, data: Any = None, step_id: str | None = None) -> None:
        """Publish an event of the run `document`: to this process now, to other processes when the procedure has ended."""
        run_id, workflow_id = document["_id"], str(document.get("workflowId", ""))  # a damaged run can be cancelled, too
        event = Event(name=name, run_id=run_id, workflow_id=workflow_id, step_id=step_id, data=data, at=self.now())
        self._events.publish(event)
        global_event_bus.publish(event)
        self._connections.control_events.add(event)

    def check_here(self, run_id: str) -> None:
        """Have this process read that run's state, if it executes the run itself."""
        self._connections.check_here(run_id)
