"""What happened to a run, a line each, from its events and from its stored document. Pure.

Owns which lines there are, and that each is told once. Events show every attempt, but a killed worker loses those that it
had not published, and a failure for too many lost workers publishes none. The document shows the state at the moment of the
read, and not what came between two reads. Together they show every attempt that one of them has seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from streamline_pool.domain.model import ENDED_STEPS, TERMINAL, RunStatus, StepStatus
from streamline_pool.events.event import Event
from streamline_pool.supervisor.cli.console import error_line, short, span
from streamline_pool.supervisor.cli.explain import part_of

__all__ = ["Line", "RunProgress", "Tone", "is_terminal"]

Document = Mapping[str, Any]
Tone = Literal["plain", "good", "warning", "bad"]

_ENDED = frozenset(status.value for status in ENDED_STEPS)
_TERMINAL = frozenset(status.value for status in TERMINAL)
_TONES: Mapping[str, Tone] = {"done": "good", "failed": "bad", "cancelled": "warning"}  # of runs and of steps
_ERROR_CHARACTERS_MAX = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One thing that happened."""

    at: datetime | None  # aware UTC; None: the document does not say
    text: str
    tone: Tone = "plain"
    is_setback: bool = False  # an attempt has failed and another follows, or a worker was lost


def is_terminal(document: Document) -> bool:
    """Whether the stored run has ended."""
    return document.get("status") in _TERMINAL


