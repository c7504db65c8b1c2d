"""The circuit breaker of one host: whether its workers may claim. Pure; gates.py feeds it and applies its changes.

closed     claims flow. Opens after `FAILURES_TO_OPEN` failed operations in a row, or one failed probe of the steward.
open       no worker claims. A successful probe half-opens it; an outage of any length ends that way.
half-open  one worker claims one batch. Its success closes the breaker, its failure opens it again. A worker that finds
           nothing to do proves nothing, so a further successful probe after `TRIAL_S` closes it too: it never sticks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import assert_never

from streamline_pool.supervisor.ipc.messages import CircuitState

__all__ = ["FAILURES_TO_OPEN", "TRIAL_S", "Breaker", "Tally", "after_probe", "after_tally", "trial_lost"]

FAILURES_TO_OPEN = 5  # fewer would open on one fail-over's handful of retried operations
TRIAL_S = 1.5  # derived: longer than a heartbeat interval, so that the trial's own result normally comes first


@dataclass(frozen=True, slots=True, kw_only=True)
class Breaker:
    """The breaker's state; every change makes a new record."""

    state: CircuitState = "closed"
    failures: int = 0  # failed operations in a row, over all workers of the host; meaningful while closed
    since: float = 0.0  # monotonic instant of the last change of `state`


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """The results of one worker's operations between two of its heartbeats."""

    ok: int
    failed: int
    trailing: int  # failures after the last success


def after_tally(breaker: Breaker, tally: Tally, now: float, *, trial: bool = False) -> Breaker:
    """A worker reported operations. `trial`: it is the half-open worker, and they began after its gate opened."""
    match breaker.state:
        case "closed":
            failures = min(tally.trailing, tally.failed) if tally.ok else breaker.failures + tally.failed
            opens = failures >= FAILURES_TO_OPEN
            return Breaker(state="open", since=now) if opens else replace(breaker, failures=failures)
        case "open":
            return breaker  # only a probe, which was sent after the failure, counts; a tally may be older than the failure
        case "half-open":
            if not trial or tally.ok + tally.failed == 0:
                return breaker
            return Breaker(state="open" if tally.trailing else "closed", since=now)
        case _:
            assert_never(breaker.state)


def after_probe(breaker: Breaker, ok: bool, now: float) -> Breaker:
    """The steward's probe succeeded or failed."""
    match breaker.state, ok:
        case "closed", True:
            return replace(breaker, failures=0)
        case "open", True:
            return Breaker(state="half-open", since=now)
        case "half-open", True:
            return Breaker(state="closed", since=now) if now - breaker.since >= TRIAL_S else breaker
        case "open", False:
            return breaker
        case _:
            return Breaker(state="open", since=now)


def trial_lost(breaker: Breaker, now: float) -> Breaker:
    """The half-open worker has died: open again; the next successful probe chooses another."""
    return Breaker(state="open", since=now) if breaker.state == "half-open" else breaker
