"""The actors: two workers and a steward of one host, another host's worker, and clients. Each is the product's own code in a task.

Owns their assembly, and the part of a supervisor that a schedule needs: it passes hints on, starts what died again, and
reports deaths to the steward.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from streamline_pool import Settings, Streamline
from streamline_pool.config.env import Env
from streamline_pool.engine.engine import Engine
from streamline_pool.supervisor.ipc.messages import Died, Evidence, Released, RunChanged, TimersFired, WorkDue
from streamline_pool.supervisor.steward.duty import Duty, DutyTools, StewardBoot
from streamline_pool.supervisor.steward.lease_recovery import LeaseRecovery
from streamline_pool.supervisor.steward.signal_tail import SignalTail
from streamline_pool.supervisor.steward.stream_subscribers import StreamSubscribers
from streamline_pool.supervisor.steward.sweep import Sweep
from streamline_pool.supervisor.steward.wake_ups import WakeUps
from streamline_pool.worker.worker import Worker

from .loop import ACTOR
from .server import EPOCH
from .store import ExplorerAsyncStore, ExplorerStore

if TYPE_CHECKING:
    from .ledger import Call
    from .world import World

__all__ = ["SETTINGS", "Actor", "ClientActor", "StewardActor", "WorkerActor"]

SETTINGS = Settings(lease_s=30.0, concurrency=4)


class _Clock:
    """The clocks of an actor's host, in virtual time. The time of day may be wrong; the monotonic clock runs at the right speed."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.wrong_s = 0.0

    def now(self) -> datetime:
        return EPOCH + timedelta(milliseconds=round((self._world.loop.time() + self.wrong_s) * 1000))

    def monotonic(self) -> float:
        return self._world.loop.time()


class Bus:
    """The application's event bus without its thread: what is published is checked at once."""

    active = True

    def __init__(self, on_event: Callable[[Any], None]) -> None:
        self.publish = on_event


class Actor:
    """One process. `owner` names its incarnation; a new one is made after each death."""

    call: Call | None = None
    has_defect = False  # of the next driver that stores something
    clock_error_s = 0.0  # of its readings of the server's clock

    @property
    def engine(self) -> Engine | None:
        """What holds runs in this process; a steward holds none."""
        return None

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.number = 0
        self.owner = name
        self.alive = False
        self.clock = _Clock(world)

    def start(self) -> None:
        """Begin a new incarnation."""
        self.number += 1
        self.owner = f"{self.name}.{self.number}"
        self.alive = True
        self.call = None
        self.has_defect = False
        self.app = self._make_app()
        self.spawn(self.main())

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine as this actor."""
        task = self.world.loop.create_task(work, context=self.context())
        self.world.watch(self, task)
        return task

    def context(self) -> contextvars.Context:
        """The context of this incarnation's code."""
        context = contextvars.Context()
        context.run(ACTOR.set, self.owner)
        return context

    async def main(self) -> None:
        """What the process does."""
        raise NotImplementedError

    def die(self) -> None:
        """SIGKILL."""
        self.alive = False
        self.world.loop.kill(self.owner)

    def _make_app(self) -> Streamline:
        self._ids = 0
        chance = random.Random(f"{self.world.choices.seed} {self.owner}")
        env = Env(
            clock=self.clock,
            new_id=self._new_id,
            new_secret=lambda: f"{chance.getrandbits(128):032x}",
            random=chance.random,
            sleep=lambda seconds: self.world.block(self, seconds),
            async_sleep=asyncio.sleep,
            probe=self._probe,
        )
        app = Streamline(self.world.uri, database=self.world.server.name, settings=SETTINGS, env=env)
        app.connections.use(ExplorerStore(app.where, env, self.world, self))
        self.world.workload.define(app, self)
        app.freeze()
        return app

    def _probe(self, point: str) -> None:
        """Code of the engine: the next driver to come here has a defect."""
        if self.has_defect and point in ("handler.after", "commit.before"):
            self.has_defect = False
            raise RuntimeError("a defect of the engine")

    def _new_id(self) -> str:
        self._ids += 1
        return f"{self.owner}-{self._ids}"

    def use_store(self) -> ExplorerAsyncStore:
        """Give the application its asyncio store, in the running loop."""
        return self.app.connections.use(ExplorerAsyncStore(self.app.where, self.app.env, self.world, self))


