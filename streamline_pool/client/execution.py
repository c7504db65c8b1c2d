"""Executing one run in the calling program, to its next stop.

Owns what a caller of `Workflow.execute` gets back. Claiming and driving the run is in inline_runner.py.
"""

from __future__ import annotations

from streamline_pool.domain.errors import WorkflowNotFoundError
from streamline_pool.domain.model import Run

from .connections import Connections
from .run_control import getting_run

__all__ = ["execute_run"]


async def execute_run(connections: Connections, workflow_id: str, version: str, run_id: str) -> Run:
    """Claim a run and drive it in the running event loop; see `Workflow.execute`."""
    await connections.store_async().ensure()
    runner = connections.runner()
    with runner.caller():
        run = await connections.drive_async(getting_run(workflow_id, run_id))
        if run is None:
            raise WorkflowNotFoundError(f"workflow {workflow_id}: no run {run_id!r}", run_id=run_id)
        if run.version != version or not await runner.execute(run_id):
            return run
        return await connections.drive_async(getting_run(workflow_id, run_id)) or run
