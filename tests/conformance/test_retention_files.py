"""Outputs and files of deleted and archived runs: orphans are deleted after a day, and those of stored runs stay."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import gridfs
import pytest
from old_runs import archive, file_ids, files, ids, killed_at, meddling, outputs, put_file, put_output, put_run, revive

from streamline_pool import Streamline

Put = Callable[..., None]
Left = Callable[[Streamline], set[str]]
KINDS = pytest.mark.parametrize(
    ("put", "left"), [(put_file, file_ids), (put_output, lambda app: ids(outputs(app)))], ids=["files", "outputs"]
)


@KINDS
def test_orphans_go_after_a_day_and_nothing_else_does(app: Streamline, put: Put, left: Left) -> None:
    """A crash between output and commit, or the TTL, leaves outputs that no other code would ever delete."""
    put_run(app, "live", days=None, status="running")
    put_run(app, "done", days=1)
    put_run(app, "archived")
    put_run(app, "elsewhere")
    for name, run_id, days in (
        ("f-live", "live", 50),
        ("f-done", "done", 50),
        ("f-archived", "archived", 50),
        ("f-elsewhere", "elsewhere", 50),
        ("f-young", "gone", 0.9),
        ("f-old", "gone", 1.1),
        ("f-older", "gone", 50),
    ):
        put(app, name, run_id, days=days)
    app.archive_old_runs(399, to="attic")
    app.runs.insert_one(app.client[app.where.database]["attic"].find_one_and_delete({"_id": "archived"}))
    app.archive_old_runs(399)
    assert (ids(archive(app)), ids(app.client[app.where.database]["attic"])) == ({"archived"}, {"elsewhere"})
    app.cleanup_old_runs(30, dry_run=True)
    assert len(left(app)) == 7
    assert app.cleanup_old_runs(30) == 0
    assert left(app) == {"f-live", "f-done", "f-archived", "f-elsewhere", "f-young"}
    app.client[app.where.database]["attic"].drop()
    app.cleanup_old_runs(30)
    assert left(app) == {"f-live", "f-done", "f-archived", "f-young"}, "where an archive was dropped by hand, its files are orphans"


@KINDS
def test_deleting_a_run_that_the_archive_holds_as_well_keeps_its_outputs(
    app: Streamline, mongodb_uri: str, database: str, put: Put, left: Left
) -> None:
    """After an archiver's crash the run is in both collections, and the outputs belong to the copy that stays."""
    put_run(app, "run")
    put(app, "f", "run", days=50)
    killed_at("copy_runs", "after", "archive_old_runs(30)", mongodb_uri, database)
    assert app.cleanup_old_runs(30) == 1
    assert (ids(app.runs), ids(archive(app)), left(app)) == (set(), {"run"}, {"f"})


@KINDS
def test_a_new_run_under_a_deleted_id_keeps_its_outputs(app: Streamline, put: Put, left: Left) -> None:
    """Between the delete of a run and the search for its outputs, a new run may use the id."""
    put_run(app, "run")
    put(app, "f-old", "run")

    def start_again() -> None:
        put_run(app, "run", days=None, status="running")
        put(app, "f-new", "run")

    meddling(app, "existing_runs", start_again)
    assert app.cleanup_old_runs(30) == 1
    assert "f-new" in left(app)


@KINDS
def test_prefixes_do_not_mix(make_app: Callable[..., Streamline], put: Put, left: Left) -> None:
    one, other = make_app(), make_app(collection_prefix="other_")
    for app in (one, other):
        put_run(app, "run")
        put(app, "f", "run", days=9)
    assert one.cleanup_old_runs(30) == 1
    assert (ids(other.runs), left(other)) == ({"run"}, {"f"})
    assert other.archive_old_runs(30) == 1
    assert (ids(archive(one)), ids(archive(other))) == (set(), {"run"})


