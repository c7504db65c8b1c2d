"""Every control operation in every state a run can be in: the outcome, the stored fields and the published events.

The matrix below states the documented outcome of each cell. After every operation the run is sound. Unless it was
cancelled, it can still be brought to its end.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from stored_runs import stored
from workers import check_invariants, run_until_idle

from streamline_pool import InvalidStateError, Run, Streamline, WorkflowError, create_hook
from support import eventually

STATES = ["draft", "ready", "held", "backing off", "sleeping", "human", "webhook", "event"]


ENDED = ["done", "failed", "cancelled"]


PAUSED = [f"{state}, paused" for state in STATES]


class Scene:
    """One run in a state of the matrix, and what is needed to end it."""

    def __init__(self, app: Streamline, state: str, name: str = "w") -> None:
        self.app = app
        self.state, _, pause = state.partition(", ")
        self.token: str | None = None
        self.entered, self.go = threading.Event(), threading.Event()
        self.tame = False  # True: from now on the step succeeds
        self.received: list[str] = []
        self.workflow = app.workflow(
            name,
            steps={
                "zero": lambda ctx: 0,
                "act": (self.act, {"retry_delay": 3600, "retries": 1 if self.state == "failed" else 2}),
                "end": lambda ctx: "end",
            },
        )
        self.thread: threading.Thread | None = None
        self.run = self.bring()
        if pause:
            self.workflow.pause(self.run.id, reason="the test says so")
        app.events.on("*", lambda event: self.received.append(event.name))

    def act(self, ctx: Any) -> str:
        if self.tame:
            return "tame"
        match self.state:
            case "held":
                self.entered.set()
                self.go.wait(20)
            case "backing off" | "failed":
                raise ValueError("as it should")
            case "sleeping":
                ctx.sleep(3600)
            case "human":
                ctx.wait("approve?")
            case "webhook":
                self.token = create_hook(ctx, "sign").token
                ctx.wait("sign")
            case "event":
                ctx.wait_for("news")
        return "acted"

    def bring(self) -> Run:
        run = self.workflow.start(start_at=3600 if self.state == "draft" else None)
        match self.state:
            case "draft" | "ready":
                return run
            case "cancelled":
                return self.workflow.cancel(run.id)
            case "held":
                self.thread = threading.Thread(target=self.workflow.execute, args=(run.id,))
                self.thread.start()
                assert self.entered.wait(20)
                return run
        return self.workflow.execute(run.id)

    def document(self) -> dict[str, Any]:
        """The stored run, without the expiry that the lease holder's renewals change."""
        document = stored(self.app, self.run)
        document.get("lease", {}).pop("expiresAt", None)
        return document

    def finish(self) -> dict[str, Any]:
        """End the run by the calls that its users would make. Returns its document."""
        self.tame = True
        self.go.set()
        if self.thread is not None:
            self.thread.join(20)
        if self.document()["paused"] and self.document()["endedAt"] is None:
            self.workflow.resume(self.run.id)
        # The test does not wait for hours: it moves the due time of a sleep into the past.
        past = datetime.now(UTC) - timedelta(seconds=1)
        self.app.runs.update_one({"_id": self.run.id, "wakeAt": {"$exists": True}}, {"$set": {"wakeAt": past}})
        timer = {"_id": self.run.id, "steps.1.waitingFor.resumeAt": {"$exists": True}}
        self.app.runs.update_one(timer, {"$set": {"steps.1.waitingFor.resumeAt": past}})
        run_until_idle(self.app)
        with contextlib.suppress(InvalidStateError):
            self.workflow.resume(self.run.id, "answered")
        self.app.send_event("news", "sent", run_id=self.run.id)
        run_until_idle(self.app)
        return self.document()


OPERATIONS: dict[str, Callable[[Scene], Any]] = {
    "pause": lambda scene: scene.workflow.pause(scene.run.id, reason="why"),
    "resume": lambda scene: scene.workflow.resume(scene.run.id),
    "resume with a payload": lambda scene: scene.workflow.resume(scene.run.id, "yes"),
    "rewind": lambda scene: scene.workflow.rewind_to(scene.run.id, "zero"),
    "cancel": lambda scene: scene.workflow.cancel(scene.run.id, reason="why"),
    "send": lambda scene: scene.app.send_event("news", "yes", run_id=scene.run.id),
    "broadcast": lambda scene: scene.app.send_event("news", "yes"),
}


# state: pause, resume, resume with a payload, rewind, cancel, send, broadcast
_CELLS: dict[str, str] = {
    "draft": "paused refused refused rewound cancelled kept unwoken",
    "ready": "paused refused refused rewound cancelled kept unwoken",
    "held": "paused refused refused rewound cancelled kept unwoken",
    "backing off": "paused refused refused rewound cancelled kept unwoken",
    "sleeping": "paused refused refused rewound cancelled kept unwoken",
    "human": "paused answered answered rewound cancelled kept unwoken",
    "webhook": "paused answered answered rewound cancelled kept unwoken",
    "event": "paused refused refused rewound cancelled woken woken",
    "done": "same refused refused rewound same unwoken unwoken",
    "failed": "same refused refused rewound same unwoken unwoken",
    "cancelled": "same refused refused refused same unwoken unwoken",
    **{
        f"{state}, paused": f"same unpaused refused rewound cancelled {'woken woken' if state == 'event' else 'kept unwoken'}"
        for state in STATES
    },
}


