"""One schedule: actors, the server, what goes wrong, and in which order the operations happen.

Owns the scheduler. When no actor has anything to do, it takes one operation that is under way, performs it on the server, with
or without a fault, and lets the actors react; or it lets time pass. The rules see every change.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from typing import Any

from pymongo.errors import AutoReconnect, PyMongoError

from streamline_pool.protocol.operations import Find
from streamline_pool.worker.worker import Worker

from .actors import Actor, ClientActor, StewardActor, WorkerActor
from .choices import THEMED, Choices
from .faults import draw_fault, draw_theme
from .judgement import is_quiet, judge
from .ledger import Ledger, Violation
from .loop import VirtualLoop
from .promptness import Promptness
from .server import Server
from .signals import Signals
from .store import Request
from .transitions import TERMINAL, Rules
from .workload import Workload

__all__ = ["World"]

OPERATION_S = 0.001  # virtual time that an operation takes
OPERATIONS_MAX = 3_000  # more would mean that something repeats for ever
PLAY_S = 900.0  # virtual time for the clients' plans and the faults
SETTLE_S = 3_600.0  # and for everything to come to rest without faults: above six retries of the longest back-off
FREEZES_S = (2.0, 12.0, 28.0, 31.0, 45.0, 70.0)  # shorter and longer than a lease of 30 s
LAGS_S = (1.0, 5.0, 20.0)
LATE_S = (0.0, 0.01, 0.5, 5.0, 40.0)
SETBACKS_S = (0.3, 3.0, 20.0)
JUMPS_S = (3_600.0, -3_600.0, 40.0, -40.0)
THEMED_DUELS = 0.7  # of the duels that need a fault
OUTAGES_S = (0.3, 3.0, 15.0, 40.0)
_AT_ANY_TIME = ("freeze after", "crash after", "driver lost")


class _Crashed(BaseException):
    """Unwinds the code of an actor that has died in a blocking operation."""


class World:
    """Plays one schedule. `run` raises Violation."""

    def __init__(self, server: Server, uri: str, choices: Choices) -> None:
        self.server = server
        self.uri = uri
        self.choices = choices
        self.loop = VirtualLoop(self._on_idle)
        self.ledger = Ledger()
        self.rules = Rules(self)
        self.workload = Workload(self)
        if self.workload.duel is not None and self.workload.duel.theme is not None and choices.fixed.random() < THEMED_DUELS:
            choices.profile = THEMED
        self.promptness = Promptness(self)
        self.is_calm = choices.profile.name == "calm"
        lost = choices.fixed.choice((0.0, 0.0, 0.05, 1.0))
        self.signals = Signals(choices, 0.0 if self.is_calm else lost, self.loop.time)
        self.workers = [WorkerActor(self, f"worker-{number}", number) for number in range(2)]
        self.steward = StewardActor(self, "steward")
        self.clients = [ClientActor(self, f"client-{number}") for number in range(self.workload.clients)]
        for actor in (*self.workers, self.steward, *self.clients):
            error_s = choices.fixed.choice((0.0, 0.0, 0.0, 0.4, -0.4, 5.0, -5.0))
            actor.clock_error_s = 0.0 if self.is_calm else error_s
            actor.clock.wrong_s = choices.fixed.choice((0.0, 0.0, 0.0, 45.0, -45.0, 3_600.0, -3_600.0))
        self.operations = 0
        self.faults: dict[str, int] = {}
        self._pending: list[Request] = []
        self._unacknowledged: list[tuple[Request, Any]] = []
        self._theme = draw_theme(choices, self.workload.duel)
        self._late: list[list[Any]] = []  # [writes of its sender that come first, the copy]
        self.last_fault_at = -1.0
        self._is_over = False
        self._away_until = -1.0  # an outage ends
        self._settling = False
        self._failure: BaseException | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._later_count = 0  # late copies, thaws and the like that are still to come

    # --- playing -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Play the schedule to its end, then judge it. Raises Violation."""
        self.server.clear()
        asyncio.set_event_loop(self.loop)
        for actor in (*self.workers, self.steward, *self.clients):
            self.loop.call_soon(actor.start)
        try:
            self.loop.run_forever()
            if self._failure is not None:
                raise self._failure
            judge(self)
        finally:
            self._end()

    def _end(self) -> None:
        self._settling = self._is_over = True
        self.loop.set_exception_handler(lambda _loop, _context: None)
        self.loop.revive_all()
        self._pending.clear()
        self._failure = self._failure or Violation("over")
        for task in self._tasks:
            task.cancel()
        for _ in range(50):
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            if not asyncio.all_tasks(self.loop):
                break
        for task in asyncio.all_tasks(self.loop):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        self.loop._scheduled.clear()
        self.loop._ready.clear()
        self.loop.close()
        asyncio.set_event_loop(None)

    def watch(self, actor: Actor, task: asyncio.Task[None]) -> None:
        """An actor's own task: an exception that leaves it is a defect of the product or of the explorer."""
        self._tasks.append(task)

        def ended(done: asyncio.Task[None]) -> None:
            if done.cancelled() or self._failure is not None:
                return
            error = done.exception()
            if error is not None and not isinstance(error, _Crashed):
                self.fail(error if isinstance(error, Violation) else Violation(f"{actor.owner} ended by {error!r}"), error)

        task.add_done_callback(ended, context=contextvars.Context())

    def fail(self, violation: Violation, cause: BaseException | None = None) -> None:
        """End the schedule: a promise was broken."""
        if self._failure is None:
            violation.__cause__ = cause if cause is not violation else None
            self._failure = violation
            self.loop.stop()

    def _on_idle(self) -> bool:
        """Do one thing. False: the schedule is over."""
        if self._failure is not None:
            return False
        try:
            return self._step()
        except Violation as violation:
            self.fail(violation)
            return False

    def _step(self) -> bool:
        if self.operations > OPERATIONS_MAX:
            raise Violation(f"after {self.operations} operations the actors have not come to rest")
        timer = self.loop.next_timer()
        if self._pending and not (timer is not None and self._time_passes()):
            self._perform_one()
            return True
        if not self._settling and (self.loop.time() > PLAY_S or self._played()):
            self._settle()
            return True
        if self._settling and not self._pending and not self._later_count and is_quiet(self):
            return False
        if self._settling and self.loop.time() > self._settle_until:
            raise Violation(f"not at rest {SETTLE_S:g} s after the last fault: {self.rules.describe_unrest()}")
        if timer is None:
            raise Violation("no actor waits for anything, and the runs are not at rest")
        self.loop.advance(timer)
        self.server.clock_s = self.loop.time()
        self.rules.time_passed()
        self.promptness.time_passed()
        if not self._settling and self._theme in (None, *_AT_ANY_TIME):
            self._disturb()
        return True

    def _disturb(self) -> None:
        """Stop or kill a worker in whose handlers time passes, or end a driver, without any operation under way."""
        chance = self.choices.profile.near_writes / 4
        if not chance or not self.rules.handlers_run() or not self.choices.happens(chance):
            return
        actor = self.choices.one_of(self.workers)
        if not actor.alive or self.loop.is_frozen(actor.owner):
            return
        fault = self._theme or self.choices.one_of(_AT_ANY_TIME)
        self.faults[fault] = self.faults.get(fault, 0) + 1
        self.ledger.tell(self.loop.time(), f"{actor.owner}: at work: {fault.upper()}")
        match fault:
            case "freeze after":
                self._freeze(actor)
            case "crash after":
                self._crash(actor)
            case _:
                self._lose_driver(actor)

    def _lose_driver(self, actor: WorkerActor) -> None:
        """A defect ends the driver of a run. Its lease must not be renewed any more."""
        active_runs = [] if actor.engine is None else list(actor.engine.active_runs.held.values())
        if active_runs:
            task = self.choices.one_of(active_runs).task
            if task is not None:
                self.loop.call_soon(task.cancel, context=actor.context())

    def _time_passes(self) -> bool:
        return not self._settling and self.choices.happens(self.choices.profile.delay)

    def _played(self) -> bool:
        return not self._later_count and all(not client.alive or self.workload.has_played(client) for client in self.clients)

    def _settle(self) -> None:
        """No more faults. Nothing helps the runs from here on but time."""
        self.ledger.tell(self.loop.time(), "--- from here on nothing goes wrong")
        self._settling = True
        self._settle_until = self.loop.time() + SETTLE_S
        self._away_until = -1.0
        self._pending.extend(entry[1] for entry in self._late)
        self._late.clear()
        if self.server.lags:
            self._catch_up()
        for actor in (*self.workers, self.steward):
            if self.loop.is_frozen(actor.owner):
                self._thaw(actor, actor.owner)

    @property
    def is_ending(self) -> bool:
        """Whether the schedule is over, and what is left of it is cancelled."""
        return self._failure is not None or self._is_over

    @property
    def is_away(self) -> bool:
        """Whether an outage is under way."""
        return self.loop.time() < self._away_until

    # --- operations --------------------------------------------------------------------------------------------------

    async def request(self, request: Request) -> Any:
        """Send an operation. Returns the reply, or raises the driver's error."""
        self._check_life(request)
        request.future = self.loop.create_future()
        self._enter(request)
        try:
            return await request.future
        except asyncio.CancelledError:
            request.future = None  # the request is on its way all the same
            raise

    def request_blocking(self, request: Request) -> Any:
        """Perform an operation of a blocking caller. Operations of other actors may come first."""
        self._check_life(request)
        for _ in range(self.choices.number(4) if self._pending else 0):
            others = [pending for pending in self._pending if pending.owner != request.owner]
            if others:
                self._pending.remove(others[0])
                contextvars.Context().run(self._perform, others[0], None)
        result: list[Any] = []

        class _Caller:
            def done(self) -> bool:
                return bool(result)

            def set_result(self, value: Any) -> None:
                result.append((value, None))

            def set_exception(self, error: Exception) -> None:
                result.append((None, error))

        request.future = _Caller()  # type: ignore[assignment]
        self._note_leases(request)
        fault = contextvars.Context().run(self._draw, request)
        if fault in ("slow reply", "lag", "majority too late"):
            fault = None  # the loop is blocked: no timer could end these
        if fault == "freeze before":
            self.block(request.actor, self.choices.one_of(FREEZES_S))
            contextvars.Context().run(self._perform, request, None)
        elif fault == "freeze after":
            contextvars.Context().run(self._perform, request, None)
            self.block(request.actor, self.choices.one_of(FREEZES_S))
        else:
            contextvars.Context().run(self._perform, request, fault)
        if not request.actor.alive or request.owner != request.actor.owner:
            raise _Crashed
        if not result:  # held back until a majority has it
            self._later(lambda: None, 0.0)
            self._catch_up()
        value, error = result[0]
        if error is not None:
            raise error
        return value

    def block(self, actor: Actor, seconds: float) -> None:
        """Stop an actor in the middle of a blocking call: the others go on meanwhile, in the same loop."""
        self.ledger.tell(self.loop.time(), f"{actor.owner}: blocked for {seconds:g} s")
        over: list[bool] = []
        self._later(lambda: over.append(True), seconds)
        owner, task = actor.owner, asyncio.current_task(self.loop)
        self.loop.freeze(owner)
        asyncio.tasks._leave_task(self.loop, task)  # type: ignore[arg-type]
        try:
            while not over and self._failure is None:
                self.loop._run_once()
        finally:
            asyncio.tasks._enter_task(self.loop, task)  # type: ignore[arg-type]
        self._thaw(actor, owner)

    def _check_life(self, request: Request) -> None:
        if self._failure is not None:
            raise asyncio.CancelledError
        if not request.actor.alive or request.owner != request.actor.owner:
            raise _Crashed

    def _enter(self, request: Request) -> None:
        self._note_leases(request)
        self._pending.append(request)
        self.workload.on_sent(request)

    def _note_leases(self, request: Request) -> None:
        if request.writes and request.op.collection == "runs":
            request.leases = {run_id: run.get("lease", {}).get("id") for run_id, run in self.rules.runs.items()}

    def _perform_one(self) -> None:
        candidates = [request for request in self._pending if request.hold <= 0] or self._pending
        for request in self._pending:
            request.hold -= 1
        request = candidates[0]
        if len(candidates) > 1 and not self._settling and self.choices.happens(self.choices.profile.reorder):
            request = candidates[self.choices.number(len(candidates))]
        self._pending.remove(request)
        self._perform(request, self._draw(request))

    def _draw(self, request: Request) -> str | None:
        if self._settling or not request.actor.alive or request.future is None:
            return None
        if self.loop.time() < self._away_until:
            return "request lost"
        return draw_fault(self.choices, request, self._theme)

    def _perform(self, request: Request, fault: str | None) -> None:
        """Let one operation happen, or not, as the fault says."""
        self.operations += 1
        self.loop.advance(self.loop.time() + OPERATION_S)
        self.server.clock_s = self.loop.time()
        if fault is not None:
            self.faults[fault] = self.faults.get(fault, 0) + 1
            self.last_fault_at = self.loop.time()
            self.ledger.tell(self.loop.time(), f"{request.owner}: {request.name}: {fault.upper()}")
        self._release_late(request)
        actor = request.actor
        match fault:
            case "request lost":
                request.fail(AutoReconnect("the request was lost"))
                return
            case "outage":
                self._away_until = self.loop.time() + self.choices.one_of(OUTAGES_S)
                request.fail(AutoReconnect("the server is away"))
                return
            case "late":
                request.fail(AutoReconnect("the connection broke"))
                copy = Request(actor, request.op, request.document, request.by_majority)
                copy.owner, copy.call, copy.leases = request.owner, request.call, request.leases
                self._send_late(copy)
                return
            case "full":
                error = {"index": 0, "code": 17419, "errmsg": "Resulting document after update is larger than 16777216"}
                request.answer({"n": 0, "nModified": 0, "writeErrors": [error], "ok": 1.0})
                return
            case "crash before":
                self._crash(actor)
                return
            case "freeze before":
                self._freeze(actor)
            case "lag" | "majority too late" if not self.server.lags:
                self._begin_lag()
            case "clock jump":
                actor.clock.wrong_s += self.choices.one_of(JUMPS_S)
            case "server clock" if not self.server.behind_s:
                self.server.behind_s += self.choices.one_of(SETBACKS_S)
        self._reply(request, self._on_server(request), fault)

    def _reply(self, request: Request, reply: Any, fault: str | None) -> None:
        match fault:
            case "reply lost":
                request.fail(AutoReconnect("the reply was lost"))
            case "slow reply" if not self._waits_for_majority(request):
                self._later(lambda: self._acknowledge(request, reply), self.choices.one_of(LATE_S))
            case "crash after":
                self._crash(request.actor)
            case "freeze after":
                self._acknowledge(request, reply)
                self._freeze(request.actor)
            case "majority too late" if request.writes and isinstance(reply, dict):
                request.answer({**reply, "writeConcernError": {"code": 64, "errmsg": "waiting for replication timed out"}})
            case _:
                self._acknowledge(request, reply)

    def _on_server(self, request: Request) -> Any:
        """Perform it. Returns the reply, or the driver's error."""
        reply: Any = None
        try:
            if isinstance(request.op, Find):
                reply = self.server.find(request.op, by_majority=request.by_majority)
            else:
                assert request.document is not None, "a command has a document"
                reply = self.server.command(request.op, request.document)
        except PyMongoError as exc:
            return exc
        finally:
            if request.writes and request.op.collection == "runs" and not _matched_nothing(reply):
                self.rules.changed(request)
                self.workload.on_changed()
        if request.name == "record_event":
            self.rules.event_recorded()
        self.workload.on_performed(request)
        return reply

    def _waits_for_majority(self, request: Request) -> bool:
        return request.writes and request.by_majority and self.server.lags

    def _acknowledge(self, request: Request, reply: Any) -> None:
        if isinstance(reply, Exception):
            request.fail(reply)
        elif self._waits_for_majority(request):
            self._unacknowledged.append((request, reply))
        else:
            request.answer(reply)

    def _send_late(self, copy: Request) -> None:
        """A copy comes after some time, or behind the next writes of its sender, where it does most harm."""
        behind = self.choices.one_of((0, 1, 2, 3))
        if behind:
            self._late.append([behind, copy])
        else:
            self._later(lambda: self._pending.append(copy), self.choices.one_of(LATE_S))

    def _release_late(self, request: Request) -> None:
        """A write is about to be performed: the copies that wait for it come next."""
        for entry in [entry for entry in self._late if entry[1].owner == request.owner and request.writes]:
            entry[0] -= 1
            if entry[0] < 0:
                self._late.remove(entry)
                self._pending.insert(0, entry[1])

    def stray_wake_up(self, run_id: str) -> None:
        """Another program stores a due time in a run that has ended or is paused, which no code of this package does."""
        run = self.rules.runs.get(run_id)
        if run is not None and "lease" not in run and (run["status"] in TERMINAL or run.get("paused") is True):
            self.ledger.tell(self.loop.time(), f"another program: stores a due time in {run_id}")
            self.server.set_wake_at(run_id)
            self.rules.strayed.add(run_id)
            self.rules.runs = self.server.runs()

    # --- faults ------------------------------------------------------------------------------------------------------

    def _later(self, act: Callable[[], None], delay_s: float) -> None:
        self._later_count += 1

        def happen() -> None:
            self._later_count -= 1
            act()

        self.loop.call_later(delay_s, happen, context=contextvars.Context())

    def kill(self, actor: Actor) -> None:
        """A handler kills its own process."""
        contextvars.Context().run(self._crash, actor)

    def _crash(self, actor: Actor) -> None:
        owner = actor.owner
        actor.die()
        for request in self._pending:
            if request.owner == owner:
                request.future = None
        self.rules.died(actor, owner)
        if isinstance(actor, ClientActor):
            self.workload.died(actor)
            return
        if isinstance(actor, WorkerActor) and self.choices.number(3) < 2:
            self._later(lambda: self._report_death(owner), self.choices.one_of((0.01, 1.0, 20.0)))  # else its leases expire
        self._later(actor.start, self.choices.one_of((0.01, 1.0, 40.0)))

    def _report_death(self, owner: str) -> None:
        self.promptness.death_reported(owner)
        self.steward.died(owner)

    def drained(self, actor: Actor) -> None:
        """A worker has finished its steps and released its runs; the supervisor starts a new one."""
        actor.die()
        self.rules.died(actor, actor.owner)
        contextvars.Context().run(self._later, actor.start, 0.1)

    def _freeze(self, actor: Actor) -> None:
        owner = actor.owner
        if self.loop.is_frozen(owner):
            return
        self.loop.freeze(owner)
        self._later(lambda: self._thaw(actor, owner), self.choices.one_of(FREEZES_S))

    def _thaw(self, actor: Actor, owner: str) -> None:
        if actor.owner == owner and actor.alive and self.loop.is_frozen(owner):
            self.ledger.tell(self.loop.time(), f"{owner} goes on")
            self.loop.thaw(owner)
            self.rules.thawed(actor)

    def _begin_lag(self) -> None:
        self.server.begin_lag()
        self.rules.lag_began()
        self._later(self._end_lag, self.choices.one_of(LAGS_S))

    def _end_lag(self) -> None:
        if not self.server.lags:
            return
        if self.choices.happens(0.5):
            self._fail_over()
        else:
            self._catch_up()

    def _catch_up(self) -> None:
        self.last_fault_at = self.loop.time()
        self.server.catch_up()
        self.rules.lag_ended()
        waiting, self._unacknowledged = self._unacknowledged, []
        for request, reply in waiting:
            request.answer(reply)

    def _fail_over(self) -> None:
        self.last_fault_at = self.loop.time()
        self.ledger.tell(self.loop.time(), "FAIL-OVER: what no majority had is rolled back")
        self.server.roll_back()
        waiting, self._unacknowledged = self._unacknowledged, []
        for request, _ in waiting:
            request.fail(AutoReconnect("the primary stepped down"))
        try:
            self.rules.rolled_back()
            self.rules.lag_ended()
        except Violation as violation:
            self.fail(violation)

    # --- the supervisor ----------------------------------------------------------------------------------------------

    def to_workers(self, deliver: Callable[[Worker], None] | None) -> None:
        """Pass a message to the workers that live."""
        if deliver is None:
            return
        for actor in self.workers:
            if actor.alive and actor.worker is not None:
                self.loop.call_soon(deliver, actor.worker, context=actor.context())


def _matched_nothing(reply: Any) -> bool:
    """Whether a write has certainly changed no run."""
    return isinstance(reply, dict) and (reply.get("n") == 0 or ("lastErrorObject" in reply and reply.get("value") is None))
