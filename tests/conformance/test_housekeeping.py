"""Deleting and archiving ended runs on a real server: exactly those, whatever dies or comes between."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest

from streamline_pool import StoreUnavailableError, Streamline, ValidationError
from streamline_pool.protocol import retention
from streamline_pool.protocol.codec import encode_payload
from streamline_pool.protocol.operations import Op
from streamline_pool.storage.files import putting_file
from streamline_pool.storage.store import Store
from support import shown

REPOSITORY = Path(__file__).resolve().parents[2]
LONG_AGO_DAYS = 400
BULK = encode_payload("x" * 300_000, "x")


def stored(app: Streamline, run_id: str, *, days: float | None = LONG_AGO_DAYS, status: str = "done", **fields: Any) -> str:
    """A run as one that ended `days` days ago (None: it has not) is stored."""
    ended_at = None if days is None else datetime.now(UTC) - timedelta(days=days)
    document = {
        "_id": run_id,
        "workflowId": "flow",
        "version": "1.0.0",
        "status": status,
        "steps": [{"stepId": "a", "status": "done", "attempts": 1, "output": None}],
        "currentStepId": None,
        "context": {},
        "createdAt": datetime.now(UTC) - timedelta(days=500),
        "updatedAt": ended_at,
        "endedAt": ended_at,
        "rev": 3,
        "acts": 0,
        **fields,
    }
    app.runs.insert_one(document)
    return run_id


def put_file(app: Streamline, file_id: str, run_id: str, *, days: float = 0) -> None:
    app.store().drive(putting_file(file_id, BULK, run_id))
    files(app).update_one({"_id": file_id}, {"$set": {"uploadDate": datetime.now(UTC) - timedelta(days=days)}})


def files(app: Streamline) -> Any:
    return app.store().collection("files.files")


def archive(app: Streamline) -> Any:
    return app.store().collection("runs_archive")


def ids(collection: Any) -> set[str]:
    return {document["_id"] for document in collection.find({}, {"_id": 1})}


def file_ids(app: Streamline) -> set[str]:
    records = ids(files(app))
    assert records == set(app.store().collection("files.chunks").distinct("files_id")), "records and chunks belong together"
    return records


class Meddling(Store):
    """Lets something happen immediately before the operation of a certain name."""

    meddle: Callable[[], object] | None = None
    before = ""

    def run(self, op: Op, session: Any = None) -> Any:
        if op.name == self.before and self.meddle is not None:
            meddle, self.meddle = self.meddle, None
            meddle()
        return super().run(op, session)


def meddling(app: Streamline, before: str, meddle: Callable[[], object]) -> None:
    store = use(app, Meddling(app.where, app.env))
    store.before, store.meddle = before, meddle


S = TypeVar("S", bound=Store)


def use(app: Streamline, store: S) -> S:
    """Let the application work by this store; what it had is closed."""
    app.store().close()
    app.connections.use(store)
    return store


# --- what counts as old --------------------------------------------------------------------------------------------


def test_only_runs_that_ended_long_enough_ago_are_deleted(app: Streamline) -> None:
    """A sleep of a year is no old run; a run that was started a year ago and ended yesterday is not old."""
    old = {stored(app, f"old-{status}", status=status) for status in ("done", "failed", "cancelled")}
    kept = {stored(app, f"live-{status}", status=status) for status in ("draft", "running", "waiting")}
    kept |= {stored(app, "young", days=29.9), stored(app, "no-date", endedAt=None), stored(app, "text", endedAt="2001-01-01")}
    kept |= {stored(app, "number", endedAt=7), stored(app, "dates", endedAt=[datetime(2001, 1, 1, tzinfo=UTC)])}
    app.runs.update_one({"_id": "no-date"}, {"$unset": {"endedAt": ""}})
    assert app.cleanup_old_runs(dry_run=True) == 3
    assert ids(app.runs) == old | kept, "a dry run changes nothing"
    assert app.cleanup_old_runs() == 3
    assert ids(app.runs) == kept
    assert app.cleanup_old_runs() == 0


def test_days_may_be_zero_fractional_and_a_timedelta(app: Streamline) -> None:
    for run_id, days in (("just", 0.0), ("hours", 0.6), ("days", 3.0)):
        stored(app, run_id, days=days)
    assert app.cleanup_old_runs(1.5) == 1
    assert app.cleanup_old_runs(timedelta(hours=12)) == 1
    assert app.cleanup_old_runs(0) == 1
    assert app.cleanup_old_runs(10**9) == 0


@pytest.mark.parametrize("days", [-1, -0.1, float("nan"), float("inf"), "30", None, True, timedelta(days=-1)], ids=shown)
def test_what_can_be_no_age_is_refused(app: Streamline, days: Any) -> None:
    """A negative age would be every run that ends in the future, and so all of them."""
    stored(app, "run")
    for call in (app.cleanup_old_runs, app.archive_old_runs):
        with pytest.raises(ValidationError, match="days: a finite number of days, at least 0"):
            call(days)
    assert ids(app.runs) == {"run"}


def test_the_age_is_judged_by_the_servers_clock(app: Streamline) -> None:
    """A host whose clock is a year ahead must not delete last week's runs."""

    class Ahead:
        def now(self) -> datetime:
            return datetime.now(UTC) + timedelta(days=365)

        def monotonic(self) -> float:
            return system.clock.monotonic()

    system = app.env
    app.env = type(system)(**{**{name: getattr(system, name) for name in system.__slots__}, "clock": Ahead()})
    stored(app, "young", days=1)
    assert app.cleanup_old_runs(30) == app.archive_old_runs(30) == 0


