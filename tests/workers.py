"""Worker objects in the test's own process, with the part of a steward that they need: timers, sweeps, recovery."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from streamline_pool import Streamline
from streamline_pool.config.asyncio_tasks import end_tasks
from streamline_pool.config.env import Env
from streamline_pool.domain.errors import StoreUnavailableError
from streamline_pool.protocol import claims, recovery
from streamline_pool.protocol.operations import Find
from streamline_pool.worker.worker import Worker, WorkerStatus

__all__ = ["Pool", "check_invariants", "run_until_idle"]

POLL_S = 0.01
SOON_S = 3.0  # a run that becomes due later than this does not keep `run_until_idle` waiting


class Pool:
    """Some workers in the running loop. Leaving the block drains them."""

    def __init__(self, app: Streamline, *, workers: int = 1, recover_every_s: float | None = None, env: Env | None = None) -> None:
        self.app = app
        self.workers = [
            Worker(app, app.settings, owner=f"test:{index}:{app.env.new_id()[-8:]}", index=index, total=workers, env=env)
            for index in range(workers)
        ]
        self._lanes = app.lanes(app.settings.queues)
        self._recover_every_s = recover_every_s
        self._tasks: list[asyncio.Task[None]] = []
        self._steward: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(worker.run()) for worker in self.workers]
        self._steward = asyncio.create_task(self._keep_waking_up())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in self.workers:
            worker.drain() if kind is None else worker.stop(0.1)
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._steward is not None:
            await end_tasks([self._steward])
        await self.app.close_async()
        for failure in ended:
            if isinstance(failure, BaseException) and kind is None:
                raise failure

    def stop_waking_up(self) -> None:
        """No timer and no sweep reaches the workers any more; the test wakes them up."""
        if self._steward is not None:
            self._steward.cancel()

    async def _keep_waking_up(self) -> None:
        store = self.app.store_async()
        recovered_at = time.monotonic()
        while True:
            await asyncio.sleep(POLL_S)
            try:
                if self._recover_every_s is not None and time.monotonic() - recovered_at > self._recover_every_s:
                    recovered_at = time.monotonic()
                    await store.run(recovery.recover_expired(self.app.settings.max_crashes))
                if await store.run(claims.find_due_before(self._lanes, store.now(), 1)):
                    for worker in self.workers:
                        worker.wake_up(overdue=True)
            except StoreUnavailableError:
                continue

    async def until(self, holds: Callable[[], Any], *, timeout: float = 15.0) -> None:
        """Let the workers work until `holds()`."""
        deadline = time.monotonic() + timeout
        while not await asyncio.to_thread(holds):
            for task in self._tasks:
                if task.done():
                    task.result()
            assert time.monotonic() < deadline, f"not within {timeout:g} s: {getattr(holds, '__name__', holds)}; {self.statuses()}"
            await asyncio.sleep(POLL_S)

    async def until_idle(self, *, timeout: float = 15.0) -> None:
        """Let the workers work until no run is active and none becomes due within `SOON_S`."""
        store = self.app.store_async()
        deadline = time.monotonic() + timeout
        while not await self._is_idle(store):
            assert time.monotonic() < deadline, f"not idle within {timeout:g} s: {self.statuses()}"
            for task in self._tasks:
                if task.done():
                    task.result()
            await asyncio.sleep(POLL_S)

    async def _is_idle(self, store: Any) -> bool:
        owners = {"$in": [worker._owner for worker in self.workers]}
        soon = {"lane": {"$in": self._lanes}, "paused": {"$ne": True}, "wakeAt": {"$lte": store.now() + timedelta(seconds=SOON_S)}}
        live = Find(name="live", collection="runs", filter={"$or": [{"lease.owner": owners}, soon]}, limit=1)
        try:
            if await store.run(live):
                return False
        except StoreUnavailableError:
            return False
        return all(not status.in_flight and status.state != "starting" for status in self.statuses())

    def statuses(self) -> list[WorkerStatus]:
        """The status of each worker."""
        return [worker.status() for worker in self.workers]


def run_until_idle(app: Streamline, *, workers: int = 1, timeout: float = 15.0, recover_every_s: float | None = None) -> list[WorkerStatus]:
    """Work in this thread until no run is due in `app`'s database. Yields the final status of each worker."""

    async def work() -> list[WorkerStatus]:
        async with Pool(app, workers=workers, recover_every_s=recover_every_s) as pool:
            await pool.until_idle(timeout=timeout)
        return pool.statuses()

    return asyncio.run(work())


def check_invariants(documents: Sequence[Mapping[str, Any]]) -> None:
    """The invariants of stored runs, as far as single documents show them."""
    for document in documents:
        run_id, status = document["_id"], document["status"]
        if status in ("done", "failed", "cancelled"):
            assert document["endedAt"] is not None, f"{run_id}: {status} without endedAt"
            assert "lease" not in document, f"{run_id}: {status}, and leased"
            assert not {"wakeAt", "pausedWakeAt", "awaits"} & set(document), f"{run_id}: {status}, and claimable or awaiting: {document}"
            if status == "failed":
                assert document["error"]["code"], f"{run_id}: failed without a reason"
                assert document["error"]["message"], f"{run_id}: failed without a reason"
            continue
        where = f"{run_id}: wedged or doubly scheduled: {document}"
        none: dict[str, Any] = {"status": "none"}
        step = next((step for step in document["steps"] if step["stepId"] == document["currentStepId"]), none)
        waits_for = step["waitingFor"]["type"] if step["status"] == "waiting" else None
        # A step that waits without a deadline goes on when it is answered. Every other run has a lease or a `wakeAt`.
        on_its_own = waits_for in ("human", "webhook", "event") and step["waitingFor"].get("expiresAt") is None
        if document.get("paused"):
            assert "wakeAt" not in document, f"{run_id}: paused, and claimable: {document}"
            scheduled = ("lease" in document) + ("pausedWakeAt" in document)
        else:
            assert "pausedWakeAt" not in document, where
            scheduled = ("lease" in document) + ("wakeAt" in document)
        assert scheduled == 1 or (scheduled == 0 and on_its_own), where
        awaited = step["waitingFor"]["eventName"] if waits_for == "event" else None
        assert document.get("awaits") == awaited, f"{run_id}: awaits {document.get('awaits')!r}: {document}"
