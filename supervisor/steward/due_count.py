"""Duty: for `--burst`, answer the supervisor's question whether any run is claimable at this moment."""

from __future__ import annotations

import asyncio
import functools

from streamline_pool.protocol import claims
from streamline_pool.supervisor.ipc.messages import DueCount
from streamline_pool.supervisor.steward.duty import READ_TIMEOUT_S, DutyTools
from streamline_pool.supervisor.steward.sweep import SWEEP_LIMIT

__all__ = ["DueCounter"]


class DueCounter:
    """Counts due runs, up to `SWEEP_LIMIT`. Each count is tried until it succeeds: the supervisor waits for the answer."""

    def __init__(self, tools: DutyTools) -> None:
        self._tools = tools
        self._checks: asyncio.Queue[int] = asyncio.Queue()  # the supervisor asks one question at a time

    def on_check(self, seq: int) -> None:
        """The supervisor asks; the answer carries the same number."""
        self._checks.put_nowait(seq)

    async def run(self) -> None:
        while True:
            seq = await self._checks.get()
            find = claims.find_due_before(self._tools.lanes, self._tools.store.now(), SWEEP_LIMIT)
            found = await self._tools.insist(functools.partial(self._tools.run, find, READ_TIMEOUT_S))
            self._tools.send(DueCount(seq=seq, due=len(found)))
