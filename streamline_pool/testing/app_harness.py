"""One application under test: connected to the test's database, with a worker while the kit wants one.

Owns the worker of a test: its start, the check that it is idle, and its death. What time it is, and which application
works when, is decided by kit.py.
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
from streamline_pool.client.connections import PYMONGO_STORES, StoreFactories
from streamline_pool.client.inline_runner import make_owner
from streamline_pool.config.asyncio_tasks import end_tasks
from streamline_pool.domain.errors import StoreUnavailableError
from streamline_pool.events.event import Event
from streamline_pool.protocol import claims, recovery, run_lifecycle
from streamline_pool.protocol.operations import Command, Op
from streamline_pool.storage.bulk_update import update_many
from streamline_pool.storage.store import AsyncStore
from streamline_pool.worker.worker import Worker

from .time_travel import JumpableAsyncStore, JumpableStore, Timeline

__all__ = ["AppHarness", "KitPort"]

log = logging.getLogger("streamline_pool")

_POLL_S = 0.02  # between checks for a change of which the worker sends no notice; it sends notice of nearly all
_ABRUPT_GRACE_S = 0.1  # for handlers that still run when a call of the kit has failed


class KitPort(Protocol):
    """What a harness needs of its kit."""

    mongodb_uri: str
    timeline: Timeline

    def record(self, event: Event) -> None:
        """Take one event of the application's bus."""


