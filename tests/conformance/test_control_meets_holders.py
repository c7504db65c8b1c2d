"""Control operations, answers and events that meet the lease holder of the run immediately before its write.

The test plays the lease holder, or it stops the real engine by a probe immediately before its write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from workers import check_invariants

from streamline_pool import Context, Streamline, create_hook
from streamline_pool.config.env import system_env
from streamline_pool.domain import transitions, waits
from streamline_pool.domain.change import Change
from streamline_pool.engine.write_outcome import WriteOutcome, resolve_write
from streamline_pool.protocol import claims, durable_events
from streamline_pool.protocol.commits import (
    commit,
    commit_under_pause,
    read_fences,
    write_statements,
)
from streamline_pool.protocol.operations import Fence
from support import present

ClientCall = Callable[[Streamline, str], Any]


class Held:
    """A waiting run whose deadline has passed, and which the test has claimed."""

    def __init__(self, app: Streamline, how: str) -> None:
        self.app = app
        self.tokens: list[str] = []
        self.workflow = app.workflow(
            "held", steps={"zero": lambda ctx: 0, "first": self.first, "last": lambda ctx: ctx.get_output("first")}
        )
        self.run_id = self.workflow.start(how).id
        self.workflow.execute(self.run_id)
        app.runs.update_one({"_id": self.run_id}, [{"$set": {"wakeAt": "$$NOW"}}])
        self.document = app.store().run(claims.claim_run(self.run_id, None, "claim", "test:0:holder", 30.0))
        assert self.document["lease"]["id"] == "claim"

    def first(self, ctx: Context) -> None:
        if ctx.input == "hook":
            self.tokens.append(create_hook(ctx, "?").token)
        ctx.wait_for("e", timeout=3600) if ctx.input == "event" else ctx.wait("?", timeout=3600)

    def stored(self) -> dict[str, Any]:
        document: dict[str, Any] = self.app.runs.find_one({"_id": self.run_id})
        check_invariants([document])
        return document

    def write(self, change: Change, *, paused: bool = False) -> WriteOutcome | None:
        """One write by the lease holder, based on the document that its claim returned."""
        document = self.document
        fence = Fence(self.run_id, "claim", document["rev"], document["token"])
        statement = (commit_under_pause if paused else commit)(fence, change, self.app.store().now(), 0)
        if self.app.store().run(write_statements([statement]))["n"] == 1:
            return WriteOutcome.COMMITTED
        return resolve_write(statement, self.app.store().run(read_fences([self.run_id]))[0])

    def time_out(self) -> Change:
        change = waits.time_out(self.document, 1, self.app.store().now())
        return change._replace(not_before=None)


TAKING: dict[str, tuple[str, Callable[[Held], Any]]] = {
    "answer": ("human", lambda held: held.workflow.resume(held.run_id, "answer")),
    "hook": ("hook", lambda held: held.app.resume_hook(held.tokens[-1], "answer")),
    "event": ("event", lambda held: held.app.send_event("e", "answer", run_id=held.run_id)),
    "event to all": ("event", lambda held: held.app.send_event("e", "answer")),
    "rewind": ("human", lambda held: held.workflow.rewind_to(held.run_id, "first")),
    "cancel": ("human", lambda held: held.workflow.cancel(held.run_id)),
}
"""By name: what the run waits for, and an operation that removes its lease."""


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("name", TAKING)
def test_an_operation_that_changes_the_run_removes_the_lease_of_its_holder(app: Streamline, name: str, paused: bool) -> None:
    """With its lease the holder could time out a wait that was answered, or continue a run that was cancelled."""
    how, operation = TAKING[name]
    held = Held(app, how)
    token = held.document["token"]
    if paused:
        held.workflow.pause(held.run_id)
    if paused and name == "answer":
        return  # a paused run is not answered by `resume`
    operation(held)
    stored = held.stored()
    assert "lease" not in stored
    assert stored["token"] == token + 1
    if name == "cancel":
        assert stored["status"] == "cancelled"
    else:
        assert ("wakeAt" in stored, "pausedWakeAt" in stored) == (not paused, paused)
    assert held.write(held.time_out()) is WriteOutcome.FENCED
    assert held.write(held.time_out(), paused=True) is WriteOutcome.FENCED
    assert held.stored() == stored, "a fenced lease holder has changed the run"


def test_pause_and_resume_leave_a_live_lease_alone(app: Streamline) -> None:
    """Without its lease the run would be claimed by a second worker while the first worker's handler still works."""
    held = Held(app, "human")
    held.workflow.pause(held.run_id)
    stored = held.stored()
    assert stored["lease"] == held.document["lease"]
    assert "pausedWakeAt" not in stored
    assert held.write(held.time_out()) is WriteOutcome.PAUSED
    held.workflow.resume(held.run_id)
    stored = held.stored()
    assert stored["lease"] == held.document["lease"]
    assert "wakeAt" not in stored
    assert stored["token"] == held.document["token"]
    paused_form = transitions.under_pause(held.document, held.time_out(), app.store().now())
    assert held.write(paused_form, paused=True) is WriteOutcome.RESUMED
    assert held.write(held.time_out()) is WriteOutcome.COMMITTED
    assert held.stored()["steps"][1]["status"] == "done"


def stopped_before_commit(make_app: Callable[..., Streamline], operation: Callable[[Streamline], Any], change: int = 1) -> Streamline:
    """An application whose engine stops once, immediately before commit number `change`, while another calls `operation`."""
    other = make_app()
    commits: list[str] = []

    def probe(point: str) -> None:
        if point == "commit.before":
            commits.append(point)
            if len(commits) == change:
                operation(other)

    return make_app(env=replace(system_env(), probe=probe))


