"""What the kinds of faults do: deaths, freezes, outages, late copies, replication that lags, clocks that jump.

Owns what is still to come of a fault. faults.py draws them, world.py performs the operations themselves.
"""

from __future__ import annotations

import contextvars
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pymongo.errors import AutoReconnect

from .actors import Actor, ClientActor, WorkerActor
from .faults import draw_theme
from .ledger import Violation
from .store import Request
from .transitions import TERMINAL

if TYPE_CHECKING:
    from .world import World

__all__ = ["FREEZES_S", "LATE_S", "Harm"]

FREEZES_S = (2.0, 12.0, 28.0, 31.0, 45.0, 70.0)  # shorter and longer than a lease of 30 s
LAGS_S = (1.0, 5.0, 20.0)
LATE_S = (0.0, 0.01, 0.5, 5.0, 40.0)
SETBACKS_S = (0.3, 3.0, 20.0)
JUMPS_S = (3_600.0, -3_600.0, 40.0, -40.0)
OUTAGES_S = (0.3, 3.0, 15.0, 40.0)
_AHEAD = -1
_AT_ANY_TIME = ("freeze after", "crash after", "driver lost")
_TOO_LARGE = {"index": 0, "code": 17419, "errmsg": "Resulting document after update is larger than 16777216"}


