"""`Streamline`: the application object, through which programs define workflows and reach their runs.

Owns the registry of workflows and the connections of this process; nothing is opened before first use, so a module can
make an `app` at import and still be forked. What can be done with one workflow is in workflow.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, Self, TypeVar

from streamline_pool.config.env import Env, system_env
from streamline_pool.config.settings import DEFAULT_MONGODB_URI, Settings
from streamline_pool.domain.definition import Definition, check_defaults, check_id, make_steps
from streamline_pool.domain.errors import StoreUnavailableError, ValidationError, WorkflowError
from streamline_pool.domain.model import Run
from streamline_pool.engine.engine import Engine, EngineConfig
from streamline_pool.engine.ports import Observer
from streamline_pool.events.bus import EventBus, global_event_bus
from streamline_pool.events.event import Event
from streamline_pool.events.publisher import ControlEvents
from streamline_pool.events.stream import EventStream, open_stream
from streamline_pool.protocol import retention, signals
from streamline_pool.protocol.engine_indexes import EVENT_INDEXES, HOST_INDEXES, RUN_INDEXES
from streamline_pool.protocol.hosts import list_hosts
from streamline_pool.storage.indexes import TENANT_FIELD, custom_indexes, days_in_seconds, making_indexes, tenant_fields
from streamline_pool.storage.procedures import Procedure
from streamline_pool.storage.retention import archiving, check_archive, deleting, dropping_orphans, forgetting_events
from streamline_pool.storage.store import AsyncStore, Store
from streamline_pool.storage.target import DatabaseTarget

from .event_delivery import sending_event
from .inline_runner import InlineRunner, LoopThread
from .run_control import HookResult, answering_hook, cancelling_run, getting_run, pausing_run, resuming_run, rewinding_run
from .workflow import Workflow, sync_and_async

__all__ = ["Streamline"]

log = logging.getLogger("streamline_pool")

T = TypeVar("T")


class Streamline:
    """Workflows on one MongoDB database, isolated from every other `Streamline` in the process.

    `mongodb_uri` falls back to the environment's STREAMLINE_MONGODB_URI, then to a local server. `database` beats
    the one in the URI. `settings` are the pool's (lease, concurrency, …), for `execute`.
    """

    def __init__(
        self,
        mongodb_uri: str | None = None,
        *,
        database: str | None = None,
        collection_prefix: str = "workflow_",
        settings: Settings | None = None,
        env: Env | None = None,
    ) -> None:
        self.env = env or system_env()
        self.settings = settings or Settings()
        self.mongodb_uri = mongodb_uri  # as given in code; None: not given
        self.database = database
        self.collection_prefix = collection_prefix
        self.events = EventBus(self._open_stream)
        self._open_store: Callable[[DatabaseTarget, Env], Store] = Store  # testing.py puts in stores whose time can be jumped
        self._open_async_store: Callable[[DatabaseTarget, Env], AsyncStore] = AsyncStore
        self._workflows: dict[str, Workflow] = {}
        self._where: DatabaseTarget | None = None
        self._tenant_field: str | None = None  # as given to `setup_indexes` of this object
        self._reset_connections()

    def _reset_connections(self) -> None:
        self._pid = os.getpid()
        self._opening = threading.Lock()  # threads that come first at the same time share what the first of them opens
        self._store: Store | None = None
        self._async_stores: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncStore] = weakref.WeakKeyDictionary()
        self._runners: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, InlineRunner] = weakref.WeakKeyDictionary()
        self._background: LoopThread | None = None
        self._control_events = ControlEvents(self.env)

    # --- workflows -------------------------------------------------------------------------------------------------

    def workflow(
        self,
        workflow_id: str,
        *,
        steps: Mapping[str, Any] | None = None,
        context: Callable[[Any], Any] | None = None,
        version: str = "1.0.0",
        defaults: Mapping[str, Any] | None = None,
        queue: str = "default",
    ) -> Workflow:
        """Define and register a workflow. `steps` maps ids to handlers or `(handler, options)`; or add them with `@wf.step`.

        `context` makes the first context from the input. Raises ValidationError for anything that cannot work.
        """
        check_id(workflow_id, "workflow id")
        if workflow_id in self._workflows:
            raise ValidationError(f"workflow {workflow_id!r} is defined twice in this app; give one of the two another id")
        if context is not None and not callable(context):
            raise ValidationError(f"workflow {workflow_id}: context= must be a function of the input, not {context!r}")
        if steps is not None and not isinstance(steps, Mapping):
            raise ValidationError(f"workflow {workflow_id}: steps= must map step ids to handlers, not {type(steps)}")
        defaults = check_defaults(workflow_id, {} if defaults is None else defaults)
        workflow = Workflow(
            self,
            workflow_id,
            version=version,
            queue=queue,
            defaults=defaults,
            make_context=context,
            steps=make_steps(workflow_id, steps or {}, defaults),
        )
        if steps is not None:
            _ = workflow.definition  # a definition that cannot work is refused here, where it is written
        self._workflows[workflow_id] = workflow
        return workflow

    @property
    def workflows(self) -> Mapping[str, Workflow]:
        """The registered workflows by id; read-only."""
        return MappingProxyType(self._workflows)

    def freeze(self) -> None:
        """Fix the steps of every workflow, as a pool does; ValidationError for a workflow without steps."""
        for workflow in self._workflows.values():
            _ = workflow.definition

    def lanes(self, queues: Sequence[str] = ()) -> tuple[str, ...]:
        """What a worker of this app may claim: each workflow on its own queue, or on each of `queues` if any are named."""
        return tuple(workflow.definition.lane_of(queue) for workflow in self._workflows.values() for queue in (queues or [workflow.queue]))

    def definition_of(self, document: Mapping[str, Any]) -> Definition | None:
        """The definition that a stored run was started with, if this app has that workflow and version."""
        workflow = self._workflows.get(document.get("workflowId", ""))
        return workflow.definition if workflow is not None and workflow.version == document.get("version") else None

    # --- connections -----------------------------------------------------------------------------------------------

    def configure(self, settings: Settings) -> None:
        """Take over a pool's settings, URI and database included. Only before the first use of the database."""
        if self._where is not None:
            raise ValidationError("configure: this Streamline has used its database already; configure it before the first use")
        self.settings = settings
        self.mongodb_uri = settings.mongodb_uri
        self.database = settings.database or self.database

    @property
    def where(self) -> DatabaseTarget:
        """The server, database and collections in use."""
        if self._where is None:
            uri = self.mongodb_uri or os.environ.get("STREAMLINE_MONGODB_URI") or DEFAULT_MONGODB_URI
            self._where = DatabaseTarget(uri, self.database or os.environ.get("STREAMLINE_DATABASE"), self.collection_prefix)
        return self._where

    def store(self) -> Store:
        """The synchronous connection of this process; opened by its first operation."""
        self._notice_fork()
        store = self._store
        if store is None:
            with self._opening:
                store = self._store = self._store or self._open_store(self.where, self.env)
        return store

    def store_async(self) -> AsyncStore:
        """The connection of the running event loop; opened by its first operation."""
        self._notice_fork()
        loop = asyncio.get_running_loop()
        store = self._async_stores.get(loop)
        if store is None:
            store = self._async_stores[loop] = self._open_async_store(self.where, self.env)
        return store

    def _notice_fork(self) -> None:
        if self._pid != os.getpid():
            # Connections belong to the parent; using or even closing them here would disturb it.
            self._reset_connections()

    @property
    def client(self) -> Any:
        """The `MongoClient` in use, for sessions and transactions."""
        return self.store().client

    @property
    def async_client(self) -> Any:
        """The `AsyncMongoClient` of the running event loop."""
        return self.store_async().client

    @property
    def runs(self) -> Any:
        """The PyMongo `Collection` of run documents, for direct queries. Write to it at your own risk."""
        return self.store().collection("runs")

    def close(self) -> None:
        """Release connections, threads, streams and local executions. The app opens again on its next use."""
        self._notice_fork()
        self.events.close_streams()
        if self._background is not None:
            self._background.call(self.close_async())
            self._background.close()
            self._background = None
        if self._store is not None:
            self._store.close()
            self._store = None
        self._where = None
        self.events.close()

    async def close_async(self) -> None:
        """Release what belongs to the running event loop. `close` releases the rest."""
        loop = asyncio.get_running_loop()
        runner = self._runners.pop(loop, None)
        if runner is not None:
            await runner.shutdown(5.0)
        store = self._async_stores.pop(loop, None)
        if store is not None:
            await store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close_async()
        await asyncio.to_thread(self.close)

    # --- looking at the whole database -----------------------------------------------------------------------------

    def _proc_get_run(self, run_id: str) -> Procedure[Run | None]:
        """The run with that id, of whatever workflow; None if there is none."""
        return (yield from getting_run(self, None, run_id))

    get_run, get_run_async = sync_and_async(_proc_get_run)

    def _proc_cancel_run(self, run_id: str, *, reason: str | None = None) -> Procedure[Run]:
        """Cancel a run of whatever workflow; see `Workflow.cancel`."""
        return (yield from cancelling_run(self, None, run_id, reason))

    cancel_run, cancel_run_async = sync_and_async(_proc_cancel_run)

    def _proc_pause_run(self, run_id: str, *, reason: str | None = None) -> Procedure[Run]:
        """Pause a run of whatever workflow; see `Workflow.pause`."""
        return (yield from pausing_run(self, None, run_id, reason))

    pause_run, pause_run_async = sync_and_async(_proc_pause_run)

    def _proc_resume_run(self, run_id: str, payload: Any = None) -> Procedure[Run]:
        """Resume a run of whatever workflow; see `Workflow.resume`."""
        return (yield from resuming_run(self, None, run_id, payload))

    resume_run, resume_run_async = sync_and_async(_proc_resume_run)

    def _proc_rewind_run(self, run_id: str, step_id: str) -> Procedure[Run]:
        """Rewind a run of whatever workflow; see `Workflow.rewind_to`."""
        return (yield from rewinding_run(self, None, run_id, step_id))

    rewind_run, rewind_run_async = sync_and_async(_proc_rewind_run)

    def _proc_resume_hook(self, token: str, payload: Any = None) -> Procedure[HookResult]:
        """Answer by the token of a hook; the payload becomes the output of the step that made it.

        HookTokenError, and nothing is changed, if the token is wrong, used, expired or of a wait that is over. On a paused
        run the answer is stored, and the run goes on when it is resumed.
        """
        return (yield from answering_hook(self, token, payload))

    resume_hook, resume_hook_async = sync_and_async(_proc_resume_hook)

    def _proc_send_event(self, name: str, data: Any = None, *, run_id: str | None = None) -> Procedure[int]:
        """Deliver a durable event to one run, or to every run that waits for it; the number of runs woken now.

        To one run: it is kept if the run does not wait for it yet. To all: it reaches the runs that wait now, and those
        that exist now and wait later, each once. WorkflowNotFoundError for an unknown `run_id`, PayloadTooLargeError
        (nothing stored) for a full inbox or more than 256 KiB.
        """
        return (yield from sending_event(self, name, data, run_id))

    send_event, send_event_async = sync_and_async(_proc_send_event)

    def _proc_workers(self) -> Procedure[list[dict[str, Any]]]:
        """What every pool that has spoken lately says of itself: one document per pool, with its workers."""
        hosts: list[dict[str, Any]] = yield list_hosts()
        return hosts

    workers, workers_async = sync_and_async(_proc_workers)

    def _proc_server_info(self) -> Procedure[dict[str, Any]]:
        """`{version, topology, database, uri}`. Raises StoreUnavailableError when unreachable or too old."""
        store = self.store()
        return (yield from store.reading_facts())

    server_info, server_info_async = sync_and_async(_proc_server_info)

    def _proc_init_db(self) -> Procedure[list[str]]:
        """Create the engine's collections and indexes; idempotent. Yields the index names."""
        yield from self._ensuring(None)
        return [index.name for index in (*RUN_INDEXES, *HOST_INDEXES, *EVENT_INDEXES)]

    init_db, init_db_async = sync_and_async(_proc_init_db)

    # --- indexes and housekeeping ----------------------------------------------------------------------------------

    def _proc_setup_indexes(
        self,
        *,
        tenant_field: str | None = None,
        user_field: str | None = None,
        auto_cleanup_days: float | timedelta | None = None,
        context_fields: Sequence[str] = (),
    ) -> Procedure[list[str]]:
        """Create the engine's indexes and those for your own queries; returns the names of all of them.

        `tenant_field` (such as "context.tenantId"): for one tenant's runs by status and age; the housekeeping below compares
        `tenant_id` with it, too. `user_field`: for one user's runs; default "userId". `context_fields`: one index each,
        "orderId" meaning "context.orderId". `auto_cleanup_days`: MongoDB itself deletes runs so long after their end, within
        about a minute; another figure changes it in place, None leaves it as it is. Runs that have not ended are never touched.

        May be called by every process at its start. Raises ValidationError for what cannot be a field, and when an index
        with the same keys and other options is in the way.
        """
        indexes = custom_indexes(
            tenant_field=tenant_field, user_field=user_field, auto_cleanup_days=auto_cleanup_days, context_fields=context_fields
        )
        names = yield from self._proc_init_db()
        names += yield from making_indexes(indexes)
        self._tenant_field = tenant_field or self._tenant_field
        return names

    setup_indexes, setup_indexes_async = sync_and_async(_proc_setup_indexes)

    def _proc_cleanup_old_runs(self, days: float | timedelta = 30, *, tenant_id: Any = None, dry_run: bool = False) -> Procedure[int]:
        """Delete runs that ended at least `days` days ago, with their files; returns how many.

        `tenant_id`: only those whose `tenant_field` (see `setup_indexes`; default `context.tenantId`) is equal to it.
        `dry_run` counts and deletes nothing. Removes files that a crash has left behind, too, and events that nobody can want
        any more. May be interrupted and repeated, and run by several processes at once. Goes through the whole collection
        once, whatever it finds.
        """
        age_s = days_in_seconds(days, "cleanup_old_runs: days")
        tenant = None if tenant_id is None else ((yield from self._tenant_path()), tenant_id)
        count = yield from deleting(retention.ended_before(age_s, tenant), dry_run=dry_run)
        if not dry_run:
            yield from dropping_orphans()
            yield from forgetting_events()
        return count

    cleanup_old_runs, cleanup_old_runs_async = sync_and_async(_proc_cleanup_old_runs)

    def _proc_archive_old_runs(self, days: float | timedelta = 90, *, to: str | None = None, dry_run: bool = False) -> Procedure[int]:
        """Move runs that ended at least `days` days ago to another collection of this database; returns how many.

        `to`: its name; default `<prefix>runs_archive`. A run is copied first and then deleted, so a crash may leave it in
        both collections until the next call, never in neither. Files stay where they are. A run whose id the archive holds
        already, of another run, is left where it is, with a warning in the log.
        """
        age_s = days_in_seconds(days, "archive_old_runs: days")
        collection, stored_name = check_archive(to, self.where.prefix)
        return (yield from archiving(retention.ended_before(age_s), collection, stored_name, dry_run=dry_run))

    archive_old_runs, archive_old_runs_async = sync_and_async(_proc_archive_old_runs)

    def _proc_cleanup_expired(self, *, dry_run: bool = False) -> Procedure[int]:
        """Delete ended runs whose `context.expireAt` (a date) has passed, with their files; returns how many."""
        return (yield from deleting(retention.expired(), dry_run=dry_run))

    cleanup_expired, cleanup_expired_async = sync_and_async(_proc_cleanup_expired)

    def _tenant_path(self) -> Procedure[str]:
        """The field that holds a run's tenant: as this object was told, else as some other process has indexed it."""
        if self._tenant_field is not None:
            return self._tenant_field
        known = yield from tenant_fields()
        if len(known) > 1:
            raise ValidationError(
                f"tenant_id: tenants are indexed by {' and by '.join(known)}; call setup_indexes(tenant_field=…) first, to say which counts"
            )
        return known[0] if known else TENANT_FIELD

    # --- for workflow.py, local.py and worker.py -------------------------------------------------------------------

    def make_engine(self, store: AsyncStore, observer: Observer) -> Engine:
        """An engine for the running loop, with this app's definitions, buses and settings."""
        config = EngineConfig(
            blocking_store=self.store,
            definition_of=self.definition_of,
            events=self.events,
            lease_s=self.settings.lease_s,
            threads_max=self.settings.concurrency,
        )
        return Engine(config, store, self.env, observer)

    def _runner(self) -> InlineRunner:
        loop = asyncio.get_running_loop()
        runner = self._runners.get(loop)
        if runner is None:
            runner = self._runners[loop] = InlineRunner(self.make_engine, self.store_async(), self.env, self.settings.lease_s)
        return runner

    def _loop_thread(self) -> LoopThread:
        self._notice_fork()
        with self._opening:
            self._background = self._background or LoopThread()
            return self._background

    def _shutdown(self, timeout_s: float) -> None:
        if self._background is not None:
            self._background.call(self._shutdown_async(timeout_s))

    async def _shutdown_async(self, timeout_s: float) -> None:
        runner = self._runners.pop(asyncio.get_running_loop(), None)
        if runner is not None:
            await runner.shutdown(timeout_s)

    def _open_stream(self, names: frozenset[str] | None, run_id: str | None) -> EventStream:
        return open_stream(self.store(), self.env, names, run_id)

    def _drive(self, procedure: Procedure[T], session: Any) -> T:
        store = self.store()
        result = store.drive(procedure, session)
        for signal in self._control_events.take():
            with contextlib.suppress(WorkflowError):  # those who stream see by the numbers that they missed it
                store.run(signal)
        return result

    async def _drive_async(self, procedure: Procedure[T], session: Any) -> T:
        store = self.store_async()
        result = await store.drive(procedure, session)
        for signal in self._control_events.take():
            with contextlib.suppress(WorkflowError):
                await store.run(signal)
        return result

    def _ensuring(self, session: Any) -> Procedure[None]:
        """Indexes and clock, once per connection. Outside of a caller's transaction, which cannot create indexes."""
        store = self._driving_store()
        if session is not None and getattr(session, "in_transaction", False):
            # Collections cannot be created within every transaction; what is missing is made beside it.
            if not store._ensured or store.clock.stale:
                self._ensure_beside()
            return
        yield from store.ensuring()

    def _ensure_beside(self) -> None:
        blocking = self.store()
        blocking.drive(blocking.ensuring())
        driving = self._driving_store()
        driving._ensured, driving.clock = True, blocking.clock

    def _driving_store(self) -> Store | AsyncStore:
        """The store that drives the procedure under way: the running loop's if there is one and it has one."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return self.store()
        return self._async_stores.get(loop) or self.store()

    def _server_now(self) -> datetime:
        return self._driving_store().now()

    def _signalling(self, kind: str, **fields: Any) -> Procedure[None]:
        """Send a signal; a failure costs latency only, so nobody is told."""
        if kind == "cancel":
            self._check_here(fields["runId"])
        try:
            yield signals.send_signal(kind, self._server_now(), **fields)
        except StoreUnavailableError as exc:
            log.debug("signal_lost", extra={"kind": kind, "error": str(exc)})

    def _check_here(self, run_id: str) -> None:
        """This program may be executing the run itself; it tails no signals."""
        for reference in self._runners.keyrefs():  # a copy made at once: another thread may open a loop meanwhile
            loop = reference()
            runner = None if loop is None else self._runners.get(loop)
            if loop is not None and runner is not None:
                with contextlib.suppress(RuntimeError):  # a loop that is closed executes nothing
                    loop.call_soon_threadsafe(runner.check, run_id)

    def _publish(self, document: Mapping[str, Any], name: str, data: Any, step_id: str | None = None) -> None:
        event = Event(
            name=name, run_id=document["_id"], workflow_id=document["workflowId"], step_id=step_id, data=data, at=self._server_now()
        )
        self.events.publish(event)
        global_event_bus.publish(event)
        self._control_events.add(event)  # sent by whatever drives this act
