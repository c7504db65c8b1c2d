"""Deleting and archiving while runs are revived, while other cleaners work, and when the cleaner is killed or the server fails."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from old_runs import LONG_AGO_DAYS, archive, file_ids, ids, killed_at, meddling, put_file, put_run, revive, use

from streamline_pool import StoreUnavailableError, Streamline
from streamline_pool.protocol import retention
from streamline_pool.protocol.operations import Op
from streamline_pool.storage.store import Store
from support import REPOSITORY


@pytest.mark.parametrize("ended_again", [False, True])
def test_a_run_that_was_revived_before_the_delete_stays(app: Streamline, ended_again: bool) -> None:
    """If a run were found as old, rewound and then deleted, work in progress would be lost."""
    for number in range(5):
        put_run(app, f"run-{number}")
        put_file(app, f"f-{number}", f"run-{number}")
    more = {"status": "done", "endedAt": datetime.now(UTC)} if ended_again else {}
    meddling(app, "delete_runs", lambda: revive(app, "run-1", "run-3", **more))
    assert app.cleanup_old_runs(30) == 3
    assert ids(app.runs) == {"run-1", "run-3"}
    assert file_ids(app) == {"f-1", "f-3"}


@pytest.mark.parametrize("before", ["copy_runs", "identify_runs", "delete_same_runs"])
@pytest.mark.parametrize("ended_again", [False, True])
def test_a_run_that_was_revived_stays_and_leaves_no_copy(app: Streamline, before: str, ended_again: bool) -> None:
    """Readers of the archive take its runs for ended, so the deleted document must be exactly the copied one."""
    for number in range(5):
        put_run(app, f"run-{number}")
    # Ended again in the same millisecond, and so old again: only `acts` and `rev` differ.
    more = {"status": "done", "endedAt": app.runs.find_one({"_id": "run-1"})["endedAt"], "output": "new"} if ended_again else {}
    meddling(app, before, lambda: revive(app, "run-1", **more))
    moved = app.archive_old_runs(30)
    if before == "copy_runs" and ended_again:
        assert moved == 5, "it was old again before it was copied"
        assert archive(app).find_one({"_id": "run-1"})["output"] == "new"
        return
    assert moved == 4
    assert ids(app.runs) == {"run-1"}
    assert ids(archive(app)) == {"run-0", "run-2", "run-3", "run-4"}
    if ended_again:
        assert app.archive_old_runs(30) == 1
        assert archive(app).find_one({"_id": "run-1"})["output"] == "new"


def test_more_runs_than_one_query_returns(app: Streamline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queries must neither skip a run at their borders nor count one twice."""
    monkeypatch.setattr(retention, "SLICE", 7)
    for number in range(50):
        put_run(app, f"run-{number:02}", days=LONG_AGO_DAYS if number % 3 else 1)
    assert app.cleanup_old_runs(30, dry_run=True) == 33
    assert app.archive_old_runs(300) == 33
    assert len(ids(app.runs)) == 17
    assert app.cleanup_old_runs(0.5) == 17


def test_thousands_take_few_commands(app: Streamline) -> None:
    """With one round trip per run, a million runs would take an hour."""
    names: Counter[str] = Counter()

    class Counting(Store):
        def run(self, op: Op, session: Any = None) -> Any:
            names[op.name] += 1
            return super().run(op, session)

    app.init_db()
    ended_at = datetime.now(UTC) - timedelta(days=50)
    app.runs.insert_many({"_id": f"run-{n:05}", "status": "done", "endedAt": ended_at, "createdAt": ended_at} for n in range(5_000))
    use(app, Counting(app.where, app.env))
    assert app.archive_old_runs(30) == 5_000
    assert sum(names.values()) == 6 + 25 * 3 + 2, names  # two for events that no run can need any more
    names.clear()
    assert app.cleanup_old_runs(30) == 0
    assert sum(names.values()) == 5, names  # for runs, files, outputs, and two for events that no run can need any more


