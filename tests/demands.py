"""Demands in the states that their tests begin with."""

from __future__ import annotations

from collections.abc import Collection

from streamline_pool.worker.demand import Claim, ClaimDue, Demand

MAX_CRASHES = 3
SUSPECT = MAX_CRASHES - 1  # crashes of a run that the next lost worker convicts


def new_demand(concurrency: int = 16) -> Demand:
    return Demand(concurrency=concurrency, max_crashes=MAX_CRASHES)


def idle_demand(concurrency: int = 16) -> Demand:
    """Of a worker without active runs, whose first poll has found nothing."""
    demand = new_demand(concurrency)
    demand.start()
    claim = demand.next_claim(0)
    assert claim == ClaimDue(limit=min(concurrency, 200), crashes_below=None, from_start=False)
    demand.polled(more=False, tried=0, won=0)
    demand.claim_ended(claim, ())
    assert demand.next_claim(0) is None
    demand.claims_succeeded()
    assert demand.is_idle(0)
    return demand


def perform(demand: Demand, claim: Claim | None, active_runs: Collection[str] = (), *, more: bool = False) -> None:
    assert claim is not None
    if isinstance(claim, ClaimDue):
        demand.polled(more=more, tried=0, won=0)
    demand.claim_ended(claim, active_runs)


def names(count: int) -> list[str]:
    return [f"r{number}" for number in range(count)]
