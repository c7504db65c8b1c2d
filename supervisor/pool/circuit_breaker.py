"""The circuit breaker of one host: whether its workers may claim. Pure; decide.py feeds it and acts on what changes.

closed     claims flow. Opens after `FAILURES_TO_OPEN` failed operations in a row, or one failed probe of the steward.
open       nothing is claimed. A successful probe half-opens it; an outage of any length ends that way.
half-open  one worker claims one batch. Its success closes the breaker, its failure opens it again. A worker that finds
           nothing to do proves nothing, so a further successful probe after `TRIAL_S` closes it too: it never sticks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import assert_never

from streamline_pool.supervisor.ipc.messages import CircuitState

__all__ = ["FAILURES_TO_OPEN", "TRIAL_S", "Breaker", "Tally", "after_probe", "after_tally", "trial_lost"]

FAILURES_TO_OPEN = 5  # as promised by the design; fewer would open on one fail-over's handful of retried operations
TRIAL_S = 1.5  # derived: longer than a beat interval, so that the trial's own result normally comes first


@dataclass(frozen=True, slots=True, kw_only=True)
class Breaker:
    state: CircuitState = "closed"
    failures: int = 0  # failed operations in a row, over all workers of the host; meaningful while closed
    since: float = 0.0  # monotonic instant of the last change of `state`


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What one worker's operations came to between two of its beats."""

    ok: int
    failed: int
    trailing: int  # failures after the last success


def after_tally(breaker: Breaker, tally: Tally, now: float, *, trial: bool = False) -> Breaker:
    """`trial`: these operations are those of the half-open worker, begun after it was let through."""
    match breaker.state:
        case "closed":
            failures = min(tally.trailing, tally.failed) if tally.ok else breaker.failures + tally.failed
            opens = failures >= FAILURES_TO_OPEN
            return Breaker(state="open", since=now) if opens else replace(breaker, failures=failures)
        case "open":
            return breaker  # only a probe, sent after the failure, is news; a tally may be older than it
        case "half-open":
            if not trial or tally.ok + tally.failed == 0:
                return breaker
            return Breaker(state="open" if tally.trailing else "closed", since=now)
        case _:
            assert_never(breaker.state)


def after_probe(breaker: Breaker, ok: bool, now: float) -> Breaker:
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
    """The half-open worker is gone: open again; the next probe will choose another."""
    return Breaker(state="open", since=now) if breaker.state == "half-open" else breaker
