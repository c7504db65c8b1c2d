"""A workflow as programs hold it: declare steps or a main, start runs, read them, control them, wait for them, execute them.

Owns the public methods and their documentation. Each `x` and its `x_async` drive the same procedure, `x` by PyMongo's
synchronous API and `x_async` by its asyncio API. The procedures are in starting.py, run_control.py and waiting.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeVar, Unpack, overload

from streamline_pool.domain.definition import Declaration, Definition
from streamline_pool.domain.model import Run, seconds

from .beginning_again import retrying_run, rewinding_run
from .connections import Connections
from .execution import execute_run
from .new_runs import RunRequest, StartOptions
from .run_control import cancelling_run, getting_run, pausing_run, resuming_run
from .services import Services
from .starting import starting_run, starting_runs
from .step_options import Handler, MainFunction, MainOptions, StepOptions
from .waiting import waiting_for_run

__all__ = ["Workflow"]

AnyHandler = TypeVar("AnyHandler", bound=Handler)
AnyMain = TypeVar("AnyMain", bound=MainFunction)


class Workflow:
    """A named sequence of steps, or a durable function. Made by `app.workflow(...)`; the first `start` or a pool freezes its steps.

    Methods that reach the database raise StoreUnavailableError when it does not answer within some ten seconds. They
    raise ValidationError for arguments that cannot be right, and DataCorruptionError for a stored run that another
    program has made unreadable.
    """

    def __init__(self, app: Any, declaration: Declaration, connections: Connections, services: Services) -> None:
        self.app = app  # the `Streamline` that made it; for users only, so this module need not know that class
        self._declaration = declaration
        self._connections = connections
        self._services = services

    def __repr__(self) -> str:
        return f"<Workflow {self.id} {self.version}: {', '.join(self.steps)}>"

    # --- declaration -----------------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The workflow's id, unique in its app."""
        return self._declaration.workflow_id

    @property
    def version(self) -> str:
        """The version that new runs get. Only workers with the same version claim them."""
        return self._declaration.version

    @property
    def queue(self) -> str:
        """Where its runs go unless `start(queue=…)` says otherwise."""
        return self._declaration.queue

    @property
    def steps(self) -> tuple[str, ...]:
        """The step ids, in order."""
        return self._declaration.step_ids

    @property
    def definition(self) -> Definition:
        """The frozen definition. Reading it freezes the steps. Raises ValidationError if there are none."""
        return self._declaration.freeze()

    @overload
    def step(self, handler: AnyHandler, /) -> AnyHandler: ...

    @overload
    def step(self, step_id: str | None = None, /, **options: Unpack[StepOptions]) -> Callable[[AnyHandler], AnyHandler]: ...

    def step(self, target: Any = None, /, **options: Any) -> Any:
        """Add a step: `@wf.step`, `@wf.step("id", retries=5)` or `@wf.step(retries=5)`. The function itself is returned.

        The id is the function's name if none is given. Options: see `StepOptions`; they override the workflow's
        `defaults`. Raises ValidationError for an id that is taken, a handler or an option that cannot work, and when
        the steps are frozen.
        """
        if callable(target):
            self._declaration.add(getattr(target, "__name__", None), target, {})
            return target

        def decorate(handler: Handler) -> Handler:
            self._declaration.add(target if target is not None else getattr(handler, "__name__", None), handler, options)
            return handler

        return decorate

    @overload
    def main(self, function: AnyMain, /) -> AnyMain: ...

    @overload
    def main(self, /, **options: Unpack[MainOptions]) -> Callable[[AnyMain], AnyMain]: ...

    def main(self, function: Any = None, /, **options: Any) -> Any:
        """Make the workflow a durable function: `@wf.main` or `@wf.main(retries=3)`. The function itself is returned.

        An `async def` gets a `DurableContext`, a `def` a `BlockingDurableContext`. After every stop it is called again from its
        beginning, and each of its calls that has a stored result returns that. Options: see `MainOptions`. Raises ValidationError for
        a workflow that has steps or a main.
        """
        if function is not None:
            self._declaration.set_main(function, options)
            return function

        def decorate(function: MainFunction) -> MainFunction:
            self._declaration.set_main(function, options)
            return function

        return decorate

    # --- starting --------------------------------------------------------------------------------------------------

    def start(
        self,
        input: Any = None,
        meta: Mapping[str, Any] | None = None,
        *,
        run_id: str | None = None,
        idempotency_key: str | None = None,
        priority: int = 0,
        queue: str | None = None,
        start_at: datetime | timedelta | float | None = None,
        user_id: str | None = None,
        tags: Sequence[str] = (),
        session: Any = None,
    ) -> Run:
        """Store a run and make it claimable. It is durable when this returns.

        `input`, `meta`: what BSON can hold. `run_id`: text of 1 to 100 characters; a new id if not given. `priority`:
        -1 000 000 to 1 000 000, higher is claimed first within a queue. `start_at`: an aware instant, or a delay in
        seconds or as a timedelta; the run is a `draft` until then.

        `idempotency_key`: text of 1 to 500 characters. If a run of this workflow has it already, that stored run is
        returned, and nothing is started.

        `session`: a PyMongo session of this app's client (of `async_client` for `start_async`). In a transaction, the run
        exists only if that commits. A conflict with another transaction is PyMongo's own error, so that
        `with_transaction` tries again.

        Raises ValidationError or PayloadTooLargeError before anything is stored, InvalidStateError when `run_id` exists.
        """
        options = StartOptions(meta=meta, priority=priority, queue=queue, start_at=start_at, user_id=user_id, tags=tags)
        request = RunRequest(input=input, run_id=run_id, idempotency_key=idempotency_key)
        return self._connections.drive(starting_run(self._services, self.definition, request, options, session), session)

    async def start_async(
        self,
        input: Any = None,
        meta: Mapping[str, Any] | None = None,
        *,
        run_id: str | None = None,
        idempotency_key: str | None = None,
        priority: int = 0,
        queue: str | None = None,
        start_at: datetime | timedelta | float | None = None,
        user_id: str | None = None,
        tags: Sequence[str] = (),
        session: Any = None,
    ) -> Run:
        """`start` for the running event loop."""
        options = StartOptions(meta=meta, priority=priority, queue=queue, start_at=start_at, user_id=user_id, tags=tags)
        request = RunRequest(input=input, run_id=run_id, idempotency_key=idempotency_key)
        return await self._connections.drive_async(starting_run(self._services, self.definition, request, options, session), session)

    def start_many(
        self,
        inputs: Sequence[Any],
        meta: Mapping[str, Any] | None = None,
        *,
        idempotency_keys: Sequence[str] | None = None,
        priority: int = 0,
        queue: str | None = None,
        start_at: datetime | timedelta | float | None = None,
        user_id: str | None = None,
        tags: Sequence[str] = (),
        session: Any = None,
    ) -> list[Run]:
        """`start` for each input, in few commands. Returns the runs in the order of the inputs.

        Every input is checked before the first is stored. `idempotency_keys`: one for each input; a key twice is one run,
        which the result names at both places. The other arguments and the errors are those of `start`, and are shared by
        all runs.
        """
        options = StartOptions(meta=meta, priority=priority, queue=queue, start_at=start_at, user_id=user_id, tags=tags)
        return self._connections.drive(starting_runs(self._services, self.definition, inputs, idempotency_keys, options, session), session)

    async def start_many_async(
        self,
        inputs: Sequence[Any],
        meta: Mapping[str, Any] | None = None,
        *,
        idempotency_keys: Sequence[str] | None = None,
        priority: int = 0,
        queue: str | None = None,
        start_at: datetime | timedelta | float | None = None,
        user_id: str | None = None,
        tags: Sequence[str] = (),
        session: Any = None,
    ) -> list[Run]:
        """`start_many` for the running event loop."""
        options = StartOptions(meta=meta, priority=priority, queue=queue, start_at=start_at, user_id=user_id, tags=tags)
        return await self._connections.drive_async(
            starting_runs(self._services, self.definition, inputs, idempotency_keys, options, session), session
        )

    # --- reading and control operations ----------------------------------------------------------------------------

    def get(self, run_id: str) -> Run | None:
        """The run as stored now, or None. Another workflow's run is as if it did not exist, here and in all methods below."""
        return self._connections.drive(getting_run(self.id, run_id))

    async def get_async(self, run_id: str) -> Run | None:
        """`get` for the running event loop."""
        return await self._connections.drive_async(getting_run(self.id, run_id))

    def cancel(self, run_id: str, *, reason: str | None = None) -> Run:
        """Refuse all further progress of the run, in whatever process it is. Its handler's `ctx.signal` fires.

        Returns the cancelled run. A terminal run is returned unchanged. `reason` is stored as `cancelReason` and sent
        in the event. Raises WorkflowNotFoundError.
        """
        return self._connections.drive(cancelling_run(self._services, self.id, run_id, reason))

    async def cancel_async(self, run_id: str, *, reason: str | None = None) -> Run:
        """`cancel` for the running event loop."""
        return await self._connections.drive_async(cancelling_run(self._services, self.id, run_id, reason))

    def pause(self, run_id: str, *, reason: str | None = None) -> Run:
        """Start no further step of the run until `resume`. The step in progress is finished and stored.

        Returns the paused run. A terminal or paused run is returned unchanged. `reason` is stored as `pauseReason` and
        sent in the event. Raises WorkflowNotFoundError, InvalidStateError when other control operations never cease.
        """
        return self._connections.drive(pausing_run(self._services, self.id, run_id, reason))

    async def pause_async(self, run_id: str, *, reason: str | None = None) -> Run:
        """`pause` for the running event loop."""
        return await self._connections.drive_async(pausing_run(self._services, self.id, run_id, reason))

    def resume(self, run_id: str, payload: Any = None) -> Run:
        """Answer the wait of the run: the payload becomes the step's output. A paused run is only un-paused.

        Of two concurrent answers one wins, and the other raises InvalidStateError. So do an answer to a run that does not
        wait for a person or a hook, and a payload for a paused run. Raises WorkflowNotFoundError as well.
        """
        return self._connections.drive(resuming_run(self._services, self.id, run_id, payload))

    async def resume_async(self, run_id: str, payload: Any = None) -> Run:
        """`resume` for the running event loop."""
        return await self._connections.drive_async(resuming_run(self._services, self.id, run_id, payload))

    def rewind_to(self, run_id: str, step_id: str) -> Run:
        """Set that step and all later ones back to pending, and make the run claimable, whatever it is doing now.

        The context is kept, open hooks become invalid, a paused run stays paused. Raises InvalidStateError for a cancelled
        run and for a step that the run has not reached, StepNotFoundError, WorkflowNotFoundError.
        """
        return self._connections.drive(rewinding_run(self._services, self.id, run_id, step_id))

    async def rewind_to_async(self, run_id: str, step_id: str) -> Run:
        """`rewind_to` for the running event loop."""
        return await self._connections.drive_async(rewinding_run(self._services, self.id, run_id, step_id))

    def retry(self, run_id: str) -> Run:
        """Let a failed run go on: the step or the call that failed it has fresh attempts; what was stored before stays.

        Raises InvalidStateError for a run that has not failed, WorkflowNotFoundError.
        """
        return self._connections.drive(retrying_run(self._services, self.id, run_id))

    async def retry_async(self, run_id: str) -> Run:
        """`retry` for the running event loop."""
        return await self._connections.drive_async(retrying_run(self._services, self.id, run_id))

    # --- waiting and executing -------------------------------------------------------------------------------------

    def wait_for(self, run_id: str, *, timeout: float | timedelta | None = None, poll_interval: float | timedelta = 1.0) -> Run:
        """Wait until the run is terminal, and return it.

        A signal ends the wait at once where possible; otherwise the run is read every `poll_interval` seconds. Raises the
        built-in TimeoutError after `timeout` seconds (None: never), WorkflowNotFoundError.
        """
        return self._connections.drive(waiting_for_run(self._services, self.id, run_id, timeout, poll_interval))

    async def wait_for_async(self, run_id: str, *, timeout: float | timedelta | None = None, poll_interval: float | timedelta = 1.0) -> Run:
        """`wait_for` for the running event loop."""
        return await self._connections.drive_async(waiting_for_run(self._services, self.id, run_id, timeout, poll_interval))

    def execute(self, run_id: str) -> Run:
        """Claim the run and drive it in this process to its next stop: terminal, wait, sleep, back-off or pause.

        Returns the run as it is then. A run that cannot be claimed now is returned as stored, at once. Raises
        WorkflowNotFoundError.
        """
        return self._connections.loop_thread().call(self.execute_async(run_id))

    async def execute_async(self, run_id: str) -> Run:
        """`execute` for the running event loop."""
        return await execute_run(self._connections, self._services.env, self.id, self.version, run_id)

    def shutdown(self, *, timeout: float | timedelta = 30.0) -> None:
        """Let local executions finish their current steps, for `timeout` seconds, then stop them. All their runs are released."""
        self._connections.shutdown(seconds(timeout, "shutdown: timeout", zero_ok=True))

    async def shutdown_async(self, *, timeout: float | timedelta = 30.0) -> None:
        """`shutdown` for the running event loop."""
        await self._connections.shutdown_async(seconds(timeout, "shutdown: timeout", zero_ok=True))
