"""Conditional steps: the decision is made once and stored with the step; no crash, wait or restart repeats it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
from pool_process import running
from stored_runs import stored
from workers import Pool, check_invariants, run_until_idle

from streamline_pool import Context, Handler, StepOptions, Streamline, create_hook
from streamline_pool.engine import run_driver
from streamline_pool.protocol import operations, recovery
from support import present

CONDITIONS = ["condition", "skip_if", "run_if"]


def asked(answers: list[bool], name: str, log: list[str]) -> Any:
    """A predicate that returns `answers` one after the other (True: enter the step) and logs each call."""

    def ask(*args: Any) -> bool:
        log.append(name)
        enter = answers.pop(0) if len(answers) > 1 else answers[0]
        return not enter if name == "skip_if" else enter

    return (lambda ctx, run: ask()) if name == "condition" else (lambda ctx: ask())


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_skipped_step_is_stored_as_such_and_the_run_goes_on(app: Streamline, name: str) -> None:
    entered: list[str] = []
    options = cast(StepOptions, {name: asked([False], name, [])})
    steps: dict[str, Handler | tuple[Handler, StepOptions]] = {
        "one": lambda ctx: "one",
        "maybe": (lambda ctx: entered.append("maybe"), options),
        "end": lambda ctx: [ctx.get_output("one"), ctx.get_output("maybe")],
    }
    received: list[tuple[str, str | None]] = []
    app.events.on("*", lambda event: received.append((event.name, event.step_id)))
    workflow = app.workflow("w", steps=steps)
    done = workflow.execute(workflow.start().id)
    app.events.close()
    step = done.step("maybe")
    assert (done.status, done.output, entered) == ("done", ["one", None], [])
    assert (step.status, step.attempts, step.output, step.ended_at is not None) == ("skipped", 0, None, True)
    assert ("step:skipped", "maybe") in received
    assert ("step:started", "maybe") not in received


def test_a_run_whose_last_step_or_every_step_is_skipped_is_done(app: Streamline) -> None:
    skip: StepOptions = {"skip_if": lambda ctx: True}
    last = app.workflow("last", steps={"one": lambda ctx: 1, "two": (lambda ctx: 2, skip)})
    every = app.workflow("every", steps={"one": (lambda ctx: 1, skip), "two": (lambda ctx: 2, skip)})
    for workflow in (last, every):
        done = workflow.execute(workflow.start().id)
        check_invariants([done.to_dict()])
        assert (done.status, done.output, done.step("two").status) == ("done", None, "skipped")


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_predicates_see_the_run_as_it_is_and_may_be_async(app: Streamline, name: str, kind: str) -> None:
    seen: list[Any] = []

    def predicate(ctx: Any, *run: Any) -> bool:
        known = [(one.id == ctx.run_id, one.status) for one in run]
        seen.append((ctx.step_id, ctx.get_output("one"), ctx.context, ctx.input, known))
        return name != "skip_if"

    async def predicate_async(ctx: Any, *run: Any) -> bool:
        await asyncio.sleep(0)
        return predicate(ctx, *run)

    def one(ctx: Any) -> str:
        ctx.set("k", "set by one")
        return "one"

    options = cast(StepOptions, {name: predicate if kind == "def" else predicate_async})
    workflow = app.workflow("w", steps={"one": one, "two": (lambda ctx: "two", options)})
    assert workflow.execute(workflow.start({"i": 1}).id).output == "two"
    known = [(True, "running")] if name == "condition" else []
    assert seen == [("two", "one", {"i": 1, "k": "set by one"}, {"i": 1}, known)]


def test_condition_skip_if_and_run_if_are_evaluated_in_this_order_until_one_says_no(app: Streamline) -> None:
    for says_no, expected in (("condition", CONDITIONS[:1]), ("skip_if", CONDITIONS[:2]), ("run_if", CONDITIONS)):
        log: list[str] = []
        options = cast(StepOptions, {name: asked([name != says_no], name, log) for name in CONDITIONS})
        workflow = app.workflow(f"no-{says_no.replace('_', '-')}", steps={"a": (lambda ctx: 1, options)})
        assert workflow.execute(workflow.start().id).step("a").status == "skipped"
        assert log == expected


@pytest.mark.parametrize("loss", ["a failed attempt", "a lost worker", "a pause", "a drain"])
def test_a_decision_to_enter_is_not_repeated(app: Streamline, loss: str) -> None:
    """A condition may read a clock, a flag or a service; if it were repeated, it could skip a step whose work is half done."""
    log: list[str] = []
    lost: list[str] = []

    def work(ctx: Any) -> str:
        if not lost:
            lost.append(ctx.run_id)
            match loss:
                case "a failed attempt":
                    raise ValueError("once")
                case "a lost worker":
                    app.store().run(
                        operations.update_matching("expire", {"_id": ctx.run_id}, [{"$set": {"lease.expiresAt": "$createdAt"}}])
                    )
                    app.store().run(recovery.recover_expired(5))
                    ctx.signal.wait(0.2)
                case "a pause":
                    app.pause_run(ctx.run_id)
                    raise ValueError("during the pause")
                case "a drain":
                    ctx.sleep(0.05)
        return "entered"

    workflow = app.workflow("w", steps={"a": (work, {"retry_delay": 0, "run_if": asked([True, False], "run_if", log)}), "b": lambda ctx: 1})
    run = workflow.start()
    run_until_idle(app)
    if loss == "a pause":
        workflow.resume(run.id)
    run_until_idle(app)
    done = present(workflow.get(run.id))
    assert (done.status, done.step("a").status, log) == ("done", "done", ["run_if"])


def test_a_decision_to_skip_is_not_repeated_but_a_rewind_discards_it(app: Streamline) -> None:
    log: list[str] = []
    options: StepOptions = {"run_if": asked([False, True], "run_if", log)}
    workflow = app.workflow("w", steps={"a": (lambda ctx: "entered", options), "b": lambda ctx: ctx.wait("?")})
    run = workflow.execute(workflow.start().id)
    workflow.pause(run.id)
    workflow.resume(run.id)
    workflow.rewind_to(run.id, "b")
    assert workflow.execute(run.id).step("a").status == "skipped"
    assert log == ["run_if"]
    workflow.rewind_to(run.id, "a")
    assert workflow.execute(run.id).step("a").output == "entered"
    assert log == ["run_if", "run_if"]


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("call", ["wait", "wait_for", "create_hook"])
def test_a_condition_can_neither_wait_nor_make_a_hook(app: Streamline, name: str, call: str) -> None:
    """The step has not been entered, so there is nothing that could wait; the run must fail with the reason and not stop."""

    def predicate(ctx: Any, *run: Any) -> bool:
        create_hook(ctx, "?") if call == "create_hook" else getattr(ctx, call)("why")
        return True

    workflow = app.workflow("w", steps={"a": (lambda ctx: 1, cast(StepOptions, {name: predicate, "retries": 1}))})
    failed = workflow.execute(workflow.start().id)
    code = "STEP_FAILED" if call == "create_hook" else "VALIDATION_ERROR"
    assert (failed.status, present(failed.error)["code"], failed.document["waitGen"]) == ("failed", code, 0)
    assert "hooks" not in failed.document["steps"][0]


FLIPPING = """
import os
from streamline_pool import Streamline

