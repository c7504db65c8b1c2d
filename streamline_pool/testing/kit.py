"""The kit for users' own tests: their application on a database of its own, a worker at call, a clock that jumps.

    pytest_plugins = ["streamline_pool.testing"]  # in the top-level conftest.py: fixtures `streamline_server` and `streamline`

Owns what a test needs of a pool: when the worker works, until when, and what time it is. It is the real worker on a real
MongoDB; only the time is made up (timewarp.py). pytest is not needed, but for the fixtures. The guide is docs/testing.md.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

from streamline_pool.client.app import Streamline
from streamline_pool.client.inline_runner import LoopThread
from streamline_pool.client.workflow import Workflow
from streamline_pool.config.asyncio_tasks import end_tasks
from streamline_pool.config.env import Env, system_env
from streamline_pool.domain.errors import InvalidStateError, StoreUnavailableError, ValidationError, WorkflowNotFoundError
from streamline_pool.domain.model import Run, seconds
from streamline_pool.events.event import Event
from streamline_pool.storage.store import Store

from .app_harness import AppHarness
from .time_travel import Timeline

__all__ = ["SERVER_VARIABLE", "TestKit"]

T = TypeVar("T")

SERVER_VARIABLE = "STREAMLINE_TEST_MONGODB_URI"
"""Names a server to test on, instead of a private one. Each test makes a database there, and drops it."""

_AGAIN_S = 0.002  # until a run that was due by our clock is due by the server's
_TICK_S = 0.01  # between looks for due runs while `working`
_JUMP_MAX_S = 100 * 365 * 86400.0


class TestKit:
    """Workflows under test: `use(app)`, then `run`, `settle` and `jump`. A context manager; `close` gives the apps back.

    Nothing works in the background: runs move inside of the kit's calls only (or in `with kit.working()`). Every call that
    works has an asyncio twin with the suffix `_async`; either may be used in any test, since the worker has a thread and
    an event loop of its own. `timeout` is real seconds that one call may take.
    """

    __test__ = False  # pytest takes classes with such a name for tests

    def __init__(self, mongodb_uri: str, *, timeout: float | timedelta = 30.0, env: Env | None = None) -> None:
        self.mongodb_uri = mongodb_uri
        self.timeline = Timeline()
        self._timeout_s = seconds(timeout, "TestKit: timeout")
        self._env = env or system_env()
        self._guests: list[AppHarness] = []
        self._databases: dict[tuple[str | None, str | None], str] = {}  # by where the apps were -> where they are now
        self._events: list[Event] = []
        self._closed = False
        self._loop = LoopThread()
        self._kit_loop = self._call(_this_loop())
        self._turn = asyncio.Lock()  # one call at a time decides what time it is
        self._at_work = 0  # calls and blocks under way that need the workers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give every application back, closed and pointing where it did, and drop the databases."""
        if self._closed:
            return
        self._closed = True
        for guest in self._guests:
            self._close_app(guest.app)
        for guest in self._guests:
            self._call(guest.drop_database())
            guest.release()
        self._loop.close()

    # --- applications ------------------------------------------------------------------------------------------------

    def use(self, app: Streamline, *, queues: Sequence[str] = ()) -> Streamline:
        """Take `app` over until the kit is closed: on an empty database of the test's server, at the kit's time. Returns it.

        Apps that share a database in earnest share one here. `queues`: what its worker works on, instead of the queues
        of the app's settings, or else of its workflows. Raises InvalidStateError for an app that a kit has already.
        """
        if app._open_store is not Store:
            raise InvalidStateError("use: a TestKit has this app already; close that kit first, or use it once")
        where = (app.mongodb_uri, app.database)
        database = self._databases.setdefault(where, f"streamline_test_{self._env.new_id()[-12:]}")
        guest = AppHarness(app, self, database, queues)
        self._close_app(app)
        self._guests.append(guest)  # from here on it is given back, whatever fails
        guest.take()
        self._call(guest.open())
        return app

    def _close_app(self, app: Streamline) -> None:
        """Close what an app has open, in this thread and in every loop but the kit's."""
        app.close()
        for loop in list(app._async_stores):
            if loop.is_closed():
                del app._async_stores[loop]  # it was closed with its loop
            elif loop is _running_loop():
                loop.create_task(app.close_async())
            elif loop.is_running():
                if loop is not self._kit_loop:
                    asyncio.run_coroutine_threadsafe(app.close_async(), loop).result()
            else:
                loop.run_until_complete(app.close_async())

    # --- time --------------------------------------------------------------------------------------------------------

    def now(self) -> datetime:
        """What time it is for the apps: aware UTC, whole milliseconds."""
        for guest in self._guests:
            if guest.store is not None:
                return guest.store.now()
        return self._env.clock.now() + timedelta(milliseconds=self.timeline.offset_ms)

    def jump(self, by: float | timedelta) -> None:
        """Let so much time pass (seconds or a timedelta), and everything happen that becomes due in it, in its order.

        First all that is due is worked off. Then the clock goes from one instant at which a run becomes due to the
        next, and last to the end.
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
        """`workflow.start(input, **options)`, then `settle`; the run as it is then: ended, or in a wait, sleep or back-off."""
        if all(guest.app is not workflow.app for guest in self._guests):
            raise InvalidStateError(f"run: this kit does not have the app of workflow {workflow.id}; call use(app) first")
        started = workflow.start(input, **options)
        self.settle()
        return workflow.get(started.id) or started

    async def run_async(self, workflow: Workflow, input: Any = None, **options: Any) -> Run:
        """See `run`."""
        return await asyncio.to_thread(self.run, workflow, input, **options)

    def settle(self, *, timeout: float | timedelta | None = None) -> None:
        """Work until nothing is in flight and nothing is due. TimeoutError after `timeout` real seconds (the kit's)."""
        self._call(self._settle_in_turn(self._timeout_s if timeout is None else seconds(timeout, "settle: timeout")))

    async def settle_async(self, *, timeout: float | timedelta | None = None) -> None:
        """See `settle`."""
        await asyncio.to_thread(self.settle, timeout=timeout)

    def finish(self, run: Run | str) -> Run:
        """Let time pass until this run has ended: through its sleeps, back-offs, start time and timeouts.

        Raises InvalidStateError when it waits for something that no time brings, such as an answer.
        """
        return self._call(self._finish(run if isinstance(run, str) else run.id))

    async def finish_async(self, run: Run | str) -> Run:
        """See `finish`."""
        return await asyncio.to_thread(self.finish, run)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Within the block runs are worked on in the background, as by a pool: for code that waits for runs itself."""
        ticking = self._call(self._start_ticking())
        try:
            yield
        finally:
            self._call(self._stop_ticking(ticking))

    def crash_after(self, step_id: str, *, times: int = 1) -> None:
        """Have the worker die when a handler of that step has ended and its result is not stored yet, so many times.

        As with a real death its leases are taken back, another worker claims its runs, and handlers are entered again;
        `max_crashes` such deaths fail a run with WORKER_CRASHED.
        """
        known = {step for guest in self._guests for workflow in guest.app.workflows.values() for step in workflow.steps}
        if step_id not in known:
            raise ValidationError(
                f"crash_after: no workflow of the apps in use has a step {step_id!r}; they have {', '.join(sorted(known))}"
            )
        for guest in self._guests:
            if any(step_id in workflow.steps for workflow in guest.app.workflows.values()):
                guest.crashes.extend([step_id] * times)

    # --- looking -----------------------------------------------------------------------------------------------------

    def events(self, name: str = "*", *, run: Run | str | None = None) -> list[Event]:
        """What the apps' event buses have published since `use`, oldest first: of that name, of that run."""
        for guest in self._guests:
            guest.app.events.flush()
        run_id = run.id if isinstance(run, Run) else run
        return [event for event in list(self._events) if name in ("*", event.name) and run_id in (None, event.run_id)]

    def record(self, event: Event) -> None:
        """Subscribed to the buses of all apps in use."""
        self._events.append(event)

    # --- in the kit's loop -------------------------------------------------------------------------------------------

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.call(work)

    @contextlib.asynccontextmanager
    async def _workers(self) -> AsyncIterator[None]:
        """While it lasts, every app in use has a worker."""
        self._at_work += 1
        failed = True
        try:
            for guest in self._guests:
                if not guest.has_worker:
                    await guest.start()
            yield
            failed = False
        finally:
            self._at_work -= 1
            if not self._at_work:
                for guest in self._guests:
                    await guest.stop(abruptly=failed)

    async def _settle_in_turn(self, timeout_s: float) -> None:
        async with self._turn, self._workers():
            await self._settle(self._env.clock.monotonic() + timeout_s)

    async def _settle(self, deadline: float) -> None:
        """Work until nothing is due. From its return to the caller's next `await` nothing is in flight, nor being claimed."""
        before: list[str] = []
        while True:
            for guest in self._guests:
                await guest.rest(deadline)
            for guest in self._guests:
                await guest.recover()
            due = [run_id for guest in self._guests if (run_id := await guest.find_work()) is not None]
            if not due and all(guest.is_at_rest() for guest in self._guests):
                return
            if self._env.clock.monotonic() > deadline:
                raise TimeoutError(f"there is always something due, run {due} at last; a longer timeout= may help")
            if due == before:
                await self._env.async_sleep(_AGAIN_S)
            before = due

    def _deadline(self) -> float:
        return self._env.clock.monotonic() + self._timeout_s

    async def _jump(self, target: datetime) -> None:
        async with self._turn, self._workers():
            await self._pass_to(target, self._deadline())

    async def _pass_to(self, target: datetime, deadline: float) -> None:
        """Go from instant to instant. A lease in flight would be over after a jump, so there is none when that happens."""
        while True:
            await self._settle(deadline)
            instants = [at for guest in self._guests if (at := await guest.next_due(target)) is not None]
            if not all(guest.is_at_rest() for guest in self._guests):
                continue
            self.timeline.advance(min(instants, default=target) - self.now())
            if not instants:
                break
            if self._env.clock.monotonic() > deadline:
                raise TimeoutError(
                    f"it is {self.now()}, on the way to {target}, and there is ever more to do; jump less far, or give TestKit more time"
                )
        await self._settle(deadline)

    async def _finish(self, run_id: str) -> Run:
        deadline = self._deadline()
        async with self._turn, self._workers():
            while True:
                await self._settle(deadline)
                guest, run = await self._find(run_id)
                if run.is_terminal:
                    return run
                stored = run.to_dict()
                if stored.get("wakeAt") is None or not guest.works_on(stored.get("lane")):
                    raise InvalidStateError(
                        f"finish: no time brings run {run_id} to its end: {_what_it_waits_for(run, guest)}", run_id=run_id
                    )
                await self._pass_to(stored["wakeAt"], deadline)

    async def _find(self, run_id: str) -> tuple[AppHarness, Run]:
        found = [(guest, run) for guest in self._guests if (run := await guest.app.get_run_async(run_id)) is not None]
        for guest, run in found:
            if run.workflow_id in guest.app.workflows:  # the others only share its database
                return guest, run
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
                for guest in [
                    guest for guest in self._guests if guest.has_worker
                ]:  # one that has just come gets its own with the next call
                    with contextlib.suppress(StoreUnavailableError):  # the next tick asks again
                        await guest.alive()
                        await guest.find_work()
            await self._env.async_sleep(_TICK_S)

    async def _stop_ticking(self, ticking: tuple[contextlib.AsyncExitStack, asyncio.Task[None]]) -> None:
        stack, task = ticking
        failure = task.exception() if task.done() else None
        await end_tasks([task])
        await stack.aclose()
        if failure is not None:
            raise failure


def _what_it_waits_for(run: Run, guest: AppHarness) -> str:
    if run.paused:
        return "it is paused"
    if not guest.works_on(run.to_dict().get("lane")):
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
