"""Rewinding a run: what it keeps, what it discards, and when it is refused."""

from __future__ import annotations

from typing import Any

import pytest
from held_run import held
from stored_runs import stored

from streamline_pool import StepNotFoundError, Streamline, WorkflowNotFoundError
from support import present


def test_a_rewind_discards_the_attempt_in_progress(app: Streamline) -> None:
    """Its handler may still work in some process: nothing that it returns may be stored, and the next attempt may begin at once."""
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
    assert first[4] != second[4], "a payment of the first pass must not count for the second"
    assert (done.step("one").attempts, done.output) == (1, 2)


def test_a_rewind_revives_a_failed_run(app: Streamline) -> None:
    broken = [True]

    def two(ctx: Any) -> str:
        if broken[0]:
            raise ValueError("broken")
        return "mended"

    workflow = app.workflow("w", steps={"one": lambda ctx: 1, "two": (two, {"retries": 1})})
    run = workflow.execute(workflow.start().id)
    assert (run.status, present(run.error)["code"]) == ("failed", "STEP_FAILED")
    broken[0] = False
    rewound = workflow.rewind_to(run.id, "two")
    assert (rewound.status, rewound.error, rewound.ended_at) == ("running", None, None)
    assert workflow.execute(run.id).output == "mended"


@pytest.mark.parametrize("method", ["rewind_to", "rewind_run"])
def test_an_impossible_rewind_says_why_and_changes_nothing(app: Streamline, method: str) -> None:
    workflow = app.workflow("w", steps={"one": lambda ctx: ctx.wait("?"), "two": lambda ctx: 2})
    run = workflow.execute(workflow.start().id)
    rewind = workflow.rewind_to if method == "rewind_to" else app.rewind_run
    before = stored(app, run)
    with pytest.raises(StepNotFoundError, match="its steps are one, two"):
        rewind(run.id, "three")
    with pytest.raises(WorkflowNotFoundError):
        rewind("unknown", "one")
    assert stored(app, run) == before
