"""Renews the leases of active runs, and stops their handlers before a lease can expire.

Owns renewal and self-fencing, apart from each other: self-fencing reads only the clock, so that a database that does
not answer cannot delay it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from streamline_pool.config.asyncio_tasks import end_tasks
from streamline_pool.config.env import Env
from streamline_pool.domain.errors import StoreUnavailableError
from streamline_pool.protocol import commits
from streamline_pool.storage.bulk_update import update_many
from streamline_pool.storage.store import AsyncStore

from .active_run import ActiveRun
from .ports import Observer
from .write_outcome import lease_id_of

__all__ = ["LeaseKeeper"]

log = logging.getLogger("streamline_pool")

_SAFETY = 0.9  # a lease counts as expired after this part of it, so that no handler outlives it because of a slow clock
_RENEW_AFTER = 1 / 3  # of the lease, so that two renewals may fail before another worker may claim the run
_RENEWAL_PATIENCE = 1 / 4  # of the lease; as long as a tick and two such waits fit in before self-fencing


_SELF_FENCE = "self-fence"


class LeaseKeeper:
    """Keeps the leases of one engine's active runs; the engine adds and removes them."""

    def __init__(self, store: AsyncStore, env: Env, held: Mapping[str, ActiveRun], lease_s: float, observer: Observer) -> None:
        self._store = store
        self._env = env
        self._held = held  # by run id
        self._lease_s = lease_s
        self._observer = observer
        self._admitted = asyncio.Event()  # there may be leases to keep
        self._wanted = asyncio.Event()
        self._doubted: dict[str, ActiveRun] = {}  # active runs that a control operation may have taken away
        self._doubt = asyncio.Event()
        self._tick_s = min(1.0, lease_s / 20)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin, in the running loop."""
        loop = asyncio.get_running_loop()
        duties = {"renew": self._renew_forever, _SELF_FENCE: self._fence_forever, "check": self._check_forever}
        self._tasks = [loop.create_task(self._insist(name, duty), name=name) for name, duty in duties.items()]

    async def _insist(self, name: str, duty: Callable[[], Awaitable[None]]) -> None:
        """A duty that fails, as by a clock that cannot be read, begins again. Handlers that were not fenced meanwhile stop."""
        while True:
            try:
                await duty()
            except Exception:
                log.exception("lease_duty_failed", extra={"duty": name})
                if name == _SELF_FENCE:
                    for active in list(self._held.values()):
                        active.abort("lease-lost")
                await self._env.async_sleep(self._tick_s)

    async def close(self) -> None:
        """Stop."""
        await end_tasks(self._tasks)

    def deadline(self) -> float:
        """The monotonic deadline of a lease that is requested now; taken *before* the request is sent."""
        return self._env.clock.monotonic() + self._lease_s * _SAFETY

    def run_admitted(self) -> None:
        """There is one more lease to keep."""
        self._admitted.set()

    async def _some_held(self) -> None:
        """Return when a lease is held. Until then no timer wakes this process up."""
        while not self._held:
            self._admitted.clear()
            await self._admitted.wait()

    def renew_soon(self) -> None:
        """Check the leases now instead of at the next tick."""
        self._wanted.set()

    def check(self, active: ActiveRun) -> None:
        """A control operation may have changed this run: read it now.

        One read, beside the renewals. A renewal would show it as well, but only after the one that is under way, and
        with a write before the read that shows the lease holder.
        """
        self._doubted[active.run_id] = active
        self._doubt.set()

    async def _check_forever(self) -> None:
        while True:
            await self._doubt.wait()
            self._doubt.clear()
            doubted, self._doubted = list(self._doubted.values()), {}
            try:
                await asyncio.wait_for(self._check(doubted), self._lease_s * _RENEWAL_PATIENCE)
            except (StoreUnavailableError, TimeoutError) as exc:
                self._observer.store_answered(False)
                log.warning("check_failed", extra={"runs": len(doubted), "error": str(exc) or "no answer"})
                self._renew_now(doubted)
            except Exception:
                log.exception("check_failed", extra={"runs": len(doubted)})  # a defect of ours; as above
                self._renew_now(doubted)

    async def _check(self, active_runs: list[ActiveRun]) -> None:
        found = await self._store.run(commits.read_fences([active.run_id for active in active_runs]))
        self._observer.store_answered(True)
        documents = {document["_id"]: document for document in found}
        for active in active_runs:
            document = documents.get(active.run_id, {})
            if lease_id_of(document) != active.lease_id:
                self._lost(active, document)

    def _renew_now(self, active_runs: list[ActiveRun]) -> None:
        for active in active_runs:
            active.renew_now = True
        self.renew_soon()

    def _lost(self, active: ActiveRun, document: Mapping[str, Any]) -> None:
        """This worker holds the run no more.

        Unless a handler runs, a condition is asked or outputs are loaded, our own write may have released the lease. That write finds out.
        """
        if (active.in_user_code or active.is_loading or not active.is_driven) and self._held.get(active.run_id) is active:
            active.lost = "cancelled" if document.get("status") == "cancelled" else "lease-lost"
            log.info("run_lost", extra={"run_id": active.run_id, "reason": active.lost})
            active.abort(active.lost)

    async def _fence_forever(self) -> None:
        while True:
            await self._some_held()
            await self._env.async_sleep(self._tick_s)
            too_late = self._env.clock.monotonic() + self._tick_s
            for active in list(self._held.values()):
                if active.deadline <= too_late and active.in_user_code:
                    # No other worker holds the run yet: its handler or condition stops, and it is released if that can be written.
                    log.warning("lease_running_out", extra={"run_id": active.run_id})
                    active.abort("lease-lost")

    async def _renew_forever(self) -> None:
        while True:
            await self._some_held()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), self._tick_s)
            self._wanted.clear()
            renew_before = self._env.clock.monotonic() + self._lease_s * (_SAFETY - _RENEW_AFTER)
            due = [active for active in self._held.values() if active.deadline <= renew_before or active.renew_now]
            if not due:
                continue
            try:
                # A connection that does not answer must not hold up the renewals after it.
                await asyncio.wait_for(self._renew(due), self._lease_s * _RENEWAL_PATIENCE)
            except TimeoutError:
                self._observer.store_answered(False)
                log.warning("renew_failed", extra={"runs": len(due), "error": "no answer"})
            except Exception:
                log.exception("renew_failed", extra={"runs": len(due)})  # a defect of ours; the other leases must still be renewed

    async def _renew(self, active_runs: list[ActiveRun]) -> None:
        """Extend these leases, each by run and claim. If fewer matched, some are lost, and a read shows which."""
        run_ids = [active.run_id for active in active_runs]
        deadline = self.deadline()
        for active in active_runs:
            active.renew_now = False
        try:
            renewal = commits.renew(run_ids, list({active.lease_id for active in active_runs}), self._lease_s)
            renewed, refused = await update_many(self._store.run, renewal, self._store.now)
            found = [] if renewed == len(active_runs) else await self._store.run(commits.read_fences(run_ids))
        except StoreUnavailableError as exc:
            self._observer.store_answered(False)
            log.warning("renew_failed", extra={"runs": len(active_runs), "error": str(exc)})
            return
        self._observer.store_answered(True)
        documents = {document["_id"]: document for document in found}
        for active in active_runs:
            document = documents.get(active.run_id, {})
            if active.run_id in refused:
                continue  # this worker holds it until its old deadline; the server cannot extend that
            if renewed == len(active_runs) or lease_id_of(document) == active.lease_id:
                active.deadline = max(active.deadline, deadline)
            else:
                self._lost(active, document)
