"""Every documented error code, reached by the public API alone, with its type, HTTP status and context.

The test of a code has the code's name. The last test compares these names with `ErrorCode`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import pytest
from pool_process import running
from waiting_app import waiting_app
from workers import run_until_idle

from streamline_pool import (
    DataCorruptionError,
    DurableContext,
    ErrorCode,
    HookTokenError,
    InvalidStateError,
    LeaseLostError,
    NonRetriableError,
    PayloadTooLargeError,
    StepNotFoundError,
    StepOptions,
    StoreUnavailableError,
    Streamline,
    ValidationError,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowNotFoundError,
    create_hook,
)
from streamline_pool.config.env import SystemClock, system_env
from support import present

STATUSES = {
    "WORKFLOW_NOT_FOUND": 404, "WORKFLOW_CANCELLED": 409, "STEP_NOT_FOUND": 404, "STEP_TIMEOUT": 408, "STEP_FAILED": 500,
    "INVALID_STATE": 409, "DATA_CORRUPTION": 500, "MAX_RETRIES_EXCEEDED": 500, "VALIDATION_ERROR": 400, "HOOK_TOKEN_INVALID": 401,
    "LEASE_LOST": 409, "PAYLOAD_TOO_LARGE": 413, "VERSION_MISMATCH": 409, "WORKER_CRASHED": 500, "STORE_UNAVAILABLE": 503,
    "NON_DETERMINISM": 409,
}  # fmt: skip
"""The documented HTTP statuses."""


def raised(kind: type[WorkflowError], call: Callable[[], Any]) -> WorkflowError:
    """The error that the call raises. It must have that type, the code's status, and a text that begins with the code."""
    with pytest.raises(kind) as caught:
        call()
    error = caught.value
    assert type(error) is kind
    assert error.http_status == STATUSES[error.code]
    assert str(error).startswith(f"{error.code}: ")
    assert isinstance(error.context, dict)
    return error