def test_expired_runs_are_those_that_ended_and_whose_own_date_has_passed(app: Streamline) -> None:
    now = datetime.now(UTC)
    past, future = now - timedelta(minutes=1), now + timedelta(hours=1)
    for number, status in enumerate(("done", "failed", "cancelled", "waiting", "running", "draft")):
        stored(app, f"past-{status}", days=0, status=status, context={"expireAt": past}, rev=number)
    stored(app, "future", context={"expireAt": future})
    stored(app, "none")
    for number, value in enumerate(("2001-01-01", 0, None, [past], {"at": past}, True)):
        stored(app, f"odd-{number}", context={"expireAt": value})
    stored(app, "odd-context", context=[{"expireAt": past}])
    put_file(app, "f-1", "past-done")
    put_file(app, "f-2", "future")
    assert app.cleanup_expired(dry_run=True) == 3
    assert app.cleanup_expired() == 3
    left = ids(app.runs)
    assert {"past-waiting", "past-running", "past-draft", "future", "none", "odd-context"} <= left
    assert len(left) == 12
    assert file_ids(app) == {"f-2"}
    assert app.cleanup_expired() == 0


# --- tenants -------------------------------------------------------------------------------------------------------


def test_one_tenants_runs_only(app: Streamline) -> None:
    """One tenant's request to forget must not be answered with another's runs."""
    for tenant in ("a", "b", "", None):
        stored(app, f"run-of-{tenant}", context={"tenantId": tenant})
    stored(app, "run-of-nobody", context={})
    stored(app, "live-of-a", days=None, status="waiting", context={"tenantId": "a"})
    assert app.cleanup_old_runs(30, tenant_id="a", dry_run=True) == 1
    assert app.cleanup_old_runs(30, tenant_id="a") == 1
    assert app.cleanup_old_runs(30, tenant_id={"$ne": "x"}) == 0, "a tenant is a value, not a query"
    assert app.cleanup_old_runs(30, tenant_id="") == 1
    assert ids(app.runs) == {"run-of-b", "run-of-None", "run-of-nobody", "live-of-a"}


def test_the_tenants_field_is_the_one_of_setup_indexes_also_in_another_process(
    app: Streamline, make_app: Callable[..., Streamline]
) -> None:
    """The command that cleans up at night has never called setup_indexes."""
    stored(app, "run-1", meta={"tenant": "a"}, context={"tenantId": "b"})
    stored(app, "run-2", meta={"tenant": "b"}, context={"tenantId": "a"})
    stored(app, "run-3", meta={"tenant": "a"}, context={"tenantId": "c"})
    nightly = make_app()
    assert nightly.cleanup_old_runs(tenant_id="c", dry_run=True) == 1, "context.tenantId until somebody says otherwise"
    app.setup_indexes(tenant_field="meta.tenant")
    assert app.cleanup_old_runs(tenant_id="a", dry_run=True) == 2
    assert nightly.cleanup_old_runs(tenant_id="a", dry_run=True) == 2
    make_app().setup_indexes(tenant_field="context.tenantId")
    with pytest.raises(ValidationError, match=r"tenants are indexed by meta\.tenant and by context\.tenantId"):
        nightly.cleanup_old_runs(tenant_id="a")
    assert app.cleanup_old_runs(tenant_id="a") == 2
    assert ids(app.runs) == {"run-2"}