class Harm:
    """Does harm to the actors, the server and the connections of one schedule."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._choices = world.choices
        self.theme = draw_theme(world.choices, world.workload.duel)
        self.counts: dict[str, int] = {}  # kind of fault -> how often
        self.full: set[str] = set()  # runs whose document has refused a write as too large
        self.lost_drivers: Counter[str] = Counter()  # owner -> how many of its drivers were to end
        self.last_at = -1.0  # virtual seconds
        self._came_at = -1.0  # when the last of what was delayed has come
        self.to_come = 0  # late copies, thaws and the like
        self._away_until = -1.0  # an outage ends
        self._late: list[list[Any]] = []  # [writes of its sender that come first, or _AHEAD; the copy]
        self._unacknowledged: list[tuple[Request, Any]] = []

    def later(self, act: Callable[[], None], delay_s: float) -> None:
        """Do something after some virtual time, whatever becomes of the present actor."""
        self.to_come += 1

        def happen() -> None:
            self.to_come -= 1
            self._came_at = self._world.loop.time()
            act()

        self._world.loop.call_later(delay_s, happen, context=contextvars.Context())

    def is_over_since(self, at: float) -> bool:
        """Whether since then nothing has gone wrong, and nothing that was delayed has come or is still to come."""
        return not self.to_come and max(self.last_at, self._came_at) < at

    def end(self) -> None:
        """No more faults: what was held back arrives, and the frozen go on."""
        self._away_until = -1.0
        self._world.send_again(entry[1] for entry in self._late)
        self._late.clear()
        if self._world.server.lags:
            self.catch_up()
        for actor in (*self._world.workers, self._world.steward):
            if self._world.loop.is_frozen(actor.owner):
                self.thaw(actor, actor.owner)

    # --- at an operation ---------------------------------------------------------------------------------------------

    def before(self, request: Request, fault: str | None) -> bool:
        """Do what comes before an operation. False: the server never gets it, or later."""
        world = self._world
        if fault is not None:
            self.counts[fault] = self.counts.get(fault, 0) + 1
            self.last_at = world.loop.time()
            world.ledger.tell(world.loop.time(), f"{request.owner}: {request.name}: {fault.upper()}")
        self._release_late(request)
        match fault:
            case "request lost":
                request.fail(AutoReconnect("the request was lost"))
                return False
            case "outage":
                self.begin_outage()
                request.fail(AutoReconnect("the server is away"))
                return False
            case "late":
                request.fail(AutoReconnect("the connection broke"))
                self._send_late(request.copy())
                return False
            case "half done":
                world.perform_part(request.half(self._choices.one_of((2, 3))))
                request.fail(AutoReconnect("the connection broke in the middle"))
                return False
            case "full":
                self.full.add(_first_run(request))
                request.answer({"n": 0, "nModified": 0, "writeErrors": [_TOO_LARGE], "ok": 1.0})
                return False
            case "crash before":
                self.crash(request.actor)
                return False
            case "freeze before" if not world.loop.is_frozen(request.actor.owner):
                self._freeze_before(request)
                return False
            case "lag" | "majority too late" if not world.server.lags:
                self._begin_lag()
            case "clock jump":
                request.actor.clock.wrong_s += self._choices.one_of(JUMPS_S)
            case "server clock" if not world.server.behind_s:
                world.server.behind_s += self._choices.one_of(SETBACKS_S)
        return True

    def acknowledge(self, request: Request, reply: Any) -> None:
        """Pass the reply on. A write that waits for a majority is held back while replication lags."""
        if isinstance(reply, Exception):
            request.fail(reply)
        elif self.waits_for_majority(request):
            self._unacknowledged.append((request, reply))
        else:
            request.answer(reply)

    def begin_outage(self) -> None:
        """From now on, and for some time, every operation fails."""
        self._away_until = self._world.loop.time() + self._choices.one_of(OUTAGES_S)

    def waits_for_majority(self, request: Request) -> bool:
        """Whether the reply to this request cannot come now."""
        return request.writes and request.by_majority and self._world.server.lags

    @property
    def is_away(self) -> bool:
        """Whether an outage is under way."""
        return self._world.loop.time() < self._away_until

    def _freeze_before(self, request: Request) -> None:
        """The sender stops before it sends, which it does when it goes on, unless it has died."""
        actor, owner = request.actor, request.owner
        self._world.loop.freeze(owner)

        def go_on() -> None:
            self.last_at = self._world.loop.time()
            if actor.alive and actor.owner == owner:
                self._world.send_next(request)
                self.thaw(actor, owner)

        self.later(go_on, self._choices.one_of(FREEZES_S))

    def _send_late(self, copy: Request) -> None:
        """A copy comes after some time, or behind the next writes of its sender, or just before the next one of its kind."""
        behind = self._choices.one_of((0, 1, 2, 3, _AHEAD))
        if behind:
            self._late.append([behind, copy])
        else:
            self.later(lambda: self._world.send_again([copy]), self._choices.one_of(LATE_S))

    def _release_late(self, request: Request) -> None:
        """A write is about to be performed: the copies that wait for it come before it or next."""
        for entry in [entry for entry in self._late if entry[1].owner == request.owner and request.writes]:
            if entry[0] == _AHEAD:
                if entry[1].name == request.name:
                    self._late.remove(entry)
                    self._world.perform_part(entry[1])
                continue
            entry[0] -= 1
            if entry[0] < 0:
                self._late.remove(entry)
                self._world.send_next(entry[1])

    # --- at any time -------------------------------------------------------------------------------------------------

    def disturb(self) -> None:
        """Stop or kill a worker in whose handlers time passes, or end a driver, without any operation under way."""
        chance = self._choices.profile.near_writes / (4 if not self.counts or self.theme is None else 40)  # a theme strikes, then waits
        if not chance or (self.theme is not None and (self.theme.at is not None or self.theme.kind not in _AT_ANY_TIME)):
            return
        if not self._world.rules.entries.handlers_run() or not self._choices.happens(chance):
            return
        busy = [actor for actor in self._world.workers if actor.alive and actor.engine is not None and actor.engine.active_runs.held]
        if not busy:
            return
        actor = self._choices.one_of(busy)
        if self._world.loop.is_frozen(actor.owner):
            return
        fault = self._choices.one_of(_AT_ANY_TIME) if self.theme is None else self.theme.kind
        self.counts[fault] = self.counts.get(fault, 0) + 1
        self._world.ledger.tell(self._world.loop.time(), f"{actor.owner}: at work: {fault.upper()}")
        match fault:
            case "freeze after":
                self.freeze(actor)
            case "crash after":
                self.crash(actor)
            case _:
                self._lose_driver(actor)

    def _lose_driver(self, actor: WorkerActor) -> None:
        """A defect ends the driver of a run, whose lease must not be renewed any more; or a handler cancels the task that it runs in."""
        self.lost_drivers[actor.owner] += 1
        active_runs = [] if actor.engine is None else list(actor.engine.active_runs.held.values())
        if self._choices.happens(0.7):
            actor.has_defect = True
        elif active_runs:
            task = self._choices.one_of(active_runs).task
            if task is not None:
                self._world.loop.call_soon(task.cancel, context=actor.context())

    def stray_wake_up(self, run_id: str) -> None:
        """Another program stores a due time in a run that has ended or is paused, which no code of this package does."""
        world = self._world
        run = world.rules.runs.get(run_id)
        if run is not None and "lease" not in run and (run["status"] in TERMINAL or run.get("paused") is True):
            world.ledger.tell(world.loop.time(), f"another program: stores a due time in {run_id}")
            world.server.set_wake_at(run_id)
            world.rules.strayed.add(run_id)
            world.rules.runs = world.server.runs()

    # --- deaths and freezes ------------------------------------------------------------------------------------------

    def kill(self, actor: Actor) -> None:
        """A handler kills its own process."""
        contextvars.Context().run(self.crash, actor)

    def crash(self, actor: Actor) -> None:
        """An actor dies. What it has sent is on its way all the same. A new one starts later, if it was no client."""
        owner = actor.owner
        actor.die()
        self._world.forget_sender(owner)
        self._world.rules.died(owner)
        if isinstance(actor, ClientActor):
            self._world.workload.died(actor)
            return
        if isinstance(actor, WorkerActor) and self._choices.number(3) < 2:
            self.later(lambda: self._report_death(owner), self._choices.one_of((0.01, 1.0, 20.0)))  # else its leases expire
        self.later(actor.start, self._choices.one_of((0.01, 1.0, 40.0)))

    def _report_death(self, owner: str) -> None:
        self._world.promptness.death_reported(owner)
        self._world.steward.died(owner)

    def drained(self, actor: Actor) -> None:
        """A worker has finished its steps and released its runs; the supervisor starts a new one."""
        actor.die()
        self._world.rules.died(actor.owner)
        contextvars.Context().run(self.later, actor.start, 0.1)

    def freeze(self, actor: Actor) -> None:
        """An actor stops for some time."""
        owner = actor.owner
        if self._world.loop.is_frozen(owner):
            return
        self._world.loop.freeze(owner)
        self.later(lambda: self.thaw(actor, owner), self._choices.one_of(FREEZES_S))

    def thaw(self, actor: Actor, owner: str) -> None:
        """A frozen actor goes on, unless another process has taken its place."""
        if actor.owner == owner and actor.alive and self._world.loop.is_frozen(owner):
            self._world.ledger.tell(self._world.loop.time(), f"{owner} goes on")
            self._world.loop.thaw(owner)
            self._world.rules.entries.thawed(actor)

    # --- replication that lags ---------------------------------------------------------------------------------------

    def _begin_lag(self) -> None:
        self._world.server.begin_lag()
        self._world.rules.lag_began()
        self.later(self._end_lag, self._choices.one_of(LAGS_S))

    def _end_lag(self) -> None:
        if not self._world.server.lags:
            return
        if self._choices.happens(0.5):
            self._fail_over()
        else:
            self.catch_up()

    def catch_up(self) -> None:
        """A majority has what the primary has."""
        self.last_at = self._world.loop.time()
        self._world.server.catch_up()
        self._world.rules.lag_ended()
        waiting, self._unacknowledged = self._unacknowledged, []
        for request, reply in waiting:
            request.answer(reply)

    def _fail_over(self) -> None:
        world = self._world
        self.last_at = world.loop.time()
        world.ledger.tell(world.loop.time(), "FAIL-OVER: what no majority had is rolled back")
        world.server.roll_back()
        waiting, self._unacknowledged = self._unacknowledged, []
        for request, _ in waiting:
            request.fail(AutoReconnect("the primary stepped down"))
        try:
            world.rules.rolled_back()
            world.rules.lag_ended()
        except Violation as violation:
            world.fail(violation)


def _first_run(commits: Request) -> str:
    """The run of the first statement."""
    assert commits.document is not None, "a command has a document"
    return str(commits.document["updates"][0]["q"]["_id"])
