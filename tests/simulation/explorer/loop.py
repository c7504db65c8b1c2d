"""An event loop with virtual time, in which every actor can be frozen or killed apart from the others.

Owns the loop's time and which callbacks may run. A callback belongs to the actor in whose context it was scheduled. When
nothing is ready, `on_idle` decides what happens next: it completes an operation, or sets the time forward.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

__all__ = ["ACTOR", "VirtualLoop"]

ACTOR: ContextVar[str] = ContextVar("ACTOR", default="")
"""The name of the actor whose code runs; empty for the explorer's own."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Time passes only when `advance` says so. `on_idle` returns False when nothing is left to do, which ends the loop."""

    def __init__(self, on_idle: Callable[[], bool]) -> None:
        super().__init__()
        self._now = 0.0
        self._on_idle = on_idle
        self._frozen: dict[str, deque[Any]] = {}
        self._dead: set[str] = set()
        self._ready: deque[Any]
        self._scheduled: list[Any]

    def time(self) -> float:
        """Virtual seconds since the start of the schedule."""
        return self._now

    # --- actors ------------------------------------------------------------------------------------------------------

    def freeze(self, actor: str) -> None:
        """Run nothing of this actor until `thaw`. Its timers pass meanwhile, as they do for a stopped process."""
        self._frozen.setdefault(actor, deque())

    def thaw(self, actor: str) -> None:
        """Let the actor go on. Not for one that was killed."""
        self._ready.extend(self._frozen.pop(actor, ()))

    def kill(self, actor: str) -> None:
        """Run nothing of this actor until the end of the schedule, when its tasks are cancelled."""
        self._dead.add(actor)
        self.freeze(actor)

    def revive_all(self) -> None:
        """At the end of a schedule: let every task be cancelled."""
        self._dead.clear()
        for actor in list(self._frozen):
            self.thaw(actor)

    def is_frozen(self, actor: str) -> bool:
        """Whether the actor is frozen."""
        return actor in self._frozen

    # --- time --------------------------------------------------------------------------------------------------------

    def next_timer(self) -> float | None:
        """When the next timer of a living actor fires; None if there is none."""
        while self._scheduled and (self._scheduled[0]._cancelled or self._owner(self._scheduled[0]) in self._dead):
            heapq.heappop(self._scheduled)._scheduled = False
        return self._scheduled[0]._when if self._scheduled else None

    def advance(self, to: float) -> None:
        """Set the time forward."""
        self._now = max(self._now, to)

    @staticmethod
    def _owner(handle: Any) -> str:
        return str(handle._context.get(ACTOR, ""))

    # --- asyncio -----------------------------------------------------------------------------------------------------

    def _run_once(self) -> None:
        self._fire_timers()
        if not self._ready and not self._on_idle():
            self.stop()
            return
        for _ in range(len(self._ready)):
            if not self._ready:
                break  # an actor that blocks in a callback has let the others go on in between
            handle = self._ready.popleft()
            if handle._cancelled:
                continue
            owner = self._owner(handle)
            if owner in self._frozen:
                self._frozen[owner].append(handle)
            else:
                handle._run()

    def _fire_timers(self) -> None:
        while self._scheduled and (self._scheduled[0]._cancelled or self._scheduled[0]._when <= self._now):
            handle = heapq.heappop(self._scheduled)
            handle._scheduled = False
            if not handle._cancelled:
                self._ready.append(handle)

    def _process_events(self, event_list: Any) -> None:
        """There are no files to watch."""

    def _write_to_self(self) -> None:
        """No other thread wakes this loop up."""
