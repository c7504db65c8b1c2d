"""One schedule: actors, the server, what goes wrong, and in which order the operations happen.

Owns the scheduler. When no actor has anything to do, it takes one operation that is under way, performs it on the server, with
or without a fault, and lets the actors react; or it lets time pass. The rules see every change.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

from pymongo.errors import AutoReconnect, PyMongoError

from streamline_pool.protocol.operations import Find
from streamline_pool.worker.worker import Worker

from .actors import Actor, ClientActor, StewardActor, WorkerActor
from .choices import THEMED, Choices
from .faults import draw_fault
from .harm import FREEZES_S, LATE_S, Harm
from .holders import Holders
from .judgement import is_quiet, judge
from .ledger import Ledger, Violation
from .loop import VirtualLoop
from .promptness import Promptness
from .publications import Publications
from .server import Server
from .signals import Signals
from .store import Request
from .transitions import Rules
from .workload import Workload

__all__ = ["World"]

OPERATION_S = 0.001  # virtual time that an operation takes
OPERATIONS_MAX = 3_000  # more would mean that something repeats for ever
PLAY_S = 900.0  # virtual time for the clients' plans and the faults
SETTLE_S = 3_600.0  # and for everything to come to rest without faults: above six retries of the longest back-off
THEMED_DUELS = 0.7  # of the duels that need a fault; all of those that need it at one operation


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
        theme = None if self.workload.duel is None else self.workload.duel.theme
        if theme is not None and (choices.fixed.random() < THEMED_DUELS or " at " in theme):
            choices.profile = THEMED
        self.holders = Holders(self)
        self.promptness = Promptness(self)
        self.publications = Publications(self)
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
        self._pending: list[Request] = []
        self.harm = Harm(self)
        self._is_over = False
        self.is_settling = False  # from here on nothing goes wrong
        self._failure: BaseException | None = None
        self._tasks: list[asyncio.Task[None]] = []

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
        self.is_settling = self._is_over = True
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
        self.holders.look()
        if self.operations > OPERATIONS_MAX:
            raise Violation(f"after {self.operations} operations the actors have not come to rest")
        timer = self.loop.next_timer()
        if self._pending and not (timer is not None and self._time_passes()):
            self._perform_one()
            return True
        if not self.is_settling and (self.loop.time() > PLAY_S or self._played()):
            self._settle()
            return True
        if self.is_settling and not self._pending and not self.harm.to_come and is_quiet(self):
            return False
        if self.is_settling and self.loop.time() > self._settle_until:
            raise Violation(f"not at rest {SETTLE_S:g} s after the last fault: {self.rules.describe_unrest()}")
        if timer is None:
            raise Violation("no actor waits for anything, and the runs are not at rest")
        self.loop.advance(timer)
        self.server.clock_s = self.loop.time()
        self.rules.entries.time_passed()
        self.promptness.time_passed()
        self.publications.time_passed()
        if not self.is_settling:
            self.harm.disturb()
        return True

    def _time_passes(self) -> bool:
        return not self.is_settling and self.choices.happens(self.choices.profile.delay)

    def _played(self) -> bool:
        return not self.harm.to_come and all(not client.alive or self.workload.has_played(client) for client in self.clients)

    def _settle(self) -> None:
        """No more faults. Nothing helps the runs from here on but time."""
        self.ledger.tell(self.loop.time(), "--- from here on nothing goes wrong")
        self.is_settling = True
        self._settle_until = self.loop.time() + SETTLE_S
        self.harm.end()

    @property
    def is_ending(self) -> bool:
        """Whether the schedule is over, and what is left of it is cancelled."""
        return self._failure is not None or self._is_over

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
            self.harm.later(lambda: None, 0.0)
            self.harm.catch_up()
        value, error = result[0]
        if error is not None:
            raise error
        return value

    def block(self, actor: Actor, seconds: float) -> None:
        """Stop an actor in the middle of a blocking call: the others go on meanwhile, in the same loop."""
        self.ledger.tell(self.loop.time(), f"{actor.owner}: blocked for {seconds:g} s")
        over: list[bool] = []
        self.harm.later(lambda: over.append(True), seconds)
        owner, task = actor.owner, asyncio.current_task(self.loop)
        self.loop.freeze(owner)
        asyncio.tasks._leave_task(self.loop, task)  # type: ignore[arg-type]
        try:
            while not over and self._failure is None:
                self.loop._run_once()
        finally:
            asyncio.tasks._enter_task(self.loop, task)  # type: ignore[arg-type]
        self.harm.thaw(actor, owner)

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
        if len(candidates) > 1 and not self.is_settling and self.choices.happens(self.choices.profile.reorder):
            request = candidates[self.choices.number(len(candidates))]
        self._pending.remove(request)
        self._perform(request, self._draw(request))

    def _draw(self, request: Request) -> str | None:
        if self.is_settling or not request.actor.alive or request.future is None:
            return None
        if self.harm.is_away:
            return "request lost"
        return draw_fault(self.choices, request, self.harm.theme, has_struck=bool(self.harm.counts))

    def _perform(self, request: Request, fault: str | None) -> None:
        """Let one operation happen, or not, as the fault says."""
        self.operations += 1
        self.loop.advance(self.loop.time() + OPERATION_S)
        self.server.clock_s = self.loop.time()
        if self.harm.before(request, fault):
            self._reply(request, self._on_server(request), fault)

    def _reply(self, request: Request, reply: Any, fault: str | None) -> None:
        match fault:
            case "reply lost":
                request.fail(AutoReconnect("the reply was lost"))
            case "outage after":
                self.harm.begin_outage()
                request.fail(AutoReconnect("the server went away"))
            case "slow reply" if not self.harm.waits_for_majority(request):
                self.harm.later(lambda: self.harm.acknowledge(request, reply), self.choices.one_of(LATE_S))
            case "crash after":
                self.harm.crash(request.actor)
            case "freeze after":
                self.harm.acknowledge(request, reply)
                self.harm.freeze(request.actor)
            case "majority too late" if request.writes and isinstance(reply, dict):
                request.answer({**reply, "writeConcernError": {"code": 64, "errmsg": "waiting for replication timed out"}})
            case _:
                self.harm.acknowledge(request, reply)

    def _on_server(self, request: Request) -> Any:
        """Perform it. Returns the reply, or the driver's error."""
        reply: Any = None
        try:
            if isinstance(request.op, Find):
                reply = self.server.find(request.op, by_majority=request.by_majority)
            else:
                assert request.document is not None, "a command has a document"
                reply = self.server.command(request.op, request.document)
                if "localTime" in reply:
                    reply["localTime"] += timedelta(seconds=request.actor.clock_error_s)
        except PyMongoError as exc:
            return exc
        finally:
            if request.writes and request.op.collection == "runs" and not _matched_nothing(reply):
                self.rules.changed(request)
                self.workload.on_changed()
        if request.name == "record_event":
            self.rules.waits.event_recorded()
        self.workload.on_performed(request)
        return reply

    def perform_part(self, part: Request) -> None:
        """The server performs a part of a write, and its sender does not learn of it."""
        self._on_server(part)

    def send_again(self, copies: Iterable[Request]) -> None:
        """Late copies of requests are on their way, behind all others."""
        self._pending.extend(copies)

    def send_next(self, copy: Request) -> None:
        """A late copy of a request is on its way, before all others."""
        self._pending.insert(0, copy)

    def forget_sender(self, owner: str) -> None:
        """The sender is dead: its requests reach the server, and their replies reach no one."""
        for request in self._pending:
            if request.owner == owner:
                request.future = None

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