def test_runs_that_the_ttl_has_removed_leave_outputs_that_the_next_cleanup_removes(app: Streamline) -> None:
    """MongoDB removes run documents only. Without the clean-up, outputs would be kept for ever."""
    flow = app.workflow("flow", steps={"make": lambda ctx: "x" * 20_000, "again": lambda ctx: "y" * 20_000})
    kept, gone = (flow.execute(flow.start().id).id for _ in range(2))
    app.runs.delete_one({"_id": gone})
    app.cleanup_old_runs(30)
    assert outputs(app).count_documents({"runId": gone}) == 2, "they are younger than a day"
    for run_id in (kept, gone):
        for output in outputs(app).find({"runId": run_id}):
            outputs(app).delete_one({"_id": output["_id"]})
            put_output(app, output["_id"], run_id, days=2)
    app.cleanup_old_runs(30)
    assert [outputs(app).count_documents({"runId": run_id}) for run_id in (gone, kept)] == [0, 2]


def test_orphans_are_found_beside_many_outputs_of_stored_runs(app: Streamline) -> None:
    """The search goes on behind a run with more outputs than one command reads."""
    put_run(app, "many", days=None, status="running")
    outputs(app).insert_many([{"_id": f"many-{n}", "runId": "many", "data": b""} for n in range(1_200)])
    for run_id in ("before", "zero"):
        put_output(app, run_id, run_id, days=2)
    app.cleanup_old_runs(30)
    assert outputs(app).count_documents({}) == 1_200
    assert files(app).count_documents({}) == 0


@KINDS
def test_an_output_of_a_run_that_ended_again_before_its_copy_is_no_orphan(app: Streamline, put: Put, left: Left) -> None:
    """Its first output came after the archiver had looked for outputs, so it was deleted although the copy refers to it."""
    put_run(app, "run")

    def run_again() -> None:
        put(app, "late", "run", days=50)
        revive(app, "run", status="done", endedAt=datetime.now(UTC) - timedelta(days=40), output={"$external": "late"})

    meddling(app, "copy_runs", run_again)
    assert app.archive_old_runs(30, to="attic") == 1
    assert app.client[app.where.database]["attic"].find_one()["output"] == {"$external": "late"}
    app.cleanup_old_runs(30)
    assert left(app) == {"late"}


def test_more_outputs_than_one_command_can_name_are_archived(app: Streamline) -> None:
    """Rewound runs keep the outputs of each execution. The command that marks them was too large, so no such run could be archived."""
    put_run(app, "run")
    outputs(app).insert_many({"_id": f"{number:05}{'x' * 995}", "runId": "run", "at": None, "data": b""} for number in range(17_000))
    assert app.archive_old_runs(30, to="attic") == 1
    assert outputs(app).count_documents({"archives": "attic"}) == 17_000


@KINDS
@pytest.mark.parametrize(("before", "days"), [("delete_runs", 30), ("existing_runs", 500)])
def test_a_run_that_is_archived_during_a_clean_up_keeps_its_outputs(app: Streamline, put: Put, left: Left, before: str, days: int) -> None:
    """The clean-up knew only the archives that the outputs named before the move, and deleted what the archived run refers to."""
    put_run(app, "run")
    put(app, "f", "run", days=50)
    meddling(app, before, lambda: app.archive_old_runs(30, to="attic"))
    assert app.cleanup_old_runs(days) == 0
    assert ids(app.client[app.where.database]["attic"]) == {"run"}
    assert left(app) == {"f"}


@pytest.mark.parametrize("metadata", [None, {}, {"runId": 7}])
def test_a_foreign_file_with_the_name_of_a_run_stays_and_stops_nothing(app: Streamline, metadata: dict[str, object] | None) -> None:
    """Applications may use the same bucket. Such a file ended each clean-up with a KeyError, before anything was deleted."""
    bucket = gridfs.GridFSBucket(app.client[app.where.database], "workflow_files")
    bucket.upload_from_stream_with_id("theirs", "run", b"x", metadata=metadata)
    for to in (None, "attic"):
        put_run(app, "run")
        put_file(app, "f", "run")
        assert app.archive_old_runs(30, to=to) == 1
    put_run(app, "run")
    assert app.cleanup_old_runs(30) == 1
    for collection in (archive(app), app.client[app.where.database]["attic"]):
        collection.drop()
    put_run(app, "run")
    assert app.cleanup_old_runs(30) == 1
    assert file_ids(app) == {"theirs"}
