"""Documents and payloads that only a foreign program would write: one clear error, no run lost, other runs unaffected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bson
import pytest
from workers import check_invariants, run_until_idle

from streamline_pool import DataCorruptionError, Streamline, WorkflowError
from support import present

MISSING = object()
GARBAGE = ["x", 5, 5.5, None, [], [1], {}, {"id": 3}, True, bson.Timestamp(1, 1), float("nan"), "$$NOW", MISSING]
HEALED = [
    "token",
    "lease",
    "acts",
    "lastAct",
    "startId",
    "startedAt",
    "updatedAt",
    "endedAt",
    "input",
    "output",
    "error",
    "userId",
    "meta",
    "priority",
    "slot",
]
REPORTED = ["workflowId", "version", "status", "steps", "currentStepId", "context", "rev", "crashes", "failures", "waitGen"]
UNREACHABLE = ["lane", "queue", "wakeAt"]


def nap(ctx: Any) -> None:
    ctx.set("key", 1)
    ctx.sleep(0.01)


@pytest.fixture
def workflow(app: Streamline) -> Any:
    return app.workflow("w", steps={"nap": (nap, {"retries": 1}), "use": (lambda ctx: ctx.context["key"], {"skip_if": lambda ctx: False})})


def changed(app: Streamline, workflow: Any, field: str) -> list[str]:
    """One run for each kind of invalid value in `field`."""
    run_ids = []
    for value in GARBAGE:
        run = workflow.start({"x": 1})
        run_ids.append(run.id)
        app.runs.update_one({"_id": run.id}, {"$unset": {field: ""}} if value is MISSING else {"$set": {field: value}})
    return run_ids


@pytest.mark.parametrize("field", [*HEALED, *REPORTED, "tags", "createdAt"])
def test_a_field_that_another_program_changed_harms_its_own_run_at_most(app: Streamline, workflow: Any, field: str) -> None:
    """All these runs are claimed by one command, and an expression that fails for one of them would fail for all."""
    run_ids, neighbours = changed(app, workflow, field), workflow.start_many([{}] * 5)
    run_until_idle(app, recover_every_s=0.1)
    assert all(workflow.get(run.id).status == "done" for run in neighbours)
    for run_id, value in zip(run_ids, GARBAGE, strict=True):
        stored = app.runs.find_one({"_id": run_id})
        if field in ("tags", "createdAt"):
            assert stored["status"] == "done", "the engine does not rely on it"
            continue
        assert stored["status"] in ("done", "failed"), f"{field} = {value!r}: {stored}"
        assert "lease" not in stored
        if stored["status"] == "failed":
            assert stored["error"]["code"] == "DATA_CORRUPTION"
            assert field in stored["error"]["message"] or "step" in stored["error"]["message"]
            assert "mend it" in stored["error"]["message"]
            assert stored["endedAt"] is not None
        elif field in ("status", "steps", "currentStepId", "context", "workflowId", "version"):
            assert field == "context", f"{field} = {value!r} went unnoticed"
            assert value in ({}, {"id": 3})


@pytest.mark.parametrize("field", ["createdAt", "tags"])
def test_a_field_that_only_readers_need_is_named_to_them(app: Streamline, workflow: Any, field: str) -> None:
    run = workflow.start()
    app.runs.update_one({"_id": run.id}, {"$set": {field: 5.5}})
    for read in (workflow.get, workflow.wait_for, workflow.execute):
        with pytest.raises(DataCorruptionError, match=f"DATA_CORRUPTION: run {run.id}: .*mend it, or delete it"):
            read(run.id)


@pytest.mark.parametrize("field", UNREACHABLE)
def test_a_live_run_that_no_worker_can_find_is_an_error_for_its_readers(app: Streamline, workflow: Any, field: str) -> None:
    """No worker will ever claim this run, so a reader that gets "running" would wait for ever."""
    for run_id in changed(app, workflow, field):
        for read in (workflow.get, workflow.wait_for):
            with pytest.raises(DataCorruptionError, match="DATA_CORRUPTION"):
                read(run_id)
        assert workflow.cancel(run_id).status == "cancelled", "it can still be ended"


@pytest.mark.parametrize("status", ["done", "failed", "cancelled"])
def test_an_ended_run_is_not_revived_by_a_timer(app: Streamline, workflow: Any, status: str) -> None:
    run = workflow.start()
    app.runs.update_one({"_id": run.id}, {"$set": {"status": status, "endedAt": run.created_at}})
    assert workflow.execute(run.id).status == status
    assert app.runs.find_one({"_id": run.id})["token"] == 0


def test_an_unknown_status_does_not_make_cancel_repeat_without_end(app: Streamline, workflow: Any) -> None:
    run = workflow.start()
    app.runs.update_one({"_id": run.id}, {"$set": {"status": "strange"}})
    with pytest.raises(DataCorruptionError, match="strange"):
        workflow.cancel(run.id)


@pytest.mark.parametrize(
    "change",
    [
        {"$set": {"lease": "garbage"}},
        {"$set": {"lease": []}},
        {"$unset": {"lease": ""}},
        {"$set": {"lease": {"id": 5}}},
        {"$set": {"rev": "x"}},
    ],
)
def test_a_lease_that_another_program_changed_affects_only_its_run(make_app: Callable[..., Streamline], change: dict[str, Any]) -> None:
    """The holder's write does not match, and reading the damaged lease must not raise in the group commit that serves all runs."""
    app = make_app(lease_s=1.0)

    def sabotage(ctx: Any) -> int:
        if ctx.input == "victim":
            app.runs.update_one({"_id": ctx.run_id}, change)
        return 1

    workflow = app.workflow("w", steps={"a": sabotage, "b": lambda ctx: 2})
    workflow.start("victim")
    neighbours = workflow.start_many(range(20))
    run_until_idle(app, recover_every_s=0.1)
    assert [present(workflow.get(run.id)).output for run in neighbours] == [2] * 20


