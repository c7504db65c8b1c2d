"""What a pool says of itself in the database, and when that is news. Pure; steward.py writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from streamline_pool.supervisor.ipc.messages import PoolFacts

__all__ = ["host_record", "shape"]


def host_record(host_id: str, host: str, pid: int, lanes: Sequence[str], facts: PoolFacts) -> dict[str, Any]:
    """What `streamline-pool workers` and `runs show` know of this pool."""
    return {
        "_id": host_id,
        "host": host,
        "pid": pid,
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


def _pool_state(facts: PoolFacts) -> str:
    if facts.draining:
        return "draining"
    if facts.held:
        return "holding"
    return "ready" if facts.ready else "starting"


def shape(facts: PoolFacts) -> object:
    """What of the pool's facts is worth a write when it changes; figures can wait for the next regular one."""
    return _pool_state(facts), facts.target, facts.circuit, [(worker.pid, worker.state) for worker in facts.workers]
