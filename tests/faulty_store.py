"""Stores in which chosen operations fail, for the tests in simulation/. Owns the kinds of failure and their timing.

A failure is "lost" (the server never receives the operation), "unknown" (the operation is applied, its reply is lost) or
"late" (the caller gets an error, and a copy of the write is applied afterwards).
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

from streamline_pool import Streamline
from streamline_pool.config.env import Env, system_env
from streamline_pool.domain.errors import StoreUnavailableError
from streamline_pool.protocol.operations import Command, Op
from streamline_pool.storage.store import AsyncStore, Store

__all__ = ["CLAIMS", "OUTAGE", "EntryLog", "Faults", "FaultyAsyncStore", "FaultyStore", "hasty_env", "install_faults"]

LATE_S = 0.03  # the delay of a late copy: longer than a reply takes, shorter than AGAIN_S in test_faults_waits.py
OUTAGE = 6  # operations that fail in a row when a fault lasts
HASTE = 10  # back-offs are this many times shorter than in production
CLAIMS = frozenset({"claim_run", "claim_runs"})
STEWARD = frozenset({"find_due_before", "recover_expired", "live"})  # operations of the test's own steward; they are not counted


class Faults:
    """Which operations fail: `count` of them, beginning with number `first`. `hit` names those that did."""

    def __init__(self, kind: str, first: int, count: int = 1) -> None:
        self.kind = kind
        self.first = first
        self.count = count
        self.seen = 0
        self.hit: list[str] = []

    def strikes(self, op: Op) -> bool:
        """Count the operation. True if it must fail."""
        if op.name in STEWARD:
            return False
        self.seen += 1
        if not self.first <= self.seen < self.first + self.count:
            return False
        self.hit.append(op.name)
        return True

    @staticmethod
    def error(op: Op) -> StoreUnavailableError:
        return StoreUnavailableError(f"{op.name}: a fault of this test", transient=True)


NO_FAULTS = Faults("none", 0, 0)


class FaultyAsyncStore(AsyncStore):
    """The asyncio store of a worker, under `faults`."""

    faults: Faults = NO_FAULTS
    late: tuple[asyncio.Task[None], ...] = ()

    async def run(self, op: Op, session: Any = None) -> Any:
        if not self.faults.strikes(op):
            return await super().run(op, session)
        if self.faults.kind == "unknown":
            await super().run(op, session)
        elif self.faults.kind == "late" and isinstance(op, Command):
            self.late = (*self.late, asyncio.get_running_loop().create_task(self._run_late(op, session)))
        raise self.faults.error(op)

    async def _run_late(self, op: Op, session: Any) -> None:
        await asyncio.sleep(LATE_S)
        await super().run(op, session)

    async def late_applied(self) -> None:
        """Wait until every late copy is applied or refused."""
        await asyncio.gather(*self.late, return_exceptions=True)


class FaultyStore(Store):
    """The blocking store of handlers on threads and of clients, under `faults`."""

    faults: Faults = NO_FAULTS
    late: tuple[threading.Timer, ...] = ()

    def run(self, op: Op, session: Any = None) -> Any:
        if not self.faults.strikes(op):
            return super().run(op, session)
        if self.faults.kind == "unknown":
            super().run(op, session)
        elif self.faults.kind == "late" and isinstance(op, Command):
            copy = threading.Timer(LATE_S, super().run, (op, session))
            self.late = (*self.late, copy)
            copy.start()
        raise self.faults.error(op)

    def late_applied(self) -> None:
        """Stop the faults, and wait until every late copy is applied or refused."""
        self.faults = NO_FAULTS
        for copy in self.late:
            copy.join()
        self.late = ()


class EntryLog:
    """The entries into a run's handlers. `too_late` describes those whose step already had a durable result."""

    def __init__(self, app: Streamline) -> None:
        self.entries: list[tuple[str, int]] = []  # (step id, attempt)
        self.too_late: list[str] = []
        self._app = app

    def enter(self, ctx: Any) -> None:
        """Called first in each handler: compare the entry with the database, and record it."""
        stored = self._app.runs.find_one({"_id": ctx.run_id})
        assert stored is not None
        step = next(step for step in stored["steps"] if step["stepId"] == ctx.step_id)
        if step["status"] in ("done", "waiting"):
            self.too_late.append(f"{ctx.step_id} was entered, and is {step}")
        self.entries.append((ctx.step_id, ctx.attempt))

    def times(self, step_id: str) -> int:
        """How many times the step's handler was entered."""
        return sum(step == step_id for step, _ in self.entries)


def hasty_env() -> Env:
    """The system's environment with back-offs that are `HASTE` times shorter."""
    system = system_env()
    return replace(system, sleep=lambda s: system.sleep(s / HASTE), async_sleep=lambda s: asyncio.sleep(s / HASTE))


def install_faults(app: Streamline) -> FaultyStore:
    """Give the application a blocking store whose `faults` the test sets later."""
    return app.connections.use(FaultyStore(app.where, app.env))
