"""Every operation of a client's call fails once, in every way an operation can fail, on a real server.

A call (answer, hook, event, pause, resume, rewind, cancel) is made while its operation number 1, 2, 3 … fails, until it
ends without reaching the faulty number. After each call: its result is what happened, it happened once, and the run continues.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from faulty_store import Faults, hasty_env, install_faults
from stored_runs import stored
from workers import check_invariants

from streamline_pool import Streamline, create_hook
from streamline_pool.domain.errors import WorkflowError
from support import eventually

OPERATIONS_MAX = 20  # a call needs about five; more would mean that a fault causes endless repetition


class Scene:
    """Workflows whose first step waits for a person, for a hook or for an event, and the events that were published."""

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

        self.received: list[str] = []
        app.events.on("*", lambda event: self.received.append(event.name))

    def published(self, document: dict[str, Any]) -> list[str]:
        """The `workflow:` events that subscribers have received since the last call."""
        self.app.services.publish(document, "mark")
        eventually(lambda: "mark" in self.received)
        received = [name for name in self.received if name.startswith("workflow:")]
        self.received.clear()
        return received

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


PUBLISHED: dict[str, str | None] = {"event to the inbox": None, "pause": "workflow:paused", "cancel": "workflow:cancelled", "rewind": None}
"""The event that a call publishes, once. The calls that are not listed publish `workflow:resumed`."""


@pytest.mark.timeout(180)
@pytest.mark.parametrize("kind", [pytest.param("lost", marks=pytest.mark.slow), "unknown", "late"])
@pytest.mark.parametrize("call", CALLS)
def test_a_clients_call_takes_effect_once_whichever_of_its_operations_fails(
    make_app: Callable[..., Streamline], call: str, kind: str
) -> None:
    """The caller relies on an acknowledged call; a repetition or a late copy must not apply it a second time."""
    app = make_app(env=hasty_env())
    store = install_faults(app)
    scene = Scene(app)
    waits_for, paused, make_call = CALLS[call]
    for number in range(1, OPERATIONS_MAX):
        run_id = scene.begin(waits_for, paused)
        before = stored(app, run_id)
        scene.published(before)
        store.faults = faults = Faults(kind, number)
        try:
            result: Any = make_call(scene, run_id)
        except WorkflowError as exc:
            result = exc.code
        store.late_applied()
        after = stored(app, run_id)
        where = f"operation {number} ({', '.join(faults.hit)}) {kind}"
        event = PUBLISHED.get(call, "workflow:resumed")
        assert scene.published(after) == ([event] if event else []), where
        check_effect(scene, call, before, after, result, where)
        if not faults.hit:
            assert number > 1, "the loop ended before it tested anything"
            return
    raise AssertionError(f"a call needed {OPERATIONS_MAX} operations: something repeats without end")


def check_effect(scene: Scene, call: str, before: dict[str, Any], after: dict[str, Any], result: Any, where: str) -> None:
    """The call succeeded and took effect once. Afterwards the run continues, and is then cancelled."""
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
