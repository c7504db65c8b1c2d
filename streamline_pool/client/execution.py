"""Executing one run in the calling program, to its next stop.

Owns what a caller of `Workflow.execute` gets back. Claiming and driving the run is in inline_runner.py.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from streamline_pool.config.env import Env
from streamline_pool.domain.errors import WorkflowNotFoundError
from streamline_pool.domain.model import Run

from .connections import Connections
from .run_control import getting_run

__all__ = ["execute_run"]

# Guesses. A program's reading of the server's clock is wrong by half a round trip at most, so a run that this program has just
# started may be due by the reading and not by the server.
_AHEAD = timedelta(seconds=0.1)
_TRY_AGAIN_S = 0.02
_TRIES_MAX = 100


async def execute_run(connections: Connections, env: Env, workflow_id: str, version: str, run_id: str) -> Run:
    """Claim a run and drive it in the running event loop; see `Workflow.execute`."""
    store = connections.store_async()
    await store.ensure()
    runner = connections.runner()
    with runner.caller():
        tries_left = _TRIES_MAX
        while True:
            run = await connections.drive_async(getting_run(workflow_id, run_id))
            if run is None:
                raise WorkflowNotFoundError(f"workflow {workflow_id}: no run {run_id!r}", run_id=run_id)
            if run.version != version:
                return run
            if await runner.execute(run_id):
                return await connections.drive_async(getting_run(workflow_id, run_id)) or run
            if not tries_left or not _seems_due(run, store.now()):
                return run
            await env.async_sleep(_TRY_AGAIN_S)
            tries_left -= 1


def _seems_due(run: Run, now: datetime) -> bool:
    """Whether the run can be claimed, were it not for the clock: the server's differs a little from the reading `now`."""
    wake_at = run.document.get("wakeAt")
    return not run.is_terminal and not run.paused and isinstance(wake_at, datetime) and wake_at <= now + _AHEAD