def failure(app: Streamline, handler: Any, **options: Unpack[StepOptions]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The stored errors of a run whose only step fails like that, and of the step. Both must be complete."""
    all_options: StepOptions = {"retries": 1, "retry_delay": 0, **options}
    workflow = app.workflow(f"w{len(app.workflows)}", steps={"work": (handler, all_options)})
    run = workflow.start()
    run_until_idle(app)
    document = app.runs.find_one({"_id": run.id})
    assert (document["status"], document["endedAt"] is not None) == ("failed", True), document
    assert set(document["error"]) == {"code", "message", "type", "stepId", "traceback"}
    assert set(document["steps"][0]["error"]) == {"code", "message", "type"}
    assert document["error"]["stepId"] == "work"
    return document["error"], document["steps"][0]["error"]


def fail(ctx: Any) -> None:
    raise KeyError("the last cause")


# --- raised to callers ----------------------------------------------------------------------------------------------


def test_workflow_not_found(app: Streamline) -> None:
    workflow, other = (app.workflow(name, steps={"a": lambda ctx: ctx.wait("?")}) for name in ("w", "other"))
    theirs = other.execute(other.start().id)
    calls: list[Callable[[], Any]] = [
        *(lambda call=call, run_id=run_id: call(run_id)
          for call in (workflow.cancel, workflow.pause, workflow.resume, workflow.execute, workflow.wait_for)
          for run_id in ("unknown", theirs.id)),
        lambda: workflow.rewind_to(theirs.id, "a"),
        *(lambda call=call: call("unknown") for call in (app.cancel_run, app.pause_run, app.resume_run)),
        lambda: app.rewind_run("unknown", "a"),
        lambda: app.send_event("news", run_id="unknown"),
    ]  # fmt: skip
    for call in calls:
        error = raised(WorkflowNotFoundError, call)
        assert error.code == "WORKFLOW_NOT_FOUND"
        assert error.context["run_id"] in ("unknown", theirs.id)
    assert other.get(theirs.id) == theirs, "another workflow's run does not exist for this workflow"


def test_step_not_found(app: Streamline) -> None:
    workflow = app.workflow("w", steps={"a": lambda ctx: 1})
    run = workflow.execute(workflow.start().id)
    for call in (lambda: workflow.rewind_to(run.id, "b"), lambda: run.step("b"), lambda: workflow.definition.step("b")):
        error = raised(StepNotFoundError, call)
        assert (error.code, error.context["step_id"]) == ("STEP_NOT_FOUND", "b")


def test_invalid_state(app: Streamline) -> None:
    workflow = app.workflow("w", steps={"a": lambda ctx: ctx.wait("?")})
    run = workflow.execute(workflow.start(run_id="taken").id)
    workflow.pause(run.id)
    assert raised(InvalidStateError, lambda: workflow.resume(run.id, "payload")).code == "INVALID_STATE"
    workflow.resume(run.id)
    workflow.resume(run.id, "answer")
    raised(InvalidStateError, lambda: workflow.resume(run.id, "another"))
    raised(InvalidStateError, lambda: workflow.start(run_id="taken"))
    workflow.cancel(run.id)
    error = raised(InvalidStateError, lambda: workflow.rewind_to(run.id, "a"))
    assert (error.context["run_id"], error.context["status"]) == (run.id, "cancelled")


def test_validation_error(app: Streamline) -> None:
    workflow = app.workflow("w", steps={"a": lambda ctx: 1})
    error = raised(ValidationError, lambda: workflow.start({"items": [1, {"when": object()}]}))
    assert error.code == "VALIDATION_ERROR"
    assert "input.items[1].when: cannot store <class 'object'>" in error.message
    raised(ValidationError, lambda: app.workflow("not an id", steps={"a": lambda ctx: 1}))
    run_error, step_error = failure(app, lambda ctx: object(), retries=5)
    assert (run_error["code"], step_error["code"]) == ("VALIDATION_ERROR", "VALIDATION_ERROR"), "an unstorable output is not retried"
    raised(ValidationError, lambda: app.workflow("none").start())
    assert app.runs.count_documents({}) == 1


def test_payload_too_large(app: Streamline) -> None:
    workflow = app.workflow("w", steps={"a": lambda ctx: ctx.wait_for("news")})
    run = workflow.execute(workflow.start().id)
    bulk = b"x" * (65 * 1024 * 1024)
    for call in (
        lambda: workflow.start(bulk),
        lambda: app.send_event("news", bulk, run_id=run.id),
        lambda: app.send_event("news", bulk),
    ):
        assert raised(PayloadTooLargeError, call).code == "PAYLOAD_TOO_LARGE"
    assert workflow.get(run.id) == run
    run_error, step_error = failure(app, lambda ctx: bulk, retries=5)
    assert (run_error["code"], step_error["code"]) == ("PAYLOAD_TOO_LARGE", "PAYLOAD_TOO_LARGE"), "and is not retried"


def test_hook_token_invalid(app: Streamline) -> None:
    tokens: list[str] = []

    def offer(ctx: Any) -> None:
        tokens.append(create_hook(ctx, "?").token)
        ctx.wait("?")

    workflow = app.workflow("w", steps={"a": offer})
    workflow.execute(workflow.start().id)
    app.resume_hook(tokens[0])
    odd: list[Any] = [tokens[0], f"unknown.{'x' * 32}", "", None]
    for token in odd:
        error = raised(HookTokenError, partial(app.resume_hook, token))
        assert error.code == "HOOK_TOKEN_INVALID"
        assert "x" * 32 not in str(error)


def test_data_corruption(app: Streamline) -> None:
    workflow = app.workflow("w", steps={"a": lambda ctx: 1})
    broken, sound = workflow.start(), workflow.start()
    app.runs.update_one({"_id": broken.id}, {"$set": {"createdAt": "yesterday"}})
    error = raised(DataCorruptionError, lambda: workflow.get(broken.id))
    assert (error.code, error.context["run_id"]) == ("DATA_CORRUPTION", broken.id)
    app.runs.update_one({"_id": broken.id}, {"$set": {"createdAt": datetime.now(UTC), "steps": "garbage"}})
    run_until_idle(app)
    failed = app.runs.find_one({"_id": broken.id})
    assert (failed["status"], failed["error"]["code"], failed["endedAt"] is not None) == ("failed", "DATA_CORRUPTION", True)
    assert present(workflow.get(sound.id)).status == "done"


class Hasty(SystemClock):
    """A clock that is a hundred times faster, so that the ten seconds for which a call is repeated last a tenth of a second."""

    def monotonic(self) -> float:
        return super().monotonic() * 100


@pytest.mark.slow
def test_store_unavailable() -> None:
    env = replace(system_env(), clock=Hasty(), sleep=lambda s: None)
    with Streamline("mongodb://127.0.0.1:1/nothing?serverSelectionTimeoutMS=200", env=env) as app:
        workflow = app.workflow("w", steps={"a": lambda ctx: 1})
        for call in (workflow.start, lambda: workflow.get("run"), lambda: workflow.cancel("run"), lambda: app.send_event("news")):
            assert raised(StoreUnavailableError, call).code == "STORE_UNAVAILABLE"


# --- raised within handlers -----------------------------------------------------------------------------------------


def test_workflow_cancelled(app: Streamline) -> None:
    entered, errors = threading.Event(), []

    def work(ctx: Any) -> None:
        entered.set()
        ctx.signal.wait(20)
        errors.append(raised(WorkflowCancelledError, ctx.signal.raise_if_aborted))

    workflow = app.workflow("w", steps={"a": work})
    run = workflow.start()
    thread = threading.Thread(target=workflow.execute, args=(run.id,))
    thread.start()
    assert entered.wait(20)
    assert workflow.cancel(run.id).status == "cancelled"
    thread.join(20)
    assert [error.code for error in errors] == ["WORKFLOW_CANCELLED"]


@pytest.mark.parametrize("first", ["the call", "the signal"])
def test_lease_lost(app: Streamline, first: str) -> None:
    """The error must be the same whether the handler's own call detects the loss or its signal has fired before."""
    errors: list[WorkflowError] = []
    over = threading.Event()

    def work(ctx: Any) -> None:
        if first == "the call":
            app.runs.update_one({"_id": ctx.run_id}, {"$set": {"lease.id": "another's"}, "$inc": {"token": 1}})
        else:
            workflow.rewind_to(ctx.run_id, "a")
            ctx.signal.wait(20)
        errors.append(raised(LeaseLostError, lambda: ctx.checkpoint(1)))
        errors.append(raised(LeaseLostError, lambda: create_hook(ctx, "?")))
        ctx.signal.wait(20)
        errors.append(raised(LeaseLostError, ctx.signal.raise_if_aborted))
        over.set()

    workflow = app.workflow("w", steps={"a": work})
    run = workflow.execute(workflow.start().id)
    assert over.wait(20), "the thread continues after its run was released"
    assert [error.code for error in errors] == ["LEASE_LOST"] * 3
    assert not {"checkpoint", "hooks"} & set(app.runs.find_one({"_id": run.id})["steps"][0])


# --- stored with runs -----------------------------------------------------------------------------------------------


def test_step_failed(app: Streamline) -> None:
    run_error, step_error = failure(app, fail)
    assert (run_error["code"], run_error["type"], run_error["message"]) == ("STEP_FAILED", "KeyError", "'the last cause'")
    assert step_error == {"code": "STEP_FAILED", "type": "KeyError", "message": "'the last cause'"}
    assert "KeyError: 'the last cause'" in run_error["traceback"]

    class Broken(NonRetriableError):
        pass

    def give_up(ctx: Any) -> None:
        raise Broken("for good")

    run_error, _ = failure(app, give_up, retries=5)
    assert (run_error["code"], run_error["type"]) == ("STEP_FAILED", "Broken")


def test_max_retries_exceeded(app: Streamline) -> None:
    run_error, step_error = failure(app, fail, retries=2)
    assert (run_error["code"], run_error["type"], step_error["code"]) == ("MAX_RETRIES_EXCEEDED", "KeyError", "STEP_FAILED")
    assert run_error["message"].endswith("'the last cause'")


@pytest.mark.parametrize("retries", [1, 2])
def test_step_timeout(app: Streamline, retries: int) -> None:
    run_error, step_error = failure(app, lambda ctx: ctx.signal.wait(20), timeout=0.1, retries=retries)
    assert (step_error["code"], step_error["type"]) == ("STEP_TIMEOUT", "StepTimeoutError")
    assert run_error["code"] == ("STEP_TIMEOUT" if retries == 1 else "MAX_RETRIES_EXCEEDED")
    assert "0.1 s" in run_error["message"]


def test_version_mismatch(make_app: Callable[..., Streamline]) -> None:
    old, new = make_app(), make_app()
    run = old.workflow("w", steps={"a": lambda ctx: 1, "b": lambda ctx: 2}).start()
    new.workflow("w", steps={"a": lambda ctx: 1, "c": lambda ctx: 2})
    run_until_idle(new)
    failed = present(old.workflows["w"].get(run.id))
    assert (failed.status, present(failed.error)["code"]) == ("failed", "VERSION_MISMATCH")
    assert "a, b" in present(failed.error)["message"]
    assert "a, c" in present(failed.error)["message"]


def test_non_determinism(make_app: Callable[..., Streamline]) -> None:
    async def before(ctx: DurableContext) -> None:
        await ctx.step("approve", lambda: 1)
        await ctx.wait("go on")

    async def after(ctx: DurableContext) -> None:
        await ctx.wait("approve?", name="approve")

    old, new = make_app().workflow("w"), make_app().workflow("w")
    old.main(before)
    new.main(after)
    run = old.execute(old.start().id)
    old.resume(run.id)
    failed = new.execute(run.id)
    assert (failed.status, present(failed.error)["code"], present(failed.error)["type"]) == (
        "failed",
        "NON_DETERMINISM",
        "NonDeterminismError",
    )


DEADLY = """
import os
from streamline_pool import Streamline, StepOptions
app = Streamline()
app.workflow("deadly", steps={"die": lambda ctx: os._exit(7)})
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_worker_crashed(mongodb_uri: str, database: str, tmp_path: Path) -> None:
    with waiting_app(mongodb_uri, database) as app, running(tmp_path, DEADLY, mongodb_uri, "--workers", "1", database=database) as pool:
        pool.ready()
        deadly = app.workflow("deadly", steps={"die": lambda ctx: None})
        failed = deadly.wait_for(deadly.start().id, timeout=40)
    assert (failed.status, present(failed.error)["code"], present(failed.error)["stepId"]) == ("failed", "WORKER_CRASHED", "die")
    assert present(failed.error)["message"].startswith("3 workers were lost")
    assert "7" in present(failed.error)["message"], "the message names the exit code"


def test_every_code_has_its_test_and_its_status() -> None:
    assert set(STATUSES) == set(ErrorCode)
    for code in ErrorCode:
        assert f"test_{code.lower()}" in globals(), f"no test reaches {code}"
