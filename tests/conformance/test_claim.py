"""What may be claimed: only what is due, never what somebody holds or what has ended."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from streamline_pool import Context, Run, Streamline, Workflow, ops

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
    """What the two ways to claim win, one after the other."""
    named = flow.app.store().run(ops.claim_run(run.id, None, lease_id, "w", LEASE_S))
    batch = flow.app.store().run(ops.claim_runs([run.id], lease_id, "w", LEASE_S))
    return named, batch


def test_a_leased_run_is_claimed_by_nobody_else(flow: Workflow) -> None:
    """Two workers find the same run due and both claim it: in an expression a missing `wakeAt` is before every date."""
    run = flow.start()
    assert flow.app.store().run(ops.claim_runs([run.id], "first", "w1", LEASE_S)) == 1
    assert claimed(flow, run, "second") == (None, 0)
    stored = flow.get(run.id)
    assert stored is not None
    assert stored.to_dict()["lease"]["id"] == "first"
    assert stored.step("only").attempts == 1


def test_an_ended_run_is_claimed_by_nobody(flow: Workflow) -> None:
    """`execute` of a run that is done must return it as it is, not run its last step again."""
    run = flow.execute(flow.start().id)
    assert claimed(flow, run, "again") == (None, 0)
    assert flow.execute(run.id) == run
