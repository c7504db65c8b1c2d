"""Which runs can be claimed: only those that are due, never those that are leased or have ended."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from streamline_pool import Context, Run, Streamline, Workflow
from streamline_pool.protocol import claims, recovery

LEASE_S = 30.0


@pytest.fixture
def flow(mongodb_uri: str, database: str) -> Iterator[Workflow]:
    with Streamline(mongodb_uri, database=database) as app:
        flow = app.workflow("flow")

        @flow.step
        def only(ctx: Context) -> str:
            return "once"

        yield flow


def claimed(flow: Workflow, run: Run, lease_id: str) -> tuple[object, int]:
    """The ids that the two claim operations return, one operation after the other."""
    named = flow.app.store().run(claims.claim_run(run.id, None, lease_id, "w", LEASE_S))
    batch = flow.app.store().run(claims.claim_runs([run.id], None, lease_id, "w", LEASE_S))
    return named, batch


def test_a_leased_run_cannot_be_claimed(flow: Workflow) -> None:
    """Two workers may find the same run due. A missing `wakeAt` sorts before every date, so the second claim could match."""
    run = flow.start()
    assert flow.app.store().run(claims.claim_runs([run.id], None, "first", "w1", LEASE_S)) == 1
    assert claimed(flow, run, "second") == (None, 0)
    stored = flow.get(run.id)
    assert stored is not None
    assert stored.to_dict()["lease"]["id"] == "first"
    assert stored.step("only").attempts == 1


def test_an_ended_run_cannot_be_claimed(flow: Workflow) -> None:
    """`execute` of a run that is done must return it unchanged and must not run its last step again."""
    run = flow.execute(flow.start().id)
    assert claimed(flow, run, "again") == (None, 0)
    assert flow.execute(run.id) == run
    flow.app.runs.update_one({"_id": run.id}, [{"$set": {"wakeAt": "$$NOW"}}])  # by another program
    assert claimed(flow, run, "again") == (None, 0)


def test_a_run_of_a_dead_worker_keeps_its_place_in_the_queue(flow: Workflow) -> None:
    """When a worker dies while many runs are queued, its runs must not wait behind all of them."""
    store, lanes = flow.app.store(), [flow.definition.lane]
    old = flow.start()
    assert store.run(claims.claim_runs([old.id], None, "first", "dead", LEASE_S)) == 1
    flow.start_many([None] * 20)
    assert store.run(recovery.release_owner("dead", 3, {})) == 1
    first, *_ = store.run(claims.find_due(lanes, None, store.now(), 1, None))
    assert first["_id"] == old.id


def test_a_paused_run_cannot_be_claimed_even_with_a_wake_at(flow: Workflow) -> None:
    """`paused` is in every claim filter: a `wakeAt` that another program wrote, or a defect of ours, must not end a pause."""
    run = flow.start()
    flow.pause(run.id)
    flow.app.runs.update_one({"_id": run.id}, [{"$set": {"wakeAt": "$$NOW"}}])
    assert claimed(flow, run, "first") == (None, 0)


def test_a_run_that_is_due_later_cannot_be_claimed(flow: Workflow) -> None:
    """A host whose clock is ahead finds it due. The server decides."""
    run = flow.start(start_at=60)
    assert claimed(flow, run, "first") == (None, 0)


def test_a_claim_reads_back_only_what_it_has_won(flow: Workflow) -> None:
    """Two workers that have found the same runs both read them back. Neither may take those of the other for its own."""
    store = flow.app.store()
    ids = [run.id for run in flow.start_many([None] * 4)]
    assert store.run(claims.claim_runs(ids[:3], None, "first", "w1", LEASE_S)) == 3
    assert store.run(claims.claim_runs(ids, None, "second", "w2", LEASE_S)) == 1
    assert [document["_id"] for document in store.run(claims.read_claimed(ids, "second"))] == ids[3:]
