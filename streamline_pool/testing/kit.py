"""The kit for users' own tests: their application on a database of the test, a worker on demand, a clock that jumps.

    pytest_plugins = ["streamline_pool.testing"]  # in the top-level conftest.py: fixtures `streamline_server` and `streamline`

Owns when the worker works, for how long, and what time it is. The worker and the MongoDB are real; only the time is set
by the test (time_travel.py). pytest is needed for the fixtures only. The guide is docs/how-to/test-workflows.md.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

from streamline_pool.client.app import Streamline
from streamline_pool.client.connections import PYMONGO_STORES
from streamline_pool.client.inline_runner import LoopThread
from streamline_pool.client.workflow import Workflow
from streamline_pool.config.asyncio_tasks import end_tasks
from streamline_pool.config.env import Env, system_env
from streamline_pool.domain.errors import InvalidStateError, StoreUnavailableError, ValidationError, WorkflowNotFoundError
from streamline_pool.domain.model import Run, seconds
from streamline_pool.events.event import Event, check_subscribed

from .app_harness import AppHarness
from .time_travel import Timeline

__all__ = ["SERVER_VARIABLE", "TestKit"]

T = TypeVar("T")

SERVER_VARIABLE = "STREAMLINE_TEST_MONGODB_URI"
"""The environment variable that names a server for the tests, instead of a private one. Each test creates a database there and drops it."""

_AGAIN_S = 0.002  # the server's clock may be that much behind ours when it decides which runs are due
_TICK_S = 0.01  # between polls for due runs in `working`
_JUMP_MAX_S = 100 * 365 * 86400.0


class TestKit:
    """Workflows under test: `use(app)`, then `run`, `settle` and `jump`. A context manager; `close` releases the apps.

    No worker runs in the background: runs advance within the kit's calls only (or in `with kit.working()`). Every call that
    lets runs advance has an asyncio form with the suffix `_async`. Both forms work in every test, because the worker has a
    thread and an event loop of its own. `timeout`: real seconds that one call may take.
    """

    __test__ = False  # pytest takes classes with such a name for tests

    def __init__(self, mongodb_uri: str, *, timeout: float | timedelta = 30.0, env: Env | None = None) -> None:
        self.mongodb_uri = mongodb_uri
        self.timeline = Timeline()
        self._timeout_s = seconds(timeout, "TestKit: timeout")
        self._env = env or system_env()
        self._harnesses: list[AppHarness] = []
        self._databases: dict[tuple[str | None, str | None], str] = {}  # an app's own URI and database -> the test's database
        self._events: list[Event] = []
        self._closed = False
        self._loop = LoopThread()
        self._kit_loop = self._call(_this_loop())
        self._turn = asyncio.Lock()  # one call at a time sets the time
        self._workers_needed = 0  # calls and blocks in progress that need the workers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close every application, connect it to its own server again, and drop the test's databases."""
        if self._closed:
            return
        self._closed = True
        for harness in self._harnesses:
            self._close_app(harness.app)
        for harness in self._harnesses:
            self._call(harness.drop_database())
            harness.release()
        self._loop.close()

    # --- applications ------------------------------------------------------------------------------------------------

    def use(self, app: Streamline, *, queues: Sequence[str] = ()) -> Streamline:
        """Use `app` until the kit is closed: on an empty database of the test's server, at the kit's time. Returns it.

        Apps that share a database in production share one here. `queues`: the queues of its worker; by default those of the
        app's settings, else those of its workflows. Raises InvalidStateError if a kit uses the app already.
        """
        if app.connections.factories is not PYMONGO_STORES:
            raise InvalidStateError("use: a TestKit has this app already; close that kit first, or use it once")
        where = (app.mongodb_uri, app.database)
        database = self._databases.setdefault(where, f"streamline_test_{self._env.new_id()[-12:]}")
        harness = AppHarness(app, self, database, queues)
        self._close_app(app)
        self._harnesses.append(harness)  # from here on `close` releases it, even if the following fails
        harness.take_over()
        self._call(harness.open())
        return app

    def _close_app(self, app: Streamline) -> None:
        """Close the connections of an app, in this thread and in every event loop except the kit's."""
        app.close()
        for loop in app.connections.open_loops():
            if loop is _running_loop():
                loop.create_task(app.close_async())
            elif loop.is_running():
                if loop is not self._kit_loop:
                    asyncio.run_coroutine_threadsafe(app.close_async(), loop).result()
            else:
                loop.run_until_complete(app.close_async())

    # --- time --------------------------------------------------------------------------------------------------------

    def now(self) -> datetime:
        """The time for the apps: aware UTC, whole milliseconds."""
        for harness in self._harnesses:
            if harness.store is not None:
                return harness.store.now()
        return self._env.clock.now() + timedelta(milliseconds=self.timeline.offset_ms)

    def jump(self, by: float | timedelta) -> None:
        """Let time pass, by seconds or a timedelta. Everything that becomes due meanwhile happens in its order.

        The worker first works on all due runs. Then the clock goes from each instant at which a run becomes due to the
        next, and at last to the end of the jump.
        """
        by_s = seconds(by, "jump", zero_ok=True)
        if by_s > _JUMP_MAX_S:
            raise ValidationError(f"jump: {by_s:g} seconds is more than a hundred years")
        self._call(self._jump(self.now() + timedelta(seconds=by_s)))

    async def jump_async(self, by: float | timedelta) -> None:
        """See `jump`."""
        await asyncio.to_thread(self.jump, by)

    def jump_to(self, instant: datetime) -> None:
        """`jump` to an aware instant. One in the past is a ValidationError."""
        if instant.tzinfo is None:
            raise ValidationError(f"jump_to: {instant!r} has no time zone; use an aware datetime such as kit.now() + timedelta(days=1)")
        self.jump(instant - self.now())

    async def jump_to_async(self, instant: datetime) -> None:
        """See `jump_to`."""
        await asyncio.to_thread(self.jump_to, instant)

    # --- work --------------------------------------------------------------------------------------------------------

    def run(self, workflow: Workflow, input: Any = None, **options: Any) -> Run:
        """`workflow.start(input, **options)`, then `settle`. Returns the run: ended, or in a wait, sleep or back-off."""
        if all(harness.app is not workflow.app for harness in self._harnesses):
            raise InvalidStateError(f"run: this kit does not have the app of workflow {workflow.id}; call use(app) first")
        started = workflow.start(input, **options)
        self.settle()
        return workflow.get(started.id) or started

    async def run_async(self, workflow: Workflow, input: Any = None, **options: Any) -> Run:
        """See `run`."""
        return await asyncio.to_thread(self.run, workflow, input, **options)

    def settle(self, *, timeout: float | timedelta | None = None) -> None:
        """Let the workers work until no run is active and none is due. TimeoutError after `timeout` real seconds (default: the kit's)."""
        self._call(self._settle_in_turn(self._timeout_s if timeout is None else seconds(timeout, "settle: timeout")))

    async def settle_async(self, *, timeout: float | timedelta | None = None) -> None:
        """See `settle`."""
        await asyncio.to_thread(self.settle, timeout=timeout)

    def finish(self, run: Run | str) -> Run:
        """Let time pass until this run has ended: its sleeps, back-offs, start time and timeouts. Returns it.

        Raises InvalidStateError when the run waits for something that does not come by time alone, such as an answer.
        """
        return self._call(self._finish(run if isinstance(run, str) else run.id))

    async def finish_async(self, run: Run | str) -> Run:
        """See `finish`."""
        return await asyncio.to_thread(self.finish, run)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Within the block, workers run in the background, as in a pool. For code that itself waits for runs."""
        ticking = self._call(self._start_ticking())
        try:
            yield
        finally:
            self._call(self._stop_ticking(ticking))

    def crash_after(self, step_id: str, *, times: int = 1) -> None:
        """Let the worker die, `times` times, when a handler of that step has ended and its result is not stored yet.

        As after a real crash, its leases are released, another worker claims its runs, and handlers are entered again.
        `max_crashes` such deaths fail a run with WORKER_CRASHED.
        """
        known = {step for harness in self._harnesses for workflow in harness.app.workflows.values() for step in workflow.steps}
        if step_id not in known:
            raise ValidationError(
                f"crash_after: no workflow of the apps in use has a step {step_id!r}; they have {', '.join(sorted(known))}"
            )
        for harness in self._harnesses:
            if any(step_id in workflow.steps for workflow in harness.app.workflows.values()):
                harness.crashes.extend([step_id] * times)

    # --- events ------------------------------------------------------------------------------------------------------

    def events(self, name: str = "*", *, run: Run | str | None = None) -> list[Event]:
        """The events that the apps have published since `use`, oldest first. `name`, `run`: only the events with that name, of that run.

        Raises ValidationError for a misspelt name of an engine event, as `app.events.on` does.
        """
        check_subscribed(name, "events")
        for harness in self._harnesses:
            harness.app.events.flush()
        run_id = run.id if isinstance(run, Run) else run
        return [event for event in list(self._events) if name in ("*", event.name) and run_id in (None, event.run_id)]

    def record(self, event: Event) -> None:
        """The subscriber to the buses of all apps in use."""
        self._events.append(event)

    # --- in the kit's loop -------------------------------------------------------------------------------------------

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.call(work)

    @contextlib.asynccontextmanager
    async def _workers(self) -> AsyncIterator[None]:
        """Within the block, every app in use has a worker."""
        self._workers_needed += 1
        failed = True
        try:
            for harness in self._harnesses:
                if not harness.has_worker:
                    await harness.start()
            yield
            failed = False
        finally:
            self._workers_needed -= 1
            if not self._workers_needed:
                for harness in self._harnesses:
                    await harness.stop(abruptly=failed)

    async def _settle_in_turn(self, timeout_s: float) -> None:
        async with self._turn, self._workers():
            await self._settle(self._env.clock.monotonic() + timeout_s)

    async def _settle(self, deadline: float) -> None:
        """Work until no run is due. From its return until the caller's next `await`, no run is active or being claimed."""
        before: list[str] = []
        while True:
            for harness in self._harnesses:
                await harness.wait_until_idle(deadline)
            for harness in self._harnesses:
                await harness.recover_expired()
            due = [run_id for harness in self._harnesses if (run_id := await harness.wake_up_if_due()) is not None]
            if not due and all(harness.is_idle() for harness in self._harnesses):
                return
            if self._env.clock.monotonic() > deadline:
                raise TimeoutError(f"there is always a due run, last {due}; a longer timeout= may help")
            if due == before:
                await self._env.async_sleep(_AGAIN_S)
            before = due

    def _deadline(self) -> float:
        return self._env.clock.monotonic() + self._timeout_s

    async def _jump(self, target: datetime) -> None:
        async with self._turn, self._workers():
            await self._pass_to(target, self._deadline())

    async def _pass_to(self, target: datetime, deadline: float) -> None:
        """Go from one due instant to the next. A jump would end the lease of an active run, so it waits for such runs."""
        while True:
            await self._settle(deadline)
            instants = [at for harness in self._harnesses if (at := await harness.next_due_at(target)) is not None]
            if not all(harness.is_idle() for harness in self._harnesses):
                continue
            self.timeline.advance(min(instants, default=target) - self.now())
            if not instants:
                break
            if self._env.clock.monotonic() > deadline:
                raise TimeoutError(
                    f"it is {self.now()}, on the way to {target}, and runs keep becoming due; jump less far, or give TestKit more time"
                )
        await self._settle(deadline)

    async def _finish(self, run_id: str) -> Run:
        deadline = self._deadline()
        async with self._turn, self._workers():
            while True:
                await self._settle(deadline)
                harness, run = await self._find(run_id)
                if run.is_terminal:
                    return run
                stored = run.to_dict()
                if stored.get("wakeAt") is None or not harness.claims_from(stored.get("lane")):
                    raise InvalidStateError(
                        f"finish: time alone does not end run {run_id}: {_what_it_waits_for(run, harness)}", run_id=run_id
                    )
                await self._pass_to(stored["wakeAt"], deadline)

    async def _find(self, run_id: str) -> tuple[AppHarness, Run]:
        found = [(harness, run) for harness in self._harnesses if (run := await harness.app.get_run_async(run_id)) is not None]
        for harness, run in found:
            if run.workflow_id in harness.app.workflows:  # other apps may share its database
                return harness, run
        if found:
            return found[0]
        raise WorkflowNotFoundError(f"no run {run_id!r} in the databases of this kit", run_id=run_id)

    async def _start_ticking(self) -> tuple[contextlib.AsyncExitStack, asyncio.Task[None]]:
        stack = contextlib.AsyncExitStack()
        await stack.enter_async_context(self._workers())
        return stack, asyncio.create_task(self._tick())

    async def _tick(self) -> None:
        while True:
            async with self._turn:
                # An app that was added meanwhile gets its worker with the next call.
                for harness in [harness for harness in self._harnesses if harness.has_worker]:
                    with contextlib.suppress(StoreUnavailableError):  # the next tick tries again
                        await harness.live_worker()
                        await harness.wake_up_if_due()
            await self._env.async_sleep(_TICK_S)

    async def _stop_ticking(self, ticking: tuple[contextlib.AsyncExitStack, asyncio.Task[None]]) -> None:
        stack, task = ticking
        failure = task.exception() if task.done() else None
        await end_tasks([task])
        await stack.aclose()
        if failure is not None:
            raise failure


def _what_it_waits_for(run: Run, harness: AppHarness) -> str:
    if run.paused:
        return "it is paused"
    if not harness.claims_from(run.to_dict().get("lane")):
        return f"no app in use works on workflow {run.workflow_id} {run.version}, queue {run.queue}; name queues in use(app, queues=…)"
    waiting_for = run.step(run.current_step_id).waiting_for if run.current_step_id is not None else None
    return f"step {run.current_step_id} waits for {waiting_for}; answer that first"


async def _this_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