class WorkerActor(Actor):
    """One worker process."""

    def __init__(self, world: World, name: str, index: int) -> None:
        super().__init__(world, name)
        self._index = index
        self.worker: Worker | None = None

    async def main(self) -> None:
        self.use_store()
        self.app.events = Bus(lambda event: self.world.publications.published(self, event))  # type: ignore[assignment]
        self.worker = worker = Worker(self.app, SETTINGS, owner=self.owner, index=self._index, total=2, notify=self._beat_soon)
        await worker.run()
        self.world.harm.drained(self)

    @property
    def engine(self) -> Engine | None:
        """What holds runs in this process."""
        return None if self.worker is None else self.worker._engine

    def _beat_soon(self) -> None:
        self.world.loop.call_soon(self._beat)

    def _beat(self) -> None:
        if self.worker is not None and self.alive:
            parked = self.worker.take_parked()
            if parked:
                self.world.steward.parked(tuple((round(at.timestamp() * 1000), run_id) for at, run_id in parked))

    def drain(self) -> None:
        """SIGTERM."""
        if self.worker is not None:
            self.worker.drain()


class StewardActor(Actor):
    """One steward process, and its end of the pipe to the supervisor."""

    unsent_bytes = 0

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self._wake_ups: WakeUps | None = None
        self._leases: LeaseRecovery | None = None
        self._deaths: list[Died] = []

    async def main(self) -> None:
        self.use_store()
        boot = StewardBoot(host_id=self.owner, host="host", pid=1, first=False)
        tools = DutyTools(self.app, SETTINGS, self.app.env, boot, self)
        subscribers = StreamSubscribers(tools)
        self._wake_ups, self._leases = WakeUps(tools), LeaseRecovery(tools)
        await tools.store.ensure()
        duties: list[Duty] = [SignalTail(tools, self._wake_ups, subscribers), Sweep(tools, self._wake_ups, subscribers), self._leases]
        deaths, self._deaths = self._deaths, []
        for died in deaths:
            self._leases.on_died(died)
        for duty in duties:
            self.spawn(duty.run())
        await asyncio.Event().wait()

    def died(self, owner: str) -> None:
        """The supervisor reports the death of a worker."""
        evidence = Evidence(exit_code=None, signal="SIGKILL", stalled=False, rss_bytes=None, uptime_s=1.0)
        died = Died(owner=owner, evidence=evidence)
        if self.alive and self._leases is not None:
            self.world.loop.call_soon(self._leases.on_died, died, context=self.context())
        else:
            self._deaths.append(died)

    def parked(self, instants: tuple[tuple[int, str], ...]) -> None:
        """A worker's beat: when its parked runs are due."""
        if self.alive and self._wake_ups is not None and self.world.signals.copies():
            self.world.loop.call_soon(self._wake_ups.plan_parked, instants, context=self.context())

    def die(self) -> None:
        super().die()
        self._wake_ups = self._leases = None

    # --- duty.SupervisorLink -----------------------------------------------------------------------------------------

    def send(self, message: Any) -> None:
        """The supervisor passes each hint to a worker; a hint may be lost or come twice."""
        for _ in range(self.world.signals.copies()):
            self.world.to_workers(self._deliver(message))

    send_latest = send

    def _deliver(self, message: Any) -> Callable[[Worker], None] | None:
        match message:
            case Released(runs=runs) if runs:
                return lambda worker: worker.wake_up(None, overdue=True)
            case WorkDue(run_id=run_id, overdue=overdue):
                return lambda worker: worker.wake_up(run_id, overdue=overdue)
            case TimersFired(run_ids=run_ids):
                return lambda worker: worker.timers_fired(run_ids)
            case RunChanged(run_id=run_id):
                return lambda worker: worker.check_run(run_id)
            case _:
                return None


class ClientActor(Actor):
    """One program that starts runs and controls them."""

    async def main(self) -> None:
        self.use_store()
        await self.world.workload.play(self)

    @property
    def engine(self) -> Engine | None:
        """What executes runs in this program."""
        runner = self.app.connections._runners.get(self.world.loop)
        return None if runner is None else runner._engine
