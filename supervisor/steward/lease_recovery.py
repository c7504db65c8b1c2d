"""Duty: release the leases of workers that died on this host. Leases of other hosts expire, and the sweep recovers them.

Owns the queue of deaths that the supervisor reported, and the update that makes runs claimable again.
"""

from __future__ import annotations

import asyncio
import functools
from dataclasses import asdict
from datetime import timedelta

from streamline_pool.protocol import recovery
from streamline_pool.protocol.operations import Command
from streamline_pool.storage.bulk_update import update_many
from streamline_pool.supervisor.ipc.messages import Died, Released
from streamline_pool.supervisor.steward.duty import WRITE_TIMEOUT_S, DutyTools

__all__ = ["LeaseRecovery", "recover_leases"]

RELEASE_LOOK_BACK = timedelta(seconds=60)  # a dead worker's leases that ended earlier are found by the sweep


class LeaseRecovery:
    """Releases what dead workers held. Each release is tried until it succeeds: the runs wait for nothing else."""

    def __init__(self, tools: DutyTools) -> None:
        self._tools = tools
        self._dead: asyncio.Queue[Died] = asyncio.Queue()  # bounded by the pool's restart budget

    def on_died(self, died: Died) -> None:
        """The supervisor reports a death."""
        self._dead.put_nowait(died)

    async def run(self) -> None:
        while True:
            died = await self._dead.get()
            runs = await self._tools.insist(functools.partial(recover_leases, self._tools, self._release_of(died)))
            self._tools.send(Released(owner=died.owner, runs=runs))

    def _release_of(self, died: Died) -> Command:
        evidence = {name: value for name, value in asdict(died.evidence).items() if name != "dump"}
        since = self._tools.store.now() - RELEASE_LOOK_BACK
        return recovery.release_owner(died.owner, self._tools.settings.max_crashes, evidence, since)


async def recover_leases(tools: DutyTools, op: Command) -> int:
    """Make the runs that `op` matches claimable again; how many. A run that the server refuses to update stops no other."""
    return (await update_many(lambda each: tools.run(each, WRITE_TIMEOUT_S), op, tools.store.now)).matched