app = Streamline()

def times(ctx, what):
    evidence = app.store().collection("evidence")
    evidence.insert_one({"run": ctx.run_id, "what": what, "pid": os.getpid()})
    return evidence.count_documents({"run": ctx.run_id, "what": what})

def die_once(ctx):
    if times(ctx, "entered") == 1:
        os.kill(os.getpid(), 9)
    return "entered"

app.workflow("flipping", steps={
    "yes": (die_once, {"run_if": lambda ctx: times(ctx, "asked yes") == 1}),
    "no": (die_once, {"skip_if": lambda ctx: times(ctx, "asked no") == 1}),
    "kill": lambda ctx: os.kill(os.getpid(), 9) if times(ctx, "killed") == 1 else ctx.get_output("no"),
})
"""


@pytest.mark.timeout(120)
def test_a_decision_survives_the_death_of_its_worker(app: Streamline, mongodb_uri: str, database: str, tmp_path: Path) -> None:
    """Each predicate changes its answer after the first call. Workers die in an entered step and after a skipped one."""
    with running(tmp_path, FLIPPING, mongodb_uri, "--workers", "2", database=database) as pool:
        pool.ready()
        flipping = app.workflow("flipping", steps={name: lambda ctx: None for name in ("yes", "no", "kill")})
        done = flipping.wait_for(flipping.start().id, timeout=40)
    assert [step.status for step in done.steps] == ["done", "skipped", "done"]
    assert [step.attempts for step in done.steps] == [2, 0, 2]
    entries = [entry["what"] for entry in app.store().collection("evidence").find()]
    assert {what: entries.count(what) for what in ("asked yes", "asked no", "entered", "killed")} == {
        "asked yes": 1, "asked no": 1, "entered": 2, "killed": 2,
    }  # fmt: skip
    assert stored(app, done)["status"] == "done"


def hanging(asked: list[str], ended: list[str]) -> Any:
    """A predicate that waits for ever, and notes when it is cancelled."""

    async def ask(ctx: Any, *run: Any) -> bool:
        asked.append(ctx.run_id)
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(ctx.run_id)
        return True

    return ask


def work(app: Streamline, during: Callable[[Pool], Awaitable[None]]) -> None:
    """Have a worker work during that."""

    async def main() -> None:
        async with Pool(app) as pool:
            await during(pool)

    asyncio.run(main())


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("timeout", [0.05, None])
def test_a_condition_that_does_not_return_fails_its_attempt(
    app: Streamline, name: str, timeout: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It held the run and a place in its worker for ever."""
    monkeypatch.setattr(run_driver, "CONDITION_TIMEOUT_S", 0.1)
    asked: list[str] = []
    ended: list[str] = []
    options = cast(StepOptions, {name: hanging(asked, ended), "retries": 2, "retry_delay": 0, "timeout": timeout})
    workflow = app.workflow("w", steps={"a": (lambda ctx: 1, options)})
    run = workflow.start()
    work(app, lambda pool: pool.until(lambda: stored(app, run)["status"] == "failed", timeout=5))
    document = stored(app, run)
    check_invariants([document])
    error = document["steps"][0]["error"]
    message = f"the conditions of step a took longer than {timeout or 0.1:g} s"
    assert (error["code"], error["message"], document["error"]["code"]) == ("STEP_TIMEOUT", message, "MAX_RETRIES_EXCEEDED")
    assert asked == ended == [run.id] * 2


