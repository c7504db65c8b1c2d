"""What `current_step()` gives within a call of a durable function: the attempt, a checkpoint, a log. Owns what `fn` may ask for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, NoReturn, cast

from streamline_pool.domain.done import DONE, Done
from streamline_pool.domain.errors import InvalidStateError
from streamline_pool.engine.context import Context
from streamline_pool.engine.intents import Suspension
from streamline_pool.protocol.codec import as_payload

from .call_attempt import current_context
from .recorder import Recorder

__all__ = ["StepContext", "current_step"]


def current_step() -> Context:
    """The attempt at the call in which this code runs: `fn` of `ctx.step` or `ctx.map`. Raises InvalidStateError anywhere else."""
    context = current_context.get()
    if context is None:
        raise InvalidStateError("current_step: this code does not run within ctx.step of a durable function")
    return context


class StepContext(Context):
    """One attempt at a call. `fn` cannot sleep or wait: the durable function can."""

    __slots__ = ("recorder",)

    recorder: Recorder

    def checkpoint(self, value: Any) -> Done:
        """Store the progress of this call; kept across attempts, dropped when the call ends.

        Durable on return; in an `async def`, when it is awaited. The call is left here when this worker no longer holds the run.
        """
        self._check_open()
        value, size = as_payload(value, "checkpoint")
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run_coroutine_threadsafe(self._saved(value, size), self.recorder.loop).result()
            return DONE
        return cast(Done, _Saving(self._saved_here(value, size)))

    async def _saved(self, value: Any, size: int) -> None:
        await self._saved_here(value, size)

    def _saved_here(self, value: Any, size: int) -> Awaitable[None]:
        return self.recorder.save_checkpoint(self._place, value, size)

    def _suspend(self, _suspension: Suspension) -> NoReturn:
        """Sleep, wait, wait_for: refused."""
        text = f"run {self.run_id}: the call {self.step_id!r} cannot sleep or wait; let the durable function do it, beside the call"
        raise InvalidStateError(text, run_id=self.run_id, step_id=self.step_id)


class _Saving(Done):
    """A checkpoint under way: `await` returns once it is durable."""

    __slots__ = ("_future",)

    def __init__(self, future: Awaitable[None]) -> None:
        self._future = future

    def __await__(self) -> Any:
        return (yield from self._future.__await__())
