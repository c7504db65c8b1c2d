"""Duty: keep the record of this pool in the database, for `streamline-pool workers` and `runs show`.

Owns what the record says, when a change is worth a write, and the newest facts of the supervisor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from streamline_pool.config.package_version import package_version
from streamline_pool.protocol import hosts
from streamline_pool.supervisor.ipc.messages import PoolFacts
from streamline_pool.supervisor.steward.duty import READ_TIMEOUT_S, DutyTools, StewardBoot
from streamline_pool.supervisor.steward.health import Report

__all__ = ["HostRecord", "host_record", "visible_state"]

HOST_INTERVAL_S = 30.0
HOST_TTL_S = 90.0  # three intervals: two writes may fail before a live host's record expires
HOST_CHANGE_PAUSE_S = 5.0  # a changed pool is stored at most this often
FACTS_FRESH_S = 5.0  # the supervisor sends facts each second; older ones mean that it is stopped or gone


class HostRecord:
    """The supervisor's newest facts, stored on a change and every half minute."""

    def __init__(self, tools: DutyTools) -> None:
        self._tools = tools
        self._facts: PoolFacts | None = None
        self._facts_at = tools.env.clock.monotonic()
        self._changed = asyncio.Event()

    def on_facts(self, facts: PoolFacts) -> None:
        """The supervisor reports."""
        if self._facts is None or visible_state(facts) != visible_state(self._facts):
            self._changed.set()
        self._facts, self._facts_at = facts, self._tools.env.clock.monotonic()

    def report(self) -> Report:
        """What the health port says. The supervisor is taken for alive as long after the start as after each of its reports."""
        fresh = self._tools.env.clock.monotonic() - self._facts_at < FACTS_FRESH_S
        return Report(alive=fresh, facts=self._facts if fresh else None)

    async def run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(HOST_INTERVAL_S):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            await self._tools.attempt(self._store)
            await asyncio.sleep(HOST_CHANGE_PAUSE_S)

    async def _store(self) -> None:
        if self._facts is not None:
            record = host_record(self._tools.boot, self._tools.settings.app, self._tools.lanes, self._facts)
            await self._tools.run(hosts.put_host(record, HOST_TTL_S), READ_TIMEOUT_S)

    async def remove(self) -> None:
        """At the end of the pool. A record that cannot be removed expires after `HOST_TTL_S`."""
        await self._tools.store.run(hosts.remove_host(self._tools.boot.host_id))


def host_record(boot: StewardBoot, app: str | None, lanes: Sequence[str], facts: PoolFacts) -> dict[str, Any]:
    """The document that describes this pool. `app` is its application, as `module:attribute`; None: not known."""
    return {
        "_id": boot.host_id,
        "host": boot.host,
        "pid": boot.pid,
        "app": app,
        "version": package_version(),
        "state": _pool_state(facts),
        "lanes": list(lanes),
        "circuit": facts.circuit,
        "target": facts.target,
        "restarts": facts.restarts,
        "recycled": facts.recycled,
        "runs_total": facts.runs_total,
        "steps_total": facts.steps_total,
        "workers": [asdict(worker) for worker in facts.workers],
    }


def visible_state(facts: PoolFacts) -> object:
    """The part of the facts whose change is stored soon; changed figures wait for the next regular write."""
    workers = [(worker.pid, worker.state, worker.rss_bytes is None) for worker in facts.workers]  # the first measurement is worth a write
    return _pool_state(facts), facts.target, facts.circuit, workers


def _pool_state(facts: PoolFacts) -> str:
    if facts.draining:
        return "draining"
    if facts.held:
        return "holding"
    return "ready" if facts.ready else "starting"