@pytest.mark.slow
def test_cleaners_at_once_delete_each_run_once_and_count_it_once(app: Streamline, mongodb_uri: str, database: str) -> None:
    """The nightly job may run on every host at the same time."""
    app.runs.insert_many(
        {"_id": f"run-{n:04}", "status": "done", "endedAt": datetime.now(UTC) - timedelta(days=50), "createdAt": datetime.now(UTC)}
        for n in range(3_000)
    )
    for number in range(0, 3_000, 500):
        put_file(app, f"f-{number}", f"run-{number:04}")
    code = (
        "import sys; from streamline_pool import Streamline; app = Streamline(sys.argv[1], database=sys.argv[2]);"
        "print(app.archive_old_runs(30) if sys.argv[3] == 'archive' else app.cleanup_old_runs(30)); app.close()"
    )
    for kind, per_kind in (("archive", 3), ("cleanup", 0)):
        calls = [[sys.executable, "-c", code, mongodb_uri, database, kind if n < per_kind else "archive"] for n in range(3)]
        started = [subprocess.Popen(call, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for call in calls]
        counts = [int(process.communicate(timeout=50)[0]) for process in started]
        assert sum(counts) == (3_000 if kind == "archive" else 0)
    assert ids(app.runs) == set()
    assert len(ids(archive(app))) == 3_000
    assert len(file_ids(app)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("to", [None, "old_runs"])
def test_a_killed_archiver_loses_nothing_and_the_next_one_finishes(
    app: Streamline, mongodb_uri: str, database: str, to: str | None
) -> None:
    """If a run were deleted before it was copied, it would be in neither collection."""
    into = app.client[database][to or "workflow_runs_archive"]
    whole = {put_run(app, f"run-{number}", input={"n": number, "$odd.key": 1}): number for number in range(6)}
    put_file(app, "f-0", "run-0", days=9)
    before = {run["_id"]: run for run in app.runs.find()}
    for operation in ("scan_runs", "copy_runs", "identify_runs", "delete_same_runs"):
        for when in ("before", "after"):
            killed_at(operation, when, f"archive_old_runs(30, to={to!r})", mongodb_uri, database)
            assert ids(app.runs) | ids(into) == set(whole), f"{when} {operation}"
            if operation != "delete_same_runs":
                assert ids(app.runs) == set(whole)
    assert ids(app.runs) == set(), "the last one died after its delete"
    assert app.archive_old_runs(30, to=to) == 0
    assert {run["_id"]: run for run in into.find()} == before
    app.cleanup_old_runs(0)
    assert file_ids(app) == {"f-0"}, "an archived run keeps its files, wherever it is"


def test_a_killed_archiver_is_finished_by_a_second_call(app: Streamline, mongodb_uri: str, database: str) -> None:
    for number in range(4):
        put_run(app, f"run-{number}")
    killed_at("copy_runs", "after", "archive_old_runs(30)", mongodb_uri, database)
    assert len(ids(app.runs)) == len(ids(archive(app))) == 4
    assert app.archive_old_runs(30) == 4
    assert (len(ids(app.runs)), len(ids(archive(app)))) == (0, 4)


def test_a_cleaner_that_dies_leaves_orphaned_files_and_never_a_run_without_its_files(
    app: Streamline, mongodb_uri: str, database: str
) -> None:
    """If the files were deleted first, a run whose clean-up died midway could not be read any more."""
    put_run(app, "run-1")
    put_file(app, "f-1", "run-1", days=2)
    killed_at("delete_runs", "before", "cleanup_old_runs(30)", mongodb_uri, database)
    assert (ids(app.runs), file_ids(app)) == ({"run-1"}, {"f-1"})
    killed_at("delete_runs", "after", "cleanup_old_runs(30)", mongodb_uri, database)
    assert (ids(app.runs), file_ids(app)) == (set(), {"f-1"})
    app.cleanup_old_runs(30)
    assert file_ids(app) == set()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lost", "unknown"])
@pytest.mark.parametrize("call", ["archive", "cleanup"])
def test_a_fault_in_any_operation_loses_nothing(make_app: Callable[..., Streamline], kind: str, call: str) -> None:
    class Faulty(Store):
        seen, strike = 0, 0

        def run(self, op: Op, session: Any = None) -> Any:
            self.seen += 1
            if self.seen != self.strike:
                return super().run(op, session)
            if kind == "unknown":
                super().run(op, session)
            raise StoreUnavailableError("a fault of this test", transient=True)

    app = make_app()
    for number in range(1, 30):
        app.runs.drop()
        archive(app).drop()
        use(app, Store(app.where, app.env))
        for run in ("a", "b"):
            put_run(app, f"run-{run}")
            put_file(app, f"f-{run}", f"run-{run}")
        put_run(app, "live", days=None, status="running")
        store = use(app, Faulty(app.where, app.env))
        store.strike = number
        (app.archive_old_runs if call == "archive" else app.cleanup_old_runs)(30)
        assert ids(app.runs) == {"live"}, number
        assert ids(archive(app)) == ({"run-a", "run-b"} if call == "archive" else set())
        assert file_ids(app) == ({"f-a", "f-b"} if call == "archive" else set())
        if store.seen < number:
            assert number > 4
            return
    raise AssertionError("the procedure does not end")
