"""Files of deleted and archived runs: orphans are deleted after a day, and files of stored runs stay."""

from __future__ import annotations

from collections.abc import Callable

from old_runs import archive, file_ids, ids, killed_at, meddling, put_file, put_run

from streamline_pool import Streamline


def test_orphans_go_after_a_day_and_nothing_else_does(app: Streamline) -> None:
    """A crash between file and commit, or the TTL, leaves files that no other code would ever delete."""
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
        put_file(app, name, run_id, days=days)
    app.archive_old_runs(399, to="attic")
    app.runs.insert_one(app.client[app.where.database]["attic"].find_one_and_delete({"_id": "archived"}))
    app.archive_old_runs(399)
    assert (ids(archive(app)), ids(app.client[app.where.database]["attic"])) == ({"archived"}, {"elsewhere"})
    app.cleanup_old_runs(30, dry_run=True)
    assert len(file_ids(app)) == 7
    assert app.cleanup_old_runs(30) == 0
    assert file_ids(app) == {"f-live", "f-done", "f-archived", "f-elsewhere", "f-young"}
    app.client[app.where.database]["attic"].drop()
    app.cleanup_old_runs(30)
    assert file_ids(app) == {"f-live", "f-done", "f-archived", "f-young"}, "where an archive was dropped by hand, its files are orphans"


def test_deleting_a_run_that_the_archive_holds_as_well_keeps_its_files(app: Streamline, mongodb_uri: str, database: str) -> None:
    """After an archiver's crash the run is in both collections, and the files belong to the copy that stays."""
    put_run(app, "run")
    put_file(app, "f", "run", days=50)
    killed_at("copy_runs", "after", "archive_old_runs(30)", mongodb_uri, database)
    assert app.cleanup_old_runs(30) == 1
    assert (ids(app.runs), ids(archive(app)), file_ids(app)) == (set(), {"run"}, {"f"})


def test_a_new_run_under_a_deleted_id_keeps_its_files(app: Streamline) -> None:
    """Between the delete of a run and the search for its files, a new run may use the id."""
    put_run(app, "run")
    put_file(app, "f-old", "run")

    def start_again() -> None:
        put_run(app, "run", days=None, status="running")
        put_file(app, "f-new", "run")

    meddling(app, "existing_runs", start_again)
    assert app.cleanup_old_runs(30) == 1
    assert "f-new" in file_ids(app)


def test_prefixes_do_not_mix(make_app: Callable[..., Streamline]) -> None:
    one, other = make_app(), make_app(collection_prefix="other_")
    for app in (one, other):
        put_run(app, "run")
        put_file(app, "f", "run", days=9)
    assert one.cleanup_old_runs(30) == 1
    assert (ids(other.runs), file_ids(other)) == ({"run"}, {"f"})
    assert other.archive_old_runs(30) == 1
    assert (ids(archive(one)), ids(archive(other))) == (set(), {"run"})
