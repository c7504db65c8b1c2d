"""An application that a test kit has borrowed: pointed at the test's database, with a worker while one is wanted.

Owns the worker's life within a test: when it starts, when it is at rest, how it dies. What time it is and who may work
when is decided in testing.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Protocol

from streamline_pool.client.app import Streamline
from streamline_pool.client.inline_runner import make_owner
from streamline_pool.config.asyncio_tasks import end_tasks
from streamline_pool.domain.errors import StoreUnavailableError
from streamline_pool.events.event import Event
from streamline_pool.protocol import claims, recovery, run_lifecycle
from streamline_pool.protocol.operations import Command, Op
from streamline_pool.storage.bulk_update import update_many
from streamline_pool.storage.store import AsyncStore, Store
from streamline_pool.worker.worker import Worker

from .time_travel import JumpableAsyncStore, JumpableStore, Timeline

__all__ = ["AppHarness", "Lender"]

log = logging.getLogger("streamline_pool")

_LOOK_S = 0.02  # how soon a change that nobody told of is seen; the worker tells of nearly all
_ABRUPT_GRACE_S = 0.1  # for handlers that are still at work when a test gives up


class Lender(Protocol):
    """What a borrowed application is told by its kit."""

    mongodb_uri: str
    timeline: Timeline

    def record(self, event: Event) -> None:
        """Subscribed to the application's bus."""


