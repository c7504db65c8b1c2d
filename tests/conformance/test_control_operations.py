"""Pause, resume, rewind, cancel, answers and events in every state a run can be in, from everywhere, and against each other.

The matrix below is CONTRACT, sections 2 to 4 and 9, cell by cell. Whatever was done to a run, it is sound afterwards, and
unless it was cancelled it can still be brought to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from other_program import other_program
from waiting_app import evidence, stored, until_step, waiting_app, waiting_pool
from workers import check_invariants, run_until_idle

from streamline_pool import InvalidStateError, Run, StepNotFoundError, Streamline, WorkflowError, WorkflowNotFoundError, create_hook
from streamline_pool.protocol import control
from support import eventually

STATES = ["draft", "ready", "held", "backing off", "sleeping", "human", "webhook", "event"]
ENDED = ["done", "failed", "cancelled"]
PAUSED = [f"{state}, paused" for state in STATES]


class Scene:
    """One run in a state of the matrix, and all that is needed to bring it to its end."""

    def __init__(self, app: Streamline, state: str, name: str = "w") -> None:
        self.app = app
        self.state, _, pause = state.partition(", ")
        self.token: str | None = None
        self.entered, self.go = threading.Event(), threading.Event()
        self.tame = False  # from now on the step simply succeeds
        self.heard: list[str] = []
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
        app.events.on("*", lambda event: self.heard.append(event.name))

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
        """The run as stored, but for what its holder's renewals change."""
        document = stored(self.app, self.run)
        document.get("lease", {}).pop("expiresAt", None)
        return document

    def finish(self) -> dict[str, Any]:
        """Whatever it takes to end the run, as its users would do it; its document then."""
        self.tame = True
        self.go.set()
        if self.thread is not None:
            self.thread.join(20)
        if self.document()["paused"] and self.document()["endedAt"] is None:
            self.workflow.resume(self.run.id)
        # Nobody waits for hours here: whatever the run sleeps for is over now.
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


ACTS: dict[str, Callable[[Scene], Any]] = {
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
    "draft": "paused refused refused rewound cancelled kept nobody",
    "ready": "paused refused refused rewound cancelled kept nobody",
    "held": "paused refused refused rewound cancelled kept nobody",
    "backing off": "paused refused refused rewound cancelled kept nobody",
    "sleeping": "paused refused refused rewound cancelled kept nobody",
    "human": "paused answered answered rewound cancelled kept nobody",
    "webhook": "paused answered answered rewound cancelled kept nobody",
    "event": "paused refused refused rewound cancelled woken woken",
    "done": "same refused refused rewound same nobody nobody",
    "failed": "same refused refused rewound same nobody nobody",
    "cancelled": "same refused refused refused same nobody nobody",
    **{
        f"{state}, paused": f"same unpaused refused rewound cancelled {'woken woken' if state == 'event' else 'kept nobody'}"
        for state in STATES
    },
}
SCHEDULE = ("wakeAt", "pausedWakeAt", "lease", "awaits")


def test_the_matrix_has_every_state_and_act() -> None:
    assert set(_CELLS) == {*STATES, *ENDED, *PAUSED}
    assert {len(cells.split()) for cells in _CELLS.values()} == {len(ACTS)}


@pytest.mark.parametrize("state", _CELLS)
def test_every_act_in_every_state_does_what_the_contract_says(app: Streamline, state: str) -> None:
    for number, (act, outcome) in enumerate(zip(ACTS, _CELLS[state].split(), strict=True)):
        print(f"{act}: {state}: {outcome}")
        check_cell(Scene(app, state, f"w{number}"), act, outcome)


def check_cell(scene: Scene, act: str, outcome: str) -> None:
    """One cell of the matrix, and that the run comes to the end that it should come to."""
    state = scene.state
    before = scene.document()
    try:
        result: Any = ACTS[act](scene)
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
        case "nobody":
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
            expected = None if act == "resume" else "yes"
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
def test_only_what_has_happened_is_published(app: Streamline, state: str) -> None:
    """`cancel` and `pause` of an ended run publish nothing, and neither does what is refused."""
    expected = {"paused": ["workflow:paused"], "unpaused": ["workflow:resumed"], "cancelled": ["workflow:cancelled"]}
    expected["answered"] = ["step:completed", "workflow:resumed"]
    act = {"done": "cancel", "failed": "pause", "cancelled": "cancel"}.get(state, "resume")
    outcome = dict(zip(ACTS, _CELLS[state].split(), strict=True))[act]
    scene = Scene(app, state)
    with contextlib.suppress(WorkflowError):
        ACTS[act](scene)
    app.events.on("mark", lambda event: scene.heard.append("end of what was published"))
    scene.app.services.publish(scene.document(), "mark")
    eventually(lambda: "end of what was published" in scene.heard)
    assert [name for name in scene.heard if name not in ("mark", "end of what was published")] == expected.get(outcome, [])
    scene.finish()


# --- pause ----------------------------------------------------------------------------------------------------------