@pytest.mark.parametrize("swallowed", [1, 1_000], ids=["once", "always"])
def test_a_condition_that_goes_on_although_it_was_cancelled_is_left_behind(app: Streamline, swallowed: int) -> None:
    """One cancellation can get lost. A condition that swallows each of them must not hold its run, which fails or goes on elsewhere."""
    over = asyncio.Event()
    left = [swallowed]

    async def stubborn(ctx: Context) -> bool:
        while not over.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                left[0] -= 1
                if left[0] < 0:
                    raise
        return True

    workflow = app.workflow("w", steps={"a": (lambda ctx: 1, {"run_if": stubborn, "retries": 1, "timeout": 0.05})})
    run = workflow.start()

    async def wait(pool: Pool) -> None:
        await pool.until(lambda: stored(app, run)["status"] == "failed", timeout=5)
        assert bool(pool.statuses()[0].recycle) is (swallowed > 1)
        over.set()

    work(app, wait)
    assert stored(app, run)["steps"][0]["error"]["code"] == "STEP_TIMEOUT"


def test_a_cancel_ends_a_condition(app: Streamline) -> None:
    """As it ends a handler: otherwise the cancelled run keeps a place in its worker."""
    asked: list[str] = []
    ended: list[str] = []
    workflow = app.workflow("w", steps={"a": (lambda ctx: 1, {"run_if": hanging(asked, ended)})})
    run = workflow.start()

    async def cancel(pool: Pool) -> None:
        await pool.until(lambda: asked)
        await asyncio.to_thread(workflow.cancel, run.id)
        pool.workers[0].check_run(run.id)  # what a steward does when it receives the signal
        await pool.until(lambda: ended and not pool.statuses()[0].in_flight, timeout=5)

    work(app, cancel)
    document = stored(app, run)
    check_invariants([document])
    assert (document["status"], document["failures"], asked) == ("cancelled", 0, [run.id])


def test_a_worker_that_stops_releases_a_run_in_the_middle_of_a_condition(app: Streamline) -> None:
    """No failed attempt is counted, and the next worker asks again."""
    asked: list[str] = []
    ended: list[str] = []
    workflow = app.workflow("w", steps={"a": (lambda ctx: 1, {"run_if": hanging(asked, ended)})})
    run = workflow.start()

    async def stop(pool: Pool) -> None:
        await pool.until(lambda: asked)
        pool.workers[0].stop(0.1)
        await pool.until(lambda: ended and "lease" not in stored(app, run), timeout=5)

    work(app, stop)
    document = stored(app, run)
    check_invariants([document])
    assert (document["status"], document["failures"], "wakeAt" in document) == ("running", 0, True)
