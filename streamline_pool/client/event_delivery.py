"""Durable events: to one run, or to every run that waits for them now or later. Client procedures, without I/O.

Owns the order of the writes by which an event reaches each run once, whichever process dies in between. The event is
stored first, then the waiting runs get it, then it counts as delivered. The steward repeats the last two writes for
senders that have died.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from streamline_pool.domain.errors import InvalidStateError, PayloadTooLargeError, ValidationError
from streamline_pool.domain.model import TERMINAL
from streamline_pool.engine.run_context import check_event_name
from streamline_pool.protocol import durable_events
from streamline_pool.protocol.codec import as_payload, check_payload
from streamline_pool.protocol.operations import error_text
from streamline_pool.protocol.payloads import EXTERNAL_KEY, is_external
from streamline_pool.protocol.run_document import check_run_id
from streamline_pool.storage.procedures import Procedure

from .run_control import ITEM_BYTES, answered_step, check_not_full, publish_resumed, reading_run, signalling_due
from .services import Services

__all__ = ["broadcasting", "finishing_broadcasts", "sending_event"]

log = logging.getLogger("streamline_pool")

_WAITERS_MAX = 500  # runs woken by one command; a guess; fewer when `_CHUNK_BYTES` says so
_CHUNK_BYTES = 16 * 1024 * 1024
_WAITER_BYTES = 5_500  # of the command for one run, beside the event's data; measured: 4 925 with the longest name and the longest id
_ROUNDS_MAX = 20  # attempts on a run that other clients change at the same moment; a guess
_SENDER_S = 15.0  # a sender that has not finished by then counts as dead; above the time for which a procedure is repeated
_PENDING_MAX = 100  # events finished for dead senders at a time


def sending_event(services: Services, name: str, data: Any, run_id: str | None) -> Procedure[int]:
    """Deliver an event; see `Streamline.send_event`."""
    yield from services.ensure()
    check_event_name(name, "send_event")
    data, size = as_payload(data, "send_event: data")
    if is_external(data):
        raise ValidationError(f"send_event: data: a mapping with {EXTERNAL_KEY!r} alone stands for an output; add another key or rename it")
    if size > durable_events.EVENT_BYTES_MAX:
        raise PayloadTooLargeError(
            f"send_event: data of {size} bytes, and the limit is {durable_events.EVENT_BYTES_MAX}, because every run that it reaches "
            "gets a copy; store it elsewhere and pass a reference",
            size=size,
        )
    event_id = services.env.new_id()
    if run_id is not None:
        return (yield from _sending_to_one(services, check_run_id(run_id), event_id, name, data, size))
    yield durable_events.record_event(event_id, name, data, services.now())
    found = yield durable_events.read_event(event_id)
    if not found:
        return 0  # the reply was slow: meanwhile a steward has delivered the event, and it was removed with the last run that was older
    woken = yield from broadcasting(services, found[0])
    return woken


def _sending_to_one(services: Services, run_id: str, event_id: str, name: str, data: Any, size: int) -> Procedure[int]:
    for _ in range(_ROUNDS_MAX):
        document = yield durable_events.deliver_event(run_id, event_id, name, data, size + ITEM_BYTES)
        if document is None:
            document = yield from reading_run(None, run_id)
            if event_id not in (document.get("seen") or ()):
                if document["status"] in TERMINAL:
                    return 0
                check_not_full(document, size + ITEM_BYTES)
                continue  # its inbox has got room between the two operations
        if not _publish_woken(services, document, event_id, data):
            return 0
        yield from signalling_due(services, document)
        return 1
    raise InvalidStateError(
        f"run {run_id}: other clients change it all the time; the event was not delivered, send it again", run_id=run_id
    )


def _publish_woken(services: Services, document: Mapping[str, Any], event_id: str, data: Any) -> bool:
    """Publish that this event has woken the run, if it has. Returns whether it has."""
    step_id = answered_step(document, event_id)
    if step_id is not None:
        publish_resumed(services, document, step_id, data)
    return step_id is not None


def broadcasting(services: Services, event: Mapping[str, Any]) -> Procedure[int]:
    """Wake every run that waits for a stored event. Returns the number of runs that this call has woken.

    One pass in the order of run ids. A run that begins to wait behind the pass finds the stored event by itself. So does
    a run that was found, and went on before the delivery. The pass ends when every waiting run was tried. While the server
    cannot store the event in one of them, because its document is full, the event stays pending: a steward tries again
    later, until that run has room or waits no more.
    """
    chunk = max(1, min(_WAITERS_MAX, _CHUNK_BYTES // (check_payload(event.get("data"), "data") + _WAITER_BYTES)))
    total = 0
    last = None
    refused: dict[str, str] = {}  # by run id: why
    while True:
        waiters = yield durable_events.find_waiters(event, last, chunk)
        if not waiters:
            break
        last = waiters[-1]["_id"]
        for error in (yield durable_events.deliver_to_waiters(event, waiters)):
            refused[waiters[error["index"]]["_id"]] = error_text(error)
        delivered = yield durable_events.read_delivered([found["_id"] for found in waiters], event["_id"])
        lanes = (document.get("lane") for document in delivered)
        for lane, count in Counter(lane for lane in lanes if isinstance(lane, str)).items():
            yield from services.signal("due", wakeAt=services.now(), lane=lane, count=count)
        for document in delivered:
            _publish_woken(services, document, event["_id"], event.get("data"))
        total += len(delivered)
    if refused:
        _log_refused(event, refused)
        yield durable_events.postpone_event(event["_id"])
    else:
        yield durable_events.mark_delivered(event["_id"])
    return total


def _log_refused(event: Mapping[str, Any], refused: Mapping[str, str]) -> None:
    facts = {"event_id": str(event["_id"]), "name_of_event": event["name"], "run_ids": list(refused)[:10], "count": len(refused)}
    advice = "the event is kept and tried again: make room in these runs by rewind_to, or cancel them"
    log.error("event_refused", extra={**facts, "error": next(iter(refused.values())), "advice": advice})


def finishing_broadcasts(services: Services) -> Procedure[int]:
    """Finish the deliveries of senders that have died, and of events that full runs have refused.

    Returns how many events were tried. Any number of stewards may do it at once.
    """
    before = services.now() - timedelta(seconds=_SENDER_S)
    pending = yield durable_events.find_pending_events(before, _PENDING_MAX)
    for event in pending:
        try:
            yield from broadcasting(services, event)
        except ValidationError:
            # Another program has changed the stored event. That must not keep the other events from being finished.
            log.exception("event_undeliverable", extra={"event_id": str(event["_id"])})
            yield durable_events.postpone_event(event["_id"])
    return len(pending)
