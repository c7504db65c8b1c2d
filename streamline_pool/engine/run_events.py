"""Publishes what the engine did, once it is durable: to this process, and to the cluster's streams; logs failures.

Owns the publishing. Which events a change has, and their data, is decided in domain/transitions.py and domain/waits.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from streamline_pool.domain.change import Change, ChangeEvent, ChangeKind
from streamline_pool.domain.document import RunDocument
from streamline_pool.events.bus import EventBus, global_event_bus
from streamline_pool.events.event import Event
from streamline_pool.events.publisher import EventPublisher
from streamline_pool.protocol.payloads import EXTERNAL_KEY, is_external

from .active_run import ActiveRun

__all__ = ["RunEvents"]

log = logging.getLogger("streamline_pool")


class RunEvents:
    """The engine's way to subscribers. Making an event costs, so callers ask `wanted` first."""

    def __init__(self, own: EventBus, publisher: EventPublisher, now: Callable[[], datetime]) -> None:
        self._own = own
        self._publisher = publisher
        self._now = now

    @property
    def wanted(self) -> bool:
        """True if there is a subscriber, in this process or in the cluster."""
        return self._own.active or global_event_bus.active or self._publisher.active

    def publish(self, document: RunDocument, events: tuple[ChangeEvent, ...]) -> None:
        """Publish what has durably happened to a run."""
        for name, step_id, data in events:
            self._publish(name, data, document["_id"], document["workflowId"], step_id)

    def publish_error(self, name: str, data: Any) -> None:
        """Publish a failure that belongs to no run."""
        self._publish(name, data, None, None, None)

    def publish_claimed(self, active: ActiveRun) -> None:
        """Publish that a run started, or was recovered from a lost worker."""
        document = active.document
        if document["token"] == 1:
            self.publish(document, (("workflow:started", None, document.get("input")),))
        elif document["crashes"]:
            self.publish(document, (("workflow:recovered", document["currentStepId"], {"crashes": document["crashes"]}),))

    def publish_committed(self, active: ActiveRun, change: Change) -> None:
        """Publish the events of a change that was stored, and log it if it is a failure."""
        if self.wanted:
            self.publish(active.document, tuple((name, step_id, _value(data, active.outputs)) for name, step_id, data in change.events))
        if change.kind is ChangeKind.RETRY:
            _log_retry(active, change)
        elif change.kind is ChangeKind.FAIL:
            _log_run_failed(active)

    def _publish(self, name: str, data: Any, run_id: str | None, workflow_id: str | None, step_id: str | None) -> None:
        event = Event(name=name, run_id=run_id, workflow_id=workflow_id, step_id=step_id, data=data, at=self._now())
        for bus in (self._own, global_event_bus, self._publisher):
            bus.publish(event)


def _value(data: Any, outputs: Mapping[str, Any]) -> Any:
    """The data of an event; if it is an output that the document only refers to, its value (if that was loaded)."""
    return outputs[data[EXTERNAL_KEY]] if is_external(data) and data[EXTERNAL_KEY] in outputs else data


# The pool's log is the first place where people search for a step that failed.


def _log_retry(active: ActiveRun, change: Change) -> None:
    error = active.document["steps"][active.place]["error"]
    text = f"{error['type']}: {error['message']}"
    log.warning("attempt_failed", extra={**_names(active), "error": text, "again_at": str(change.wake_at)})


def _log_run_failed(active: ActiveRun) -> None:
    error = active.document["error"] or {}
    more = f"streamline-pool runs show {active.run_id}"  # with the traceback, which is too long for a line
    text = f"{error.get('code')}: {error.get('type')}: {error.get('message')}"
    log.error("run_failed", extra={**_names(active), "error": text, "more": more})


def _names(active: ActiveRun) -> dict[str, Any]:
    step = active.document["steps"][active.place]
    workflow_id = active.definition.workflow_id
    return {"run_id": active.run_id, "workflow_id": workflow_id, "step_id": step["stepId"], "attempt": step["attempts"]}
