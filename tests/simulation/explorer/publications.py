"""The rules about what workers publish: what an event reports is stored, and the end of a run is published by the worker that stored it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from streamline_pool.protocol.payloads import is_external

from .ledger import Violation

if TYPE_CHECKING:
    from .actors import Actor
    from .store import Request
    from .world import World

__all__ = ["Publications"]

PUBLISHED_S = 3.0  # more than the pauses between tries to learn what became of a write


class Publications:
    """Sees every event of a worker, and the end of every run."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._to_come: dict[str, tuple[Actor, str, float, int]] = {}  # run id -> its last holder, that incarnation, since when, `rev`

    def run_done(self, run_id: str, request: Request) -> None:
        """A worker has stored the end of a run. It publishes that, also if it learns of it later."""
        if request.actor in self._world.workers:
            rev = self._world.rules.runs[run_id]["rev"]
            self._to_come[run_id] = (request.actor, request.owner, self._world.loop.time(), rev)

    def published(self, actor: Actor, event: Any) -> None:
        """A worker has published an event."""
        if event.name == "workflow:completed" and self._to_come.get(event.run_id, (None,))[0] is actor:
            del self._to_come[event.run_id]
        if event.name in ("step:completed", "workflow:completed"):
            try:
                self._check(actor, event)
            except Violation as violation:
                self._world.fail(violation)

    def _check(self, actor: Actor, event: Any) -> None:
        """What is published is durable, and is what is stored."""
        rules = self._world.rules
        run = rules.durable().get(event.run_id)
        if run is None or event.run_id in rules.deleted:
            return
        if any(run_id == event.run_id and later and later.get("rewinds") for _, run_id, later in rules.history):
            return
        who = f"{actor.owner} published {event.name} of {event.run_id}"
        if event.name == "workflow:completed":
            if run["status"] != "done":
                raise Violation(f"{who}, which is {run['status']}")
            return
        step = next(step for step in run["steps"] if step["stepId"] == event.step_id)
        if step["status"] != "done":
            raise Violation(f"{who}, {event.step_id}, which is {step['status']}")
        stored = step.get("output")
        if not is_external(stored) and _entry_of(stored) != _entry_of(event.data):
            raise Violation(f"{who}, {event.step_id}, with {event.data}, and {stored} is stored")

    def time_passed(self) -> None:
        """Raise Violation if a worker that lives has kept back the end of a run, which has not been changed since."""
        world, now = self._world, self._world.loop.time()
        for run_id, (actor, owner, at, rev) in list(self._to_come.items()):
            run = world.rules.runs.get(run_id)
            is_gone = run is None or run["status"] != "done" or run["rev"] != rev or run.get("rewinds") or run_id in world.rules.deleted
            if is_gone or not actor.alive or actor.owner != owner:
                del self._to_come[run_id]
            elif world.harm.is_away or world.server.lags or not world.rules.entries.is_awake(actor):
                continue
            elif now > at + PUBLISHED_S and world.harm.is_over_since(now - PUBLISHED_S):
                raise Violation(f"{owner} has stored the end of {run_id} {now - at:.3f} s ago, and has not published it")


def _entry_of(output: Any) -> Any:
    """The number of the entry whose result this is, if it says so."""
    return output.get("entry") if isinstance(output, Mapping) else None
