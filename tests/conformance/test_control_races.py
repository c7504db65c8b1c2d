"""Control operations that meet each other: at once, repeated late, from two processes, and through the asyncio functions."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from other_program import other_program
from stored_runs import stored
from waiting_app import waiting_app, waiting_pool
from workers import check_invariants

from streamline_pool import InvalidStateError, Streamline, WorkflowError, create_hook
from streamline_pool.client.beginning_again import rewinding_run
from streamline_pool.client.run_control import pausing_run
from streamline_pool.protocol import control
from support import eventually


def test_every_control_operation_has_an_asyncio_function_that_does_the_same(app: Streamline) -> None:
    tokens: list[str] = []

    async def one(ctx: Any) -> None:
        tokens.append(create_hook(ctx, "?").token)
        ctx.wait("?")

    workflow = app.workflow("w", steps={"one": one, "two": lambda ctx: ctx.wait("?"), "three": lambda ctx: ctx.wait_for("news")})

    async def play() -> list[Any]:
        seen: list[Any] = []
        async with app:
            run = await workflow.start_async()
            await workflow.execute_async(run.id)
            seen.append((await workflow.pause_async(run.id, reason="why")).paused)
            seen.append((await app.resume_run_async(run.id)).paused)
            seen.append((await app.resume_hook_async(tokens[0], "by hook")).run.step("one").output)
            await workflow.execute_async(run.id)
            seen.append((await workflow.resume_async(run.id, "by a person")).step("two").output)
            await workflow.execute_async(run.id)
            seen.append(await app.send_event_async("news", "sent"))
            seen.append((await workflow.rewind_to_async(run.id, "two")).step("two").status)
            seen.append((await app.pause_run_async(run.id)).paused)
            seen.append((await app.rewind_run_async(run.id, "one")).step("one").status)
            seen.append((await workflow.cancel_async(run.id)).status)
            with pytest.raises(InvalidStateError):
                await workflow.resume_async(run.id)
        return seen

    assert asyncio.run(play()) == [True, False, "by hook", "by a person", 1, "pending", True, "pending", "cancelled"]


def test_the_same_operation_twice_at_once_is_applied_once(app: Streamline) -> None:
    workflow = app.workflow("w", steps={"one": lambda ctx: ctx.wait("?"), "two": lambda ctx: 2})
    run = workflow.execute(workflow.start().id)
    for operation, check in ((workflow.pause, True), (workflow.resume, False)):
        count_before = stored(app, run)["acts"]
        threads = [threading.Thread(target=operation, args=(run.id,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        document = stored(app, run)
        assert (document["paused"], document["acts"]) == (check, count_before + 1)
        if check is False:
            # If the second resume came after the first, the run was not paused any more, and it answered the wait.
            assert document["steps"][0]["status"] in ("waiting", "done")


@pytest.mark.parametrize("call", ["pause", "rewind"])
def test_a_call_whose_reply_was_lost_is_not_refused_because_the_run_was_cancelled_meanwhile(app: Streamline, call: str) -> None:
    """The caller would take a rewind for refused that has entered handlers again. (The explorer's seed 5083.)"""
    workflow = app.workflow("w", steps={"one": lambda ctx: ctx.wait("?")})
    run = workflow.execute(workflow.start().id)
    calls = {"pause": pausing_run(app.services, None, run.id, None), "rewind": rewinding_run(app.services, None, run.id, "one")}
    procedure = calls[call]
    read: Any = next(procedure)
    write: Any = procedure.send(app.store().run(read))
    app.store().run(write)
    app.cancel_run(run.id)
    effect: Any = procedure.send(app.store().run(write))  # repeated, because its reply was lost
    with pytest.raises(StopIteration) as ended:
        while True:
            effect = procedure.send(app.store().run(effect))
    assert ended.value.value.status == "cancelled"
    assert stored(app, run)["acts"] == 2


def test_a_late_copy_of_a_pause_or_resume_does_nothing(app: Streamline) -> None:
    """A network may deliver the request of a finished call again; it must not pause the run again."""
    workflow = app.workflow("w", steps={"one": lambda ctx: ctx.wait("?")})
    run = workflow.execute(workflow.start().id)
    seen = stored(app, run)["acts"]
    pause = control.pause_run("w", run.id, seen, None, "first")
    assert app.store().run(pause) is not None
    resume = control.unpause_run("w", run.id, seen + 1, "second")
    assert app.store().run(resume) is not None
    before = stored(app, run)
    for copy in (pause, resume, control.rewind_run("w", run.id, seen, 0, ["one"], "lane", 1, "third")):
        assert app.store().run(copy) is None
    assert stored(app, run) == before


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", [1, 2])
def test_calls_from_two_processes_on_the_runs_of_a_pool_lose_and_wedge_none(
    mongodb_uri: str, database: str, tmp_path: Path, seed: int
) -> None:
    """Random pauses, resumes, rewinds, answers and events from two processes meet each other and the workers."""
    chance = random.Random(seed)
    with (
        waiting_app(mongodb_uri, database) as app,
        waiting_pool(tmp_path, mongodb_uri, database),
        other_program(mongodb_uri, database) as left,
        other_program(mongodb_uri, database) as right,
    ):
        runs = [run for name in ("approval", "listener", "hooked") for run in app.workflows[name].start_many([{}] * 5)]
        said: dict[str, int] = {}
        cancelled: set[str] = set()
        for _ in range(100):
            for other in (left, right):
                run = chance.choice(runs[:6] if chance.random() < 0.5 else runs)  # half of the calls go to few runs, so that they meet
                first = {"approval": "ask", "listener": "first", "hooked": "offer"}[run.workflow_id]
                calls = [("pause_run", run.id), ("resume_run", run.id), ("resume_run", run.id, "yes"), ("rewind_run", run.id, first)]
                weights = [4, 4, 2, 2]
                other.ask(*chance.choices(calls, weights)[0])
            for other in (left, right):
                answer = other.answer()
                outcome = str(answer.get("error", "ok"))
                said[outcome] = said.get(outcome, 0) + 1
            check_invariants(list(app.runs.find()))
        for run in chance.sample(runs, 2):
            left.call("cancel_run", run.id)
            cancelled.add(run.id)

        def all_ended_by_users() -> bool:
            """Call what users would call to end the other runs. True when all have ended."""
            for document in app.runs.find({"endedAt": None}):
                with contextlib.suppress(WorkflowError):
                    app.resume_run(document["_id"]) if document["paused"] else None
                step = next((part for part in document["steps"] if part["status"] == "waiting"), None)
                if step is not None and step["waitingFor"]["type"] == "event":
                    app.send_event("news", "yes", run_id=document["_id"])
                elif step is not None:
                    with contextlib.suppress(InvalidStateError):
                        app.resume_run(document["_id"], "yes")
            return not list(app.runs.find({"endedAt": None}).limit(1))

        eventually(all_ended_by_users, timeout=40)
    print(f"seed {seed}: {said}")
    assert set(said) <= {"ok", "INVALID_STATE"}
    documents = list(app.runs.find())
    check_invariants(documents)
    for document in documents:
        expected = {"cancelled", "done"} if document["_id"] in cancelled else {"done"}
        assert document["status"] in expected, document
    app.close()
