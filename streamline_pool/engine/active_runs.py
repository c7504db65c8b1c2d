"""The runs that one engine is at work on: those whose lease it holds, and those it has lost whose handler goes on.

Owns which execution of a run holds it. A run may be claimed again by the process that has just lost it, so a run id does not
name an execution; the engine decides what happens to the earlier one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Mapping

from .active_run import ActiveRun

__all__ = ["ActiveRuns"]


class ActiveRuns(Collection[str]):
    """Executions, counted until their handlers are over. Iterating yields their run ids, one for each execution."""

    def __init__(self) -> None:
        self._held: dict[str, ActiveRun] = {}
        self._ending: dict[ActiveRun, asyncio.Event] = {}  # lost, and a handler may go on; the event: it is over
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def held(self) -> Mapping[str, ActiveRun]:
        """By run id: the executions whose lease this process holds, as far as it knows. The same mapping at every call."""
        return self._held

    def add(self, active: ActiveRun) -> None:
        """A run was claimed. An earlier execution of it must have been passed to `keep_until_over`."""
        assert active.run_id not in self._held, "one execution of a run holds its lease"
        self._held[active.run_id] = active
        self._empty.clear()

    def keep_until_over(self, active: ActiveRun) -> None:
        """This execution holds its run no more, but its handler may go on: it counts until `remove`."""
        if self._held.get(active.run_id) is active:
            del self._held[active.run_id]
            self._ending[active] = asyncio.Event()

    def remove(self, active: ActiveRun) -> None:
        """This execution is over."""
        if self._held.get(active.run_id) is active:
            del self._held[active.run_id]
        elif (over := self._ending.pop(active, None)) is not None:
            over.set()
        if not self:
            self._empty.set()

    def all(self) -> list[ActiveRun]:
        """Every execution; those that hold their run come first."""
        return [*self._held.values(), *self._ending]

    async def lost_ones_over(self, run_id: str) -> None:
        """Return once no execution that has lost this run goes on."""
        for over in [over for active, over in self._ending.items() if active.run_id == run_id]:
            await over.wait()

    async def emptied(self) -> None:
        """Return once no execution is left."""
        await self._empty.wait()

    def __len__(self) -> int:
        return len(self._held) + len(self._ending)

    def __iter__(self) -> Iterator[str]:
        return (active.run_id for active in self.all())

    def __contains__(self, run_id: object) -> bool:
        return run_id in self._held or any(active.run_id == run_id for active in self._ending)