def held(app: Streamline, handler: Callable[[Any], Any], **options: Any) -> tuple[Any, Run, threading.Event, threading.Thread]:
    """A run whose first handler is at work until the event is set; the handler then does what `handler` does."""
    entered, go = threading.Event(), threading.Event()

    def work(ctx: Any) -> Any:
        if ctx.attempt == 1 and not go.is_set():
            entered.set()
            go.wait(20)
        return handler(ctx)

    workflow = app.workflow("held", steps={"work": (work, options), "end": lambda ctx: "end"})
    run = workflow.start()
    thread = threading.Thread(target=workflow.execute, args=(run.id,))
    thread.start()
    assert entered.wait(20)
    return workflow, run, go, thread


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
def test_whatever_a_handler_does_during_a_pause_is_stored_and_nothing_is_started(
    app: Streamline, ending: Callable[[Any], Any], options: dict[str, Any], step: str, status: str
) -> None:
    """The work is done and must not be done again; but nothing else happens to the run, however long the pause is."""
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
    assert stored(app, run) == document, "a paused run has been touched"
    if status != "failed":
        workflow.resume(run.id)
        run_until_idle(app)
        assert workflow.get(run.id).status == ("waiting" if due is None else "done")


def test_a_pause_that_is_taken_back_while_the_handler_works_costs_nothing(app: Streamline) -> None:
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
    paused = workflow.get(run.id)
    assert (paused.status, paused.step("work").status, paused.ended_at) == ("running", "done", None)
    workflow.resume(run.id)
    run_until_idle(app)
    assert (workflow.get(run.id).status, workflow.get(run.id).output) == ("done", "worked")


def test_a_checkpoint_and_a_hook_can_be_stored_during_a_pause(app: Streamline) -> None:
    """The step in progress is finished; a handler that is refused in its middle would not be."""

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
        # While this run stands still, others go through the same pool.
        for another in [slow.start() for _ in range(3)]:
            app.store().collection("go").insert_one({"_id": another.id})
            assert slow.wait_for(another.id, timeout=20).output == "rested"
        assert stored(app, run) == document
        assert other.call("resume_run", run.id)["paused"] is False
        assert slow.wait_for(run.id, timeout=20).output == "rested"
        assert len(evidence(app, "entered", run=run.id)) == 2, "each handler was entered once"


# --- cancel ---------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_a_cancel_from_another_process_reaches_a_running_handler_at_once(mongodb_uri: str, database: str, tmp_path: Path) -> None:
    took_s = []
    with (
        waiting_app(mongodb_uri, database) as app,
        waiting_pool(tmp_path, mongodb_uri, database),
        other_program(mongodb_uri, database) as other,
    ):
        slow = app.workflows["slow"]
        for _ in range(5):
            run = slow.start()
            eventually(lambda run=run: evidence(app, "entered", run=run.id), timeout=20)
            called_at = time.time()
            assert other.call("cancel_run", run.id)["status"] == "cancelled"
            (left,) = eventually(lambda run=run: evidence(app, "left", run=run.id))
            assert left["reason"] == "cancelled"
            took_s.append(left["at"] - called_at)
            assert [step["status"] for step in stored(app, run)["steps"]] == ["running", "pending"]
    print([f"{took * 1000:.0f} ms" for took in took_s])
    assert min(took_s) < 0.1
    assert max(took_s) < 2.0, "renewals are ten seconds apart: only the signal can have been so fast"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_cancel_whose_signal_is_lost_reaches_the_handler_with_the_next_renewal(mongodb_uri: str, database: str, tmp_path: Path) -> None:
    """Signals are hints. Here nobody sends one: the write alone must be enough."""
    with waiting_app(mongodb_uri, database) as app, waiting_pool(tmp_path, mongodb_uri, database, "--lease", "3"):
        run = app.workflows["slow"].start()
        eventually(lambda: evidence(app, "entered", run=run.id), timeout=20)
        cancelled_at = time.time()
        assert app.store().run(control.cancel_run(None, run.id, None, "act")) is not None
        (left,) = eventually(lambda: evidence(app, "left", run=run.id))
        assert left["at"] - cancelled_at < 2.0, "renewals are one second apart"
        assert left["reason"] in ("cancelled", "lease-lost")
        assert stored(app, run)["status"] == "cancelled"


# --- rewind ---------------------------------------------------------------------------------------------------------


def test_a_rewind_overtakes_the_attempt_under_way(app: Streamline) -> None:
    """Its handler may still be at work in some process: nothing it returns is stored, and another attempt is made at once."""
    outputs = iter(["overtaken", "second"])
    workflow, run, go, thread = held(app, lambda ctx: next(outputs))
    rewound = workflow.rewind_to(run.id, "work")
    assert rewound.step("work").attempts == 0
    go.set()
    thread.join(20)
    assert workflow.get(run.id).step("work").status == "pending"
    done = workflow.execute(run.id)
    assert (done.status, done.step("work").output, done.document["rewinds"]) == ("done", "second", 1)


