"""The progress of a run, for user interfaces: pure functions of a `Run`, which do no I/O and read no clock.

Owns what a user interface may show of a run: percentages, time lines, what it waits for, where it can be rewound to.
Whether a rewind is allowed is decided by client/run_control.py when it is asked for; `can_rewind_to` gives the same
answer for the run as it was read. Every record here becomes JSON by `dataclasses.asdict`, if the run's own values do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from operator import itemgetter
from typing import Any, Literal

from .definition import MAIN
from .model import ENDED_STEPS, REWINDABLE, TERMINAL, Run, RunStatus, StepState, StepStatus

__all__ = [
    "StepTimeline",
    "StepUIState",
    "WaitingInfo",
    "WorkflowProgress",
    "can_rewind_to",
    "get_execution_path",
    "get_step_timeline",
    "get_step_ui_states",
    "get_waiting_info",
    "get_workflow_progress",
]

_COMPLETED = frozenset({StepStatus.DONE, StepStatus.SKIPPED})

Shown = Literal["pending", "running", "waiting", "retrying", "paused", "done", "failed", "skipped", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowProgress:
    """How many of a run's steps have ended well."""

    completed: int  # steps that are done or skipped
    total: int  # all steps of the run
    percent: int  # 0..100, rounded down, so 100 exactly when every step is done or skipped


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimeline:
    """When a step ran, as far as it is known."""

    step_id: str
    status: StepStatus
    attempts: int  # entries into the handler; 0 for a step that was skipped or not reached
    started_at: datetime | None  # aware UTC, entry of the latest attempt; None if never entered, as for a skipped step
    ended_at: datetime | None  # aware UTC; None until done, failed or skipped
    duration: float | None  # seconds from `started_at` on, waits included; None where it is unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class StepUIState:
    """A step as a user interface draws it. Exactly one of `is_past`, `is_current`, `is_future` holds."""

    step: StepState
    shown: Shown  # `step.status`, unless the run makes it mean something else; see `get_step_ui_states`
    is_current: bool  # the run is at it; in a failed or cancelled run: it ended at it
    is_past: bool
    is_future: bool
    can_rewind_to: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingInfo:
    """What a run waits for, and until when."""

    step_id: str
    type: str  # "human" | "webhook" | "timer" | "event", or "retry" (back-off) or "start" (`start_at`), which are not stored as waits
    reason: str | None  # as the handler gave it; of a retry: the message of the failure before it
    event_name: str | None  # of an event wait
    data: Any  # what the handler attached to the wait; None if nothing
    resume_at: datetime | None  # aware UTC, when it goes on by itself; None if only an answer or event ends it. Past: it is due
    expires_at: datetime | None  # aware UTC, when a wait without an answer ends and the run goes on; None for never
    paused: bool  # it does not go on before a `resume`, also when the times above have passed


