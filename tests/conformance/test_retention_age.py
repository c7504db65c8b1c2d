"""Which runs are old enough to delete or archive: by age, by their own expiry date and by tenant."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from old_runs import archive, file_ids, ids, put_file, put_run

from streamline_pool import Streamline, ValidationError
from support import shown


def test_only_runs_that_ended_long_enough_ago_are_deleted(app: Streamline) -> None:
    """A run that sleeps for a year is not old, and neither is a run that started a year ago and ended yesterday."""
    old = {put_run(app, f"old-{status}", status=status) for status in ("done", "failed", "cancelled")}
    kept = {put_run(app, f"live-{status}", status=status) for status in ("draft", "running", "waiting")}
    kept |= {put_run(app, "young", days=29.9), put_run(app, "no-date", endedAt=None), put_run(app, "text", endedAt="2001-01-01")}
    kept |= {put_run(app, "number", endedAt=7), put_run(app, "dates", endedAt=[datetime(2001, 1, 1, tzinfo=UTC)])}
    app.runs.update_one({"_id": "no-date"}, {"$unset": {"endedAt": ""}})
    assert app.cleanup_old_runs(dry_run=True) == 3
    assert ids(app.runs) == old | kept, "a dry run changes nothing"
    assert app.cleanup_old_runs() == 3
    assert ids(app.runs) == kept
    assert app.cleanup_old_runs() == 0


def test_days_may_be_zero_fractional_and_a_timedelta(app: Streamline) -> None:
    for run_id, days in (("just", 0.0), ("hours", 0.6), ("days", 3.0)):
        put_run(app, run_id, days=days)
    assert app.cleanup_old_runs(1.5) == 1
    assert app.cleanup_old_runs(timedelta(hours=12)) == 1
    assert app.cleanup_old_runs(0) == 1
    assert app.cleanup_old_runs(10**9) == 0


@pytest.mark.parametrize("days", [-1, -0.1, float("nan"), float("inf"), "30", None, True, timedelta(days=-1)], ids=shown)
def test_an_invalid_age_is_refused(app: Streamline, days: Any) -> None:
    """A negative age would mean every run that ends before a future date, and so all of them."""
    put_run(app, "run")
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
    put_run(app, "young", days=1)
    assert app.cleanup_old_runs(30) == app.archive_old_runs(30) == 0


def test_expired_runs_are_those_that_ended_and_whose_own_date_has_passed(app: Streamline) -> None:
    now = datetime.now(UTC)
    past, future = now - timedelta(minutes=1), now + timedelta(hours=1)
    for number, status in enumerate(("done", "failed", "cancelled", "waiting", "running", "draft")):
        put_run(app, f"past-{status}", days=0, status=status, context={"expireAt": past}, rev=number)
    put_run(app, "future", context={"expireAt": future})
    put_run(app, "none")
    for number, value in enumerate(("2001-01-01", 0, None, [past], {"at": past}, True)):
        put_run(app, f"odd-{number}", context={"expireAt": value})
    put_run(app, "odd-context", context=[{"expireAt": past}])
    put_file(app, "f-1", "past-done")
    put_file(app, "f-2", "future")
    assert app.cleanup_expired(dry_run=True) == 3
    assert app.cleanup_expired() == 3
    left = ids(app.runs)
    assert {"past-waiting", "past-running", "past-draft", "future", "none", "odd-context"} <= left
    assert len(left) == 12
    assert file_ids(app) == {"f-2"}
    assert app.cleanup_expired() == 0


def test_one_tenants_runs_only(app: Streamline) -> None:
    """A clean-up for one tenant must not delete another tenant's runs."""
    for tenant in ("a", "b", "", None):
        put_run(app, f"run-of-{tenant}", context={"tenantId": tenant})
    put_run(app, "run-without-tenant", context={})
    put_run(app, "live-of-a", days=None, status="waiting", context={"tenantId": "a"})
    assert app.cleanup_old_runs(30, tenant_id="a", dry_run=True) == 1
    assert app.cleanup_old_runs(30, tenant_id="a") == 1
    assert app.cleanup_old_runs(30, tenant_id={"$ne": "x"}) == 0, "a tenant is a value, not a query"
    assert app.cleanup_old_runs(30, tenant_id="") == 1
    assert ids(app.runs) == {"run-of-b", "run-of-None", "run-without-tenant", "live-of-a"}


def test_the_tenants_field_is_the_one_of_setup_indexes_also_in_another_process(
    app: Streamline, make_app: Callable[..., Streamline]
) -> None:
    """The command that cleans up at night runs in a process that never calls setup_indexes."""
    put_run(app, "run-1", meta={"tenant": "a"}, context={"tenantId": "b"})
    put_run(app, "run-2", meta={"tenant": "b"}, context={"tenantId": "a"})
    put_run(app, "run-3", meta={"tenant": "a"}, context={"tenantId": "c"})
    nightly = make_app()
    assert nightly.cleanup_old_runs(tenant_id="c", dry_run=True) == 1, "context.tenantId is the default"
    app.setup_indexes(tenant_field="meta.tenant")
    assert app.cleanup_old_runs(tenant_id="a", dry_run=True) == 2
    assert nightly.cleanup_old_runs(tenant_id="a", dry_run=True) == 2
    make_app().setup_indexes(tenant_field="context.tenantId")
    with pytest.raises(ValidationError, match=r"tenants are indexed by meta\.tenant and by context\.tenantId"):
        nightly.cleanup_old_runs(tenant_id="a")
    assert app.cleanup_old_runs(tenant_id="a") == 2
    assert ids(app.runs) == {"run-2"}


def test_a_database_without_collections_has_nothing_to_clean(mongodb_uri: str, new_database: str) -> None:
    app = Streamline(mongodb_uri, database=new_database)
    assert app.cleanup_old_runs(0) == app.cleanup_old_runs(0, tenant_id="a") == app.archive_old_runs(0) == app.cleanup_expired() == 0
    assert app.client[app.where.database].list_collection_names() == []
    app.close()


def test_the_asyncio_functions_do_the_same(app: Streamline) -> None:
    for number in range(3):
        put_run(app, f"run-{number}", days=40 * number, context={"expireAt": datetime(2001, 1, 1, tzinfo=UTC)} if number == 0 else {})

    async def all_three() -> Sequence[int]:
        async with app:
            return [await app.archive_old_runs_async(70), await app.cleanup_expired_async(), await app.cleanup_old_runs_async(30)]

    assert asyncio.run(all_three()) == [1, 1, 1]
    assert (ids(app.runs), ids(archive(app))) == (set(), {"run-2"})