def test_a_rewind_keeps_what_lies_before_it_and_the_context(app: Streamline) -> None:
    seen: list[Any] = []

    def two(ctx: Any) -> int:
        seen.append((ctx.attempt, ctx.get_output("one"), dict(ctx.context), ctx.get_checkpoint(), ctx.idempotency_key))
        ctx.set("two", len(seen))
        ctx.checkpoint("was here")
        return len(seen)

    workflow = app.workflow("w", steps={"one": lambda ctx: "one", "two": two, "three": lambda ctx: ctx.get_output("two")})
    run = workflow.execute(workflow.start({"x": 1}).id)
    workflow.rewind_to(run.id, "two")
    done = workflow.execute(run.id)
    (first, second) = seen
    assert first[:4] == (1, "one", {"x": 1}, None)
    assert second[:4] == (1, "one", {"x": 1, "two": 1}, None), "the context is kept, the checkpoint is not"
    assert first[4] != second[4], "what was paid in the first pass must not be taken for paid in the second"
    assert (done.step("one").attempts, done.output) == (1, 2)


def test_a_failed_run_is_mended_by_a_rewind(app: Streamline) -> None:
    broken = [True]

    def two(ctx: Any) -> str:
        if broken[0]:
            raise ValueError("broken")
        return "mended"

    workflow = app.workflow("w", steps={"one": lambda ctx: 1, "two": (two, {"retries": 1})})
    run = workflow.execute(workflow.start().id)
    assert (run.status, run.error["code"]) == ("failed", "STEP_FAILED")
    broken[0] = False
    rewound = workflow.rewind_to(run.id, "two")
    assert (rewound.status, rewound.error, rewound.ended_at) == ("running", None, None)
    assert workflow.execute(run.id).output == "mended"


@pytest.mark.parametrize("act", ["rewind_to", "rewind_run"])
def test_a_rewind_that_cannot_be_says_why_and_changes_nothing(app: Streamline, act: str) -> None:
    workflow = app.workflow("w", steps={"one": lambda ctx: ctx.wait("?"), "two": lambda ctx: 2})
    run = workflow.execute(workflow.start().id)
    rewind = workflow.rewind_to if act == "rewind_to" else app.rewind_run
    before = stored(app, run)
    with pytest.raises(StepNotFoundError, match="its steps are one, two"):
        rewind(run.id, "three")
    with pytest.raises(WorkflowNotFoundError):
        rewind("nobody", "one")
    assert stored(app, run) == before


def test_every_act_has_an_asyncio_twin_that_does_the_same(app: Streamline) -> None:
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


# --- against each other ---------------------------------------------------------------------------------------------


def test_the_same_act_twice_at_once_counts_once(app: Streamline) -> None:
    workflow = app.workflow("w", steps={"one": lambda ctx: ctx.wait("?"), "two": lambda ctx: 2})
    run = workflow.execute(workflow.start().id)
    for act, check in ((workflow.pause, True), (workflow.resume, False)):
        acts_before = stored(app, run)["acts"]
        threads = [threading.Thread(target=act, args=(run.id,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        document = stored(app, run)
        assert (document["paused"], document["acts"]) == (check, acts_before + 1)
        if check is False:
            # The second resume may have come after the first and have answered the wait: it was not paused any more.
            assert document["steps"][0]["status"] in ("waiting", "done")


def test_a_late_copy_of_a_pause_or_resume_does_nothing(app: Streamline) -> None:
    """The request of a call that has ended, still under way in the network, must not stop the run again."""
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
def test_whatever_two_processes_do_to_the_runs_of_a_pool_none_is_lost_or_wedged(
    mongodb_uri: str, database: str, tmp_path: Path, seed: int
) -> None:
    """Pause, resume, rewind, answers and events from two processes at random, against each other and the workers."""
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
                run = chance.choice(runs[:6] if chance.random() < 0.5 else runs)  # some are fought for
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

        def all_through() -> bool:
            """What users would do to bring the rest to an end."""
            for document in app.runs.find({"endedAt": None}):
                with contextlib.suppress(WorkflowError):
                    app.resume_run(document["_id"]) if document["paused"] else None
                step = next((part for part in document["steps"] if part["status"] == "waiting"), None)
                if step is not None and step["waitingFor"]["type"] == "event":
                    app.send_event("news", "yes", run_id=document["_id"])
                elif step is not None:
                    with contextlib.suppress(InvalidStateError):
                        app.resume_run(document["_id"], "yes")
            return app.runs.count_documents({"endedAt": None}) == 0

        eventually(all_through, timeout=40)
    print(f"seed {seed}: {said}")
    assert set(said) <= {"ok", "INVALID_STATE"}
    documents = list(app.runs.find())
    check_invariants(documents)
    for document in documents:
        expected = {"cancelled", "done"} if document["_id"] in cancelled else {"done"}
        assert document["status"] in expected, document
    app.close()