def test_steps_of_another_version_are_a_version_mismatch(app: Streamline, workflow: Any) -> None:
    run = workflow.start()
    app.runs.update_one({"_id": run.id}, {"$set": {"steps.1.stepId": "renamed"}})
    run = workflow.execute(run.id)
    assert (run.status, run.error["code"]) == ("failed", "VERSION_MISMATCH")
    assert "nap, renamed" in run.error["message"]


def test_a_run_of_a_version_that_no_worker_has_waits(make_app: Callable[..., Streamline]) -> None:
    old, new = make_app(), make_app()
    run = old.workflow("w", steps={"a": lambda ctx: "old"}, version="1").start()
    later = new.workflow("w", steps={"a": lambda ctx: "new"}, version="2")
    run_until_idle(new)
    assert later.execute(run.id).status == "running"
    run_until_idle(old)
    assert present(later.get(run.id)).output == "old"


# --- payloads -------------------------------------------------------------------------------------------------------


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


def _sets(*values: Any) -> Callable[[Any], Any]:
    def handler(ctx: Any) -> Any:
        for number, value in enumerate(values):
            ctx.set(f"k{number}", value)

    return handler


BIG = "x" * (9 * 2**20)
REFUSED = [
    (lambda ctx: nested(170), "VALIDATION_ERROR"),
    (lambda ctx: nested(190), "VALIDATION_ERROR"),
    (lambda ctx: nested(300), "VALIDATION_ERROR"),
    (_sets(BIG, BIG), "PAYLOAD_TOO_LARGE"),
    (_sets(nested(150)), "VALIDATION_ERROR"),
    (lambda ctx: "x" * (65 * 2**20), "PAYLOAD_TOO_LARGE"),
]


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize(("handler", "code"), REFUSED)
def test_a_payload_that_the_server_would_refuse_fails_only_its_run(
    app: Streamline, handler: Callable[[Any], Any], code: str, kind: str
) -> None:
    """A refused write that is repeated for ever would stop the commits of every other run of the worker."""

    async def handler_async(ctx: Any) -> Any:
        return handler(ctx)

    bad = app.workflow("bad", steps={"a": (handler if kind == "def" else handler_async, {"retries": 3}), "b": lambda ctx: 1})
    good = app.workflow("good", steps={"a": lambda ctx: 1, "b": lambda ctx: 2})
    run, neighbours = bad.start(), good.start_many(range(20))
    run_until_idle(app)
    run = present(bad.get(run.id))
    check_invariants([run.to_dict()])
    assert (run.status, present(run.error)["code"], run.step("a").attempts) == ("failed", code, 1)
    assert [present(good.get(neighbour.id)).output for neighbour in neighbours] == [2] * 20


@pytest.mark.slow
def test_a_document_that_grows_over_many_steps_ends_at_the_limit_with_a_clear_error(app: Streamline) -> None:
    """Each value fits into the document, but all of them together do not."""

    def grow(ctx: Any) -> None:
        ctx.set(ctx.step_id, "x" * (250 * 2**10))

    workflow = app.workflow("w", steps={f"s{number}": grow for number in range(80)})
    run = workflow.start()
    run_until_idle(app)
    run = present(workflow.get(run.id))
    assert (run.status, present(run.error)["code"], present(run.error)["stepId"]) == ("failed", "PAYLOAD_TOO_LARGE", "s65")
    assert "16 MiB" in present(run.error)["message"]


def test_a_run_whose_document_is_full_still_ends(app: Streamline) -> None:
    """The run must end even if the document has no room for the record of its failure."""

    def fill(ctx: Any) -> str:
        size = len(bson.encode(app.runs.find_one({"_id": ctx.run_id})))
        ctx.checkpoint("x" * (16 * 2**20 - size - 100))
        raise ValueError("y" * 2_000)

    workflow = app.workflow("w", context=lambda input: {}, steps={"fill": (fill, {"retries": 1})})
    run = workflow.start("x" * (10 * 2**20))
    run_until_idle(app)
    run = present(workflow.get(run.id))
    check_invariants([run.to_dict()])
    assert (run.status, present(run.error)["code"]) == ("failed", "PAYLOAD_TOO_LARGE")


def test_a_users_validator_or_unique_index_that_refuses_a_commit_fails_that_run(app: Streamline, workflow: Any) -> None:
    strict = app.workflow("strict", steps={"a": lambda ctx: ctx.set("key", ctx.input)})
    first, second = strict.start("same"), strict.start("same")
    app.runs.create_index("context.key", unique=True, partialFilterExpression={"context.key": "same"})
    run_until_idle(app)
    found = sorted((present(app.get_run(run.id)).status, (present(app.get_run(run.id)).error or {}).get("code")) for run in (first, second))
    assert found == [("done", None), ("failed", "VALIDATION_ERROR")]


def test_every_error_has_a_code_a_status_and_a_text_that_begins_with_the_code(app: Streamline, workflow: Any) -> None:
    calls: list[Callable[[], Any]] = [lambda: workflow.cancel("unknown"), lambda: workflow.start(priority="x"), lambda: workflow.get(5)]
    for call in calls:
        with pytest.raises(WorkflowError) as caught:
            call()
        assert str(caught.value).startswith(f"{caught.value.code}: ")
        assert caught.value.http_status in (400, 404)
