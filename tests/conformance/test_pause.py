"""Pausing a run whose handler is in progress: the result is stored, nothing starts, and resume continues the run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from held_run import held
from other_program import other_program
from stored_runs import stored, until_step
from waiting_app import evidence, waiting_app, waiting_pool
from workers import run_until_idle

from streamline_pool import Streamline, create_hook
from support import eventually, present


def fail(ctx: Any) -> str:
    if ctx.attempt == 1:
        raise ValueError("in the pause")
    return "second"


@pytest.mark.parametrize(
    ("ending", "options", "step", "status"),
    [
        (lambda ctx: "worked", {}, "done", "running"),
        (fail, {"retries": 2, "retry_delay": 0.05}, "pending", "waiting"),
        (fail, {"retries": 1}, "failed", "failed"),
        (lambda ctx: ctx.sleep(0.05), {}, "waiting", "waiting"),
        (lambda ctx: ctx.wait("?", timeout=0.05), {}, "waiting", "waiting"),
        (lambda ctx: ctx.wait("?"), {}, "waiting", "waiting"),
        (lambda ctx: ctx.wait_for("news", timeout=0.05), {}, "waiting", "waiting"),
    ],
    ids=["done", "retry", "failed", "sleep", "wait with timeout", "wait", "event"],
)
def test_a_handlers_result_during_a_pause_is_stored_and_nothing_is_started(
    app: Streamline, ending: Callable[[Any], Any], options: dict[str, Any], step: str, status: str
) -> None:
    """The finished work must not be repeated, and nothing else may happen to the run, however long the pause is."""
    workflow, run, go, thread = held(app, ending, **options)
    workflow.pause(run.id)
    go.set()
    thread.join(20)
    document = stored(app, run)
    assert (document["steps"][0]["status"], document["status"], document["paused"]) == (step, status, True)
    assert "lease" not in document
    assert "wakeAt" not in document
    due = document.get("pausedWakeAt")
    if due is not None:
        eventually(lambda: datetime.now(UTC) > due + timedelta(milliseconds=50))
    run_until_idle(app)
    assert stored(app, run) == document, "a paused run was changed"
    if status != "failed":
        workflow.resume(run.id)
        run_until_idle(app)
        assert workflow.get(run.id).status == ("waiting" if due is None else "done")


def test_a_pause_that_is_ended_while_the_handler_works_changes_nothing(app: Streamline) -> None:
    workflow, run, go, thread = held(app, lambda ctx: "worked")
    workflow.pause(run.id)
    assert workflow.resume(run.id).paused is False
    go.set()
    thread.join(20)
    done = workflow.get(run.id)
    assert (done.status, done.step("work").output, done.step("work").attempts) == ("done", "worked", 1)


def test_the_last_steps_result_during_a_pause_ends_the_run_only_after_it(app: Streamline) -> None:
    entered, go = threading.Event(), threading.Event()

    def work(ctx: Any) -> str:
        entered.set()
        go.wait(20)
        return "worked"

    workflow = app.workflow("w", steps={"work": work})
    run = workflow.start()
    thread = threading.Thread(target=workflow.execute, args=(run.id,))
    thread.start()
    assert entered.wait(20)
    workflow.pause(run.id)
    go.set()
    thread.join(20)
    paused = present(workflow.get(run.id))
    assert (paused.status, paused.step("work").status, paused.ended_at) == ("running", "done", None)
    workflow.resume(run.id)
    run_until_idle(app)
    assert (present(workflow.get(run.id)).status, present(workflow.get(run.id)).output) == ("done", "worked")


def test_a_checkpoint_and_a_hook_can_be_stored_during_a_pause(app: Streamline) -> None:
    """The step in progress must be able to finish, and a refused call would fail its handler."""

    def ending(ctx: Any) -> str:
        ctx.checkpoint("here")
        token.append(create_hook(ctx, "?").token)
        return "worked"

    token: list[str] = []
    workflow, run, go, thread = held(app, ending)
    workflow.pause(run.id)
    go.set()
    thread.join(20)
    assert (workflow.get(run.id).step("work").output, len(token)) == ("worked", 1)


@pytest.mark.timeout(120)
def test_a_pause_from_another_process_stops_a_run_after_the_step_in_progress(mongodb_uri: str, database: str, tmp_path: Path) -> None:
    with (
        waiting_app(mongodb_uri, database) as app,
        waiting_pool(tmp_path, mongodb_uri, database),
        other_program(mongodb_uri, database) as other,
    ):
        slow = app.workflows["slow"]
        run = slow.start()
        eventually(lambda: evidence(app, "entered", run=run.id), timeout=20)
        assert other.call("pause_run", run.id) == {"status": "running", "id": run.id, "paused": True}
        app.store().collection("go").insert_one({"_id": run.id})
        document = until_step(app, run, "work", "done")
        assert (document["steps"][0]["output"], document["paused"], "lease" in document) == ("worked", True, False)
        (left,) = evidence(app, "left", run=run.id)
        assert left["reason"] is None, "the handler was not disturbed"
        # While this run is paused, the pool executes other runs.
        for another in [slow.start() for _ in range(3)]:
            app.store().collection("go").insert_one({"_id": another.id})
            assert slow.wait_for(another.id, timeout=20).output == "rested"
        assert stored(app, run) == document
        assert other.call("resume_run", run.id)["paused"] is False
        assert slow.wait_for(run.id, timeout=20).output == "rested"
        assert len(evidence(app, "entered", run=run.id)) == 2, "each handler was entered once"
