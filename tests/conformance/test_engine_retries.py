"""Attempts: retries, back-off, timeouts, and handlers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from workers import Pool, check_invariants, run_until_idle

from streamline_pool import NonRetriableError, StepOptions, Streamline, WorkflowError
from support import REPOSITORY, present

# --- retries --------------------------------------------------------------------------------------------------------


def test_a_step_is_attempted_until_it_succeeds(app: Streamline) -> None:
    entered: list[int] = []

    def flaky(ctx: Any) -> str:
        entered.append(ctx.attempt)
        if ctx.attempt < 3:
            raise ValueError(f"attempt {ctx.attempt}")
        key: str = ctx.idempotency_key
        return key

    workflow = app.workflow("w", steps={"flaky": (flaky, {"retries": 3, "retry_delay": 0})})
    run = workflow.start()
    run_until_idle(app)
    run = present(workflow.get(run.id))
    assert (run.status, entered, run.output, run.step("flaky").attempts) == ("done", [1, 2, 3], f"{run.id}:flaky", 3)
    assert run.step("flaky").error is None, "a success leaves no error behind"


def test_a_run_that_used_up_its_attempts_names_the_last_cause(app: Streamline) -> None:
    def broken(ctx: Any) -> None:
        raise KeyError(f"cause {ctx.attempt}")

    workflow = app.workflow("w", steps={"broken": (broken, {"retries": 2, "retry_delay": 0}), "never": lambda ctx: 1})
    run = workflow.start()
    run_until_idle(app)
    run = present(workflow.get(run.id))
    check_invariants([run.to_dict()])
    assert (run.status, run.ended_at is not None, run.step("never").status) == ("failed", True, "pending")
    assert (present(run.error)["code"], present(run.error)["type"], present(run.error)["stepId"]) == (
        "MAX_RETRIES_EXCEEDED",
        "KeyError",
        "broken",
    )
    assert present(run.error)["message"].endswith("'cause 2'")
    assert "in broken" in present(run.error)["traceback"]
    assert run.step("broken").error == {"code": "STEP_FAILED", "message": "'cause 2'", "type": "KeyError"}


def test_with_one_attempt_the_run_has_the_steps_own_code(app: Streamline) -> None:
    workflow = app.workflow("w", steps={"broken": (lambda ctx: 1 / 0, {"retries": 1})})
    run = workflow.execute(workflow.start().id)
    assert (present(run.error)["code"], present(run.error)["message"], present(run.error)["type"]) == (
        "STEP_FAILED",
        "division by zero",
        "ZeroDivisionError",
    )


def test_a_non_retriable_error_is_not_retried(app: Streamline) -> None:
    class NoSuchCustomer(NonRetriableError): ...

    def broken(ctx: Any) -> None:
        raise NoSuchCustomer("gone")

    workflow = app.workflow("w", steps={"broken": (broken, {"retries": 5})})
    run = workflow.execute(workflow.start().id)
    assert (run.status, present(run.error)["code"], present(run.error)["type"], run.step("broken").attempts) == (
        "failed",
        "STEP_FAILED",
        "NoSuchCustomer",
        1,
    )


def test_between_attempts_the_run_waits_and_its_step_is_pending_with_its_time(app: Streamline) -> None:
    workflow = app.workflow("w", steps={"broken": (lambda ctx: 1 / 0, {"retry_delay": 40})})
    run = workflow.execute(workflow.start().id)
    step = run.step("broken")
    assert (run.status, step.status, step.attempts, present(step.error)["code"]) == ("waiting", "pending", 1, "STEP_FAILED")
    assert 28 <= (present(step.retry_after) - run.updated_at).total_seconds() <= 52.1
    assert run.document["wakeAt"] == step.retry_after


def test_each_step_has_retries_of_its_own(app: Streamline) -> None:
    def once(ctx: Any) -> None:
        if ctx.attempt == 1:
            raise ValueError

    workflow = app.workflow("w", steps={name: (once, {"retries": 2, "retry_delay": 0}) for name in ("a", "b", "c")})
    run = workflow.start()
    run_until_idle(app)
    assert [step.attempts for step in present(workflow.get(run.id)).steps] == [2, 2, 2]


# --- timeouts -------------------------------------------------------------------------------------------------------


def test_an_async_handler_that_outlives_its_timeout_is_cancelled(app: Streamline) -> None:
    reasons: list[Any] = []

    async def hang(ctx: Any) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            reasons.append((ctx.signal.aborted, ctx.signal.reason))

    workflow = app.workflow("w", steps={"hang": (hang, {"retries": 2, "timeout": 0.05, "retry_delay": 0})})
    run = workflow.start()
    statuses = run_until_idle(app)
    run = present(workflow.get(run.id))
    assert (present(run.error)["code"], present(run.step("hang").error)["code"], present(run.step("hang").error)["type"]) == (
        "MAX_RETRIES_EXCEEDED", "STEP_TIMEOUT", "StepTimeoutError",
    )  # fmt: skip
    assert "longer than its timeout of 0.05 s" in present(run.error)["message"]
    assert reasons == [(True, "timeout")] * 2
    assert statuses[0].recycle is None


def test_the_signal_can_be_awaited_and_waited_for(app: Streamline) -> None:
    received: list[Any] = []

    async def await_signal(ctx: Any) -> None:
        try:
            received.append(await ctx.signal)
        except asyncio.CancelledError:
            received.append(ctx.signal.wait(0))
            raise

    def wait_for_signal(ctx: Any) -> None:
        received.append(ctx.signal.wait(0))
        received.append(ctx.signal.wait(5))
        received.append(ctx.signal.reason)

    options: StepOptions = {"retries": 1, "timeout": 0.1}
    for name, handler in (("a", await_signal), ("b", wait_for_signal)):
        workflow = app.workflow(name, steps={"wait": (handler, options)})
        assert present(workflow.execute(workflow.start().id).error)["code"] == "STEP_TIMEOUT"
    while len(received) < 4:
        time.sleep(0.001)
    assert received in ([True, False, True, "timeout"], ["timeout", False, True, "timeout"])


@pytest.mark.slow
def test_a_def_handler_that_outlives_its_timeout_is_fenced_at_once_and_its_worker_asks_to_be_recycled(app: Streamline) -> None:
    """A thread cannot be stopped: its run and its slot must not wait for it, and nothing that it does may be stored."""
    go, entered, refused = threading.Event(), threading.Event(), []

    def hang(ctx: Any) -> str:
        if ctx.attempt > 1:
            return "the second attempt"
        entered.set()
        go.wait()
        calls: list[Callable[[], Any]] = [lambda: ctx.set("late", 1), lambda: ctx.checkpoint(1)]
        for call in calls:
            try:
                call()
            except WorkflowError as exc:
                refused.append(type(exc).__name__)
        return "too late"

    workflow = app.workflow("w", steps={"hang": (hang, {"timeout": 0.05, "retry_delay": 0}), "next": lambda ctx: ctx.get_output("hang")})
    run = workflow.start()

    async def work() -> None:
        async with Pool(app) as pool:
            await pool.until(lambda: present(workflow.get(run.id)).status == "done")
            await pool.until(lambda: pool.statuses()[0].in_flight == 0)
            await pool.until(lambda: pool.statuses()[0].recycle)
            assert run.id in str(pool.statuses()[0].recycle)
            go.set()
            await pool.until(lambda: len(refused) == 2)

    asyncio.run(work())
    stored = present(workflow.get(run.id))
    assert (stored.output, stored.context, stored.step("hang").attempts) == ("the second attempt", {}, 2)
    assert refused == ["InvalidStateError"] * 2


@pytest.mark.slow
def test_an_async_handler_that_swallows_its_cancellation_is_left_behind(app: Streamline) -> None:
    """The handler blocks its task; the run continues in another task, and the worker asks to be recycled."""
    go: list[asyncio.Event] = []

    async def stubborn(ctx: Any) -> str:
        if ctx.attempt > 1:
            return "the second attempt"
        go.append(asyncio.Event())
        while not go[0].is_set():
            try:
                await go[0].wait()
            except asyncio.CancelledError:
                continue
        return "too late"

    workflow = app.workflow("w", steps={"stubborn": (stubborn, {"timeout": 0.05, "retry_delay": 0})})
    run = workflow.start()

    async def work() -> None:
        async with Pool(app) as pool:
            await pool.until(lambda: present(workflow.get(run.id)).status == "done")
            assert pool.statuses()[0].recycle
            go[0].set()
            await asyncio.sleep(0.05)
            await pool.until(lambda: pool.statuses()[0].in_flight == 0)

    asyncio.run(work())
    assert (present(workflow.get(run.id)).output, present(workflow.get(run.id)).step("stubborn").attempts) == ("the second attempt", 2)


def test_work_that_never_got_a_thread_is_not_entered_after_its_attempt_is_over(make_app: Callable[..., Streamline]) -> None:
    """Handlers that hang use up the threads; when one becomes free, another worker may hold the runs that waited for it."""
    app, go, entered = make_app(concurrency=1), threading.Event(), []

    def hang(ctx: Any) -> None:
        entered.append(ctx.run_id)
        go.wait()

    workflow = app.workflow("w", steps={"hang": (hang, {"retries": 1, "timeout": 0.05})})
    runs = workflow.start_many(range(14))

    async def work() -> int:
        async with Pool(app) as pool:
            await pool.until(lambda: app.runs.count_documents({"status": "failed"}) == 14)
            before = len(entered)
            go.set()
            await asyncio.sleep(0.1)
            return before

    assert asyncio.run(work()) == len(entered) == 10
    assert {present(present(workflow.get(run.id)).error)["code"] for run in runs} == {"STEP_TIMEOUT"}


# --- misbehaving handlers --------------------------------------------------------------------------------------------


class BadStr(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


def _exit(ctx: Any) -> None:
    sys.exit("bye")


def _raises(exc: BaseException) -> Callable[[Any], None]:
    def handler(ctx: Any) -> None:
        raise exc

    return handler


def _group(ctx: Any) -> None:
    raise ExceptionGroup("several", [ValueError("a"), TypeError("b")])


def _deep(ctx: Any) -> None:
    _deep(ctx)


BAD = [
    (_exit, "STEP_FAILED", "SystemExit", "sys.exit('bye')"), (_raises(KeyboardInterrupt()), "STEP_FAILED", "KeyboardInterrupt", ""),
    (_raises(GeneratorExit()), "STEP_FAILED", "GeneratorExit", ""), (_raises(BaseException("odd")), "STEP_FAILED", "BaseException", "odd"),
    (_raises(asyncio.CancelledError()), "STEP_FAILED", "CancelledError", "cancelled by its own code"),
    (_raises(StopIteration(5)), "STEP_FAILED", "", ""), (_raises(BadStr()), "STEP_FAILED", "BadStr", "__str__ failed"),
    (_raises(ValueError("\ud800 lone")), "STEP_FAILED", "ValueError", "lone"),
    (_raises(ValueError("x" * 10**6)), "STEP_FAILED", "ValueError", "xxx"),
    (_group, "STEP_FAILED", "ExceptionGroup", "several"), (_deep, "STEP_FAILED", "RecursionError", "recursion"),
    (lambda ctx: object(), "VALIDATION_ERROR", "ValidationError", "output of step a: cannot store <class 'object'>"),
    (lambda ctx: {"a": [2**64]}, "VALIDATION_ERROR", "ValidationError", "output of step a.a[0]: cannot store"),
    (lambda ctx: (number for number in "ab"), "VALIDATION_ERROR", "ValidationError", "cannot store <class 'generator'>"),
    (lambda ctx: "x" * (65 * 2**20), "PAYLOAD_TOO_LARGE", "PayloadTooLargeError", "the limit is 67108864"),
    (lambda ctx: ctx.sleep(-1), "VALIDATION_ERROR", "ValidationError", "ctx.sleep"),
    (lambda ctx: ctx.checkpoint(object()), "VALIDATION_ERROR", "ValidationError", "checkpoint: cannot store"),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize(("handler", "code", "type_", "says"), BAD, ids=lambda value: getattr(value, "__name__", str(value)[:20]))
def test_a_misbehaving_handler_fails_only_its_own_run(
    app: Streamline, handler: Callable[[Any], Any], code: str, type_: str, says: str, kind: str
) -> None:
    """One bad handler must not end its worker, and must not affect the worker's other runs."""

    async def handler_async(ctx: Any) -> Any:
        return handler(ctx)

    bad = app.workflow("bad", steps={"a": (handler if kind == "def" else handler_async, {"retries": 1})})
    good = app.workflow("good", steps={"a": lambda ctx: "fine"})
    run, neighbours = bad.start(), good.start_many(range(5))
    run_until_idle(app)
    run = present(bad.get(run.id))
    check_invariants([run.to_dict()])
    assert (run.status, present(run.error)["code"]) == ("failed", code)
    assert type_ in present(run.error)["type"]
    assert says in present(run.error)["message"]
    assert len(present(run.error)["message"]) < 3_000
    assert all(present(good.get(neighbour.id)).output == "fine" for neighbour in neighbours)


