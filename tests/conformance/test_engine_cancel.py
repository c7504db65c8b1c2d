"""Cancelling a run: possible from every process and in every state, final, and decided once in every race."""

from __future__ import annotations

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from workers import Pool, check_invariants, run_until_idle

from streamline_pool import Streamline, ValidationError
from support import eventually, present


def test_cancel_stops_a_run_in_every_state(app: Streamline) -> None:
    workflow = app.workflow("w", steps={"nap": lambda ctx: ctx.sleep(3600)})
    flaky = app.workflow("f", steps={"a": (lambda ctx: 1 / 0, {"retry_delay": 60})})
    runs = [workflow.start(), workflow.start(start_at=3600), workflow.execute(workflow.start().id)]
    runs.append(flaky.execute(flaky.start().id))
    for run in runs:
        cancelled = app.cancel_run(run.id, reason="no longer wanted")
        assert (cancelled.status, cancelled.ended_at is not None, cancelled.document["cancelReason"]) == (
            "cancelled",
            True,
            "no longer wanted",
        )
    run_until_idle(app)
    documents = list(app.runs.find())
    check_invariants(documents)
    assert {document["status"] for document in documents} == {"cancelled"}


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_the_handler_of_a_cancelled_run_is_signalled_and_nothing_it_does_is_stored(app: Streamline, kind: str) -> None:
    entered, reasons = threading.Event(), []

    def work(ctx: Any) -> str:
        entered.set()
        ctx.signal.wait(10)
        reasons.append(ctx.signal.reason)
        return "too late"

    async def work_async(ctx: Any) -> None:
        entered.set()
        try:
            await asyncio.sleep(10)
        finally:
            reasons.append(ctx.signal.reason)

    workflow = app.workflow("w", steps={"a": work if kind == "def" else work_async, "b": lambda ctx: 1})
    run = workflow.start()

    async def play() -> None:
        async with Pool(app) as pool:
            await pool.until(entered.is_set)
            await asyncio.to_thread(workflow.cancel, run.id)
            pool.workers[0].check_run(run.id)  # what a steward does when it receives the signal
            await pool.until(lambda: reasons)

    asyncio.run(play())
    stored = present(workflow.get(run.id))
    check_invariants([stored.to_dict()])
    assert (reasons, stored.status, stored.step("a").output, stored.step("b").attempts) == (
        ["cancelled"],
        "cancelled",
        None,
        0,
    )


def test_cancelling_an_ended_run_changes_nothing_and_publishes_nothing(app: Streamline) -> None:
    received: list[str | None] = []
    app.events.on("workflow:cancelled", lambda event: received.append(event.run_id))
    workflow = app.workflow("w", steps={"a": lambda ctx: 1})
    done = workflow.execute(workflow.start().id)
    cancelled = workflow.cancel(workflow.start().id, reason="first")
    assert workflow.cancel(done.id) == done
    assert workflow.cancel(cancelled.id, reason="second") == cancelled
    app.close()
    assert received == [cancelled.id]


def test_of_many_cancels_one_takes_effect_and_all_return_it(app: Streamline) -> None:
    workflow = app.workflow("w", steps={"a": lambda ctx: 1})
    run = workflow.start()
    with ThreadPoolExecutor(8) as threads:
        seen = list(threads.map(lambda number: workflow.cancel(run.id, reason=str(number)), range(8)))
    assert len({run.document["cancelReason"] for run in seen}) == 1
    assert app.runs.find_one()["acts"] == 1


def test_a_cancel_that_races_the_end_wins_or_loses_once(app: Streamline) -> None:
    """A run must never be both cancelled and done, and never become done after it was cancelled."""
    workflow = app.workflow("w", steps={name: lambda ctx: 1 for name in ("a", "b", "c")})
    chance = random.Random(7)
    runs = workflow.start_many(range(60))
    answers: dict[str, Any] = {}

    def cancel_all() -> bool:
        for run in chance.sample(runs, len(runs)):
            answers[run.id] = workflow.cancel(run.id)
        return True

    async def play() -> None:
        async with Pool(app, workers=2) as pool:
            await asyncio.gather(pool.until_idle(), asyncio.to_thread(cancel_all))
            await pool.until_idle()

    asyncio.run(play())
    for run in runs:
        stored = present(workflow.get(run.id))
        check_invariants([stored.to_dict()])
        assert stored.status == answers[run.id].status, "the status that cancel returned is final"
        assert stored.status in ("done", "cancelled")


@pytest.mark.parametrize("reason", [5, ["x"], "\ud800"])
def test_a_reason_is_text(app: Streamline, reason: Any) -> None:
    workflow = app.workflow("w", steps={"a": lambda ctx: 1})
    run = workflow.start()
    with pytest.raises(ValidationError, match="reason"):
        workflow.cancel(run.id, reason=reason)
    assert present(workflow.get(run.id)).status == "running"


def test_cancel_reads_dollar_signs_as_text(app: Streamline) -> None:
    """The reason becomes part of an update expression, in which $name would refer to a field."""
    workflow = app.workflow("w", steps={"a": lambda ctx: 1})
    assert workflow.cancel(workflow.start().id, reason="$workflowId").document["cancelReason"] == "$workflowId"


def test_the_process_that_cancels_publishes_the_event(app: Streamline) -> None:
    received: list[Any] = []
    app.events.on("workflow:cancelled", lambda event: received.append((event.run_id, event.data)))
    workflow = app.workflow("w", steps={"a": lambda ctx: 1})
    run = workflow.cancel(workflow.start().id, reason="why")
    eventually(lambda: received == [(run.id, "why")])


def test_a_handler_that_is_stopped_twice_cleans_up_once_and_whole(app: Streamline) -> None:
    """The self-fence stops a handler again in each second; that must not interrupt its clean-up."""
    log: list[str] = []

    async def work(ctx: Any) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            log.append("cleans up")
            await asyncio.sleep(0.2)
            log.append("cleaned up")

    workflow = app.workflow("w", steps={"work": work})
    run = workflow.start()

    async def stop_twice() -> None:
        async with Pool(app) as pool:
            await pool.until(lambda: pool.statuses()[0].in_flight)
            engine = present(pool.workers[0]._engine)
            (active,) = engine.active_runs.held.values()
            await pool.until(lambda: active.attempt is not None)
            await app.cancel_run_async(run.id)
            engine.check(run.id)
            await pool.until(lambda: log)
            active.abort("lease-lost")
            await pool.until(lambda: not pool.statuses()[0].in_flight)

    asyncio.run(stop_twice())
    assert log == ["cleans up", "cleaned up"]
