"""The active runs of one event loop: admits claimed runs, drives them, and lets go of them.

Owns the life of drivers and what they share. A worker or an inline runner chooses which runs to claim; run_driver.py
says what happens to one run; leases.py keeps the leases.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from streamline_pool.config.env import Env
from streamline_pool.domain.change import ChangeEvent
from streamline_pool.domain.definition import Definition
from streamline_pool.domain.document import RunDocument
from streamline_pool.domain.errors import WorkflowError
from streamline_pool.events.bus import EventBus
from streamline_pool.events.publisher import EventPublisher
from streamline_pool.protocol import recovery
from streamline_pool.protocol.operations import Statement
from streamline_pool.protocol.run_document import validate_run_document
from streamline_pool.storage.outputs import Wanted
from streamline_pool.storage.procedures import Procedure
from streamline_pool.storage.store import AsyncStore, Store

from .active_run import ActiveRun
from .active_runs import ActiveRuns
from .attempt import ABORT_GRACE_S, Attempt
from .group_commit import GroupCommitter
from .group_outputs import GroupOutputs
from .handler_threads import HandlerThreads
from .leases import LeaseKeeper
from .loop_blocking import LoopBlocking
from .ports import Observer
from .run_cache import RunCache, RunNote
from .run_driver import RunDriver, SupersededError
from .run_events import RunEvents
from .run_writer import EngineState, RunWriter
from .solitude import Solitude
from .write_outcome import WriteOutcome

__all__ = ["Engine", "EngineConfig"]

log = logging.getLogger("streamline_pool")

T = TypeVar("T")

_EARLIER_EXECUTION_S = ABORT_GRACE_S + 1.0  # by then its handler is over or stuck; a condition that hangs must not hold up its run


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What an application gives its engines."""

    blocking_store: Callable[[], Store]  # for writes on a handler's thread
    definition_of: Callable[[Mapping[str, Any]], Definition | None]  # of a stored run; None: the application has no such workflow
    events: EventBus  # the application's own
    lease_s: float
    threads_max: int  # `def` handlers at once
    blocking: Callable[[], LoopBlocking]  # of the running loop
    suspect_from: int | None = None  # a run that has lost as many workers runs alone (solitude.py); None: no run has to


