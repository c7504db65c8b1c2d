"""Several applications: in one process, by prefix, database, version and pool. None sees or disturbs another.

test_engine_isolation.py covers one process and its callers; this file covers control operations, events and real pools.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from other_program import other_program
from pool_process import running
from stored_runs import until_step
from workers import run_until_idle

from streamline_pool import HookTokenError, Streamline, WorkflowNotFoundError, create_hook, global_event_bus
from support import eventually, present


@pytest.fixture
def other_database(mongodb_uri: str) -> Iterator[str]:
    name = f"streamline_test_{uuid4().hex[:12]}"
    yield name
    with Streamline(mongodb_uri, database=name) as app:
        app.client.drop_database(name)


def waiting(app: Streamline, run_id: str = "same") -> tuple[Any, list[str]]:
    """The workflow of a run that waits for a hook and then for an event, and its tokens. The run has the same id in every application."""
    tokens: list[str] = []

    def offer(ctx: Any) -> None:
        tokens.append(create_hook(ctx, "?").token)
        ctx.wait("?")

    workflow = app.workflow("w", steps={"offer": offer, "receive": lambda ctx: ctx.wait_for("news")})
    workflow.execute(workflow.start(run_id=run_id).id)
    return workflow, tokens


@pytest.mark.parametrize("apart_by", ["prefix", "database"])
def test_no_operation_reaches_another_applications_run(
    make_app: Callable[..., Streamline], mongodb_uri: str, other_database: str, apart_by: str
) -> None:
    """Ids, workflows, steps, events and keys are the same on both sides; only the prefix or the database differs."""
    one = make_app()
    if apart_by == "prefix":
        other = make_app(collection_prefix="other_")
    else:
        other = Streamline(mongodb_uri, database=other_database)
    with other:
        (mine, my_tokens), (theirs, their_tokens) = waiting(one), waiting(other)
        before = theirs.get("same").document
        with pytest.raises(HookTokenError):
            other.resume_hook(my_tokens[0], "from the wrong side")
        mine.pause("same")
        mine.resume("same")
        one.resume_hook(my_tokens[0], "mine")
        mine.execute("same")
        assert one.send_event("news", "mine") == 1
        run_until_idle(one)
        assert mine.get("same").status == "done"
        mine.rewind_to("same", "offer")
        mine.cancel("same")
        assert mine.start(idempotency_key="key").id != theirs.start(idempotency_key="key").id
        assert theirs.get("same").document == before
        other.resume_hook(their_tokens[0], "theirs")
        assert theirs.execute("same").step("receive").status == "waiting", "the event was not for them"


def test_several_applications_in_one_process_share_no_subscribers_and_no_registry(make_app: Callable[..., Streamline]) -> None:
    apps = [make_app(collection_prefix=f"p{number}_") for number in range(3)]
    received: dict[int, list[str | None]] = {number: [] for number in range(3)}
    everything: list[str | None] = []
    subscriber = global_event_bus.on("workflow:completed", lambda event: everything.append(event.run_id))

    def record_completions(app: Streamline, into: list[str | None]) -> None:
        app.events.on("workflow:completed", lambda event: into.append(event.run_id))

    try:
        for number, app in enumerate(apps):
            record_completions(app, received[number])
            app.workflow("w", steps={"a": partial(lambda number, ctx: number, number)})
        runs = [app.workflows["w"].start() for app in apps]
        for app, run in zip(apps, runs, strict=True):
            app.workflows["w"].execute(run.id)
        eventually(lambda: len(everything) == 3)
        assert received == {number: [run.id] for number, run in enumerate(runs)}
        assert [present(app.workflows["w"].get(run.id)).output for app, run in zip(apps, runs, strict=True)] == [0, 1, 2]
        apps[0].close()
        assert apps[1].workflows["w"].execute(apps[1].workflows["w"].start().id).status == "done"
    finally:
        global_event_bus.off("workflow:completed", subscriber)


def test_one_object_cancels_what_another_executes_in_the_same_process(make_app: Callable[..., Streamline]) -> None:
    """Two objects on one database are one application: a cancel through one must reach the handler of the other."""
    one, other = make_app(lease_s=3.0), make_app()
    reasons: list[Any] = []

    def work(ctx: Any) -> None:
        other.cancel_run(ctx.run_id)
        ctx.signal.wait(20)
        reasons.append(ctx.signal.reason)

    workflow = one.workflow("w", steps={"a": work})
    assert workflow.execute(workflow.start().id).status == "cancelled"
    eventually(lambda: reasons)
    assert reasons[0] in ("cancelled", "lease-lost")


def test_another_workflows_run_does_not_exist_for_control_operations(app: Streamline) -> None:
    (mine, _), other = waiting(app), app.workflow("other", steps={"offer": lambda ctx: ctx.wait("?")})
    before = mine.get("same").document
    calls: list[Callable[[str], Any]] = [
        other.resume,
        other.pause,
        other.cancel,
        lambda run_id: other.rewind_to(run_id, "offer"),
        other.execute,
    ]
    for call in calls:
        with pytest.raises(WorkflowNotFoundError):
            call("same")
    assert other.get("same") is None
    assert mine.get("same").document == before


POOL = """
import os
from streamline_pool import Streamline
app = Streamline(collection_prefix={prefix!r})
for name in {workflows!r}:
    steps = {{"ask": lambda ctx: ctx.wait("?"), "act": lambda ctx: [{mark!r}, ctx.get_output("ask")]}}
    app.workflow(name, version={version!r}, steps=steps)
