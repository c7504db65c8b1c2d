"""The interfaces between the engine and its neighbours. Owns what each side may ask of the other; implements nothing."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Protocol, TypeVar

from streamline_pool.config.env import Env
from streamline_pool.domain.change import ChangeEvent
from streamline_pool.domain.document import RunDocument
from streamline_pool.protocol.operations import Statement
from streamline_pool.storage.outputs import Wanted
from streamline_pool.storage.procedures import Procedure

from .attempt import Outcome
from .loop_blocking import LoopBlocking
from .write_outcome import WriteOutcome

__all__ = ["CallsPort", "EnginePort", "Observer"]

T = TypeVar("T")


class Observer(Protocol):
    """What the engine reports to its owner, in the loop's thread: worker.py, or inline_runner.py for `execute`."""

    def on_parked(self, lane: str, wake_at: datetime, run_id: str) -> None:
        """A run was released, to be claimed again from that time on."""

    def on_finished(self, run_id: str, status: str) -> None:
        """This process holds the run no more. Its stored status as far as known here; "lost" if another process took it."""

    def store_answered(self, ok: bool) -> None:
        """A command to the database succeeded or failed."""

    def on_stuck(self, what: str) -> None:
        """A handler goes on after its attempt is over and cannot be stopped, or no thread could be started for it."""


class CallsPort(Protocol):
    """What an active run asks of the calls of its durable function."""

    def abort(self, reason: str, grace_s: float) -> None:
        """Stop what the calls are doing; see `Attempt.abort`."""

    def close(self, outcome: Outcome) -> Outcome:
        """The function has ended with this outcome. As an outcome: it is wrong to return before all calls have ended."""

    async def settled(self) -> None:
        """After `close`: return once its calls have ended, too, and what they did is stored."""


class EnginePort(Protocol):
    """What an active run needs of its engine."""

    env: Env
    loop: asyncio.AbstractEventLoop
    blocking: LoopBlocking

    def drive_blocking(self, procedure: Procedure[T], run_id: str) -> T:
        """Run a procedure for a handler of this run, while the calling thread waits. Raises as `blocking.admit` does, too."""

    async def write(self, statement: Statement) -> WriteOutcome:
        """Send a fenced write with the group; its outcome."""

    async def read_output(self, wanted: Wanted) -> bytes:
        """The content of an output, read together with others. Raises DataCorruptionError."""

    def now(self) -> datetime:
        """The server's time, as known here."""

    def renew_soon(self) -> None:
        """Check the leases now instead of at the next tick."""

    def publish(self, document: RunDocument, events: tuple[ChangeEvent, ...]) -> None:
        """Publish events of a run."""
