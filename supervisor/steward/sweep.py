"""Duty: every few seconds, find in the database what no signal announced.

Owns the regular sweep: runs that are due or soon will be, leases that expired, broadcasts whose sender died, and
subscribers whose signal was lost. Everything here may be done by several stewards at once, and is done again next time.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime, timedelta
from typing import Any

from streamline_pool.client.event_delivery import finishing_broadcasts
from streamline_pool.domain.backoff import jittered
from streamline_pool.domain.errors import StoreUnavailableError
from streamline_pool.protocol import claims, recovery
from streamline_pool.supervisor.steward.duty import READ_TIMEOUT_S, RETRY_MAX_S, WRITE_TIMEOUT_S, DutyTools
from streamline_pool.supervisor.steward.lease_recovery import recover_leases
from streamline_pool.supervisor.steward.stream_subscribers import StreamSubscribers
from streamline_pool.supervisor.steward.wake_ups import WakeUps

__all__ = ["SWEEP_LIMIT", "Sweep"]

log = logging.getLogger("streamline_pool")

SWEEP_LIMIT = 1_000  # due runs read per sweep; more than the pool can use before the next one
OVERDUE = timedelta(seconds=3)  # less than how far back a worker polls for due runs, see worker/poller.py
FROM_START_SHARE = 1 / 50  # of the time that searches from the start of the queue may take; a guess
FULL_SWEEP_EVERY = 10  # sweeps; the sweeps in between recover only leases that ended since the last ones
BROADCASTS_EVERY = 5  # sweeps; senders finish their broadcasts themselves, unless they die in between


class Sweep:
    """One sweep after another, with a pause of `sweep_interval_s`."""

    def __init__(self, tools: DutyTools, wake_ups: WakeUps, subscribers: StreamSubscribers) -> None:
        self._tools = tools
        self._wake_ups = wake_ups
        self._subscribers = subscribers
        self._sweeps = 0
        self._due_from_start_at = 0.0  # monotonic: from then on a search from the start of the queue is affordable
        self._searched_at: datetime | None = None  # the last search for due runs that succeeded

    async def run(self) -> None:
        while True:
            ok = await self._tools.attempt(self._sweep)
            if not ok:
                self._sweeps = 0  # leases may have ended longer ago than a partial sweep looks back: the next one is full
            chance = self._tools.env.random()
            await asyncio.sleep(self._tools.settings.sweep_interval_s * (0.9 + 0.2 * chance) if ok else jittered(RETRY_MAX_S, chance))

    async def _sweep(self) -> None:
        if self._tools.store.clock.stale:
            await self._tools.store.sync_clock()
        await self._plan_due()
        full = self._sweeps % FULL_SWEEP_EVERY == 0
        self._sweeps += 1
        await self._recover_expired(full)
        if full:
            await self._subscribers.refresh()
        if self._sweeps % BROADCASTS_EVERY == 1:
            # Last, because it may take long, and the runs of dead workers wait for the other parts.
            await self._tools.within(
                WRITE_TIMEOUT_S, "finish_broadcasts", self._tools.store.drive(finishing_broadcasts(self._tools.app.services))
            )

    async def _plan_due(self) -> None:
        """Wake up workers for runs that are due, and set timers for those that will be before the next but one sweep."""
        now = self._tools.store.now
        ahead = timedelta(seconds=2 * self._tools.settings.sweep_interval_s)
        searched_at, overdue = now(), now() - OVERDUE
        until = searched_at + ahead
        start = self._search_start(min(overdue - ahead, (self._searched_at or searched_at) - OVERDUE))
        rows = await self._find_due(until, start)
        if len(rows) == SWEEP_LIMIT:
            # A search shows one queue after another, so the runs of one may hide those of the next. Those that are due must not hide
            # those that will be, which need a timer most of all when there is a backlog, nor either of them the overdue ones.
            rows = [
                *await self._find_due(overdue, start),
                *await self._find_due(searched_at, overdue),
                *await self._find_due(until, searched_at),
            ]
        self._searched_at = searched_at
        for found in rows:
            if not isinstance(found["wakeAt"], datetime) or found["wakeAt"] <= overdue:
                self._wake_ups.wake_up(found["_id"], 1, overdue=True)  # workers may poll only behind its place
            else:
                self._wake_ups.plan(found["wakeAt"], found["_id"])
        self._wake_ups.set_timer()

    def _search_start(self, recent: datetime) -> datetime | None:
        """Where this sweep's search for due runs starts: None is the start of the queue, if that is affordable, else `recent`.

        A search from the start steps over the index entries of all runs that were claimed in the last minutes, and over
        the due runs that no worker of this pool can run (worker/poller.py says more).
        """
        return recent if self._tools.env.clock.monotonic() < self._due_from_start_at else None

    async def _find_due(self, until: datetime, since: datetime | None) -> list[dict[str, Any]]:
        find = claims.find_due_before(self._tools.lanes, until, SWEEP_LIMIT, since)
        started_at = self._tools.env.clock.monotonic()
        try:
            due: list[dict[str, Any]] = await self._tools.run(find, READ_TIMEOUT_S)
        except StoreUnavailableError as exc:
            if not exc.context.get("transient"):
                # The collection or its indexes were dropped while the pool runs: claims do not succeed, either.
                await self._tools.store.ensure_again()
            raise
        finally:
            if since is None:
                # Also after a failure: a search that takes longer than its timeout would fail in every sweep, before leases are recovered.
                ended_at = self._tools.env.clock.monotonic()
                self._due_from_start_at = ended_at + (ended_at - started_at) / FROM_START_SHARE
        return due

    async def _recover_expired(self, full: bool) -> None:
        """Make runs claimable again whose lease expired; `full`: however long ago."""
        settings = self._tools.settings
        since = None if full else self._tools.store.now() - 3 * timedelta(seconds=settings.sweep_interval_s)
        recovered = await recover_leases(self._tools, recovery.recover_expired(settings.max_crashes, since))
        if recovered:
            log.warning("leases_recovered", extra={"runs": recovered})
            self._wake_ups.wake_up(None, recovered, overdue=True)
