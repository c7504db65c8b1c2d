"""Durable events: to one run, or to every run that waits for them now or later. Client procedures, without I/O.

Owns the order of the steps by which an event reaches everybody once, whoever dies in between: it is stored first, then
those who wait get it, then it counts as delivered. The steward repeats the last two for senders that have died.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from streamline_pool.domain.errors import InvalidStateError, PayloadTooLargeError, ValidationError
from streamline_pool.domain.model import TERMINAL
from streamline_pool.engine.context import check_event_name
from streamline_pool.protocol import durable_events
from streamline_pool.protocol.codec import as_payload, check_payload
from streamline_pool.protocol.payloads import EXTERNAL_KEY, is_external
from streamline_pool.protocol.run_document import check_run_id
from streamline_pool.storage.procedures import Procedure

from .run_control import ITEM_BYTES, answered_step, check_not_full, publish_resumed, reading_run, signalling_due

if TYPE_CHECKING:
    from .app import Streamline

__all__ = ["finishing_broadcasts", "sending_event"]

log = logging.getLogger("streamline_pool")

_WAITERS_MAX = 500  # runs woken by one command; a guess; fewer when `_CHUNK_BYTES` says so
_CHUNK_BYTES = 16 * 1024 * 1024
_ROUNDS_MAX = 20  # looks at a run that others act on at the same moment; a guess
_SENDER_S = 15.0  # a sender that has not finished by then is taken for dead; above what a procedure repeats for
_PENDING_MAX = 100  # events finished for dead senders at a time


def sending_event(app: Streamline, name: str, data: Any, run_id: str | None) -> Procedure[int]:
    """Deliver an event; see `Streamline.send_event`."""
    yield from app._ensuring(None)
    check_event_name(name, "send_event")
    data, size = as_payload(data, "send_event: data")
    if is_external(data):
        raise ValidationError(f"send_event: data: a mapping with {EXTERNAL_KEY!r} alone stands for a file; add another key, or rename it")
    if size > durable_events.EVENT_BYTES_MAX:
        raise PayloadTooLargeError(
            f"send_event: data of {size} bytes, and the limit is {durable_events.EVENT_BYTES_MAX}, because every run that it reaches gets a copy; "
            "store it elsewhere and pass a reference",
            size=size,
        )
    event_id = app.env.new_id()
    if run_id is not None:
        return (yield from _sending_to_one(app, check_run_id(run_id), event_id, name, data, size))
    yield durable_events.record_event(event_id, name, data, app._server_now())
    (event,) = yield durable_events.read_event(event_id)
    woken = yield from _broadcasting(app, event)
    return woken


def _sending_to_one(app: Streamline, run_id: str, event_id: str, name: str, data: Any, size: int) -> Procedure[int]:
    for _ in range(_ROUNDS_MAX):
        document = yield durable_events.deliver_event(run_id, event_id, name, data, size + ITEM_BYTES)
        if document is None:
            document = yield from reading_run(None, run_id)
            if event_id not in (document.get("seen") or ()):
                if document["status"] in TERMINAL:
                    return 0
                check_not_full(document, size + ITEM_BYTES)
                continue  # it has got room between the two reads
        if not _publish_woken(app, document, event_id, data):
            return 0
        yield from signalling_due(app, document)
        return 1
    raise InvalidStateError(f"run {run_id}: others act on it all the time; the event was not delivered, send it again", run_id=run_id)


def _publish_woken(app: Streamline, document: Mapping[str, Any], event_id: str, data: Any) -> bool:
    """Publish that this event has woken the run, if it has."""
    step_id = answered_step(document, event_id)
    if step_id is not None:
        publish_resumed(app, document, step_id, data)
    return step_id is not None


def _broadcasting(app: Streamline, event: Mapping[str, Any]) -> Procedure[int]:
    """Wake everybody who waits for a stored event; the number of runs woken by this call.

    One pass in the order of ids. Who begins to wait behind it looks for the event himself; so does who was found and
    has gone on before the delivery. Nobody may end the pass but the last of those who wait.
    """
    chunk = max(1, min(_WAITERS_MAX, _CHUNK_BYTES // (check_payload(event.get("data"), "data") + 3_000)))
    total = 0
    last = None
    while True:
        waiters = yield durable_events.find_waiters(event, last, chunk)
        if not waiters:
            break
        last = waiters[-1]["_id"]
        yield durable_events.deliver_to_waiters(event, waiters)
        delivered = yield durable_events.read_delivered([found["_id"] for found in waiters], event["_id"])
        lanes = (document.get("lane") for document in delivered)
        for lane, count in Counter(lane for lane in lanes if isinstance(lane, str)).items():
            yield from app._signalling("due", wakeAt=app._server_now(), lane=lane, count=count)
        for document in delivered:
            _publish_woken(app, document, event["_id"], event.get("data"))
        total += len(delivered)
    yield durable_events.mark_delivered(event["_id"])
    return total


def finishing_broadcasts(app: Streamline) -> Procedure[int]:
    """Do what senders that have died left undone; how many events that were. Any number of stewards may."""
    before = app._server_now() - timedelta(seconds=_SENDER_S)
    pending = yield durable_events.find_pending_events(before, _PENDING_MAX)
    for event in pending:
        try:
            yield from _broadcasting(app, event)
        except ValidationError:
            # Nobody can have it as another program has left it; that must not keep the others from being finished.
            log.exception("event_undeliverable", extra={"event_id": str(event["_id"])})
    return len(pending)
