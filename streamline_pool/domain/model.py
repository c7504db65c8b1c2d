"""The nouns: statuses, the transition tables, `Run` and `StepState` as users see them, retry policy.

Owns what a state is and which may follow which, as data: the checks in change.py and the filters in protocol/ are
derived from the tables here. Does no I/O and knows nothing of MongoDB.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from .errors import StepNotFoundError, ValidationError

__all__ = [
    "ENDED_STEPS", "NON_TERMINAL", "REWINDABLE", "RUN_MOVES", "STEP_MOVES", "TERMINAL",
    "RetryPolicy", "Run", "RunStatus", "StepState", "StepStatus",
    "is_timeout", "seconds", "timeout_output",
]  # fmt: skip


class RunStatus(StrEnum):
    """Where a run stands. One sentence each: who moves it in, who moves it out."""

    DRAFT = "draft"  # in: `start(start_at=)`; out: the claim, once its time has come
    RUNNING = "running"  # in: `start`, a claim, an answer, `rewind_to`; out: the holder's commit, or a control operation
    WAITING = "waiting"  # in: a sleep, a wait, a retry's back-off; out: the claim once due, or an answer
    DONE = "done"  # in: the commit of the last step, or of the end of its wait; out: `rewind_to` only
    FAILED = "failed"  # in: a step out of retries, a convicted crash; out: `rewind_to` only
    CANCELLED = "cancelled"  # in: `cancel`; final


class StepStatus(StrEnum):
    """Where a step stands within its run."""

    PENDING = "pending"  # not entered yet, or between two attempts (then with `retryAfter`)
    RUNNING = "running"  # granted: the handler may be entered by the holder of the lease
    WAITING = "waiting"  # the handler ended in sleep or wait; it is never entered again
    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"


RUN_MOVES: Mapping[RunStatus, frozenset[RunStatus]] = MappingProxyType(
    {
        RunStatus.DRAFT: frozenset({RunStatus.RUNNING, RunStatus.FAILED, RunStatus.CANCELLED}),
        RunStatus.RUNNING: frozenset({RunStatus.RUNNING, RunStatus.WAITING, RunStatus.DONE, RunStatus.FAILED, RunStatus.CANCELLED}),
        RunStatus.WAITING: frozenset({RunStatus.WAITING, RunStatus.RUNNING, RunStatus.DONE, RunStatus.FAILED, RunStatus.CANCELLED}),
        RunStatus.DONE: frozenset(),
        RunStatus.FAILED: frozenset(),
        RunStatus.CANCELLED: frozenset(),
    }
)
"""Which status of a run may follow which, rewind apart. `change.make_change` checks every write of a lease holder against
it; the sets of statuses below, and through them the filters of protocol/, are derived from it."""

STEP_MOVES: Mapping[StepStatus, frozenset[StepStatus]] = MappingProxyType(
    {
        StepStatus.PENDING: frozenset({StepStatus.RUNNING, StepStatus.SKIPPED, StepStatus.FAILED}),
        StepStatus.RUNNING: frozenset(StepStatus),
        StepStatus.WAITING: frozenset({StepStatus.DONE, StepStatus.FAILED, StepStatus.PENDING}),
        StepStatus.DONE: frozenset(),
        StepStatus.FAILED: frozenset(),
        StepStatus.SKIPPED: frozenset(),
    }
)
"""Which status of a step may follow which, rewind apart. A running step may stay running (its condition was
evaluated), become pending (a retry, a release), wait, or end. A wait whose answer cannot be stored is a failed attempt."""

TERMINAL: frozenset[RunStatus] = frozenset(status for status, following in RUN_MOVES.items() if not following)
"""Statuses in which no worker touches a run any more; every run in one of them has `endedAt`."""

NON_TERMINAL: frozenset[RunStatus] = frozenset(RunStatus) - TERMINAL

REWINDABLE: frozenset[RunStatus] = frozenset(RunStatus) - {RunStatus.CANCELLED}
"""Statuses from which `rewind_to` brings a run back to `running`, and its later steps back to `pending`."""

ENDED_STEPS: frozenset[StepStatus] = frozenset(status for status, following in STEP_MOVES.items() if not following)
"""Statuses that a step leaves by a rewind only."""


_SECONDS_MAX = sys.float_info.max  # an int may be greater


def seconds(value: float | timedelta, where: str, *, zero_ok: bool = False) -> float:
    """A duration in seconds from a number or a `timedelta`; anything else, or a negative one, is a ValidationError."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ValidationError(f"{where}: a duration is a number of seconds or a timedelta, not {value!r}", where=where)
    if value < 0 or (value == 0 and not zero_ok) or value > _SECONDS_MAX:
        raise ValidationError(
            f"{where}: a duration must be finite and {'at least 0' if zero_ok else 'above 0'}, not {value!r}", where=where
        )
    return float(value)


