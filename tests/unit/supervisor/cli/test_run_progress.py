"""Which lines a followed run has: each thing once, whether an event or the document has shown it first."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from streamline_pool.events.event import Event
from streamline_pool.supervisor.cli.run_progress import Line, RunProgress

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
REFUSED = {"code": "STEP_FAILED", "type": "ValueError", "message": "card refused"}


def document(*steps: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    current = next((step["stepId"] for step in steps if step["status"] in ("pending", "running", "waiting")), None)
    return {"status": "running", "steps": list(steps), "currentStepId": current, "updatedAt": NOW, "paused": False, "crashes": 0, **fields}


def step(status: str = "running", attempts: int = 1, **fields: Any) -> dict[str, Any]:
    return {"stepId": "charge", "status": status, "attempts": attempts, **fields}


def event(name: str, data: Any = None, step_id: str | None = "charge") -> Event:
    return Event(name=name, run_id="r", workflow_id="w", step_id=step_id, data=data, at=NOW)


def retry(attempt: int, after_s: float = 1.5) -> Event:
    return event("step:retry-scheduled", {"error": REFUSED, "retryAfter": NOW + timedelta(seconds=after_s), "attempt": attempt})


def texts(lines: list[Line]) -> list[str]:
    return [line.text for line in lines]


def test_events_show_every_attempt_in_order_and_the_document_repeats_none() -> None:
    progress = RunProgress()
    lines = progress.on_document(document(step("pending", 0)))
    for each in (event("step:started", {"attempt": 1}), retry(1), event("step:started", {"attempt": 2}), retry(2, 0.02)):
        lines += progress.on_event(each)
    lines += progress.on_document(document(step("pending", 2, error=REFUSED, retryAfter=NOW), status="waiting"))
    lines += progress.on_event(event("step:started", {"attempt": 3}))
    lines += progress.on_document(document(step("running", 3)))
    lines += progress.on_event(event("step:completed", {"any": "output"}))
    lines += progress.on_document(document(step("done", 3), status="done"))
    assert texts(lines) == [
        "run running",
        "step charge running",
        "step charge: attempt 1 failed: STEP_FAILED: ValueError: card refused; next in 1.5 s",
        "step charge running (attempt 2)",
        "step charge: attempt 2 failed: STEP_FAILED: ValueError: card refused; next in 20 ms",
        "step charge running (attempt 3)",
        "step charge done (attempt 3)",
        "run done",
    ]
    assert [line.is_setback for line in lines] == [False, False, True, False, True, False, False, False]


def test_the_document_alone_shows_the_same_between_two_reads() -> None:
    """Without a pool that publishes, or without the right to subscribe."""
    progress = RunProgress()
    lines = progress.on_document(document(step("running", 1)))
    failed = document(step("pending", 1, error=REFUSED, retryAfter=NOW + timedelta(seconds=2)), status="waiting")
    lines += progress.on_document(failed) + progress.on_document(failed) + progress.on_event(retry(1))
    lines += progress.on_document(document(step("failed", 2, error=REFUSED), status="failed"))
    assert texts(lines) == [
        "step charge running",
        "run running",
        "step charge: attempt 1 failed: STEP_FAILED: ValueError: card refused; next in 2.0 s",
        "step charge failed (attempt 2): STEP_FAILED: ValueError: card refused",
        "run failed",
    ]


def test_a_lost_worker_is_named_if_a_read_has_seen_it() -> None:
    progress = RunProgress()
    progress.on_document(document(step("running", 1), lease={"owner": "box:7:abc"}))
    lost = progress.on_document(document(step("pending", 1), crashes=1))
    assert (texts(lost), lost[0].is_setback) == (["step charge: worker box:7:abc was lost while it had the run"], True)
    assert progress.on_event(event("workflow:recovered", {"crashes": 1})) == []
    again = progress.on_event(event("workflow:recovered", {"crashes": 2}))
    assert texts(again) == ["step charge: a worker was lost while it had the run (2 lost at this step so far)"]
    convicted = document(step("failed", 3, error={"code": "WORKER_CRASHED", "message": "3 workers were lost"}), crashes=3, status="failed")
    assert texts(progress.on_document({**convicted, "currentStepId": "charge"})) == [
        "step charge: a worker was lost while it had the run (3 lost at this step so far)",
        "step charge failed (attempt 3): WORKER_CRASHED: 3 workers were lost",
        "run failed",
    ]


def test_waits_pauses_and_rewinds_have_lines() -> None:
    progress = RunProgress()
    progress.on_document(document(step("running", 1)))
    waiting = document(step("waiting", 1, waitingFor={"type": "human", "reason": "may it?"}), status="waiting")
    assert texts(progress.on_document(waiting)) == ["step charge waiting: may it?"]
    assert texts(progress.on_document({**waiting, "paused": True})) == ["run waiting, paused"]
    assert texts(progress.on_document(waiting)) == ["run waiting"]
    assert texts(progress.on_document(document(step("done", 1), status="done"))) == ["step charge done", "run done"]
    again = progress.on_document(document(step("running", 1), rewinds=1))
    assert texts(again) == ["run back at step charge", "step charge running"]
    assert texts(progress.on_document(document(step("done", 1), status="done", rewinds=1))) == ["step charge done", "run done"]


def test_a_read_that_is_older_than_an_event_takes_nothing_back() -> None:
    """What a read has shown is told half a second later, when events may have shown more."""
    progress = RunProgress()
    old = document(step("running", 1))
    progress.on_document(old)
    assert texts(progress.on_event(event("step:started", {"attempt": 2}))) == ["step charge running (attempt 2)"]
    sleep = {"type": "timer", "reason": "sleep", "resumeAt": NOW + timedelta(seconds=2)}
    assert texts(progress.on_event(event("step:waiting", sleep))) == ["step charge sleeping for 2.0 s"]
    assert progress.on_document(old) == []
    assert progress.on_document(document(step("waiting", 2, waitingFor=sleep), status="waiting")) == []
    assert texts(progress.on_event(event("step:completed"))) == ["step charge done (attempt 2)"]


def test_odd_events_and_documents_have_no_lines_and_no_errors() -> None:
    progress = RunProgress()
    for name in ("step:started", "step:retry-scheduled", "workflow:recovered", "step:failed", "mine"):
        progress.on_event(event(name, None, None))
    assert texts(progress.on_document({"status": "done", "steps": []})) == ["run done"]
