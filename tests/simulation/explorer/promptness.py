"""What must happen soon: rules of schedules in which nothing fails and every hint arrives, and of lost leases in all schedules.

A worker that is alive but deaf breaks no rule about single changes: a later sweep finds what it has missed. So these rules give
each event a time. Owns these times.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from .ledger import Violation
from .transitions import TERMINAL

if TYPE_CHECKING:
    from .actors import WorkerActor
    from .world import World

__all__ = ["Promptness"]

SOON_S = 1.0  # a guess: far more than any hint and pause between claims takes, and less than any sweep
READING_S = 6.0  # more than what an actor's reading of the server's clock is wrong by: so late a run may be due that is due at once
RENEWED_S = 13.0  # a worker renews every 10 s, so it learns of a lost lease no later than that


class Promptness:
    """Asked whenever time passes."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._due_since: dict[tuple[str, int], float] = {}  # (run, token) -> since when it is due and a worker has room
        self._taken_at: dict[tuple[str, str], float] = {}  # (run id, lease id) -> when it was taken away
        self._reported: dict[str, float] = {}  # owner -> when its death was reported to a steward

    def lease_taken(self, run_id: str, lease_id: str) -> None:
        """A lease was taken away from its holder, by a call or a recovery."""
        self._taken_at.setdefault((run_id, lease_id), self._world.loop.time())

    def rolled_back(self, taken: Collection[tuple[str, str]]) -> None:
        """Only these leases were taken away, after a fail-over."""
        self._taken_at = {lease: at for lease, at in self._taken_at.items() if lease in taken}

    def death_reported(self, owner: str) -> None:
        """The steward was told that a worker is dead."""
        self._reported.setdefault(owner, self._world.loop.time())

    def time_passed(self) -> None:
        """Raise Violation if something that should have happened has not."""
        if self._world.is_calm:
            self._no_worker_is_deaf()
            self._no_dead_worker_keeps_runs()
        self._no_handler_of_a_lost_run_goes_on()
        self._no_run_rests_beside_its_event()

    def _no_worker_is_deaf(self) -> None:
        now, server_now = self._world.loop.time(), self._world.server.now()
        idle = [actor for actor in self._world.workers if _has_room(actor)]
        due = {(run_id, run["token"]) for run_id, run in self._world.rules.runs.items() if self._is_due(run, server_now)}
        if not idle or self._world.workload.differs:
            due.clear()
        self._due_since = {key: self._due_since.get(key, now) for key in due}
        for (run_id, _), since in self._due_since.items():
            if now > since + SOON_S:
                raise Violation(f"run {run_id} is due for {now - since:.3f} s, and {idle[0].owner} has room and does not claim it")

    def _is_due(self, run: Mapping[str, Any], server_now: datetime) -> bool:
        if "lease" in run or run.get("paused") is True or run["_id"] in self._world.rules.strayed:
            return False
        return run.get("wakeAt") is not None and bool(run["wakeAt"] <= server_now)

    def _no_dead_worker_keeps_runs(self) -> None:
        now = self._world.loop.time()
        for run_id, run in self._world.rules.runs.items():
            reported = self._reported.get(run.get("lease", {}).get("owner", ""))
            if reported is not None and now > reported + SOON_S:
                raise Violation(f"run {run_id} is leased to {run['lease']['owner']}, whose death was reported {now - reported:.3f} s ago")

    def _no_handler_of_a_lost_run_goes_on(self) -> None:
        if self._world.harm.is_away or self._world.server.lags:
            return
        now = self._world.loop.time()
        for actor in (*self._world.workers, *self._world.clients):
            gets_hints = actor in self._world.workers  # a program that executes a run itself learns of its loss when it renews
            limit_s = SOON_S if self._world.is_calm and gets_hints else RENEWED_S
            if not actor.alive or actor.engine is None or not self._world.rules.entries.is_awake(actor):
                continue
            for active in actor.engine.active_runs.all():
                taken_at = self._taken_at.get((active.run_id, active.lease_id))
                attempt: Any = active.attempt
                if taken_at is None or attempt is None or attempt.context.signal.aborted:
                    continue
                entered_at = self._world.rules.entries.entered_at(active.run_id, active.lease_id)
                since = max(taken_at, entered_at)
                told_at = max(taken_at, self._told_at(active.run_id, entered_at))
                is_told = (
                    gets_hints
                    and not self._world.signals.lost
                    and self._hints_pass(told_at)
                    and self._world.harm.is_over_since(told_at)
                    and now > told_at + SOON_S
                )
                if is_told or (now > since + limit_s and self._world.harm.last_at < since):
                    late = f"{now - taken_at:.3f} s"
                    raise Violation(f"{actor.owner} goes on with the handler of {active.run_id}, which it lost {late} ago")

    def _no_run_rests_beside_its_event(self) -> None:
        """Once an event to all counts as delivered, no older run that waits for it rests, be it until a deadline."""
        world, rules = self._world, self._world.rules
        if not rules.waits.events or world.server.lags or "server clock" in world.harm.counts:
            return
        now = world.server.now()
        resting = [run for run in rules.runs.values() if run.get("awaits") is not None and _rests(run, now)]
        pending = {event["_id"] for event in world.server.all_of("events") if event.get("pending")} if resting else set()
        for run in resting:
            for event in rules.waits.events.values():
                is_missed = event["_id"] not in pending and event["_id"] not in (run.get("seen") or ())
                if is_missed and event["name"] == run["awaits"] and rules.waits.is_older(run, event):
                    raise Violation(f"run {run['_id']} rests, waits for {run['awaits']!r}, and has missed event {event['_id']}")

    def _hints_pass(self, since: float) -> bool:
        """Whether a steward has been there all the time to pass hints on."""
        steward = self._world.steward
        reads_since = self._world.signals.stewards.get(steward.owner)
        return steward.alive and reads_since is not None and reads_since < since and self._world.rules.entries.is_awake(steward)

    def _told_at(self, run_id: str, entered_at: float) -> float:
        """When a cancel of this run has returned. From then on its holder has the hint.

        A hint that comes before the reply to its claim tells a worker nothing: it does not know yet that it holds the run.
        """
        ends = [call.ended_at for call in self._world.ledger.calls if call.kind == "cancel" and call.run_id == run_id]
        return min((end for end in ends if end is not None and end >= entered_at), default=float("inf"))


def _rests(run: Mapping[str, Any], now: datetime) -> bool:
    """Whether no worker holds the run, and none will claim it by itself now."""
    if "lease" in run or run.get("paused") is True or run["status"] in TERMINAL:
        return False
    return run.get("wakeAt") is None or bool(run["wakeAt"] > now + timedelta(seconds=READING_S))


def _has_room(actor: WorkerActor) -> bool:
    worker = actor.worker
    if not actor.alive or worker is None or worker._engine is None:
        return False
    return worker._demand.room(len(worker._engine.active_runs)) > 0