_TIMEOUT_KEY = "$timeout"  # no handler returns such a key by accident; MongoDB stores it like any other


def timeout_output(waiting_for: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    """The output of a step whose wait was not answered in time: what it waited for, and when the wait ended."""
    return {_TIMEOUT_KEY: {"type": waiting_for["type"], "reason": waiting_for.get("reason"), "at": now}}


def is_timeout(output: Any) -> bool:
    """True for the output of a step whose `ctx.wait` or `ctx.wait_for` was not answered within its `timeout`."""
    return isinstance(output, Mapping) and len(output) == 1 and isinstance(output.get(_TIMEOUT_KEY), Mapping)


_BACKOFF_CAP_S = 60.0  # the contract's ceiling, before jitter
_JITTER = 0.3  # the contract's ±30 %


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often a step is attempted and how long is waited in between."""

    attempts_max: int = 3  # attempts including the first, 1..20; lost workers and drains are not counted
    delay_s: float = 1.0  # base of the back-off
    backoff: str | float = "exponential"  # "exponential" | "linear" | "fixed" | a multiplier

    def delay_after(self, attempt: int, chance: float) -> float:
        """Seconds to wait after failed attempt number `attempt` (1-based); `chance` is uniform in [0, 1)."""
        if self.backoff == "fixed":
            factor = 1.0
        elif self.backoff == "linear":
            factor = float(attempt)
        else:
            base = 2.0 if self.backoff == "exponential" else float(self.backoff)
            try:
                factor = base ** (attempt - 1)
            except OverflowError:
                factor = 1e308  # any number far above the cap
        return min(self.delay_s * factor, _BACKOFF_CAP_S) * (1 + _JITTER * (2 * chance - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepState:
    """One step of a run, as stored when the run was read."""

    step_id: str
    status: StepStatus
    attempts: int  # entries into the handler, those of lost workers included
    output: Any  # None until done
    error: Mapping[str, Any] | None  # {code, message, type} of the last failed attempt
    waiting_for: Mapping[str, Any] | None  # {type, reason, resumeAt, …} while waiting
    retry_after: datetime | None  # aware UTC; the earliest next attempt while backing off
    started_at: datetime | None  # aware UTC; entry of the latest attempt
    ended_at: datetime | None  # aware UTC
    duration: float | None  # seconds from `started_at` to `ended_at`
    kind: str | None = None  # "main", or of its calls "step", "sleep", "wait", "event", "patch"; None of a declared step


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run as stored at the moment it was read. Immutable; read again to see progress."""

    id: str
    workflow_id: str
    version: str
    status: RunStatus
    steps: tuple[StepState, ...]
    current_step_id: str | None  # None once every step has ended
    input: Any
    context: Mapping[str, Any]
    output: Any  # the last step's output once done
    error: Mapping[str, Any] | None  # {code, message, type, stepId, traceback} once failed
    meta: Mapping[str, Any] | None
    user_id: str | None
    tags: tuple[str, ...]
    priority: int
    queue: str
    paused: bool
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    document: Mapping[str, Any]  # the stored document; `to_dict()` gives a copy
    generation: int = 0  # how often a durable function has continued as new

    @property
    def is_terminal(self) -> bool:
        """True once no worker will touch the run any more."""
        return self.status in TERMINAL

    def step(self, step_id: str) -> StepState:
        """The state of one step; StepNotFoundError names the steps there are."""
        for step in self.steps:
            if step.step_id == step_id:
                return step
        known = ", ".join(step.step_id for step in self.steps)
        raise StepNotFoundError(f"run {self.id}: no step {step_id!r}; its steps are {known}", run_id=self.id, step_id=step_id)

    def to_dict(self) -> dict[str, Any]:
        """The stored document, as a new dict (nested values are shared, do not change them)."""
        return dict(self.document)