class AppHarness:
    """An application that a kit has taken over: where it was, and its worker while there is one."""

    def __init__(self, app: Streamline, kit: Lender, database: str, queues: Sequence[str]) -> None:
        self.app = app
        self.database = database
        self.crashes: list[str] = []  # steps after whose handlers the worker dies, each once
        self.store: AsyncStore | None = None  # that of the kit's loop, once it is open
        self._kit = kit
        self._queues = tuple(queues)
        self._before = (app.settings, app.mongodb_uri, app.database)
        self._lanes: tuple[str, ...] = ()
        self._owner = ""
        self._worker: Worker | None = None
        self._work: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._died = False

    # --- taking over and giving back ---------------------------------------------------------------------------------

    def take(self) -> None:
        """Point the application, which has nothing open, at the kit's server. StoreUnavailableError if that is away."""
        app, kit = self.app, self._kit
        app._open_store = partial(JumpableStore, timeline=kit.timeline)
        app._open_async_store = partial(JumpableAsyncStore, timeline=kit.timeline, before=self._before_sending)
        app.configure(
            replace(app.settings, mongodb_uri=kit.mongodb_uri, database=self.database, queues=self._queues or app.settings.queues)
        )
        app.events.on("*", kit.record)
        app.store().run(run_lifecycle.server_info())  # asked once: a server that is away is not waited for

    async def open(self) -> None:
        """Reach the server, read its clock, make what the engine needs there. In the kit's loop."""
        self._loop = asyncio.get_running_loop()
        self.store = self.app.store_async()
        await self.store.ensure()

    async def drop_database(self) -> None:
        """In the kit's loop, when nobody uses it any more; what is open there is closed, too."""
        if self.store is not None:
            try:
                await self.store.run(Command(name="drop_database", collection="", verb="dropDatabase", body={}))
            except StoreUnavailableError as exc:
                log.warning("test_database_left", extra={"database": self.database, "error": str(exc)})
        await self.app.close_async()

    def release(self) -> None:
        """The application is as it was before `take`, and closed."""
        app = self.app
        app.events.off("*", self._kit.record)
        app._open_store, app._open_async_store = Store, AsyncStore
        app.settings, app.mongodb_uri, app.database = self._before

    # --- the worker --------------------------------------------------------------------------------------------------

    @property
    def has_worker(self) -> bool:
        """True between `start` and `stop`."""
        return self._worker is not None

    async def start(self) -> None:
        """Have a worker, from now on."""
        app = self.app
        self._died = False
        self._owner = make_owner(app.env)
        self._lanes = app.lanes(app.settings.queues)
        self._worker = Worker(app, app.settings, owner=self._owner, index=0, total=1, notify=self._changed.set)
        self._work = asyncio.create_task(self._worker.run())

    async def stop(self, *, abruptly: bool) -> None:
        """Have none. Handlers that are still at work end first, unless `abruptly`; then their runs are given back."""
        worker, work = self._worker, self._work
        self._worker = self._work = None
        if worker is None or work is None:
            return
        if self._died:
            await end_tasks([work])
        elif abruptly:
            worker.stop(_ABRUPT_GRACE_S)
        else:
            worker.drain()
        if not self._died:
            await work

    async def rest(self, deadline: float) -> None:
        """Return once the worker has nothing in flight and has found nothing more to do. TimeoutError at the deadline."""
        clock = self.app.env.clock
        while not self.is_at_rest():
            worker = await self.alive()
            if clock.monotonic() > deadline:
                running = ", ".join(f"run {run_id} at step {step_id}" for run_id, step_id in worker.status().running)
                raise TimeoutError(
                    f"the worker is still at work: {running or worker.status()}; if that is right, give it a longer timeout="
                )
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), _LOOK_S)
            except TimeoutError:
                await self.find_work()  # a handler may be waiting for a run that it has started

    def is_at_rest(self) -> bool:
        """True while the worker neither works nor looks for work."""
        status = self._worker.status() if self._worker is not None else None
        return status is not None and not self._died and status.state == "ready" and status.idle and not status.in_flight

    async def alive(self) -> Worker:
        """The worker; a new one if it has died as it was told to. What else ended it is raised."""
        if self._died:
            await self._replace_the_dead()
        assert self._worker is not None and self._work is not None, "nobody asks for a worker that was not started"
        if self._work.done():
            self._work.result()
        return self._worker

    async def find_work(self) -> str | None:
        """Have the worker look if there is something due. Yields the id of one such run."""
        assert self._worker is not None and self.store is not None, "see `alive`"
        due = await self.store.run(claims.find_due_before(self._lanes, self.store.now(), 1))
        if not due:
            return None
        self._worker.wake_up()
        return str(due[0]["_id"])

    async def recover(self) -> None:
        """Take back leases that have run out, as the stewards of other hosts would."""
        assert self.store is not None, "see `open`"
        await update_many(self.store.run, recovery.recover_expired(self.app.settings.max_crashes), self.store.now)

    async def next_due(self, until: datetime) -> datetime | None:
        """The first instant up to `until` at which a run becomes due."""
        assert self.store is not None, "see `open`"
        planned = await self.store.run(claims.find_due_before(self._lanes, until, 0))  # all of them: a test has few
        return min((run["wakeAt"] for run in planned), default=None)

    def works_on(self, lane: object) -> bool:
        """True if the worker claims runs of that lane."""
        return lane in self._lanes

    # --- dying -------------------------------------------------------------------------------------------------------

    async def _before_sending(self, op: Op) -> None:
        """The worker dies here, and its write is never sent, if that would store the end of a step it is to die after."""
        if not (self.crashes or self._died) or op.name != "commit_runs" or not isinstance(op, Command):
            return
        if asyncio.get_running_loop() is not self._loop:
            return  # a program's own `execute`
        due = [step_id for step_id in _ended_steps(op) if step_id in self.crashes]
        if due and not self._died:
            self.crashes.remove(due[0])
            self._died = True
            self._changed.set()
        if self._died:
            await asyncio.Event().wait()  # until the committer is cancelled, with all else that the worker was

    async def _replace_the_dead(self) -> None:
        """As a pool does it: the dead worker's leases are taken back at once, then there is another."""
        assert self._work is not None and self.store is not None, "who has died was alive"
        await end_tasks([self._work])
        release = recovery.release_owner(self._owner, self.app.settings.max_crashes, {"signal": "SIGKILL"})
        await update_many(self.store.run, release, self.store.now)
        await self.start()


def _ended_steps(op: Command) -> Iterator[str]:
    """Steps whose handlers have ended, as told by a group of holders' writes."""
    for statement in op.body["updates"]:
        update = statement["u"]
        for stage in [update] if isinstance(update, Mapping) else update:
            for name, step in stage.get("$set", {}).items():
                if name.startswith("steps.") and isinstance(step, Mapping):
                    stored = step.get("$literal", step)
                    if stored.get("status") in ("done", "waiting", "failed") or "retryAfter" in stored:
                        yield stored["stepId"]
