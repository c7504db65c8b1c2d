"""A result that is on its way in several forms, because its run is paused and resumed meanwhile: the stored one counts.

The first of these was found by the explorer, the others by a review.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from streamline_pool import StoreUnavailableError, Streamline
from streamline_pool.protocol.operations import Command
from streamline_pool.storage.store import AsyncStore

Send = Callable[[Command], Awaitable[Any]]
Turn = Callable[[Send, Command], Awaitable[Any]]
"""What happens to one command: it gets the real way to send, and the command."""


class Script:
    """What happens to the commits of this test's worker, one by one; later ones take their way."""

    def __init__(self, app: Streamline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.app = app
        self.late: list[Command] = []
        self.turns: list[Turn] = []
        self.published: list[str] = []
        app.events.on("*", lambda event: self.published.append(f"{event.name} {event.step_id or ''}".strip()))
        run_op = AsyncStore.run

        async def run(store: AsyncStore, op: Any, session: Any = None) -> Any:
            if op.name == "commit_runs" and self.turns:
                return await self.turns.pop(0)(lambda command: run_op(store, command, session), op)
            return await run_op(store, op, session)

        monkeypatch.setattr(AsyncStore, "run", run)

    def play(self, flow: str, turns: Sequence[Turn]) -> tuple[str, list[str]]:
        """Execute a run of the workflow. What the run is then, and which events were published."""
        workflow = self.app.workflows[flow]
        self.run_id = workflow.start().id
        self.published.clear()
        self.turns = list(turns)
        workflow.execute(self.run_id)
        assert not self.turns, "every turn came"
        return self.now()

    def now(self) -> tuple[str, list[str]]:
        """The status of the run, and the events so far."""
        self.app.events.flush()
        document = self.app.runs.find_one({"_id": self.run_id})
        assert document is not None
        assert (document["crashes"], document["token"]) == (0, 1)
        return document["status"], [name for name in self.published if name.startswith(("step:completed", "workflow:completed"))]

    # --- turns -----------------------------------------------------------------------------------------------------

    async def pauses_and_is_late(self, _send: Send, command: Command) -> Any:
        await asyncio.to_thread(self.app.pause_run, self.run_id)
        return await self.is_late(_send, command)

    async def resumes_and_is_late(self, _send: Send, command: Command) -> Any:
        await asyncio.to_thread(self.app.resume_run, self.run_id)
        return await self.is_late(_send, command)

    async def is_late(self, _send: Send, command: Command) -> Any:
        self.late.append(command)
        raise StoreUnavailableError("the connection broke, and the request comes later", transient=True)

    async def pauses(self, send: Send, command: Command) -> Any:
        await asyncio.to_thread(self.app.pause_run, self.run_id)
        return await send(command)

    async def passes(self, send: Send, command: Command) -> Any:
        return await send(command)

    async def resumes_and_the_late_one_comes(self, send: Send, command: Command) -> Any:
        await asyncio.to_thread(self.app.resume_run, self.run_id)
        await send(self.late[0])
        return await send(command)

    async def pauses_and_the_late_one_comes(self, send: Send, command: Command) -> Any:
        await asyncio.to_thread(self.app.pause_run, self.run_id)
        await send(self.late[0])
        return await send(command)

    async def waits_and_the_late_one_comes(self, send: Send, command: Command) -> Any:
        await asyncio.sleep(0.7)
        await send(self.late[0])
        return await send(command)


@pytest.fixture
def script(app: Streamline, monkeypatch: pytest.MonkeyPatch) -> Script:
    for name, count in (("one", 1), ("two", 2)):
        app.workflow(name, steps={step: lambda ctx: ctx.step_id for step in ("a", "b")[:count]})
    return Script(app, monkeypatch)


def test_a_result_is_stored_for_a_run_that_goes_on_though_the_form_for_a_paused_one_was_sent_last(script: Script) -> None:
    """Its worker took the run for lost, and it rested until its lease was over, as if a worker had died."""
    turns = [script.pauses_and_is_late, script.passes, script.resumes_and_the_late_one_comes]
    assert script.play("two", turns) == ("done", ["step:completed a", "step:completed b", "workflow:completed"])


def test_the_end_of_a_run_is_published_though_the_form_for_a_paused_one_was_sent_last(script: Script) -> None:
    turns = [script.pauses_and_is_late, script.passes, script.resumes_and_the_late_one_comes]
    assert script.play("one", turns) == ("done", ["step:completed a", "workflow:completed"])


def test_the_end_of_a_run_is_not_published_while_only_its_result_is_stored(script: Script) -> None:
    turns = [script.pauses, script.resumes_and_is_late, script.passes, script.pauses_and_the_late_one_comes]
    assert script.play("one", turns) == ("running", ["step:completed a"])
    script.app.resume_run(script.run_id)
    script.app.runs.update_one({"_id": script.run_id}, {"$set": {"token": 0}})  # the next claim makes it 1
    script.app.workflows["one"].execute(script.run_id)
    assert script.now() == ("done", ["step:completed a", "workflow:completed"])


def test_a_result_that_is_stored_in_the_form_for_a_paused_run_is_published(script: Script) -> None:
    turns = [script.pauses, script.resumes_and_is_late, script.passes, script.pauses_and_the_late_one_comes]
    assert script.play("two", turns) == ("running", ["step:completed a"])


@pytest.mark.parametrize("last", [True, False], ids=["last step", "another follows"])
def test_the_end_of_a_sleep_is_published_though_its_wait_was_to_go_on(script: Script, last: bool) -> None:
    """By the server's clock it was too early for the end, and then not any more."""
    app = script.app
    flow = app.workflow("nap", steps={"nap": lambda ctx: ctx.sleep(0.3), **({} if last else {"b": lambda ctx: "b"})})
    script.run_id = flow.start().id
    flow.execute(script.run_id)
    time.sleep(0.35)
    later = {"$mergeObjects": ["$$s.waitingFor", {"resumeAt": {"$add": ["$$NOW", 600]}}]}
    step = {"$cond": [{"$eq": ["$$s.stepId", "nap"]}, {"$mergeObjects": ["$$s", {"waitingFor": later}]}, "$$s"]}
    app.runs.update_one({"_id": script.run_id}, [{"$set": {"token": 0, "steps": {"$map": {"input": "$steps", "as": "s", "in": step}}}}])
    script.published.clear()
    script.turns = [script.is_late, script.passes, script.waits_and_the_late_one_comes]
    flow.execute(script.run_id)
    assert script.now() == ("done", ["step:completed nap", *([] if last else ["step:completed b"]), "workflow:completed"])
