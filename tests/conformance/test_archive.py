"""The archive: the copy equals the run, the collection may have any other name, and a copy never replaces a newer state."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from old_runs import archive, ids, put_run, revive

from streamline_pool import Streamline, ValidationError
from streamline_pool.protocol import retention
from support import shown


def test_an_archived_run_equals_the_run_byte_for_byte(app: Streamline) -> None:
    flow = app.workflow("flow", steps={"a": lambda ctx: {"n": 1, "$x.y": [b"z", datetime(2024, 1, 1, tzinfo=UTC)]}})
    run = flow.execute(flow.start({"a": 1}, meta={"b": 2}, user_id="ann", tags=["t"], idempotency_key="k").id)
    raw = next(app.runs.aggregate([{"$replaceWith": {"size": {"$bsonSize": "$$ROOT"}}}]))
    assert app.archive_old_runs(0) == 1
    assert archive(app).find_one() == run.to_dict()
    assert next(archive(app).aggregate([{"$replaceWith": {"size": {"$bsonSize": "$$ROOT"}}}])) == raw
    assert flow.get(run.id) is None


@pytest.mark.parametrize(
    "to",
    ["", "workflow_runs", "workflow_hosts", "workflow_signals", "workflow_outputs", "workflow_files.files", "a$b", "system.x", ".a",
     "a.", "a..b", "a\0b", "x" * 121, "\ud800", 7, ["a"]],
    ids=shown,
)  # fmt: skip
def test_an_invalid_archive_name_is_refused(app: Streamline, to: Any) -> None:
    """If the archive were the runs' own collection, each run would be copied onto itself and then deleted."""
    put_run(app, "run")
    with pytest.raises(ValidationError, match="archive_old_runs: to"):
        app.archive_old_runs(30, to=to)
    assert ids(app.runs) == {"run"}


@pytest.mark.parametrize("to", ["workflow_runs_archive", "elsewhere", "a.b/c d"])
def test_the_archive_may_have_any_other_name(app: Streamline, database: str, to: str) -> None:
    put_run(app, "run")
    assert app.archive_old_runs(30, to=to, dry_run=True) == 1
    assert app.archive_old_runs(30, to=to) == 1
    assert ids(app.client[database][to]) == {"run"}


def test_another_run_with_the_same_id_in_the_archive_is_not_replaced(app: Streamline, caplog: pytest.LogCaptureFixture) -> None:
    """An id may be used again after its run was archived; a replacing copy would lose one of the two runs."""
    put_run(app, "run", input="first")
    assert app.archive_old_runs(30) == 1
    put_run(app, "run", input="second", createdAt=datetime.now(UTC) - timedelta(days=450), rev=9)
    put_run(app, "run-2")
    assert app.archive_old_runs(30) == 1
    assert (app.runs.find_one()["input"], archive(app).find_one({"_id": "run"})["input"]) == ("second", "first")
    assert [record.message for record in caplog.records] == ["archive_has_other_run"]


def test_a_late_copy_does_not_replace_a_later_state(app: Streamline) -> None:
    """A slow archiver's write may arrive after the run was revived, has ended and was archived again."""
    put_run(app, "run", output="old")
    late = app.runs.find_one()
    revive(app, "run", status="done", endedAt=late["endedAt"], output="new")
    assert app.archive_old_runs(30) == 1
    app.runs.insert_one(late)
    condition = retention.ended_before(0)
    app.store().run(retention.copy_runs(["run"], condition, "workflow_runs_archive"))
    assert archive(app).find_one()["output"] == "new"
