"""Executes single runs inside the calling program: `Workflow.execute`, with the same engine that workers use.

Owns the engine of one event loop, and the thread with an event loop for synchronous callers.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from datetime import datetime
from typing import Any, TypeVar

from streamline_pool.config.asyncio_tasks import end_tasks
from streamline_pool.config.env import Env
from streamline_pool.domain.errors import InvalidStateError, WorkflowError
from streamline_pool.engine.engine import Engine
from streamline_pool.protocol import claims, signals
from streamline_pool.protocol.operations import Signal
from streamline_pool.storage.store import AsyncStore

__all__ = ["InlineRunner", "LoopThread", "make_owner"]

T = TypeVar("T")

_CALLERS_S = 5.0  # for callers of `execute` to read their run a last time
_STOP_GRACE_S = 1.0  # for handlers to react to their signal
_STOP_S = 5.0  # for stopped runs to be released


def make_owner(env: Env) -> str:
    """The identity of one incarnation of a process that holds leases: `host:pid:nonce`, never reused."""
    return f"{socket.gethostname()}:{os.getpid()}:{env.new_id()[-8:]}"


class _Announcer:
    """Signals what other processes must know of the runs that are executed here: when they are due again, and which have ended."""

    def __init__(self, store: AsyncStore) -> None:
        self._store = store
        self._sending: set[asyncio.Task[None]] = set()

    def on_parked(self, lane: str, wake_at: datetime, run_id: str) -> None:
        """See engine.ports.Observer. A steward sets the timer, as for a run that a worker has parked."""
        self._send(signals.send_signal("due", self._store.now(), wakeAt=wake_at, lane=lane, runId=run_id, count=1))

    def on_finished(self, run_id: str, status: str) -> None:
        """See engine.ports.Observer."""
        if status in ("done", "failed"):
            self._send(signals.send_signal("ended", self._store.now(), runs=[run_id]))

    def store_answered(self, ok: bool) -> None:
        """See engine.ports.Observer."""

    def on_stuck(self, what: str) -> None:
        """See engine.ports.Observer."""

    async def sent(self) -> None:
        """Return once what has been announced until now is sent, or has failed."""
        if self._sending:
            await asyncio.wait(self._sending)

    def _send(self, signal: Signal) -> None:
        task = asyncio.get_running_loop().create_task(_notify(self._store, signal))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)


class InlineRunner:
    """Claims and drives runs in one event loop. Each call of `execute` drives one run."""

    def __init__(self, make_engine: Callable[[AsyncStore, _Announcer], Engine], store: AsyncStore, env: Env, lease_s: float) -> None:
        self._announcer = _Announcer(store)
        self._engine = make_engine(store, self._announcer)
        self._store = store
        self._env = env
        self._lease_s = lease_s
        self._owner = make_owner(env)
        self._callers: set[asyncio.Task[Any]] = set()
        self._engine.start()
        self._engine.event_publisher.poll_while(lambda: bool(self._engine.active_runs))

    async def execute(self, run_id: str) -> bool:
        """Claim a run by name and drive it to its next stop. False if it could not be claimed now."""
        await (
            self._engine.event_publisher.poll()
        )  # a program gets no message about subscribers of streams; beside a claim's majority write this costs little
        deadline = self._engine.leases.deadline()
        lease_id = self._env.new_id()
        document = await self._store.run(claims.claim_run(run_id, None, lease_id, self._owner, self._lease_s))
        if document is None:
            return False
        task = self._engine.admit(document, deadline)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            # Only the caller was cancelled, not the run: the handler stops, and any process may claim the run.
            self._engine.stop_run(task)
            raise
        await self._announcer.sent()
        return True

    def check(self, run_id: str) -> None:
        """If the run is executed here, read its state in the database at once: this program has changed it."""
        self._engine.check(run_id)

    @contextlib.contextmanager
    def caller(self) -> Iterator[None]:
        """Within this block, `shutdown` waits for the running task before the connections are closed."""
        task = asyncio.current_task()
        assert task is not None, "an `async def` runs in a task"
        self._callers.add(task)
        try:
            yield
        finally:
            self._callers.discard(task)

    async def shutdown(self, timeout_s: float) -> None:
        """Let current steps end, for `timeout_s` seconds; then stop them. Their runs are released either way."""
        self._engine.drain()
        try:
            await asyncio.wait_for(self._engine.emptied(), timeout_s)
        except TimeoutError:
            self._engine.stop(grace_s=_STOP_GRACE_S)
            with contextlib.suppress(TimeoutError):  # then the leases expire
                await asyncio.wait_for(self._engine.emptied(), _STOP_S)
        await self._announcer.sent()
        await self._engine.close()
        waiting = [task for task in self._callers if task is not asyncio.current_task()]
        if waiting:
            await asyncio.wait(waiting, timeout=_CALLERS_S)


async def _notify(store: AsyncStore, signal: Signal) -> None:
    with contextlib.suppress(WorkflowError):  # a hint: callers that wait poll a little later, and sweeps find due runs
        await store.run(signal)


class LoopThread:
    """An event loop on a thread of its own, for synchronous callers of asynchronous code."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="streamline-loop", daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for its result. An interrupted wait cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise InvalidStateError("the application was closed while this call was in progress") from None
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """End the loop and its thread. Calls still in progress end with an InvalidStateError."""
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_all() -> None:
    current = asyncio.current_task()
    await end_tasks(task for task in asyncio.all_tasks() if task is not current)
