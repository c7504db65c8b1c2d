"""Applications in one process do not affect each other, and neither do the objects that their callers pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from workers import run_until_idle

from streamline_pool import Streamline, ValidationError
from support import present


def test_apps_share_only_what_is_stored(make_app: Callable[..., Streamline]) -> None:
    one, two = make_app(), make_app()
    received: list[str] = []
    one.events.on("*", lambda event: received.append(event.name))
    workflow = two.workflow("w", steps={"a": lambda ctx: 1})
    assert "w" not in one.workflows
    assert workflow.execute(workflow.start().id).status == "done"
    one.close()
    assert received == []
    assert one.get_run(workflow.start().id) is not None


def test_a_prefix_keeps_two_applications_in_one_database_apart(make_app: Callable[..., Streamline]) -> None:
    one, two = make_app(), make_app(collection_prefix="other_")
    mine, other = (app.workflow("w", steps={"a": lambda ctx: 1}) for app in (one, two))
    run = mine.start()
    assert other.get(run.id) is None
    run_until_idle(two)
    assert present(mine.get(run.id)).status == "running"
    assert two.runs.name == "other_runs"


def test_a_worker_claims_only_what_is_on_its_queues(make_app: Callable[..., Streamline]) -> None:
    everything, mail_only = make_app(), make_app(queues=("mail",))
    for app in (everything, mail_only):
        app.workflow("w", steps={"a": lambda ctx: 1})
    workflow = everything.workflows["w"]
    plain, mail = workflow.start(), workflow.start(queue="mail")
    run_until_idle(mail_only)
    assert (present(workflow.get(plain.id)).status, present(workflow.get(mail.id)).status) == ("running", "done")
    run_until_idle(everything)
    assert present(workflow.get(plain.id)).status == "done"


def test_a_run_on_the_queue_of_another_workflow_is_claimed_by_a_worker_of_all_queues(app: Streamline) -> None:
    """Without --queue a pool serves every queue of its application. Such a run waited for ever."""
    letters = app.workflow("letters", steps={"a": lambda ctx: 1})
    app.workflow("mail", steps={"a": lambda ctx: 1}, queue="mail")
    run, own = letters.start(queue="mail"), letters.start()
    run_until_idle(app)
    assert [present(letters.get(run_id)).status for run_id in (run.id, own.id)] == ["done", "done"]


def test_what_a_caller_does_to_its_input_afterwards_changes_nothing(app: Streamline) -> None:
    workflow = app.workflow("w", steps={"a": lambda ctx: ctx.input})
    mine: dict[str, Any] = {"list": [1]}
    run = workflow.start(mine)
    mine["list"].append(2)
    assert run.input == {"list": [1]}
    assert workflow.execute(run.id).output == {"list": [1]}


def test_an_app_in_use_cannot_be_configured_anew(app: Streamline) -> None:
    app.workflow("w", steps={"a": lambda ctx: 1}).start()
    with pytest.raises(ValidationError, match="configure it before the first use"):
        app.configure(app.settings)


@pytest.mark.parametrize("uri", ["", "http://x", "mongodb://", "mongodb://h:notaport", "mongodb://u:secret@h/?tls=maybe"])
def test_a_uri_that_cannot_work_is_refused_without_its_password(uri: str) -> None:
    with pytest.raises(ValidationError) as caught:
        _ = Streamline(uri or "x").where
    assert "secret" not in str(caught.value)
