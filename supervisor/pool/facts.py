"""The pool in figures, for the host record and the health port. Pure."""

from __future__ import annotations

from streamline_pool.supervisor.ipc.messages import PoolFacts, WorkerFacts
from streamline_pool.supervisor.pool.state import Member, State

__all__ = ["pool_facts"]


def pool_facts(state: State, now: float) -> PoolFacts:
    """What the supervisor reports each second."""
    workers = tuple(_worker_facts(m, now) for m in state.workers)
    return PoolFacts(
        ready=state.ready and state.shutdown is None,
        draining=state.shutdown is not None,
        held=state.held,
        target=state.target,
        restarts=state.restarts,
        recycled=state.recycled,
        runs_total=state.past_runs + sum(w.runs_total for w in workers),
        steps_total=state.past_steps + sum(w.steps_total for w in workers),
        circuit=state.breaker.state,
        workers=workers,
    )


def _worker_facts(member: Member, now: float) -> WorkerFacts:
    beat = member.beat
    return WorkerFacts(
        pid=member.pid,
        owner=member.owner,
        index=member.index,
        state=beat.state if beat is not None and member.phase == "ready" else member.phase,
        in_flight=beat.in_flight if beat is not None else 0,
        runs_total=beat.runs_total if beat is not None else 0,
        steps_total=beat.steps_total if beat is not None else 0,
        rss_bytes=member.rss_bytes,
        uptime_s=round(now - member.started_at, 1),
        lru=beat.lru if beat is not None else {},
    )