SCHEDULE = ("wakeAt", "pausedWakeAt", "lease", "awaits")


def test_the_matrix_has_every_state_and_operation() -> None:
    assert set(_CELLS) == {*STATES, *ENDED, *PAUSED}
    assert {len(cells.split()) for cells in _CELLS.values()} == {len(OPERATIONS)}


@pytest.mark.parametrize("state", _CELLS)
def test_every_control_operation_in_every_state_has_its_documented_outcome(app: Streamline, state: str) -> None:
    for number, (operation, outcome) in enumerate(zip(OPERATIONS, _CELLS[state].split(), strict=True)):
        print(f"{operation}: {state}: {outcome}")
        check_cell(Scene(app, state, f"w{number}"), operation, outcome)


def check_cell(scene: Scene, operation: str, outcome: str) -> None:
    """Check one cell of the matrix, and that the run then ends with the right status."""
    state = scene.state
    before = scene.document()
    try:
        result: Any = OPERATIONS[operation](scene)
    except WorkflowError as exc:
        result = exc.code
    after = scene.document()
    check_invariants([stored(scene.app, scene.run)])
    step, was = after["steps"][1], before["steps"][1]
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    paused_before = before["paused"]
    match outcome:
        case "refused":
            assert result == "INVALID_STATE"
            assert after == before
        case "same":
            assert (result.status, after) == (before["status"], before)
        case "unwoken":
            assert result == 0
            assert after == before
        case "paused":
            assert (result.paused, result.status, after["pauseReason"]) == (True, before["status"], "why")
            assert (after.get("lease"), after["steps"]) == (before.get("lease"), before["steps"])
            assert "wakeAt" not in after
            assert after.get("pausedWakeAt") == before.get("wakeAt")
        case "unpaused":
            assert (result.paused, result.status, after["steps"]) == (False, before["status"], before["steps"])
            assert (after.get("lease"), after.get("wakeAt")) == (before.get("lease"), before.get("pausedWakeAt"))
            assert "pausedWakeAt" not in after
            assert "pauseReason" not in after
        case "answered" | "woken":
            expected = None if operation == "resume" else "yes"
            assert (step["status"], step["output"], step["attempts"], was["status"]) == ("done", expected, was["attempts"], "waiting")
            assert (after["currentStepId"], after["status"], after["paused"]) == ("end", "running", paused_before)
            assert after["token"] == before["token"] + 1
            assert (set(SCHEDULE) & set(after)) == {"pausedWakeAt" if paused_before else "wakeAt"}
            assert result == 1 if outcome == "woken" else result.step("act").output == expected
        case "kept":
            assert (result, [item["data"] for item in after["inbox"]]) == (0, ["yes"])
            assert changed == {"inbox", "seen", "updatedAt"}
        case "rewound":
            assert (result.status, result.paused) == ("running", paused_before)
            assert [(part["status"], part["attempts"]) for part in after["steps"]] == [("pending", 0)] * 3
            assert (after["currentStepId"], after["context"], after["endedAt"], after["error"]) == ("zero", before["context"], None, None)
            assert after["token"] == before["token"] + 1
            assert (set(SCHEDULE) & set(after)) == {"pausedWakeAt" if paused_before else "wakeAt"}
        case "cancelled":
            assert (result.status, after["cancelReason"], after["endedAt"] is not None) == ("cancelled", "why", True)
            assert after["token"] == before["token"] + 1
            assert not set(SCHEDULE) & set(after)
            assert after["steps"] == before["steps"]
    if scene.token is not None and outcome in ("rewound", "cancelled", "answered"):
        with pytest.raises(WorkflowError, match="HOOK_TOKEN_INVALID"):
            scene.app.resume_hook(scene.token, "late")
    finished = scene.finish()
    check_invariants([finished])
    if finished["status"] != before["status"] or before["status"] not in ENDED:
        final = "cancelled" if outcome == "cancelled" else "failed" if state == "failed" and outcome != "rewound" else "done"
        assert finished["status"] == final, finished
    if finished["status"] == "done" and state not in ENDED:
        assert finished["output"] == "end"


@pytest.mark.parametrize("state", [*STATES, *ENDED, *PAUSED])
def test_only_changes_that_happened_are_published(app: Streamline, state: str) -> None:
    """`cancel` and `pause` of an ended run, and refused operations, must publish nothing."""
    expected = {"paused": ["workflow:paused"], "unpaused": ["workflow:resumed"], "cancelled": ["workflow:cancelled"]}
    expected["answered"] = ["step:completed", "workflow:resumed"]
    operation = {"done": "cancel", "failed": "pause", "cancelled": "cancel"}.get(state, "resume")
    outcome = dict(zip(OPERATIONS, _CELLS[state].split(), strict=True))[operation]
    scene = Scene(app, state)
    with contextlib.suppress(WorkflowError):
        OPERATIONS[operation](scene)
    app.events.on("mark", lambda event: scene.received.append("end of what was published"))
    scene.app.services.publish(scene.document(), "mark")
    eventually(lambda: "end of what was published" in scene.received)
    assert [name for name in scene.received if name not in ("mark", "end of what was published")] == expected.get(outcome, [])
    scene.finish()
