"""Duty: read the signals, and pass each to the part of the pool that acts on it.

Owns the tailing cursor and its repair. A signal is a hint: it may be lost with a connection, or overwritten in the capped
collection, and the sweep finds later what it announced.
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from typing import Any

from streamline_pool.domain.backoff import Backoff
from streamline_pool.domain.errors import WorkflowError
from streamline_pool.protocol import signals
from streamline_pool.protocol.codec import Tick
from streamline_pool.supervisor.ipc.messages import RunChanged
from streamline_pool.supervisor.steward.duty import READ_TIMEOUT_S, RETRY, WRITE_TIMEOUT_S, DutyTools
from streamline_pool.supervisor.steward.stream_subscribers import SUBSCRIBER_SIGNALS, StreamSubscribers
from streamline_pool.supervisor.steward.wake_ups import WakeUps

__all__ = ["SignalTail"]

log = logging.getLogger("streamline_pool")

SIGNAL_KINDS = ("due", "cancel", *SUBSCRIBER_SIGNALS)
REFUSED = Backoff(base_s=0.05, ceiling_s=30.0)  # a server that cannot tail at all is tried now and then; the sweep does the work
STARTS_NOW = timedelta(seconds=0.1)  # a guess, well above the clock errors of hosts: a run that starts "now" by another's clock


class SignalTail:
    """Reads signals in the order of their arrival, from the steward's start on."""

    def __init__(self, tools: DutyTools, wake_ups: WakeUps, subscribers: StreamSubscribers) -> None:
        self._tools = tools
        self._wake_ups = wake_ups
        self._subscribers = subscribers

    async def run(self) -> None:
        """A broken tail is opened again where it broke; the sweep covers the gap."""
        store = self._tools.store
        position: Tick | None = None
        failures = 0
        while True:
            try:
                if position is None:
                    position = signals.tick_of(await self._tools.run(signals.latest_signal(), READ_TIMEOUT_S))
                async for signal in store.tail(signals.signals_after(position, kind={"$in": list(SIGNAL_KINDS)})):
                    failures = 0
                    if signal is not None:
                        position = signals.beyond(position, signal)
                        self._on_signal(signal)
            except WorkflowError as exc:
                failures += 1
                await self._on_broken(exc, failures)

    async def _on_broken(self, exc: WorkflowError, failures: int) -> None:
        transient = bool(exc.context.get("transient"))
        log.log(logging.DEBUG if transient else logging.WARNING, "tail_broken", extra={"error": exc.message})
        if transient:
            self._tools.doubtful.set()
        else:
            await self._tools.attempt(self._cap_ordinary_collection)
        await self._tools.pause(failures, RETRY if transient else REFUSED)

    async def _cap_ordinary_collection(self) -> None:
        """If the collection was dropped, an insert has made a new one that is not capped and cannot be tailed.

        The options decide, not the error: to convert a capped collection removes its signals and breaks every tail of it.
        """
        options = await self._tools.run(signals.read_signals_options(self._tools.store.where.collection("signals")), READ_TIMEOUT_S)
        if options is not None and not options.get("capped"):
            await self._tools.run(signals.cap_signals(), WRITE_TIMEOUT_S)

    def _on_signal(self, signal: dict[str, Any]) -> None:
        try:
            self._act_on(signal)
        except (LookupError, TypeError) as exc:  # another program may have stored anything
            log.warning("signal_malformed", extra={"signal": str(signal)[:500], "error": f"{type(exc).__name__}: {exc}"})

    def _act_on(self, signal: dict[str, Any]) -> None:
        kind, lane = signal["kind"], signal.get("lane")
        if kind == "cancel":
            run_id, owner = _typed(signal["runId"], str), _typed(signal.get("owner"), str, type(None))
            self._tools.hint(RunChanged(run_id=run_id, owner=owner))
        elif kind in SUBSCRIBER_SIGNALS:
            self._subscribers.on_signal(signal)
        elif isinstance(lane, str) and lane in self._tools.lane_set:
            self._on_due(signal)

    def _on_due(self, signal: dict[str, Any]) -> None:
        at = _typed(signal.get("wakeAt") or signal["at"], datetime)
        run_id, count = _typed(signal.get("runId"), str, type(None)), _typed(signal.get("count", 1), int)
        # A start for "now" from a host whose clock is ahead of ours is an ordinary wake-up, not a timer with a name.
        soon = timedelta(0) < at - self._tools.store.now() < STARTS_NOW
        self._wake_ups.plan(at, None if soon else run_id, count)
        self._wake_ups.set_timer()


def _typed(value: Any, *types: type) -> Any:
    if not isinstance(value, types):
        raise TypeError(f"{type(value).__name__} instead of {types[0].__name__}")
    return value
