"""The connections of one application in this process: stores, the background event loop, local executions.

Owns what is opened at first use and closed by `close`, and drives procedures on it. A forked child starts with no
connections. What the procedures do is in the other modules of this package.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from streamline_pool.config.env import Env
from streamline_pool.domain.errors import WorkflowError
from streamline_pool.events.publisher import ControlEvents
from streamline_pool.storage.procedures import Procedure
from streamline_pool.storage.store import AsyncStore, Store
from streamline_pool.storage.target import DatabaseTarget

from .inline_runner import InlineRunner, LoopThread

__all__ = ["PYMONGO_STORES", "Connections", "StoreFactories"]

T = TypeVar("T")
AnyStore = TypeVar("AnyStore", bound=Store | AsyncStore)

_RUNNER_CLOSE_S = 5.0  # for the steps in progress when an application is closed


class StoreFactories(NamedTuple):
    """Makes the stores. The testing kit replaces them by stores whose time can be jumped."""

    blocking: Callable[[DatabaseTarget, Env], Store]
    asyncio: Callable[[DatabaseTarget, Env], AsyncStore]


PYMONGO_STORES = StoreFactories(Store, AsyncStore)


class Connections:
    """One store for synchronous callers, one per event loop, and the runs that this process executes itself."""

    def __init__(self, env: Env, find_target: Callable[[], DatabaseTarget], make_runner: Callable[[AsyncStore], InlineRunner]) -> None:
        self.factories = PYMONGO_STORES
        self._env = env
        self._find_target = find_target  # called at the first use, and at the first use after `close`
        self._make_runner = make_runner
        self._target: DatabaseTarget | None = None
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._opening = threading.Lock()  # several threads may come first at the same time; they share what one of them opens
        self._store: Store | None = None
        self._async_stores: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncStore] = weakref.WeakKeyDictionary()
        self._runners: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, InlineRunner] = weakref.WeakKeyDictionary()
        self._background: LoopThread | None = None
        self._control_events = ControlEvents(self._env)

    def _notice_fork(self) -> None:
        if self._pid != os.getpid():
            # The connections belong to the parent. To use them here, or even to close them, would disturb the parent.
            self._reset()

    # --- stores ----------------------------------------------------------------------------------------------------

    @property
    def target(self) -> DatabaseTarget:
        """The server, database and collections in use. Fixed from the first use until `close`."""
        if self._target is None:
            self._target = self._find_target()
        return self._target

    @property
    def has_target(self) -> bool:
        """True once the target is fixed."""
        return self._target is not None

    def store(self) -> Store:
        """The synchronous connection of this process. Its first operation opens it."""
        self._notice_fork()
        store = self._store
        if store is None:
            with self._opening:
                store = self._store = self._store or self.factories.blocking(self.target, self._env)
        return store

    def store_async(self) -> AsyncStore:
        """The connection of the running event loop. Its first operation opens it."""
        self._notice_fork()
        loop = asyncio.get_running_loop()
        store = self._async_stores.get(loop)
        if store is None:
            store = self._async_stores[loop] = self.factories.asyncio(self.target, self._env)
        return store

    def driving_store(self) -> Store | AsyncStore:
        """The store that drives the procedure in progress: the running loop's if it has one, else the synchronous one."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return self.store()
        return self._async_stores.get(loop) or self.store()

    def use(self, store: AnyStore) -> AnyStore:
        """Use this store from now on: as the synchronous one, or as that of the running event loop. Returns it."""
        self._notice_fork()
        if isinstance(store, AsyncStore):
            self._async_stores[asyncio.get_running_loop()] = store
        else:
            self._store = store
        return store

    def open_loops(self) -> list[asyncio.AbstractEventLoop]:
        """The event loops with a connection. The connections of loops that are closed are dropped."""
        for loop in list(self._async_stores):
            if loop.is_closed():
                del self._async_stores[loop]
        return list(self._async_stores)

    # --- driving procedures ----------------------------------------------------------------------------------------

    def drive(self, procedure: Procedure[T], session: Any = None) -> T:
        """Run a procedure to its end, in the caller's `session` if one is given. Then send the events that it published."""
        store = self.store()
        result = store.drive(procedure, session)
        for signal in self._control_events.take():
            with contextlib.suppress(WorkflowError):  # the events are numbered, so readers of a stream see that they missed one
                store.run(signal)
        return result

    async def drive_async(self, procedure: Procedure[T], session: Any = None) -> T:
        """`drive` for the running event loop."""
        store = self.store_async()
        result = await store.drive(procedure, session)
        for signal in self._control_events.take():
            with contextlib.suppress(WorkflowError):
                await store.run(signal)
        return result

    @property
    def control_events(self) -> ControlEvents:
        """Takes the events of control operations. `drive` sends them to other processes when the procedure has ended."""
        return self._control_events

    # --- local executions ------------------------------------------------------------------------------------------

    def loop_thread(self) -> LoopThread:
        """The background event loop, for synchronous callers of asynchronous code."""
        self._notice_fork()
        with self._opening:
            self._background = self._background or LoopThread()
            return self._background

    def runner(self) -> InlineRunner:
        """What executes single runs in the running event loop."""
        loop = asyncio.get_running_loop()
        runner = self._runners.get(loop)
        if runner is None:
            runner = self._runners[loop] = self._make_runner(self.store_async())
        return runner

    def check_here(self, run_id: str) -> None:
        """Have this process read that run's state, if it executes the run itself: local executions read no signals."""
        for reference in self._runners.keyrefs():  # one atomic copy: another thread may add a loop meanwhile
            loop = reference()
            runner = None if loop is None else self._runners.get(loop)
            if loop is not None and runner is not None:
                with contextlib.suppress(RuntimeError):  # a closed loop executes nothing
                    loop.call_soon_threadsafe(runner.check, run_id)

    def shutdown(self, timeout_s: float) -> None:
        """End the executions that synchronous callers started; see `InlineRunner.shutdown`."""
        if self._background is not None:
            self._background.call(self.shutdown_async(timeout_s))

    async def shutdown_async(self, timeout_s: float) -> None:
        """End the executions in the running event loop."""
        runner = self._runners.pop(asyncio.get_running_loop(), None)
        if runner is not None:
            await runner.shutdown(timeout_s)

    # --- closing ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the background loop with its executions, and the synchronous connection. The next use opens them again."""
        self._notice_fork()
        if self._background is not None:
            self._background.call(self.close_async())
            self._background.close()
            self._background = None
        if self._store is not None:
            self._store.close()
            self._store = None
        self._target = None

    async def close_async(self) -> None:
        """Close what belongs to the running event loop."""
        await self.shutdown_async(_RUNNER_CLOSE_S)
        store = self._async_stores.pop(asyncio.get_running_loop(), None)
        if store is not None:
            await store.close()
