"""One document that the server refuses to update, or that Python cannot read, affects no other run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

import bson
import pytest
from bson import Binary
from bson.datetime_ms import DatetimeMS
from workers import run_until_idle

from streamline_pool import Streamline
from streamline_pool.client.run_lists import listing_runs
from streamline_pool.protocol import claims, commits, recovery
from streamline_pool.protocol.operations import Command
from streamline_pool.protocol.run_list import RunFilter
from streamline_pool.storage.bulk_update import Updated, update_many
from support import present

FULL_BYTES = 16 * 1024 * 1024


def fill(app: Streamline, run_id: str, *, room: int) -> None:
    """Enlarge a stored run until only `left` bytes remain of MongoDB's 16 MiB."""
    left = FULL_BYTES - room - len(bson.encode(app.runs.find_one({"_id": run_id}))) - 4 * len(b".pad0....")
    for place in range(4):  # a server with a small cache accepts no larger writes
        app.runs.update_one({"_id": run_id}, {"$set": {f"pad{place}": b"x" * (left // 4)}})


def statuses(app: Streamline) -> dict[str, int]:
    rows = app.runs.aggregate([{"$group": {"_id": "$status", "n": {"$sum": 1}}}])
    return {row["_id"]: row["n"] for row in rows}


def updated(app: Streamline, op: Command) -> Updated:
    async def run() -> Updated:
        async with app:
            store = app.store_async()
            return await update_many(store.run, op, store.now)

    return asyncio.run(run())


def one_step(app: Streamline) -> Any:
    return app.workflow("w", steps={"one": lambda ctx: ctx.input})


def test_a_run_too_full_to_be_claimed_fails_and_its_batch_is_claimed(app: Streamline) -> None:
    """The server ends a multi-update at the first refusal and reports 0. The runs that it had claimed before would never be
    read back, their leases would expire as if a worker had died, and at the third time the runs would fail."""
    workflow = one_step(app)
    workflow.start_many(range(5))
    full = workflow.start(99, priority=5)
    fill(app, full.id, room=50)
    run_until_idle(app)
    assert statuses(app) == {"done": 5, "failed": 1}
    assert workflow.get(full.id).error["code"] == "PAYLOAD_TOO_LARGE"
    assert workflow.get(full.id).ended_at is not None
    assert app.runs.count_documents({"crashes": {"$gt": 0}}) == 0


@pytest.mark.slow
def test_a_refused_run_at_the_head_of_the_queue_does_not_hide_those_behind_it(make_app: Callable[..., Streamline]) -> None:
    """A worker with capacity for one run must not poll again and again without a pause because it finds only the refused run."""
    app = make_app(concurrency=1)
    workflow = one_step(app)
    workflow.start(0, priority=5)
    others = workflow.start_many([1, 2, 3, 4])
    app.client[app.runs.database.name].command("collMod", app.runs.name, validator={"input": {"$ne": 0}})
    with pytest.raises(AssertionError, match="not idle") as stopped:
        run_until_idle(app, timeout=2)
    assert [workflow.get(run.id).status for run in others] == ["done"] * 4
    polls = int(str(stopped.value).split("ops_ok=")[1].split(",")[0])
    assert polls < 400, "one poll per wake-up, of which this test's steward sends a hundred per second, and none in between"


@pytest.mark.slow
def test_a_run_that_an_operators_validator_refuses_keeps_no_other_from_being_claimed(app: Streamline) -> None:
    """As above, with a document that cannot even be failed: it stays unchanged until an operator corrects the validator or the run."""
    workflow = one_step(app)
    refused, *others = workflow.start_many([0, 1, 2, 3, 4])
    app.client[app.runs.database.name].command("collMod", app.runs.name, validator={"input": {"$ne": 0}})
    with pytest.raises(AssertionError, match="not idle"):
        run_until_idle(app, timeout=2)
    assert [workflow.get(run.id).status for run in others] == ["done"] * 4
    assert workflow.get(refused.id).status == "running"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["release", "expire"])
def test_leases_of_a_dead_worker_are_recovered_although_one_cannot_be(app: Streamline, how: str) -> None:
    """Recovery must not stop at the full document: every lease after it would be held for ever."""
    workflow = one_step(app)
    runs = workflow.start_many(range(5))
    app.store().run(claims.claim_runs([run.id for run in runs], None, "claim", "dead:1:x", 0.05))
    app.runs.update_one({"_id": runs[0].id}, {"$set": {"crashes": 2, "lease.alone": True}})  # the record of its failure does not fit
    fill(app, runs[0].id, room=50)
    time.sleep(0.1)
    recover = recovery.release_owner("dead:1:x", 3, {"signal": "SIGKILL"}) if how == "release" else recovery.recover_expired(3)
    result = updated(app, recover)
    assert set(result.refused) == {runs[0].id}
    assert app.runs.count_documents({"lease": {"$exists": True}}) == 0
    assert app.runs.count_documents({"wakeAt": {"$exists": True}, "crashes": 1}) == 4
    assert statuses(app) == {"running": 4, "failed": 1}


def test_leases_are_renewed_although_one_cannot_be(app: Streamline) -> None:
    """The renewal may stop midway; a read then shows every lease in place, and leases that were not renewed must not count as renewed."""
    workflow = one_step(app)
    runs = workflow.start_many(range(5))
    ids = [run.id for run in runs]
    app.store().run(claims.claim_runs(ids, None, "claim", "me:1:x", 5))
    app.client[app.runs.database.name].command("collMod", app.runs.name, validator={"input": {"$ne": 2}})
    result = updated(app, commits.renew(ids, ["claim"], 500))
    assert set(result.refused) == {runs[2].id}
    assert result.matched == 4
    ends = {row["_id"]: row["lease"]["expiresAt"] for row in app.runs.find()}
    assert [run_id for run_id in ids if (ends[run_id] - ends[runs[2].id]).total_seconds() > 100] == [i for i in ids if i != runs[2].id]


UNREADABLE = {
    "a date": DatetimeMS(2**60),
    "text": bson.raw_bson.RawBSONDocument(b"\x10\0\0\0\x02t\0\x04\0\0\0a\xffb\0\0"),
    "a UUID of 15 bytes": Binary(b"x" * 15, 4),
    "an empty UUID": {"deep": [Binary(b"", 4)]},
    "a binary of subtype 2": bson.raw_bson.RawBSONDocument(b"\x14\0\0\0\x05u\0\x07\0\0\0\x02\x1e\0\0\0xxx\0"),
}


@pytest.mark.parametrize("value", UNREADABLE.values(), ids=UNREADABLE)
def test_a_value_that_python_cannot_read_stops_no_worker(app: Streamline, value: Any) -> None:
    """If decoding failed for the whole batch, each worker would die of it in turn and use up the pool's restarts."""
    workflow = one_step(app)
    odd, *_ = workflow.start_many(range(5))
    app.runs.update_one({"_id": odd.id}, {"$set": {"context.odd": value}})
    run_until_idle(app)
    assert statuses(app) == {"done": 5}
    assert "odd" in present(workflow.get(odd.id)).context
    assert len(app.store().drive(listing_runs(RunFilter(), limit=10)).runs) == 5


@pytest.mark.parametrize("value", UNREADABLE.values(), ids=UNREADABLE)
def test_a_claim_and_a_control_operation_survive_a_value_that_python_cannot_read(app: Streamline, value: Any) -> None:
    """Both change the run and return its document in one command: an error after the change would leave a lease that has no holder."""
    workflow = one_step(app)
    run = workflow.start("the input")
    app.runs.update_one({"_id": run.id}, {"$set": {"meta": {"odd": value}}})
    assert workflow.pause(run.id).paused
    assert not workflow.resume(run.id).paused
    done = workflow.execute(run.id)
    assert (done.status, done.output) == ("done", "the input")
    assert app.runs.count_documents({"crashes": 0, "lease": {"$exists": False}}) == 1


def test_a_malformed_uuid_is_read_as_its_bytes(app: Streamline) -> None:
    workflow = one_step(app)
    run = workflow.start()
    good = UUID(int=7)
    app.runs.update_one({"_id": run.id}, {"$set": {"input": [Binary(b"x" * 15, 4), good, Binary(b"y", 5)]}})
    done = workflow.execute(run.id)
    assert done.input == [Binary(b"x" * 15, 128), good, Binary(b"y", 5)]
    assert done.output == done.input