"""


def pool_text(mark: str, *, workflows: tuple[str, ...] = ("w",), version: str = "1", prefix: str = "workflow_") -> str:
    return POOL.format(mark=mark, workflows=workflows, version=version, prefix=prefix)


def client(uri: str, database: str, *, workflows: tuple[str, ...] = ("w",), version: str = "1", prefix: str = "workflow_") -> Streamline:
    """An application that only starts and reads runs."""
    app = Streamline(uri, database=database, collection_prefix=prefix)
    for name in workflows:
        app.workflow(name, version=version, steps={"ask": lambda ctx: None, "act": lambda ctx: None})
    return app


@pytest.mark.timeout(120)
@pytest.mark.parametrize("apart_by", ["workflow", "version", "prefix"])
@pytest.mark.slow
@pytest.mark.slow
def test_two_pools_on_one_database_run_each_its_own(mongodb_uri: str, database: str, tmp_path: Path, apart_by: str) -> None:
    """Two applications share a database: an idle worker of one must not claim the runs of the other."""
    left: dict[str, Any] = {}
    rights: dict[str, dict[str, Any]] = {
        "workflow": {"workflows": ("v",)}, "version": {"version": "2"}, "prefix": {"prefix": "other_"},
    }  # fmt: skip
    right = rights[apart_by]
    folders = [tmp_path / "left", tmp_path / "right"]
    for folder in folders:
        folder.mkdir()
    with (
        running(folders[0], pool_text("left", **left), mongodb_uri, "--workers", "2", database=database) as one,
        running(folders[1], pool_text("right", **right), mongodb_uri, "--workers", "2", database=database) as other,
        client(mongodb_uri, database, **left) as mine,
        client(mongodb_uri, database, **right) as theirs,
    ):
        one.ready(), other.ready()
        sides = [("left", mine, mine.workflows["w"]), ("right", theirs, next(iter(theirs.workflows.values())))]
        runs = [(mark, app, workflow, run) for mark, app, workflow in sides for run in workflow.start_many(range(10))]
        for _, app, workflow, run in runs:
            until_step(app, run, "ask", "waiting")
            workflow.resume(run.id, run.id)
        for mark, _, workflow, run in runs:
            assert workflow.wait_for(run.id, timeout=20).output == [mark, run.id]
        assert not one.logged("run_corrupt") + other.logged("run_corrupt")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_run_of_a_version_or_workflow_that_no_pool_has_waits_for_one(mongodb_uri: str, database: str, tmp_path: Path) -> None:
    """In the middle of a deployment no pool may fail or change a run whose version it does not have."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    with (
        client(mongodb_uri, database, version="2", workflows=("w", "brand-new")) as app,
        client(mongodb_uri, database, version="1") as old_app,
    ):
        with running(tmp_path / "old", pool_text("old"), mongodb_uri, "--workers", "2", database=database) as old:
            old.ready()
            waiting = [app.workflows[name].start() for name in ("w", "brand-new")]
            known = old_app.workflows["w"].start()
            until_step(old_app, known, "ask", "waiting")
            for run in waiting:
                found = app.runs.find_one({"_id": run.id})
                del found["bornAt"]  # the server's addition
                assert found == run.document, "changed by a pool that does not have its version"
            with other_program(mongodb_uri, database) as other:
                assert other.call("pause_run", waiting[0].id)["paused"] is True, "control operations need no workflow"
                assert other.call("resume_run", waiting[0].id)["paused"] is False
        with running(
            tmp_path / "new",
            pool_text("new", version="2", workflows=("w", "brand-new")),
            mongodb_uri, "--workers", "2", database=database,
        ) as new:  # fmt: skip
            new.ready()
            for run in waiting:
                until_step(app, run, "ask", "waiting")
                workflow = app.workflows[run.workflow_id]
                workflow.resume(run.id, "yes")
                assert workflow.wait_for(run.id, timeout=20).output == ["new", "yes"]
            # The old version's run is answered, and no worker claims it until a pool of its version is back.
            assert old_app.workflows["w"].resume(known.id, "yes").status == "running"
        with running(tmp_path / "old", pool_text("old"), mongodb_uri, "--workers", "1", database=database) as old:
            assert old_app.workflows["w"].wait_for(known.id, timeout=30).output == ["old", "yes"]