def test_a_database_without_collections_has_nothing_to_clean(app: Streamline) -> None:
    assert app.cleanup_old_runs(0) == app.cleanup_old_runs(0, tenant_id="a") == app.archive_old_runs(0) == app.cleanup_expired() == 0
    assert app.client[app.where.database].list_collection_names() == []


# --- revived in between --------------------------------------------------------------------------------------------


def revive(app: Streamline, *run_ids: str, **more: Any) -> None:
    """What `rewind_to` writes, as far as it matters here."""
    sets = {"status": "running", "endedAt": None, **more}
    app.store().collection("runs").update_many({"_id": {"$in": list(run_ids)}}, {"$set": sets, "$inc": {"acts": 1}})


@pytest.mark.parametrize("ended_again", [False, True])
def test_a_run_that_was_revived_before_the_delete_stays(app: Streamline, ended_again: bool) -> None:
    """Found as old, rewound, and deleted while a worker has it: work would vanish in progress."""
    for number in range(5):
        stored(app, f"run-{number}")
        put_file(app, f"f-{number}", f"run-{number}")
    more = {"status": "done", "endedAt": datetime.now(UTC)} if ended_again else {}
    meddling(app, "delete_runs", lambda: revive(app, "run-1", "run-3", **more))
    assert app.cleanup_old_runs(30) == 3
    assert ids(app.runs) == {"run-1", "run-3"}
    assert file_ids(app) == {"f-1", "f-3"}


@pytest.mark.parametrize("before", ["copy_runs", "identify_runs", "delete_same_runs"])
@pytest.mark.parametrize("ended_again", [False, True])
def test_a_run_that_was_revived_stays_and_leaves_no_copy(app: Streamline, before: str, ended_again: bool) -> None:
    """A run in the archive is taken for ended; what is deleted must be what was copied."""
    for number in range(5):
        stored(app, f"run-{number}")
    # Ended again in the very same millisecond, and old: only `acts` and `rev` tell.
    more = {"status": "done", "endedAt": app.runs.find_one({"_id": "run-1"})["endedAt"], "output": "new"} if ended_again else {}
    meddling(app, before, lambda: revive(app, "run-1", **more))
    moved = app.archive_old_runs(30)
    if before == "copy_runs" and ended_again:
        assert moved == 5, "it was old again when it was copied"
        assert archive(app).find_one({"_id": "run-1"})["output"] == "new"
        return
    assert moved == 4
    assert ids(app.runs) == {"run-1"}
    assert ids(archive(app)) == {"run-0", "run-2", "run-3", "run-4"}
    if ended_again:
        assert app.archive_old_runs(30) == 1
        assert archive(app).find_one({"_id": "run-1"})["output"] == "new"


# --- many, at once, interrupted ------------------------------------------------------------------------------------