class Engine:
    """Everything that runs in one event loop. `start` it there, `admit` claimed documents, `close` it at the end."""

    def __init__(self, config: EngineConfig, store: AsyncStore, env: Env, observer: Observer) -> None:
        self.store = store
        self.env = env
        self._blocking_store = config.blocking_store
        self._blocking_here = config.blocking
        self.cache = RunCache()
        self.active_runs = ActiveRuns()
        self.event_publisher = EventPublisher(store, env)
        self.events = RunEvents(config.events, self.event_publisher, store.now)
        self.leases = LeaseKeeper(store, env, self.active_runs.held, config.lease_s, observer)
        self._definition_of = config.definition_of
        self._observer = observer
        self._state = EngineState()
        self._committer = GroupCommitter(store, env, observer.store_answered)
        self._outputs = GroupOutputs(store, env, observer.store_answered)
        # Threads are made as needed; the margin is for handlers that outlive their attempt until the worker is recycled.
        self._threads = HandlerThreads(2 * config.threads_max + 8, env.clock.monotonic)
        self._writer = RunWriter(store, env, self._committer, self._outputs, self.events, observer, self._state)
        self._solitude = Solitude(self.active_runs, self._committer, self._state, store.now, config.suspect_from)
        self._driver = RunDriver(
            store,
            env,
            self._writer,
            self._outputs,
            self.events,
            self._state,
            self._threads,
            self._solitude,
            config.lease_s,
            config.threads_max,
            self._on_stuck,
        )
        self._reports: set[asyncio.Task[None]] = set()

    @property
    def steps_total(self) -> int:
        """Handlers that have ended here."""
        return self._state.steps_total

    def start(self) -> None:
        """Begin to commit and to renew, in the running loop."""
        self.loop = asyncio.get_running_loop()
        self.blocking = self._blocking_here()
        self.blocking.watch(self._deadlines)
        self._committer.start()
        self._outputs.start()
        self.event_publisher.start()
        self.leases.start()

    async def close(self) -> None:
        """Stop. The leases of runs that are still active expire; drain first to release them."""
        self._state.closed = True
        self.blocking.forget(self._deadlines)
        await self.leases.close()
        for active in self.active_runs.all():
            if active.task is not None:
                active.task.cancel()
        await self._committer.close()
        await self._outputs.close()
        await self.event_publisher.close()
        self._threads.shutdown()

    def _deadlines(self) -> list[float]:
        return [active.deadline for active in self.active_runs.all()]

    # --- admission -------------------------------------------------------------------------------------------------

    def admit(self, document: RunDocument, deadline: float) -> asyncio.Task[None]:
        """Drive a claimed run. The task ends when the run is parked, ended, released or lost; it never raises."""
        reason = validate_run_document(document)
        definition = self._definition_of(document) if reason is None else None
        run_id = document["_id"]
        held = self.active_runs.held.get(run_id)
        if reason is None and held is not None and held.task is not None and held.document["token"] > document["token"]:
            return held.task  # the answers of two claims came in the wrong order, and this claim is lost already
        claimed_again = self._supersede(run_id)
        if definition is None:
            task = self.loop.create_task(self._mark_corrupt(run_id, reason or _unknown(document)))
            self._reports.add(task)  # without a reference the task may be collected
            task.add_done_callback(self._reports.discard)
            return task
        active = ActiveRun(self, definition, document, document["lease"]["id"], deadline)
        self.active_runs.add(active)
        self._solitude.admitted(active)
        self.leases.run_admitted()
        self.cache.put(run_id, RunNote(definition.version, document["token"], deadline, True))
        active.task = self.loop.create_task(self._run_after_others(active) if claimed_again else self._run_task(active))
        return active.task

    def _supersede(self, run_id: str) -> bool:
        """The run was claimed, so an execution that held it until now has lost it. True: one of them goes on."""
        earlier = self.active_runs.held.get(run_id)
        if earlier is not None:
            if earlier.attempt is not None:  # else it may have released the run itself, and not know that this is done
                log.info("run_lost", extra={"run_id": run_id, "reason": "lease-lost"})
            earlier.mark_lost()
            self.active_runs.keep_until_over(earlier)
            earlier.abort("lease-lost")
        return run_id in self.active_runs

    async def _run_after_others(self, active: ActiveRun) -> None:
        """Drive a run that was claimed again before this process knew that it had lost it: not beside its earlier execution."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.active_runs.lost_ones_over(active.run_id), _EARLIER_EXECUTION_S)
        await self._run_task(active)

    async def _mark_corrupt(self, run_id: str, reason: str) -> None:
        log.error("run_corrupt", extra={"run_id": run_id, "reason": reason})
        try:
            await self.store.run(recovery.mark_corrupt(run_id, reason, self.store.now()))
        except WorkflowError:
            log.warning("run_corrupt_unmarked", extra={"run_id": run_id})  # its lease expires, and the next claimer tries again

    # --- drivers ---------------------------------------------------------------------------------------------------

    async def _run_task(self, active: ActiveRun, abandoned: Attempt | None = None) -> None:
        """The task of an active run. `abandoned`: an attempt that ended without its handler; what that means is stored first."""
        try:
            if abandoned is None and self.events.wanted:
                self.events.publish_claimed(active)
            if abandoned is not None:
                await self._driver.leave(active, abandoned)
            elif active.lost is None:
                await self._driver.drive(active)
        except SupersededError:
            return
        except asyncio.CancelledError:
            if self._state.closed:
                raise
            # A handler kept the task that ran it and cancelled it too late: as bad as a defect of ours, and no worse.
            log.warning("driver_cancelled", extra={"run_id": active.run_id})
        except Exception:
            # A defect of ours. The run goes on later: its lease is not renewed any more, and expires.
            log.exception("drive_failed", extra={"run_id": active.run_id})
            self.publish(active.document, (("engine:error", None, {"run_id": active.run_id}),))
        await self._lost_handler_over(active)
        self._detach(active)

    async def _lost_handler_over(self, active: ActiveRun) -> None:
        """A thread goes on when its run is lost. Until it ends or counts as stuck, it is work of this process."""
        left = active.left_attempt
        if left is not None and (active.lost is not None or left.context.signal.reason in ("lease-lost", "cancelled")):
            self.active_runs.keep_until_over(active)
            await left.handler_over()

    def _detach(self, active: ActiveRun) -> None:
        self.active_runs.remove(active)
        self._solitude.removed(active)
        if active.run_id not in self.active_runs.held:  # else this process has claimed the run again, and the newer note counts
            self.cache.put(active.run_id, RunNote(active.definition.version, active.document["token"], active.deadline, False))
        self._observer.on_finished(active.run_id, active.document["status"] if active.lost is None else "lost")

    def _on_stuck(self, active: ActiveRun, attempt: Attempt | None, what: str) -> None:
        """A handler or a condition does not end.

        A condition (`attempt` is None) and a thread leave their driver free; a coroutine blocks its driver, so a new one goes on.
        """
        self._observer.on_stuck(what)
        if attempt is None or attempt.on_thread or active.attempt is not attempt:
            return
        self._driver.close_attempt(active, attempt)
        active.task = self.loop.create_task(self._run_task(active, attempt))

    def check(self, run_id: str) -> None:
        """A control operation may have changed this run: read it now, if it is active here."""
        active = self.active_runs.held.get(run_id)
        if active is not None:
            self.leases.check(active)

    # --- ports.EnginePort ------------------------------------------------------------------------------------------

    def drive_blocking(self, procedure: Procedure[T], run_id: str) -> T:
        """See ports.EnginePort."""
        with contextlib.closing(procedure), self.blocking.waiting(run_id) as seconds:
            return self._blocking_store().drive_within(seconds, procedure)

    async def write(self, statement: Statement) -> WriteOutcome:
        """See ports.EnginePort."""
        return await self._committer.write(statement)

    async def read_output(self, wanted: Wanted) -> bytes:
        """See ports.EnginePort."""
        return await self._outputs.read(wanted)

    def now(self) -> datetime:
        """See ports.EnginePort."""
        return self.store.now()

    def renew_soon(self) -> None:
        """See ports.EnginePort."""
        self.leases.renew_soon()

    def publish(self, document: RunDocument, events: tuple[ChangeEvent, ...]) -> None:
        """See ports.EnginePort."""
        self.events.publish(document, events)

    # --- stopping --------------------------------------------------------------------------------------------------

    @property
    def suspect(self) -> str | None:
        """The active run that runs alone, or waits for that; None if there is none."""
        return self._solitude.suspect

    def drain(self) -> None:
        """Start no further step; handlers that run end, their results are stored, their runs released."""
        self._state.draining = True
        self._solitude.changed()

    def stop(self, grace_s: float) -> None:
        """Drain now: signals fire with reason "shutdown", handlers have `grace_s` seconds, conditions none; runs are released."""
        self.drain()
        for active in self.active_runs.all():
            active.abort("shutdown", grace_s)

    def stop_run(self, task: asyncio.Task[None]) -> None:
        """Stop the run that `admit` has returned this task for, as `stop` stops all: it is released, uncounted."""
        for active in self.active_runs.all():
            if active.task is task:
                active.release_requested = True
                active.abort("shutdown")

    async def emptied(self) -> None:
        """Return once no run is active."""
        await self.active_runs.emptied()


def _unknown(document: RunDocument) -> str:
    named = f"fields 'workflowId' {document['workflowId']!r} and 'version' {document['version']!r} name no workflow"
    return f"{named} of this application, though its lane {document['lane']!r} does"
