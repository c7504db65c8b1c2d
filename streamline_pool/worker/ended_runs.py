"""Publishes which runs have ended. Owns the run ids until their signal is sent; `Worker` decides which runs have ended."""

from __future__ import annotations

import asyncio

from streamline_pool.domain.errors import WorkflowError
from streamline_pool.protocol import signals
from streamline_pool.storage.store import AsyncStore

__all__ = ["EndedRuns"]


class EndedRuns:
    """Wakes up the callers that wait for runs to end. Runs that end during one signal share the next one."""

    def __init__(self) -> None:
        self._unpublished: list[str] = []
        self._publishing: asyncio.Task[None] | None = None

    def publish_soon(self, run_id: str, store: AsyncStore) -> None:
        """This run has ended. Called in the event loop."""
        self._unpublished.append(run_id)
        if self._publishing is None:
            self._publishing = asyncio.get_running_loop().create_task(self.publish(store))

    async def publish(self, store: AsyncStore) -> None:
        """Send what is not published yet. It never raises: a signal is a hint, and callers that wait also poll."""
        try:
            while self._unpublished:
                run_ids, self._unpublished = self._unpublished, []
                await store.run(signals.send_signal("ended", store.now(), runs=run_ids))
        except WorkflowError:
            return
        finally:
            self._publishing = None
