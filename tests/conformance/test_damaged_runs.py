"""Control operations on runs that another program has damaged: a call that raises has changed nothing, and one that changes returns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from stored_runs import stored

from streamline_pool import Streamline, WorkflowError, create_hook

MISSING = object()
VALUES: tuple[Any, ...] = (MISSING, None, 7, [{}])


class Damaged:
    """A run that stands in one way, and one call on it."""

    def __init__(self, app: Streamline, operation: str) -> None:
        self.app = app
        self.tokens: list[str] = []

        def wait(ctx: Any) -> None:
            self.tokens.append(create_hook(ctx, "sign here").token)
            if "send_event" in operation:
                ctx.wait_for("go")
            ctx.wait("sign here")

        workflow = app.workflow("w", steps={"large": lambda ctx: "x" * 10_000, "wait": wait, "last": lambda ctx: 1})
        self.run_id = workflow.start().id
        if operation != "unpause a due run":
            workflow.execute(self.run_id)
        if "unpause" in operation:
            workflow.pause(self.run_id)
        calls: dict[str, Callable[[], Any]] = {
            "cancel": partial(workflow.cancel, self.run_id),
            "pause": partial(workflow.pause, self.run_id),
            "unpause": partial(workflow.resume, self.run_id),
            "unpause a due run": partial(workflow.resume, self.run_id),
            "answer": partial(workflow.resume, self.run_id, "yes"),
            "rewind": partial(workflow.rewind_to, self.run_id, "wait"),
            "resume_hook": lambda: app.resume_hook(self.tokens[0], "yes"),
            "send_event": partial(app.send_event, "go", 1, run_id=self.run_id),
            "send_event to all": partial(app.send_event, "go", 1),
        }
        self.call = calls[operation]
        self.document = stored(app, self.run_id)

    def changed_although_it_raised(self, document: dict[str, Any]) -> str | None:
        """Store the document and make the call. Returns the error, if the call raised one and has changed the run."""
        self.app.runs.replace_one({"_id": self.run_id}, document)
        try:
            self.call()
        except WorkflowError as exc:
            return str(exc) if stored(self.app, self.run_id) != document else None
        return None


OPERATIONS = (
    "cancel", "pause", "unpause", "unpause a due run", "answer", "rewind", "resume_hook", "send_event", "send_event to all",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_call_that_raises_has_changed_nothing(app: Streamline, operation: str) -> None:
    """A caller takes an error for a call that did not happen: it answers again, or reports that the run goes on."""
    damaged = Damaged(app, operation)
    wrong = {}
    for name in set(damaged.document) - {"_id"}:
        for value in VALUES:
            document = copy.deepcopy(damaged.document)
            document.pop(name)
            if value is not MISSING:
                document[name] = value
            error = damaged.changed_although_it_raised(document)
            if error is not None:
                wrong[name, str(value)] = error
    assert not wrong


@pytest.mark.parametrize("operation", [operation for operation in OPERATIONS if operation != "unpause a due run"])
def test_a_missing_output_hinders_no_control_operation(app: Streamline, operation: str) -> None:
    """Else a run that has lost an output could not even be cancelled; or it would be, and its caller would not know it."""
    damaged = Damaged(app, operation)
    assert app.store().collection("outputs").delete_many({"runId": damaged.run_id}).deleted_count == 1
    assert damaged.changed_although_it_raised(damaged.document) is None
    assert stored(app, damaged.run_id)["updatedAt"] > damaged.document["updatedAt"]