class RunProgress:
    """The lines of one run. Give it each event and each read of the document; it returns the lines that are new."""

    def __init__(self) -> None:
        self._told: set[tuple[str, str, int]] = set()  # (what, step id, number): see the callers of `_new`
        self._before: Document | None = None
        self._attempts: dict[str, int] = {}  # step id to its newest attempt that was told

    # --- events ----------------------------------------------------------------------------------------------------

    def on_event(self, event: Event) -> list[Line]:
        """The new lines of one event of the run."""
        step, data = event.step_id or "", event.data if isinstance(event.data, Mapping) else {}
        match event.name:
            case "step:started":
                return self._entered(step, _number(data.get("attempt")), event.at)
            case "step:retry-scheduled":
                return self._failed(step, _number(data.get("attempt")), part_of(data, "error"), data.get("retryAfter"), event.at)
            case "workflow:recovered":
                return self._lost(step, _number(data.get("crashes")), None, event.at)
            case "step:waiting":
                return self._waiting(step, data, event.at)
            case "step:completed" | "step:failed" | "step:skipped":
                status = {"completed": StepStatus.DONE, "failed": StepStatus.FAILED, "skipped": StepStatus.SKIPPED}[event.name[5:]]
                return self._ended(step, status, data if status is StepStatus.FAILED else {}, event.at)
        return []

    # --- documents -------------------------------------------------------------------------------------------------

    def on_document(self, document: Document) -> list[Line]:
        """The new lines of one read of the run."""
        lines = self._rewound(document)
        for step in document.get("steps") or ():
            lines += self._crashes(document) if step.get("stepId") == document.get("currentStepId") else []
            lines += self._step(step, document)
        lines += self._run(document)
        self._before = document
        return lines

    def _rewound(self, document: Document) -> list[Line]:
        """A rewind lets steps happen again, so their lines are new again."""
        if self._before is None or document.get("rewinds", 0) == self._before.get("rewinds", 0):
            return []
        later = {step.get("stepId") for step in document.get("steps") or () if step.get("status") not in _ENDED}
        self._told = {key for key in self._told if key[1] not in later}
        self._attempts = {step: attempt for step, attempt in self._attempts.items() if step not in later}
        return [Line(at=document.get("updatedAt"), text=f"run back at step {document.get('currentStepId')}", tone="warning")]

    def _crashes(self, document: Document) -> list[Line]:
        crashes, step = _number(document.get("crashes")), str(document.get("currentStepId") or "")
        if not crashes:
            return []
        owner = part_of(self._before or {}, "lease").get("owner")
        return self._lost(step, crashes, owner if self._same_step(document) else None, document.get("updatedAt"))

    def _same_step(self, document: Document) -> bool:
        before = self._before or {}
        return before.get("currentStepId") == document.get("currentStepId") and _number(before.get("crashes")) < document["crashes"]

    def _step(self, step: Document, document: Document) -> list[Line]:
        step_id, status, attempt = str(step.get("stepId")), step.get("status"), _number(step.get("attempts"))
        updated = document.get("updatedAt")
        if status in _ENDED:
            self._attempts[step_id] = max(attempt, self._attempts.get(step_id, 0))
            return self._ended(step_id, StepStatus(status), part_of(step, "error"), step.get("endedAt") or updated)
        if status == StepStatus.RUNNING:
            return self._entered(step_id, attempt, step.get("startedAt") or updated)
        if status == StepStatus.WAITING:
            return self._waiting(step_id, part_of(step, "waitingFor"), updated)
        if attempt and step.get("retryAfter") and document.get("status") == RunStatus.WAITING:
            return self._failed(step_id, attempt, part_of(step, "error"), step["retryAfter"], updated)
        return []

    def _run(self, document: Document) -> list[Line]:
        """A line for the run itself: at the first read, when it is paused or resumed, and at its end.

        Its other states are those of its steps: between two attempts a run is "waiting", and the step's line says so.
        """
        before, status = self._before, document.get("status")
        paused = bool(document.get("paused")) and status not in _TERMINAL
        if before is not None and status not in _TERMINAL and bool(before.get("paused")) == paused:
            return []
        if before is not None and before.get("status") == status and status in _TERMINAL:
            return []
        at = document.get("endedAt") or document.get("updatedAt")
        return [Line(at=at, text=f"run {status}{', paused' if paused else ''}", tone=_TONES.get(str(status), "plain"))]

    # --- lines -----------------------------------------------------------------------------------------------------

    def _new(self, what: str, step: str, number: int = 0) -> bool:
        """Whether this was not told before. From now on it counts as told."""
        key = (what, step, number)
        is_new = key not in self._told
        self._told.add(key)
        return is_new

    def _entered(self, step: str, attempt: int, at: datetime | None) -> list[Line]:
        self._attempts[step] = max(attempt, self._attempts.get(step, 0))  # a read may be older than an event
        if not self._new("entered", step, attempt):
            return []
        return [Line(at=at, text=f"step {step} running{f' (attempt {attempt})' if attempt > 1 else ''}")]

    def _failed(self, step: str, attempt: int, error: Document, again_at: Any, at: datetime | None) -> list[Line]:
        lines = self._entered(step, attempt, at)
        if not self._new("failed", step, attempt):
            return lines
        why = short(error_line(error), _ERROR_CHARACTERS_MAX)
        pause = f"; next in {span(max(0.0, (again_at - at).total_seconds()))}" if isinstance(again_at, datetime) and at is not None else ""
        return [*lines, Line(at=at, text=f"step {step}: attempt {attempt} failed: {why}{pause}", tone="warning", is_setback=True)]

    def _lost(self, step: str, crashes: int, owner: str | None, at: datetime | None) -> list[Line]:
        if not crashes or not self._new("lost", step, crashes):
            return []
        worker = f"worker {owner}" if owner else "a worker"
        count = f" ({crashes} lost at this step so far)" if crashes > 1 else ""
        return [Line(at=at, text=f"step {step}: {worker} was lost while it had the run{count}", tone="bad", is_setback=True)]

    def _waiting(self, step: str, wait: Document, at: datetime | None) -> list[Line]:
        if not self._new("waiting", step, self._attempts.get(step, 0)):
            return []
        until = wait.get("resumeAt")
        if isinstance(until, datetime) and at is not None:
            return [Line(at=at, text=f"step {step} sleeping for {span(max(0.0, (until - at).total_seconds()))}")]
        what = wait.get("reason") or wait.get("eventName")
        return [Line(at=at, text=f"step {step} waiting{f': {short(what, 100)}' if what else ''}")]

    def _ended(self, step: str, status: StepStatus, error: Document, at: datetime | None) -> list[Line]:
        if not self._new("ended", step):
            return []
        attempts = self._attempts.get(step, 0)
        count = f" (attempt {attempts})" if attempts > 1 else ""
        why = f": {short(error_line(error), _ERROR_CHARACTERS_MAX)}" if error else ""
        return [Line(at=at, text=f"step {step} {status}{count}{why}", tone=_TONES.get(status.value, "plain"))]


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0
