"""Every operation of an outside call fails once, in every way an operation can fail, on a real server.

A call (answer, hook, event, pause, resume, rewind, cancel) is made while its operation number 1, 2, 3 … fails, until it gets
through without reaching the faulty number. After each: what the call said is what happened, once, and the run goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from workers import check_invariants

from streamline_pool import Streamline, create_hook
from streamline_pool.config.env import system_env
from streamline_pool.domain.errors import StoreUnavailableError, WorkflowError
from streamline_pool.protocol.operations import Command, Op
from streamline_pool.storage.store import Store
from support import eventually

LATE_S = 0.02  # how long a copy of a write that was given up on is under way
OPERATIONS_MAX = 20  # a call needs some five; more would mean that a fault makes it spin
HASTE = 20


class FaultyStore(Store):
    """Operation number `first` fails: "lost" on the way there, "unknown" on the way back, "late" and then applied after all."""

    kind = "none"
    first = 0
    seen = 0
    hit: str | None = None
    late: threading.Timer | None = None

    def fail(self, kind: str, first: int) -> None:
        self.kind, self.first, self.seen, self.hit = kind, first, 0, None

    def run(self, op: Op, session: Any = None) -> Any:
        self.seen += 1
        if self.seen != self.first:
            return super().run(op, session)
        self.hit = op.name
        if self.kind == "unknown":
            super().run(op, session)
        elif self.kind == "late" and isinstance(op, Command):
            self.late = threading.Timer(LATE_S, super().run, (op, session))
            self.late.start()
        raise StoreUnavailableError(f"{op.name}: a fault of this test", transient=True)

    def settle(self) -> None:
        """No more faults, and nothing under way any more."""
        self.first = 0
        if self.late is not None:
            self.late.join()
            self.late = None


class Scene:
    """A run that waits, by its step for a person, by a hook, or for an event."""

    def __init__(self, app: Streamline) -> None:
        self.app = app
        self.tokens: list[str] = []

        def hook(ctx: Any) -> None:
            self.tokens.append(create_hook(ctx, "?").token)
            ctx.wait("?")

        endings = {"human": lambda ctx: ctx.wait("?"), "hook": hook, "event": lambda ctx: ctx.wait_for("news")}
        self.workflows = {
            name: app.workflow(name, steps={"one": ending, "two": lambda ctx: ctx.get_output("one"), "three": lambda ctx: ctx.wait("?")})
            for name, ending in endings.items()
        }

        self.heard: list[str] = []
        app.events.on("*", lambda event: self.heard.append(event.name))

    def told(self, document: dict[str, Any]) -> list[str]:
        """What subscribers have heard of the run as a whole since this was last asked."""
        self.app.services.publish(document, "mark")
        eventually(lambda: "mark" in self.heard)
        heard = [name for name in self.heard if name.startswith("workflow:")]
        self.heard.clear()
        return heard

    def begin(self, kind: str, paused: bool) -> str:
        workflow = self.workflows[kind]
        run = workflow.execute(workflow.start().id)
        assert run.step("one").status == "waiting"
        if paused:
            workflow.pause(run.id)
        return run.id


CALLS: dict[str, tuple[str, bool, Callable[[Scene, str], Any]]] = {
    "answer": ("human", False, lambda scene, run_id: scene.app.resume_run(run_id, "yes")),
    "hook": ("hook", False, lambda scene, run_id: scene.app.resume_hook(scene.tokens[-1], "yes")),
    "hook, paused": ("hook", True, lambda scene, run_id: scene.app.resume_hook(scene.tokens[-1], "yes")),
    "event to one": ("event", False, lambda scene, run_id: scene.app.send_event("news", "yes", run_id=run_id)),
    "event to all": ("event", False, lambda scene, run_id: scene.app.send_event("news", "yes")),
    "event to the inbox": ("human", False, lambda scene, run_id: scene.app.send_event("news", "yes", run_id=run_id)),
    "pause": ("human", False, lambda scene, run_id: scene.app.pause_run(run_id)),
    "resume": ("human", True, lambda scene, run_id: scene.app.resume_run(run_id)),
    "rewind": ("human", False, lambda scene, run_id: scene.app.rewind_run(run_id, "one")),
    "cancel": ("human", False, lambda scene, run_id: scene.app.cancel_run(run_id, reason="why")),
}


TOLD: dict[str, str | None] = {"event to the inbox": None, "pause": "workflow:paused", "cancel": "workflow:cancelled", "rewind": None}
"""What subscribers hear, once; of all others that the run was resumed."""


@pytest.mark.timeout(180)
@pytest.mark.parametrize("kind", ["lost", "unknown", "late"])
@pytest.mark.parametrize("call", CALLS)
def test_an_outside_call_takes_effect_once_whichever_of_its_operations_fails(
    make_app: Callable[..., Streamline], call: str, kind: str
) -> None:
    """Whoever is told yes relies on it, and a repetition, or a copy that comes late, must not do it a second time."""
    system = system_env()
    app = make_app(env=replace(system, sleep=lambda s: system.sleep(s / HASTE)))
    store = app.connections.use(FaultyStore(app.where, app.env))
    scene = Scene(app)
    waits_for, paused, act = CALLS[call]
    for number in range(1, OPERATIONS_MAX):
        run_id = scene.begin(waits_for, paused)
        before = app.runs.find_one({"_id": run_id})
        scene.told(before)
        store.fail(kind, number)
        try:
            result: Any = act(scene, run_id)
        except WorkflowError as exc:
            result = exc.code
        hit = store.hit
        store.settle()
        after = app.runs.find_one({"_id": run_id})
        told = TOLD.get(call, "workflow:resumed")
        assert scene.told(after) == ([told] if told else []), f"operation {number} ({hit}) {kind}"
        check_effect(scene, call, before, after, result, f"operation {number} ({hit}) {kind}")
        if hit is None:
            assert number > 1, "the loop ended before it tested anything"
            return
    raise AssertionError("something spins")


def check_effect(scene: Scene, call: str, before: dict[str, Any], after: dict[str, Any], result: Any, where: str) -> None:
    """The call succeeded, and its effect is there once; then the run is brought on."""
    app, run_id = scene.app, after["_id"]
    check_invariants([after])
    assert not isinstance(result, str), f"{where}: {result}"
    step = after["steps"][0]
    workflow = scene.workflows[after["workflowId"]]
    match call:
        case "answer" | "hook" | "hook, paused" | "event to one" | "event to all":
            assert (step["status"], step["output"], after["token"]) == ("done", "yes", before["token"] + 1), where
            if call == "event to one":
                assert result == 1, where
            if call == "event to all":
                (event,) = app.store().collection("events").find({"_id": step["answer"]})
                assert event["pending"] is False, where
            if after["paused"]:
                workflow.resume(run_id)
            on = workflow.execute(run_id)
            assert (on.step("two").output, on.step("three").status) == ("yes", "waiting"), where
        case "event to the inbox":
            assert (result, [item["data"] for item in after["inbox"]]) == (0, ["yes"]), where
        case "pause" | "resume":
            assert (result.paused, after["paused"], after["acts"]) == (call == "pause", call == "pause", before["acts"] + 1), where
            assert step == before["steps"][0], where
        case "rewind":
            assert (after["rewinds"], after["acts"], step["status"]) == (1, before["acts"] + 1, "pending"), where
        case "cancel":
            assert (after["status"], after["acts"], result.status) == ("cancelled", before["acts"] + 1, "cancelled"), where
    if after["endedAt"] is None:
        app.cancel_run(run_id)
