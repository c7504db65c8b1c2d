"""Waiting for people: one answer counts, it becomes the step's output, and no process that dies loses it."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from other_program import other_program
from stored_runs import stored, until_step
from waiting_app import evidence, waiting_pool
from workers import Pool, check_invariants, run_until_idle

from streamline_pool import InvalidStateError, Run, Streamline, ValidationError, Workflow, is_timeout
from streamline_pool.protocol import claims
from streamline_pool.protocol.answers import answer_wait
from support import eventually, present


def asking(app: Streamline, kind: str = "def", **options: Any) -> Workflow:
    """A workflow whose first step waits for a person, and whose second returns the answer."""

    async def ask_async(ctx: Any) -> None:
        ctx.wait("approve?", {"amount": 5}, **options)

    ask = ask_async if kind == "async def" else lambda ctx: ctx.wait("approve?", {"amount": 5}, **options)
    return app.workflow("asking", steps={"ask": ask, "use": lambda ctx: ctx.get_output("ask")})


def begun(workflow: Workflow) -> Run:
    """A run of the workflow that waits."""
    run = workflow.execute(workflow.start().id)
    assert (run.status, run.steps[0].status) == ("waiting", "waiting")
    return run


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_the_answer_is_the_steps_output_and_its_handler_is_not_called_again(app: Streamline, kind: str) -> None:
    entered: list[int] = []

    def ask(ctx: Any) -> None:
        entered.append(ctx.attempt)
        ctx.wait("approve?")

    async def ask_async(ctx: Any) -> None:
        ask(ctx)

    workflow = app.workflow("w", steps={"ask": ask if kind == "def" else ask_async, "use": lambda ctx: ctx.get_output("ask")})
    run = begun(workflow)
    answered = workflow.resume(run.id, {"approved": True})
    assert (answered.status, answered.step("ask").status, answered.step("ask").output) == ("running", "done", {"approved": True})
    done = workflow.execute(run.id)
    assert (done.status, done.output, entered, done.step("ask").attempts) == ("done", {"approved": True}, [1], 1)
    check_invariants([done.to_dict()])


def test_a_waiting_run_shows_what_it_waits_for_and_has_no_lease(app: Streamline) -> None:
    run = begun(asking(app, timeout=3600))
    document = run.to_dict()
    step = run.step("ask")
    assert step.waiting_for == {"type": "human", "reason": "approve?", "data": {"amount": 5}, "expiresAt": document["wakeAt"]}
    assert timedelta(seconds=3590) < document["wakeAt"] - datetime.now(UTC) <= timedelta(seconds=3601)
    assert "lease" not in document
    forever = app.workflow("forever", steps={"a": lambda ctx: ctx.wait("?")})
    document = begun(forever).to_dict()
    assert "wakeAt" not in document, "no worker may poll a run that only a person can continue"
    assert "expiresAt" not in document["steps"][0]["waitingFor"]


def test_what_a_step_has_set_before_it_waits_is_kept(app: Streamline) -> None:
    def ask(ctx: Any) -> None:
        ctx.set("asked.by", ctx.step_id)
        ctx.wait("?")

    workflow = app.workflow("w", steps={"ask": ask, "use": lambda ctx: ctx.context})
    run = begun(workflow)
    assert run.context == {"asked.by": "ask"}
    workflow.resume(run.id)
    assert workflow.execute(run.id).output == {"asked.by": "ask"}


@pytest.mark.parametrize(
    "payload",
    [None, False, 0, "", "$workflowId", {"$literal": 1}, {"$inc": {"x": 1}, "a.b": "$$NOW", "": 1}, [["$steps"]], b"\x00", {"$ref": 1},
     datetime(2026, 1, 1, tzinfo=UTC), "$$REMOVE", {"$cond": [True, 1, 2]}, {"nested": [{"$date": "x"}]}],
)  # fmt: skip
def test_an_answer_is_data_and_never_an_expression(app: Streamline, payload: Any) -> None:
    """An update pipeline writes the answer, and in it "$name" is a field and {"$op": …} is a computation."""
    workflow = asking(app)
    run = begun(workflow)
    assert workflow.resume(run.id, payload).step("ask").output == payload
    assert workflow.execute(run.id).output == payload


@pytest.mark.parametrize("payload", [object(), {"a": [1, {2, 3}]}, 2**70, "\ud800"])
def test_an_answer_that_cannot_be_stored_is_refused_and_the_wait_goes_on(app: Streamline, payload: Any) -> None:
    workflow = asking(app)
    run = begun(workflow)
    before = stored(app, run)
    with pytest.raises(ValidationError, match="resume: payload"):
        workflow.resume(run.id, payload)
    assert stored(app, run) == before


def test_the_asyncio_function_answers_too(app: Streamline) -> None:
    workflow = asking(app)
    run = begun(workflow)

    async def answer() -> Run:
        resumed: Run = await workflow.resume_async(run.id, "yes")
        await app.close_async()
        return resumed

    assert asyncio.run(answer()).step("ask").output == "yes"


def test_the_last_step_may_wait_and_its_answer_is_the_runs_output(app: Streamline) -> None:
    workflow = app.workflow("w", steps={"ask": lambda ctx: ctx.wait("?")})
    run = begun(workflow)
    answered = workflow.resume(run.id, "the end")
    check_invariants([answered.to_dict()])
    run_until_idle(app)
    done = present(workflow.get(run.id))
    assert (done.status, done.output, done.ended_at is not None) == ("done", "the end", True)


def test_an_old_answer_does_not_answer_a_newer_wait(app: Streamline) -> None:
    """A delayed copy of a request must not answer a wait that its sender has never seen."""
    workflow = app.workflow("w", steps={"one": lambda ctx: ctx.wait("first?"), "two": lambda ctx: ctx.wait("second?")})
    run = begun(workflow)
    workflow.resume(run.id, "to the first")
    workflow.execute(run.id)
    before = stored(app, run)
    for step_id, gen in (("one", 1), ("two", 1), ("one", 2)):
        assert app.store().run(answer_wait("w", run.id, step_id, gen, "late", "copy")) is None
    assert stored(app, run) == before
    assert workflow.resume(run.id, "to the second").step("two").output == "to the second"


def test_a_rewound_step_waits_again_and_no_answer_to_its_first_wait_counts(app: Streamline) -> None:
    workflow = asking(app)
    run = begun(workflow)
    gen = stored(app, run)["waitGen"]
    workflow.rewind_to(run.id, "ask")
    again = workflow.execute(run.id)
    assert (again.step("ask").status, again.document["waitGen"]) == ("waiting", gen + 1)
    assert app.store().run(answer_wait(None, run.id, "ask", gen, "late", "copy")) is None
    assert workflow.resume(run.id, "new").step("ask").output == "new"


def test_an_answer_removes_the_lease_of_a_worker_that_holds_the_run_for_its_deadline(app: Streamline) -> None:
    """The worker is about to time out the wait; the answer must neither wait for the lease nor lose against it."""
    workflow = asking(app, timeout=3600)
    run = begun(workflow)
    app.runs.update_one({"_id": run.id}, {"$set": {"wakeAt": datetime.now(UTC)}})
    claimed = app.store().run(claims.claim_run(run.id, None, "claim", "test:0:holder", 60.0))
    answered = workflow.resume(run.id, "in time").to_dict()
    assert ("lease" in answered, answered["token"], answered["steps"][0]["output"]) == (False, claimed["token"] + 1, "in time")
    assert workflow.execute(run.id).output == "in time", "the run continues at once, not when that lease has expired"


# --- timeouts -------------------------------------------------------------------------------------------------------


def test_a_wait_without_an_answer_ends_by_its_timeout_and_the_run_continues(app: Streamline) -> None:
    workflow = asking(app, timeout=0.2)
    run = begun(workflow)
    run_until_idle(app)
    done = present(workflow.get(run.id))
    assert (done.status, done.step("ask").status, done.step("ask").attempts) == ("done", "done", 1)
    assert is_timeout(done.step("ask").output)
    assert is_timeout(done.output)
    assert present(done.step("ask").ended_at) - present(done.step("ask").started_at) >= timedelta(seconds=0.2)
    with pytest.raises(InvalidStateError):
        workflow.resume(run.id, "too late")


def test_a_run_claimed_before_its_deadline_is_parked_with_it(app: Streamline) -> None:
    """A worker that claims too early, for example by a wrong clock, must neither end the wait nor lose its deadline."""
    workflow = asking(app, timeout=3600)
    run = begun(workflow)
    wake_at = stored(app, run)["wakeAt"]
    app.runs.update_one({"_id": run.id}, {"$set": {"wakeAt": datetime.now(UTC)}})
    run_until_idle(app)
    document = stored(app, run)
    assert (document["status"], document["steps"][0]["status"], document["wakeAt"]) == ("waiting", "waiting", wake_at)
    assert "lease" not in document


@pytest.mark.slow
def test_an_answer_that_races_the_deadline_counts_or_is_refused(app: Streamline) -> None:
    """If an answer were accepted and timed out, the person would get a success and the run a timeout."""
    chance = random.Random(11)
    steps = {"ask": lambda ctx: ctx.wait("?", timeout=0.3 + ctx.input / 50), "use": lambda ctx: ctx.get_output("ask")}
    workflow = app.workflow("asking", steps=steps)
    runs = workflow.start_many(range(60))
    said: dict[str, str] = {}

    def has_begun(run: Run) -> bool:
        return stored(app, run)["steps"][0]["status"] in ("waiting", "done")

    def has_passed(time: datetime) -> bool:
        return datetime.now(UTC) >= time

    def answer_all() -> bool:
        for run in runs:
            eventually(partial(has_begun, run))
            deadline = stored(app, run)["steps"][0].get("waitingFor", {}).get("expiresAt")
            if deadline is not None:
                early = timedelta(milliseconds=chance.uniform(-5, 15))
                eventually(partial(has_passed, deadline - early))
            try:
                workflow.resume(run.id, run.id)
                said[run.id] = "accepted"
            except InvalidStateError:
                said[run.id] = "refused"
        return True

    async def play() -> None:
        async with Pool(app, workers=2) as pool:
            await asyncio.gather(pool.until(lambda: app.runs.count_documents({"endedAt": None}) == 0), asyncio.to_thread(answer_all))

    asyncio.run(play())
    for run in runs:
        done = present(workflow.get(run.id))
        assert done.status == "done"
        assert (said[run.id] == "accepted") == (done.output == run.id) == (not is_timeout(done.output)), done.output
    print({outcome: list(said.values()).count(outcome) for outcome in ("accepted", "refused")})


# --- several processes ----------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_of_two_answers_from_two_processes_exactly_one_counts(client: Streamline, mongodb_uri: str, database: str, tmp_path: Path) -> None:
    """Two people answer at the same moment while a pool works on the run; only one answer may count."""
    approval = client.workflows["approval"]
    wins = {"left": 0, "right": 0}
    with (
        waiting_pool(tmp_path, mongodb_uri, database),
        other_program(mongodb_uri, database) as left,
        other_program(mongodb_uri, database) as right,
    ):
        runs = approval.start_many([{}] * 30)
        for run in runs:
            until_step(client, run, "ask", "waiting")
            left.ask("resume_run", run.id, "left")
            right.ask("resume_run", run.id, "right")
            answers = {"left": left.answer(), "right": right.answer()}
            winners = [who for who, answer in answers.items() if "error" not in answer]
            losers = [answer for answer in answers.values() if "error" in answer]
            assert (len(winners), losers) == (1, [{"error": "INVALID_STATE"}]), answers
            wins[winners[0]] += 1
            done = approval.wait_for(run.id, timeout=20)
            assert (done.output, done.step("ask").output) == (winners[0], winners[0])
    print(wins)
    entered = [entry["step"] for entry in evidence(client, "entered")]
    assert (entered.count("ask"), entered.count("act")) == (30, 30), "every handler was entered once"


@pytest.mark.timeout(120)
def test_an_answer_from_another_process_is_taken_up_by_the_pool_at_once(
    client: Streamline, mongodb_uri: str, database: str, tmp_path: Path
) -> None:
    """Only the answer's own wake-up can be this fast: no run is due, and sweeps are rare."""
    approval = client.workflows["approval"]
    took_s = []
    with waiting_pool(tmp_path, mongodb_uri, database), other_program(mongodb_uri, database) as other:
        for _ in range(5):
            run = approval.start()
            until_step(client, run, "ask", "waiting")
            answered_at = time.time()
            assert other.call("resume_run", run.id, "yes")["id"] == run.id
            approval.wait_for(run.id, timeout=20)
            (entry,) = evidence(client, "entered", run=run.id, step="act")
            took_s.append(entry["at"] - answered_at)
    print([f"{took * 1000:.0f} ms" for took in took_s])
    assert min(took_s) < 0.1
    assert max(took_s) < 2.0, "the sweep comes only every six seconds"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_wait_outlives_every_process_and_so_does_its_answer(client: Streamline, mongodb_uri: str, database: str, tmp_path: Path) -> None:
    """The pool is killed while the run waits, the answer arrives while no pool exists, and the next pool must continue the run."""
    approval = client.workflows["approval"]
    with waiting_pool(tmp_path / "first", mongodb_uri, database) as pool:
        answered, unanswered = approval.start(), approval.start({"timeout": 1.0})
        for run in (answered, unanswered):
            until_step(client, run, "ask", "waiting")
        for child in pool.children():
            child.kill()
        os.kill(pool.pid, signal.SIGKILL)
    with other_program(mongodb_uri, database) as other:
        assert other.call("resume_run", answered.id, "while no pool was there")["status"] == "running"
    with waiting_pool(tmp_path / "second", mongodb_uri, database):
        assert approval.wait_for(answered.id, timeout=20).output == "while no pool was there"
        assert approval.wait_for(unanswered.id, timeout=20).output == "no answer", "a deadline is kept across restarts, too"
    assert [entry["run"] for entry in evidence(client, "entered", step="ask")].count(answered.id) == 1


def test_a_wait_ends_the_handler_wherever_it_is_raised_and_caught(app: Streamline) -> None:
    def swallow(ctx: Any) -> str:
        try:
            ctx.wait("?")
        except BaseException:  # noqa: BLE001 -- careless handlers catch everything
            return "swallowed"
        raise AssertionError("the wait did not end the handler")

    def in_a_thread(ctx: Any) -> None:
        thread = threading.Thread(target=lambda: swallow(ctx))
        thread.start()
        thread.join()

    for number, handler in enumerate((swallow, in_a_thread)):
        workflow = app.workflow(f"w{number}", steps={"ask": handler})
        run = begun(workflow)
        assert workflow.resume(run.id, "answer").step("ask").output == "answer"


@pytest.mark.parametrize("operation", [Streamline.resume_run, Streamline.pause_run, Streamline.cancel_run])
def test_control_operations_on_unknown_runs_say_so(app: Streamline, operation: Callable[..., Any]) -> None:
    with pytest.raises(Exception, match="WORKFLOW_NOT_FOUND"):
        operation(app, "unknown")
