"""The rule about lease holders: a process that lives drives its run for as long as the lease is its own. Checked between operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .ledger import Violation

if TYPE_CHECKING:
    from .actors import Actor
    from .world import World

__all__ = ["Holders"]


class Holders:
    """Sees which runs each process drives."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._driven: dict[tuple[str, str, str], Actor] = {}  # (owner, run id, lease id) -> the process that drives the run

    def look(self) -> None:
        """No process has anything to do. Raise Violation if one has dropped a run that it holds.

        Such a run would rest until its lease is over, and its step be entered in vain. A worker that misreads a lost reply does that.
        """
        before, self._driven = self._driven, self._driven_now()
        for lease, actor in before.items():
            if lease in self._driven:
                continue
            owner, run_id, lease_id = lease
            is_there = actor.alive and actor.owner == owner and actor.engine is not None and not actor.engine._state.closed
            if is_there and self._is_leased(run_id, lease_id) and not self._excuse(owner, run_id):
                raise Violation(f"{owner} drives {run_id} no more, and holds its lease {lease_id}")

    def _excuse(self, owner: str, run_id: str) -> bool:
        """Whether a fault explains it: each driver that was lost drops one run, and a document that is full refuses even its failure."""
        harm = self._world.harm
        if run_id in harm.full:
            return True
        harm.lost_drivers[owner] -= 1
        return harm.lost_drivers[owner] >= 0

    def _driven_now(self) -> dict[tuple[str, str, str], Actor]:
        return {
            (actor.owner, active.run_id, active.lease_id): actor
            for actor in (*self._world.workers, *self._world.clients)
            if actor.alive and actor.engine is not None
            for active in actor.engine.active_runs.held.values()
            if active.lost is None
        }

    def _is_leased(self, run_id: str, lease_id: str) -> bool:
        """Whether the lease is stored, by what a majority has and by what the primary has."""
        both = (self._world.rules.durable(), self._world.rules.runs)
        return all(runs.get(run_id, {}).get("lease", {}).get("id") == lease_id for runs in both)