def test_more_runs_than_one_look_sees(app: Streamline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The looks must neither skip runs at their borders nor count one twice."""
    monkeypatch.setattr(retention, "SLICE", 7)
    for number in range(50):
        stored(app, f"run-{number:02}", days=LONG_AGO_DAYS if number % 3 else 1)
    assert app.cleanup_old_runs(30, dry_run=True) == 33
    assert app.archive_old_runs(300) == 33
    assert len(ids(app.runs)) == 17
    assert app.cleanup_old_runs(0.5) == 17


def test_thousands_take_few_commands(app: Streamline) -> None:
    """One round trip for each run would make a million take an hour."""
    names: Counter[str] = Counter()

    class Counting(Store):
        def run(self, op: Op, session: Any = None) -> Any:
            names[op.name] += 1
            return super().run(op, session)

    ended_at = datetime.now(UTC) - timedelta(days=50)
    app.runs.insert_many({"_id": f"run-{n:05}", "status": "done", "endedAt": ended_at, "createdAt": ended_at} for n in range(5_000))
    use(app, Counting(app.where, app.env))
    assert app.archive_old_runs(30) == 5_000
    assert sum(names.values()) == 6 + 25 * 3, names
    names.clear()
    assert app.cleanup_old_runs(30) == 0
    assert sum(names.values()) == 4, names  # two looks, and two for events that nobody can want any more


@pytest.mark.slow
def test_cleaners_at_once_delete_each_run_once_and_count_it_once(app: Streamline, mongodb_uri: str, database: str) -> None:
    """The nightly job runs on every host."""
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


def killed_at(operation: str, when: str, call: str, uri: str, database: str) -> None:
    """A process that makes `call` and is killed immediately before or after its first `operation`."""
    code = f"""
import os, signal, sys
from streamline_pool import Streamline
from streamline_pool.storage.store import Store

class Dying(Store):
    def run(self, op, session=None):
        if op.name == {operation!r} and {when!r} == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        answer = super().run(op, session)
        if op.name == {operation!r}:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

app = Streamline(sys.argv[1], database=sys.argv[2])
app.connections.use(Dying(app.where, app.env))
app.{call}
"""
    ended = subprocess.run([sys.executable, "-c", code, uri, database], cwd=REPOSITORY, timeout=50, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, (operation, ended)


@pytest.mark.slow
@pytest.mark.parametrize("to", [None, "old_runs"])
def test_a_killed_archiver_loses_nothing_and_the_next_one_finishes(
    app: Streamline, mongodb_uri: str, database: str, to: str | None
) -> None:
    """Deleted before it was copied, a run would be in neither collection."""
    into = app.client[database][to or "workflow_runs_archive"]
    whole = {stored(app, f"run-{number}", input={"n": number, "$odd.key": 1}): number for number in range(6)}
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
        stored(app, f"run-{number}")
    killed_at("copy_runs", "after", "archive_old_runs(30)", mongodb_uri, database)
    assert len(ids(app.runs)) == len(ids(archive(app))) == 4
    assert app.archive_old_runs(30) == 4
    assert (len(ids(app.runs)), len(ids(archive(app)))) == (0, 4)


def test_a_cleaner_that_dies_leaves_orphans_and_never_a_run_without_its_files(app: Streamline, mongodb_uri: str, database: str) -> None:
    """Files first, and a run whose clean-up died half-way can be read no more."""
    stored(app, "run-1")
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
            stored(app, f"run-{run}")
            put_file(app, f"f-{run}", f"run-{run}")
        stored(app, "live", days=None, status="running")
        store = use(app, Faulty(app.where, app.env))
        store.strike = number
        (app.archive_old_runs if call == "archive" else app.cleanup_old_runs)(30)
        assert ids(app.runs) == {"live"}, number
        assert ids(archive(app)) == ({"run-a", "run-b"} if call == "archive" else set())
        assert file_ids(app) == ({"f-a", "f-b"} if call == "archive" else set())
        if store.seen < number:
            assert number > 4
            return
    raise AssertionError("an endless procedure")


# --- archives ------------------------------------------------------------------------------------------------------


def test_an_archived_run_is_the_run_byte_for_byte(app: Streamline) -> None:
    flow = app.workflow("flow", steps={"a": lambda ctx: {"n": 1, "$x.y": [b"z", datetime(2024, 1, 1, tzinfo=UTC)]}})
    run = flow.execute(flow.start({"a": 1}, meta={"b": 2}, user_id="ann", tags=["t"], idempotency_key="k").id)
    raw = next(app.runs.aggregate([{"$replaceWith": {"size": {"$bsonSize": "$$ROOT"}}}]))
    assert app.archive_old_runs(0) == 1
    assert archive(app).find_one() == run.to_dict()
    assert next(archive(app).aggregate([{"$replaceWith": {"size": {"$bsonSize": "$$ROOT"}}}])) == raw
    assert flow.get(run.id) is None


@pytest.mark.parametrize(
    "to",
    ["", "workflow_runs", "workflow_hosts", "workflow_signals", "workflow_files.files", "workflow_files.chunks", "a$b", "system.x", ".a",
     "a.", "a..b", "a\0b", "x" * 121, "\ud800", 7, ["a"]],
    ids=shown,
)  # fmt: skip
def test_what_can_be_no_archive_is_refused(app: Streamline, to: Any) -> None:
    """Archived into the collection of runs itself, runs would be copied onto themselves and then deleted."""
    stored(app, "run")
    with pytest.raises(ValidationError, match="archive_old_runs: to"):
        app.archive_old_runs(30, to=to)
    assert ids(app.runs) == {"run"}


@pytest.mark.parametrize("to", ["workflow_runs_archive", "elsewhere", "a.b/c d"])
def test_the_archive_may_have_any_other_name(app: Streamline, database: str, to: str) -> None:
    stored(app, "run")
    assert app.archive_old_runs(30, to=to, dry_run=True) == 1
    assert app.archive_old_runs(30, to=to) == 1
    assert ids(app.client[database][to]) == {"run"}


def test_another_run_with_the_same_id_in_the_archive_is_not_replaced(app: Streamline, caplog: pytest.LogCaptureFixture) -> None:
    """An id may be used again once its run is archived; of two runs one would then be in neither collection."""
    stored(app, "run", input="first")
    assert app.archive_old_runs(30) == 1
    stored(app, "run", input="second", createdAt=datetime.now(UTC) - timedelta(days=450), rev=9)
    stored(app, "run-2")
    assert app.archive_old_runs(30) == 1
    assert (app.runs.find_one()["input"], archive(app).find_one({"_id": "run"})["input"]) == ("second", "first")
    assert [record.message for record in caplog.records] == ["archive_has_other_run"]


def test_a_late_copy_does_not_replace_a_later_state(app: Streamline) -> None:
    """A slow archiver's write may arrive after the run was revived, ended and archived anew."""
    stored(app, "run", output="old")
    late = app.runs.find_one()
    revive(app, "run", status="done", endedAt=late["endedAt"], output="new")
    assert app.archive_old_runs(30) == 1
    app.runs.insert_one(late)
    condition = retention.ended_before(0)
    app.store().run(retention.copy_runs(["run"], condition, "workflow_runs_archive"))
    assert archive(app).find_one()["output"] == "new"


def test_the_asyncio_twins_do_the_same(app: Streamline) -> None:
    for number in range(3):
        stored(app, f"run-{number}", days=40 * number, context={"expireAt": datetime(2001, 1, 1, tzinfo=UTC)} if number == 0 else {})

    async def all_three() -> Sequence[int]:
        async with app:
            return [await app.archive_old_runs_async(70), await app.cleanup_expired_async(), await app.cleanup_old_runs_async(30)]

    assert asyncio.run(all_three()) == [1, 1, 1]
    assert (ids(app.runs), ids(archive(app))) == (set(), {"run-2"})


# --- files ---------------------------------------------------------------------------------------------------------


def test_orphans_go_after_a_day_and_nothing_else_does(app: Streamline) -> None:
    """A crash between the file and the commit, or the TTL, leaves files that nobody would ever look for."""
    stored(app, "live", days=None, status="running")
    stored(app, "done", days=1)
    stored(app, "archived")
    stored(app, "elsewhere")
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
    """After an archiver's crash the run is in both collections; the files belong to the copy that stays."""
    stored(app, "run")
    put_file(app, "f", "run", days=50)
    killed_at("copy_runs", "after", "archive_old_runs(30)", mongodb_uri, database)
    assert app.cleanup_old_runs(30) == 1
    assert (ids(app.runs), ids(archive(app)), file_ids(app)) == (set(), {"run"}, {"f"})


def test_a_run_started_anew_under_a_deleted_id_keeps_its_files(app: Streamline) -> None:
    """Between the delete and the look for its files, the id may be another run's."""
    stored(app, "run")
    put_file(app, "f-old", "run")

    def anew() -> None:
        stored(app, "run", days=None, status="running")
        put_file(app, "f-new", "run")

    meddling(app, "existing_runs", anew)
    assert app.cleanup_old_runs(30) == 1
    assert "f-new" in file_ids(app)


def test_prefixes_do_not_mix(make_app: Callable[..., Streamline]) -> None:
    one, other = make_app(), make_app(collection_prefix="other_")
    for app in (one, other):
        stored(app, "run")
        put_file(app, "f", "run", days=9)
    assert one.cleanup_old_runs(30) == 1
    assert (ids(other.runs), file_ids(other)) == ({"run"}, {"f"})
    assert other.archive_old_runs(30) == 1
    assert (ids(archive(one)), ids(archive(other))) == (set(), {"run"})
