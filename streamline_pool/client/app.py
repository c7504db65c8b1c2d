"""`Streamline`: the application object, through which programs define workflows and reach their runs.

Owns the registry of workflows and the public methods for the whole database. Nothing is opened before the first use, so
a module can make an `app` at import and still be forked. What can be done with one workflow is in workflow.py; the
procedures behind the methods are in run_control.py, event_delivery.py and maintenance.py.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Self

from streamline_pool.config.env import Env, system_env
from streamline_pool.config.settings import DEFAULT_MONGODB_URI, Settings
from streamline_pool.domain.definition import Declaration, Definition, check_id
from streamline_pool.domain.errors import ValidationError
from streamline_pool.domain.model import Run
from streamline_pool.engine.engine import Engine, EngineConfig
from streamline_pool.engine.loop_blocking import LoopsBlocking
from streamline_pool.engine.ports import Observer
from streamline_pool.events.bus import EventBus
from streamline_pool.events.stream import EventStream, open_stream
from streamline_pool.storage.store import AsyncStore, Store
from streamline_pool.storage.target import DatabaseTarget

from .beginning_again import rewinding_run
from .connections import Connections
from .event_delivery import sending_event
from .inline_runner import InlineRunner
from .maintenance import Maintenance
from .run_control import (
    HookResult,
    answering_hook,
    cancelling_run,
    getting_run,
    listing_pools,
    pausing_run,
    resuming_run,
)
from .services import Services
from .step_options import StepDeclaration, StepDefaults
from .workflow import Workflow

__all__ = ["Streamline"]


class Streamline:
    """Workflows on one MongoDB database, isolated from every other `Streamline` in the process.

    `mongodb_uri`: if not given, the environment's STREAMLINE_MONGODB_URI, else a local server. `database` overrides the
    one in the URI. `settings` are the pool's (lease, concurrency, …), for `execute`. Methods that reach the database raise
    StoreUnavailableError when it does not answer within some ten seconds, and ValidationError for arguments that cannot
    be right.
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
        self.connections = Connections(self.env, self._find_target, self._make_runner)
        self.events = EventBus(self._open_stream)
        self.services = Services(self.env, self.connections, self.events)
        self._maintenance = Maintenance(self.services)
        self._loops_blocking = LoopsBlocking(self.env)
        self._workflows: dict[str, Workflow] = {}

    # --- workflows -------------------------------------------------------------------------------------------------

    def workflow(
        self,
        workflow_id: str,
        *,
        steps: Mapping[str, StepDeclaration] | None = None,
        context: Callable[[Any], Any] | None = None,
        version: str = "1.0.0",
        defaults: StepDefaults | None = None,
        queue: str = "default",
    ) -> Workflow:
        """Define and register a workflow.

        `steps`: step ids to handlers, or to `(handler, options)`, in order. Without it, add them with `@wf.step`.
        `context` makes the first context of a run from its input. `defaults`: options of every step that has no others.
        Raises ValidationError for an id that is taken and for anything that cannot work.
        """
        check_id(workflow_id, "workflow id")
        if workflow_id in self._workflows:
            raise ValidationError(f"workflow {workflow_id!r} is defined twice in this app; give one of the two another id")
        declaration = Declaration(workflow_id, version=version, queue=queue, make_context=context, defaults=defaults, steps=steps)
        workflow = self._workflows[workflow_id] = Workflow(self, declaration, self.connections, self.services)
        return workflow

    @property
    def workflows(self) -> Mapping[str, Workflow]:
        """The registered workflows by id; read-only."""
        return MappingProxyType(self._workflows)

    def freeze(self) -> None:
        """Fix the steps of every workflow, as a pool does. Raises ValidationError for a workflow without steps."""
        for workflow in self._workflows.values():
            _ = workflow.definition

    def lanes(self, queues: Sequence[str] = ()) -> tuple[str, ...]:
        """What a worker of this app may claim: each workflow on each of `queues`, or on every queue of the app if none are named.

        A run can be started on the queue of another workflow.
        """
        served = queues or list(dict.fromkeys(workflow.queue for workflow in self._workflows.values()))
        return tuple(workflow.definition.lane_of(queue) for workflow in self._workflows.values() for queue in served)

    def definition_of(self, document: Mapping[str, Any]) -> Definition | None:
        """The definition that a stored run was started with, if this app has that workflow and version."""
        workflow = self._workflows.get(document.get("workflowId", ""))
        return workflow.definition if workflow is not None and workflow.version == document.get("version") else None

    # --- connections -----------------------------------------------------------------------------------------------

    def configure(self, settings: Settings) -> None:
        """Take over a pool's settings, URI and database included. Only before the first use of the database: ValidationError."""
        if self.connections.has_target:
            raise ValidationError("configure: this Streamline has used its database already; configure it before the first use")
        self.settings = settings
        self.mongodb_uri = settings.mongodb_uri
        self.database = settings.database or self.database

    @property
    def where(self) -> DatabaseTarget:
        """The server, database and collections in use."""
        return self.connections.target

    def store(self) -> Store:
        """The synchronous connection of this process. Its first operation opens it."""
        return self.connections.store()

    def store_async(self) -> AsyncStore:
        """The connection of the running event loop. Its first operation opens it."""
        return self.connections.store_async()

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
        self.events.close_streams()
        self.connections.close()
        self.events.close()

    async def close_async(self) -> None:
        """Release what belongs to the running event loop. `close` releases the rest."""
        await self.connections.close_async()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close_async()
        await asyncio.to_thread(self.close)

    # --- runs of any workflow --------------------------------------------------------------------------------------

    def get_run(self, run_id: str) -> Run | None:
        """The run with that id, of any workflow. None if there is none."""
        return self.connections.drive(getting_run(None, run_id))

    async def get_run_async(self, run_id: str) -> Run | None:
        """`get_run` for the running event loop."""
        return await self.connections.drive_async(getting_run(None, run_id))

    def cancel_run(self, run_id: str, *, reason: str | None = None) -> Run:
        """Cancel a run of any workflow; see `Workflow.cancel`."""
        return self.connections.drive(cancelling_run(self.services, None, run_id, reason))

    async def cancel_run_async(self, run_id: str, *, reason: str | None = None) -> Run:
        """`cancel_run` for the running event loop."""
        return await self.connections.drive_async(cancelling_run(self.services, None, run_id, reason))

    def pause_run(self, run_id: str, *, reason: str | None = None) -> Run:
        """Pause a run of any workflow; see `Workflow.pause`."""
        return self.connections.drive(pausing_run(self.services, None, run_id, reason))

    async def pause_run_async(self, run_id: str, *, reason: str | None = None) -> Run:
        """`pause_run` for the running event loop."""
        return await self.connections.drive_async(pausing_run(self.services, None, run_id, reason))

    def resume_run(self, run_id: str, payload: Any = None) -> Run:
        """Resume a run of any workflow; see `Workflow.resume`."""
        return self.connections.drive(resuming_run(self.services, None, run_id, payload))

    async def resume_run_async(self, run_id: str, payload: Any = None) -> Run:
        """`resume_run` for the running event loop."""
        return await self.connections.drive_async(resuming_run(self.services, None, run_id, payload))

    def rewind_run(self, run_id: str, step_id: str) -> Run:
        """Rewind a run of any workflow; see `Workflow.rewind_to`."""
        return self.connections.drive(rewinding_run(self.services, None, run_id, step_id))

    async def rewind_run_async(self, run_id: str, step_id: str) -> Run:
        """`rewind_run` for the running event loop."""
        return await self.connections.drive_async(rewinding_run(self.services, None, run_id, step_id))

    def resume_hook(self, token: str, payload: Any = None) -> HookResult:
        """Answer by the token of a hook. The payload becomes the output of the step that made the hook.

        Raises HookTokenError, and changes nothing, if the token is wrong, used, expired or of a wait that is over. On a
        paused run the answer is stored, and the run goes on when it is resumed.
        """
        return self.connections.drive(answering_hook(self.services, token, payload))

    async def resume_hook_async(self, token: str, payload: Any = None) -> HookResult:
        """`resume_hook` for the running event loop."""
        return await self.connections.drive_async(answering_hook(self.services, token, payload))

    def send_event(self, name: str, data: Any = None, *, run_id: str | None = None) -> int:
        """Deliver a durable event to one run, or to every run that waits for it. Returns the number of runs woken now.

        To one run: the event is kept if the run does not wait for it yet. To all: it reaches the runs that wait now, and
        those that exist now and wait later, each once. Raises WorkflowNotFoundError for an unknown `run_id`,
        PayloadTooLargeError (nothing is stored) for a full inbox or for data of more than 256 KiB. If a run that waits has
        no room for an event to all, the others get it, the log event `event_refused` names that run, and pools try again.
        """
        return self.connections.drive(sending_event(self.services, name, data, run_id))

    async def send_event_async(self, name: str, data: Any = None, *, run_id: str | None = None) -> int:
        """`send_event` for the running event loop."""
        return await self.connections.drive_async(sending_event(self.services, name, data, run_id))

    # --- pools and the server --------------------------------------------------------------------------------------

    def workers(self) -> list[dict[str, Any]]:
        """What every pool has reported of itself lately: one document per pool, with its workers."""
        return self.connections.drive(listing_pools())

    async def workers_async(self) -> list[dict[str, Any]]:
        """`workers` for the running event loop."""
        return await self.connections.drive_async(listing_pools())

    def server_info(self) -> dict[str, Any]:
        """`{version, topology, database, uri}`. Raises StoreUnavailableError when the server is unreachable or too old."""
        return self.connections.drive(self.store().reading_facts())

    async def server_info_async(self) -> dict[str, Any]:
        """`server_info` for the running event loop."""
        return await self.connections.drive_async(self.store().reading_facts())

    def init_db(self) -> list[str]:
        """Create the engine's collections and indexes. Idempotent. Returns the names of the indexes."""
        return self.connections.drive(self._maintenance.initializing_database())

    async def init_db_async(self) -> list[str]:
        """`init_db` for the running event loop."""
        return await self.connections.drive_async(self._maintenance.initializing_database())

    # --- indexes and clean-up --------------------------------------------------------------------------------------

    def setup_indexes(
        self,
        *,
        tenant_field: str | None = None,
        user_field: str | None = None,
        auto_cleanup_days: float | timedelta | None = None,
        context_fields: Sequence[str] = (),
    ) -> list[str]:
        """Create the engine's indexes and those for your own queries. Returns the names of all of them.

        `tenant_field` (such as "tenantId"): for one tenant's runs by status and age. `cleanup_old_runs` compares
        `tenant_id` with the same field. `user_field`: for one user's runs; default "userId". `context_fields`: one index
        each. A name means `context.<name>`, unless it is or begins with a field of the run ("userId", "meta.tenant",
        "context.orderId"). `auto_cleanup_days`: MongoDB itself deletes runs so many days after their end, within about a
        minute; another figure changes it in place, None leaves it as it is. Runs that have not ended are never deleted.

        Every process may call this at its start. Raises ValidationError for what cannot be a field, and when an existing
        index has the same keys and other options.
        """
        return self.connections.drive(self._maintenance.setting_up_indexes(tenant_field, user_field, auto_cleanup_days, context_fields))

    async def setup_indexes_async(
        self,
        *,
        tenant_field: str | None = None,
        user_field: str | None = None,
        auto_cleanup_days: float | timedelta | None = None,
        context_fields: Sequence[str] = (),
    ) -> list[str]:
        """`setup_indexes` for the running event loop."""
        return await self.connections.drive_async(
            self._maintenance.setting_up_indexes(tenant_field, user_field, auto_cleanup_days, context_fields)
        )

    def cleanup_old_runs(self, days: float | timedelta = 30, *, tenant_id: Any = None, dry_run: bool = False) -> int:
        """Delete runs that ended at least `days` days ago, with their files. Returns how many.

        `tenant_id`: only those whose `tenant_field` (see `setup_indexes`; default `context.tenantId`) is equal to it.
        `dry_run` counts and deletes nothing. Also removes files that a crash has left behind, and events to all that no
        stored run can receive any more, as the other clean-ups do. The call may be interrupted and repeated, and several
        processes may make it at once. It reads the whole collection once.

        With an age below a minute, a `start` whose reply was lost can store its run a second time: it is repeated for ten
        seconds, and cannot know that its run has ended and is deleted.
        """
        return self.connections.drive(self._maintenance.cleaning_up_old_runs(days, tenant_id, dry_run))

    async def cleanup_old_runs_async(self, days: float | timedelta = 30, *, tenant_id: Any = None, dry_run: bool = False) -> int:
        """`cleanup_old_runs` for the running event loop."""
        return await self.connections.drive_async(self._maintenance.cleaning_up_old_runs(days, tenant_id, dry_run))

    def archive_old_runs(self, days: float | timedelta = 90, *, to: str | None = None, dry_run: bool = False) -> int:
        """Move runs that ended at least `days` days ago to another collection of this database. Returns how many.

        `to`: the collection's name; default `<prefix>runs_archive`. `dry_run` counts and moves nothing. A run is copied
        first and then deleted, so a crash may leave it in both collections until the next call, never in neither. Files
        stay where they are. If the archive holds another run with the same id, the run stays, and a warning is logged.
        """
        return self.connections.drive(self._maintenance.archiving_old_runs(days, to, self.where.prefix, dry_run))

    async def archive_old_runs_async(self, days: float | timedelta = 90, *, to: str | None = None, dry_run: bool = False) -> int:
        """`archive_old_runs` for the running event loop."""
        return await self.connections.drive_async(self._maintenance.archiving_old_runs(days, to, self.where.prefix, dry_run))

    def cleanup_expired(self, *, dry_run: bool = False) -> int:
        """Delete ended runs whose `context.expireAt` (a date) has passed, with their files. Returns how many.

        `dry_run` counts and deletes nothing.
        """
        return self.connections.drive(self._maintenance.cleaning_up_expired_runs(dry_run))

    async def cleanup_expired_async(self, *, dry_run: bool = False) -> int:
        """`cleanup_expired` for the running event loop."""
        return await self.connections.drive_async(self._maintenance.cleaning_up_expired_runs(dry_run))

    # --- what connections and workers are made with ----------------------------------------------------------------

    def make_engine(self, store: AsyncStore, observer: Observer, suspect_from: int | None = None) -> Engine:
        """An engine for the running loop, with this app's definitions, buses and settings. `suspect_from`: see `EngineConfig`."""
        config = EngineConfig(
            blocking_store=self.store,
            definition_of=self.definition_of,
            events=self.events,
            lease_s=self.settings.lease_s,
            threads_max=self.settings.concurrency,
            blocking=lambda: self._loops_blocking.here(self.settings.stall_timeout_s),
            suspect_from=suspect_from,
        )
        return Engine(config, store, self.env, observer)

    def _make_runner(self, store: AsyncStore) -> InlineRunner:
        return InlineRunner(self.make_engine, store, self.env, self.settings.lease_s)

    def _find_target(self) -> DatabaseTarget:
        uri = self.mongodb_uri or os.environ.get("STREAMLINE_MONGODB_URI") or DEFAULT_MONGODB_URI
        return DatabaseTarget(uri, self.database or os.environ.get("STREAMLINE_DATABASE"), self.collection_prefix)

    def _open_stream(self, names: frozenset[str] | None, run_id: str | None) -> EventStream:
        return open_stream(self.store(), self.env, names, run_id)
