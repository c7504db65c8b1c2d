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


def test_a_run_of_a_dead_worker_keeps_its_place_in_the_queue(flow: Workflow) -> None:
    """When a worker dies while many runs are queued, its runs must not wait behind all of them."""
    store, lanes = flow.app.store(), [flow.definition.lane]
    old = flow.start()
    assert store.run(claims.claim_runs([old.id], None, "first", "dead", LEASE_S)) == 1
    flow.start_many([None] * 20)
    assert store.run(recovery.release_owner("dead", 3, {})) == 1
    first, *_ = store.run(claims.find_due(lanes, None, store.now(), 1, None))
    assert first["_id"] == old.id