class AppHarness:
    """An application that a kit uses: its former address, and its worker while there is one."""

    def __init__(self, app: Streamline, kit: KitPort, database: str, queues: Sequence[str]) -> None:
        self.app = app
        self.database = database
        self.crashes: list[str] = []  # steps after whose handlers the worker dies, once per entry
        self.store: AsyncStore | None = None  # the store of the kit's event loop, once it is open
        self._kit = kit
        self._queues = tuple(queues)
        self._before = (app.settings, app.mongodb_uri, app.database)
        self._lanes: tuple[str, ...] = ()
        self._owner = ""
        self._worker: Worker | None = None
        self._work: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._died = False

    # --- taking over and releasing -----------------------------------------------------------------------------------

    def take_over(self) -> None:
        """Connect the application, which has nothing open, to the kit's server. StoreUnavailableError if it cannot be reached."""
        app, kit = self.app, self._kit
        app.connections.factories = StoreFactories(
            partial(JumpableStore, timeline=kit.timeline),
            partial(JumpableAsyncStore, timeline=kit.timeline, before=self._die_before_commit),
        )
        app.configure(
            replace(app.settings, mongodb_uri=kit.mongodb_uri, database=self.database, queues=self._queues or app.settings.queues)
        )
        app.events.on("*", kit.record)
        app.store().run(run_lifecycle.server_info())  # one attempt: the kit does not wait for a server

    async def open(self) -> None:
        """Connect, read the server's clock, create the engine's collections and indexes. In the kit's loop."""
        self._loop = asyncio.get_running_loop()
        self.store = self.app.store_async()
        await self.store.ensure()

    async def drop_database(self) -> None:
        """Drop the test's database and close the connection of the kit's loop. When no application uses the database any more."""
        if self.store is not None:
            try:
                await self.store.run(Command(name="drop_database", collection="", verb="dropDatabase", body={}))
            except StoreUnavailableError as exc:
                log.warning("test_database_left", extra={"database": self.database, "error": str(exc)})
        await self.app.close_async()

    def release(self) -> None:
        """Restore the application's own address and stores, as before `take_over`."""
        app = self.app
        app.events.off("*", self._kit.record)
        app.connections.factories = PYMONGO_STORES
        app.settings, app.mongodb_uri, app.database = self._before

    # --- the worker --------------------------------------------------------------------------------------------------

    @property
    def has_worker(self) -> bool:
        """True between `start` and `stop`."""
        return self._worker is not None

    async def start(self) -> None:
        """Start a worker."""
        app = self.app
        self._died = False
        self._owner = make_owner(app.env)
        self._lanes = app.lanes(app.settings.queues)
        self._worker = Worker(app, app.settings, owner=self._owner, index=0, total=1, notify=self._changed.set)
        self._work = asyncio.create_task(self._worker.run())

    async def stop(self, *, abruptly: bool) -> None:
        """Stop the worker. It first waits for handlers that still run. With `abruptly` it aborts them and releases their runs."""
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

    async def wait_until_idle(self, deadline: float) -> None:
        """Return once the worker has no active run and has found no due run. TimeoutError at the deadline (monotonic seconds)."""
        clock = self.app.env.clock
        while not self.is_idle():
            worker = await self.live_worker()
            if clock.monotonic() > deadline:
                running = ", ".join(f"run {run_id} at step {step_id}" for run_id, step_id in worker.status().running)
                raise TimeoutError(
                    f"the worker is still at work: {running or worker.status()}; if that is right, give it a longer timeout="
                )
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), _POLL_S)
            except TimeoutError:
                await self.wake_up_if_due()  # a handler may wait for a run that it has started

    def is_idle(self) -> bool:
        """True while the worker has no active run and polls for none."""
        status = self._worker.status() if self._worker is not None else None
        return status is not None and not self._died and status.state == "ready" and status.idle and not status.in_flight

    async def live_worker(self) -> Worker:
        """The worker; a new one if it died by `crashes`. An error that ended it is raised."""
        if self._died:
            await self._replace_worker()
        assert self._worker is not None and self._work is not None, "the kit starts it first"
        if self._work.done():
            self._work.result()
        return self._worker

    async def wake_up_if_due(self) -> str | None:
        """Wake the worker up if a run is due. Returns the id of one such run, or None."""
        assert self._worker is not None and self.store is not None, "see `live_worker`"
        due = await self.store.run(claims.find_due_before(self._lanes, self.store.now(), 1))
        if not due:
            return None
        self._worker.wake_up(overdue=True)
        return str(due[0]["_id"])

    async def recover_expired(self) -> None:
        """Recover the runs whose leases have expired, as the steward of a pool does."""
        assert self.store is not None, "see `open`"
        await update_many(self.store.run, recovery.recover_expired(self.app.settings.max_crashes), self.store.now)

    async def next_due_at(self, until: datetime) -> datetime | None:
        """The first instant up to `until` at which a run becomes due; None if there is none."""
        assert self.store is not None, "see `open`"
        planned = await self.store.run(claims.find_due_before(self._lanes, until, 0))  # 0: no limit, because a test has few
        return min((run["wakeAt"] for run in planned), default=None)

    def claims_from(self, lane: object) -> bool:
        """True if the worker claims runs of that lane."""
        return lane in self._lanes

    # --- dying -------------------------------------------------------------------------------------------------------

    async def _die_before_commit(self, op: Op) -> None:
        """Before each operation: if it would store the end of a step in `crashes`, the worker dies and the write is not sent."""
        if not (self.crashes or self._died) or op.name != "commit_runs" or not isinstance(op, Command):
            return
        if asyncio.get_running_loop() is not self._loop:
            return  # `execute` of the test itself, which has no worker
        due = [step_id for step_id in _ended_steps(op) if step_id in self.crashes]
        if due and not self._died:
            self.crashes.remove(due[0])
            self._died = True
            self._changed.set()
        if self._died:
            await asyncio.Event().wait()  # until this task is cancelled, with the others of the worker

    async def _replace_worker(self) -> None:
        """As a pool does: release the leases of the dead worker at once, then start another."""
        assert self._work is not None and self.store is not None, "it died, so it was started"
        await end_tasks([self._work])
        release = recovery.release_owner(self._owner, self.app.settings.max_crashes, {"signal": "SIGKILL"})
        await update_many(self.store.run, release, self.store.now)
        await self.start()


def _ended_steps(op: Command) -> Iterator[str]:
    """The steps whose handlers have ended, read from a group of commits."""
    for statement in op.body["updates"]:
        update = statement["u"]
        for stage in [update] if isinstance(update, Mapping) else update:
            for name, step in stage.get("$set", {}).items():
                if name.startswith("steps.") and isinstance(step, Mapping):
                    stored = step.get("$literal", step)
                    if stored.get("status") in ("done", "waiting", "failed") or "retryAfter" in stored:
                        yield stored["stepId"]