ENDINGS: dict[str, Callable[[Context], Any]] = {
    "sleep": lambda ctx: ctx.sleep(3600),
    "wait": lambda ctx: ctx.wait("?", timeout=3600),
    "event": lambda ctx: ctx.wait_for("e", timeout=3600),
}


@pytest.mark.parametrize("way", [*ENDINGS, "search"])
def test_a_holder_ends_nothing_under_pause(make_app: Callable[..., Streamline], way: str) -> None:
    """The holder has claimed the run because a sleep or deadline is over, or has found an event; then the run is paused."""
    run_ids: list[str] = []
    engine = stopped_before_commit(make_app, lambda other: other.pause_run(run_ids[0]))
    app = make_app()
    steps = {"one": ENDINGS["event" if way == "search" else way], "two": lambda ctx: "entered"}
    for each in (app, engine):
        each.workflow("w", steps=steps)
    run_ids.append(app.workflows["w"].execute(app.workflows["w"].start().id).id)
    past = {"$dateSubtract": {"startDate": "$$NOW", "unit": "second", "amount": 1}}
    sets = {"wakeAt": past, "steps": {"$map": {"input": "$steps", "as": "step", "in": {"$mergeObjects": ["$$step", {"$cond": [
        {"$eq": ["$$step.status", "waiting"]},
        {"waitingFor": {"$mergeObjects": ["$$step.waitingFor", {"resumeAt" if way == "sleep" else "expiresAt": past}]}},
        {},
    ]}]}}}}  # fmt: skip
    app.runs.update_one({}, [{"$set": sets}])
    if way == "search":
        app.store().run(durable_events.record_event("e1", "e", "found", app.store().now()))
    run = engine.workflows["w"].execute(run_ids[0])
    check_invariants([run.to_dict()])
    assert run.paused
    assert run.step("one").status == "waiting"
    assert "pausedWakeAt" in run.to_dict(), "the timer is kept for the resume"
    app.workflows["w"].resume(run.id)
    run = app.workflows["w"].execute(run.id)
    assert (run.status, run.output) == ("done", "entered")
    assert run.step("one").output == "found" if way == "search" else run.step("one").output != "found"


def test_the_last_result_is_stored_under_pause_and_the_run_ends_when_resumed(make_app: Callable[..., Streamline]) -> None:
    run_ids: list[str] = []
    engine = stopped_before_commit(make_app, lambda other: other.pause_run(run_ids[0]))
    workflow = engine.workflow("w", steps={"one": lambda ctx: "result"})
    run_ids.append(workflow.start().id)
    run = workflow.execute(run_ids[0])
    check_invariants([run.to_dict()])
    assert (run.status, run.paused, run.step("one").output, run.output) == ("running", True, "result", None)
    engine.resume_run(run.id)
    assert (workflow.execute(run.id).status, present(workflow.get(run.id)).output) == ("done", "result")


@pytest.mark.parametrize("operation", ["pause", "pause, resume", "pause, resume, pause"])
@pytest.mark.parametrize("way", [*ENDINGS, "return", "fail"])
def test_a_handlers_result_is_stored_however_often_the_run_is_paused_meanwhile(
    make_app: Callable[..., Streamline], way: str, operation: str
) -> None:
    """The holder alternates between its normal write and its write under pause; both must store the same, and exactly one is committed."""
    run_ids: list[str] = []

    def disturb(other: Streamline) -> None:
        for name in operation.split(", "):
            other.pause_run(run_ids[0]) if name == "pause" else other.resume_run(run_ids[0])

    engine = stopped_before_commit(make_app, disturb)

    def one(ctx: Context) -> str:
        ctx.set("entered", ctx.attempt)
        if way == "fail":
            raise ValueError
        return str(ENDINGS[way](ctx)) if way in ENDINGS else "result"

    workflow = engine.workflow("w", steps={"one": (one, {"retry_delay": 3600}), "two": lambda ctx: "entered"})
    run_ids.append(workflow.start().id)
    run = workflow.execute(run_ids[0])
    check_invariants([run.to_dict()])
    paused = operation.endswith("pause")
    assert run.paused is paused
    assert run.step("one").status == {"return": "done", "fail": "pending"}.get(way, "waiting")
    assert run.step("one").attempts == 1
    assert run.context == ({} if way == "fail" else {"entered": 1})
    assert run.status == ("done" if way == "return" and not paused else "running" if way == "return" else "waiting")
    assert run.step("two").status == ("done" if run.status == "done" else "pending")


def test_a_rewind_discards_the_answer_that_was_kept_for_the_wait(app: Streamline) -> None:
    """The answer carries the number of the next wait. If it were kept, it would answer the wait that begins after the rewind."""
    tokens: list[str] = []

    def one(ctx: Context) -> None:
        tokens.append(create_hook(ctx, "?").token)
        if len(tokens) == 1:
            app.resume_hook(tokens[0], "old")
            raise ValueError
        ctx.wait("?")

    workflow = app.workflow("w", steps={"one": (one, {"retry_delay": 3600})})
    run = workflow.execute(workflow.start().id)
    assert [item["data"] for item in run.to_dict()["inbox"]] == ["old"]
    workflow.rewind_to(run.id, "one")
    run = workflow.execute(run.id)
    assert run.step("one").status == "waiting"
    assert run.to_dict()["inbox"] == []
    assert app.resume_hook(tokens[-1], "new").run.step("one").output == "new"