FORKING = """
import asyncio, os, sys
from streamline_pool import Streamline
from workers import run_until_idle

def fork(ctx):
    pid = os.fork()
    return os.waitpid(pid, 0)[1] if pid else "the child"

async def fork_async(ctx):
    return fork(ctx)

with Streamline(sys.argv[1], database=sys.argv[2]) as app:
    workflow = app.workflow("w", steps={"fork": fork if sys.argv[3] == "def" else fork_async, "next": lambda ctx: os.getpid()})
    run = workflow.start()
    run_until_idle(app)
    run = workflow.get(run.id)
    assert (run.output, run.step("fork").output, run.step("fork").attempts) == (os.getpid(), 0, 1), run
"""


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_handler_that_forks_returns_once(mongodb_uri: str, database: str, kind: str) -> None:
    """The forked child must neither commit over its parent's connections nor continue as a second worker."""
    command = [sys.executable, "-W", "ignore", "-c", FORKING, mongodb_uri, database, kind]
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_a_handler_may_print_bytes_that_are_not_text(app: Streamline, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    workflow = app.workflow("w", steps={"a": lambda ctx: os.write(1, b"\xff\xfe\0")})
    assert workflow.execute(workflow.start().id).output == 3


def test_a_sleep_that_is_caught_still_ends_the_step(app: Streamline) -> None:
    """`except BaseException` is common in handlers; `ctx.sleep` must end the step all the same."""

    def swallow(ctx: Any) -> str:
        with contextlib.suppress(BaseException):
            ctx.sleep(0.01)
        return "not the output"

    workflow = app.workflow("w", steps={"a": swallow, "b": lambda ctx: ctx.get_output("a")})
    run = workflow.start()
    run_until_idle(app)
    assert (present(workflow.get(run.id)).status, present(workflow.get(run.id)).output) == ("done", None)


def test_a_task_that_is_cancelled_too_late_costs_an_attempt_and_not_the_run(make_app: Callable[..., Streamline]) -> None:
    """A library may keep and cancel the task it ran in later, and a handler runs in the task that drives its run."""
    app = make_app(lease_s=0.5)

    async def leave_a_bomb(ctx: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_soon(task.cancel)

    workflow = app.workflow("w", steps={"a": leave_a_bomb, "b": lambda ctx: "fine"})
    run = workflow.start()
    run_until_idle(app, recover_every_s=0.1)
    assert present(workflow.get(run.id)).status in ("done", "failed")
    check_invariants([app.runs.find_one({"_id": run.id})])


# --- sleep ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_sleep_ends_the_handler_for_good(app: Streamline, kind: str) -> None:
    entered: list[int] = []

    def nap(ctx: Any) -> None:
        entered.append(ctx.attempt)
        ctx.set("k", 1)
        ctx.sleep(0.2)
        raise AssertionError("nothing follows a sleep")

    async def nap_async(ctx: Any) -> None:
        nap(ctx)

    workflow = app.workflow("w", steps={"nap": nap if kind == "def" else nap_async, "next": lambda ctx: ctx.context["k"]})
    run = workflow.execute(workflow.start({}).id)
    assert (run.status, run.step("nap").status, run.context) == ("waiting", "waiting", {"k": 1})
    assert present(run.step("nap").waiting_for)["resumeAt"] == run.document["wakeAt"]
    assert workflow.execute(run.id).status == "waiting", "not before its time, by the server's clock"
    run_until_idle(app)
    run = present(workflow.get(run.id))
    assert (run.status, run.output, entered) == ("done", 1, [1])
    assert present(run.step("nap").duration) >= 0.2


def test_a_run_claimed_before_its_sleep_is_over_is_parked_again(app: Streamline) -> None:
    """A host's clock must not end a sleep: a worker that claims too early releases the run with its timer."""
    workflow = app.workflow("w", steps={"nap": lambda ctx: ctx.sleep(3600), "next": lambda ctx: 1})
    run = workflow.execute(workflow.start().id)
    until = run.document["wakeAt"]
    app.runs.update_one({"_id": run.id}, {"$set": {"wakeAt": run.created_at}})
    run = workflow.execute(run.id)
    assert (run.status, run.step("nap").status, run.document["wakeAt"]) == ("waiting", "waiting", until)
    check_invariants([run.to_dict()])