def get_workflow_progress(run: Run) -> WorkflowProgress:
    """How many steps have ended well. A skipped step counts; a failed one does not, so a failed run stays below 100 %.

    A paused run can be at 100 % without being done: its last result is stored, and the run ends after the resume.
    """
    completed = sum(step.status in _COMPLETED for step in run.steps)
    total = len(run.steps)
    return WorkflowProgress(completed=completed, total=total, percent=100 * completed // total if total else 0)


def get_step_timeline(run: Run, *, now: datetime | None = None) -> tuple[StepTimeline, ...]:
    """When each step ran, in the order of the steps.

    With `now` (aware), a step that is running or waiting in a run that has not ended has a duration up to then (never
    below 0); without `now` it has none. A step between two attempts has none either: `started_at` is its last attempt's.
    """
    return tuple(
        StepTimeline(
            step_id=step.step_id,
            status=step.status,
            attempts=step.attempts,
            started_at=step.started_at,
            ended_at=step.ended_at,
            duration=_duration(run, step, now),
        )
        for step in run.steps
    )


def get_step_ui_states(run: Run) -> tuple[StepUIState, ...]:
    """Every step, with its place relative to the current step. When all steps have ended, all are past.

    Of a durable function, `main` is current while it runs; its calls that have ended are past, those under way are future.

    `shown` differs from the stored status where that alone would mislead: "cancelled" for steps that a cancelled run had not
    ended; for the current step "retrying" between two attempts, and "paused" in a paused run that no worker holds.
    """
    here, reach = _place(run), _reach(run)
    past = [step.status in ENDED_STEPS if _is_durable(run) else place < here for place, step in enumerate(run.steps)]
    return tuple(
        StepUIState(
            step=step,
            shown=_shown(run, step, is_current=place == here),
            is_current=place == here,
            is_past=past[place] and place != here,
            is_future=not past[place] and place != here,
            can_rewind_to=place <= reach,
        )
        for place, step in enumerate(run.steps)
    )


def get_waiting_info(run: Run) -> WaitingInfo | None:
    """What the run waits for, or None: it runs, is ready to, or has ended.

    Includes what is stored as a wait (a person, a hook, an event, a sleep), back-offs and scheduled starts.
    A pause is not a wait: see `run.paused`.
    """
    place = _place(run)
    if run.status in TERMINAL or place == len(run.steps):
        return None
    step = run.steps[place]
    if _is_durable(run) and run.status is RunStatus.WAITING and step.status is StepStatus.PENDING:
        _, step = min(
            ((call.retry_after, call) for call in run.steps if call.retry_after is not None), key=itemgetter(0), default=(None, step)
        )
    if step.status is StepStatus.WAITING and step.waiting_for is not None:
        return _info(run, step, step.waiting_for)
    if _is_backing_off(run, step):
        reason = (step.error or {}).get("message")
        return _info(run, step, {"type": "retry", "reason": reason, "resumeAt": step.retry_after})
    if run.status is RunStatus.DRAFT:
        # A scheduled start is stored as a `wakeAt` only (`pausedWakeAt` under a pause).
        return _info(run, step, {"type": "start", "resumeAt": run.document.get("pausedWakeAt" if run.paused else "wakeAt")})
    return None


def can_rewind_to(run: Run, step_id: str) -> bool:
    """True exactly when `Workflow.rewind_to` accepts this step on the run as it was read. StepNotFoundError for an unknown one.

    That is: the run was not cancelled, and every step before this one is done or skipped. To every call of a durable function.
    """
    step = run.step(step_id)
    return run.steps.index(step) <= _reach(run)


def get_execution_path(run: Run) -> tuple[str, ...]:
    """The ids of the steps that are done, in order. Skipped steps are not among them."""
    return tuple(step.step_id for step in run.steps if step.status is StepStatus.DONE)


def _is_durable(run: Run) -> bool:
    return run.steps[0].kind == MAIN


def _place(run: Run) -> int:
    """The place of the current step; past the last one when there is none."""
    return next((place for place, step in enumerate(run.steps) if step.step_id == run.current_step_id), len(run.steps))


def _reach(run: Run) -> int:
    """The last place that the run can be rewound to; -1 if it cannot be."""
    if run.status not in REWINDABLE:
        return -1
    if _is_durable(run):
        return len(run.steps)
    return next((place for place, step in enumerate(run.steps) if step.status not in _COMPLETED), len(run.steps))


def _duration(run: Run, step: StepState, now: datetime | None) -> float | None:
    if step.duration is not None:
        return step.duration
    if step.started_at is None:
        return None
    if step.ended_at is not None:
        return _seconds_between(step.started_at, step.ended_at)
    goes_on = step.status in (StepStatus.RUNNING, StepStatus.WAITING) and run.status not in TERMINAL
    return _seconds_between(step.started_at, now) if goes_on and now is not None else None


def _seconds_between(start: datetime, end: datetime) -> float:
    return max(0.0, (end - start).total_seconds())


def _is_backing_off(run: Run, step: StepState) -> bool:
    # The run's status distinguishes a back-off from an attempt released in a drain, which may keep an old `retryAfter`.
    return run.status is RunStatus.WAITING and step.status is StepStatus.PENDING and step.retry_after is not None


def _shown(run: Run, step: StepState, *, is_current: bool) -> Shown:
    if step.status in ENDED_STEPS:
        return step.status.value
    if run.status is RunStatus.CANCELLED:
        return "cancelled"
    if is_current and run.paused and run.document.get("lease") is None:
        return "paused"
    return "retrying" if is_current and _is_backing_off(run, step) else step.status.value


def _info(run: Run, step: StepState, wait: Mapping[str, Any]) -> WaitingInfo:
    return WaitingInfo(
        step_id=step.step_id,
        type=str(wait["type"]),
        reason=wait.get("reason"),
        event_name=wait.get("eventName"),
        data=wait.get("data"),
        resume_at=wait.get("resumeAt"),
        expires_at=wait.get("expiresAt"),
        paused=run.paused,
    )
