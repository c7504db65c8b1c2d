"""The fence of a lease holder's writes, part by part: each kind of write names the claim and the number of the write that it follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from streamline_pool import Streamline, Workflow
from streamline_pool.domain import transitions
from streamline_pool.domain.errors import ErrorCode
from streamline_pool.protocol import claims, commits
from streamline_pool.protocol.operations import Fence, Statement

Write = Callable[[Streamline, Fence, Any], Statement]


def commit(app: Streamline, fence: Fence, document: Any) -> Statement:
    now = app.store().now()
    return commits.commit(fence, transitions.advance(document, 0, "result", {}, now), now, 0)


def commit_under_pause(app: Streamline, fence: Fence, document: Any) -> Statement:
    now = app.store().now()
    change = transitions.under_pause(document, transitions.advance(document, 0, "result", {}, now), now)
    return commits.commit_under_pause(fence, change, now, 0)


def save_checkpoint(app: Streamline, fence: Fence, document: Any) -> Statement:
    return commits.save_in_step(fence, 0, "checkpoint", 1, app.store().now(), 0)


def mark_alone(app: Streamline, fence: Fence, document: Any) -> Statement:
    return commits.mark_alone(fence, app.store().now(), 0)


def fail(app: Streamline, fence: Fence, document: Any) -> Statement:
    return commits.fail_minimal(fence, 0, ErrorCode.PAYLOAD_TOO_LARGE, "full", app.store().now())


@pytest.fixture
def flow(app: Streamline) -> Workflow:
    return app.workflow("flow", steps={name: lambda ctx: 1 for name in ("first", "last")})


@pytest.mark.parametrize("write", [commit, commit_under_pause, save_checkpoint, mark_alone, fail], ids=lambda write: write.__name__)
def test_each_write_of_a_holder_needs_its_claim_and_the_write_before_it(app: Streamline, flow: Workflow, write: Write) -> None:
    """A worker that has lost the run must change nothing, and neither must a late copy of what the holder itself has sent."""
    run = flow.start()
    document = app.store().run(claims.claim_run(run.id, None, "mine", "host:1:x", 30))
    if write is commit_under_pause:
        flow.pause(run.id)
    stored = app.runs.find_one({"_id": run.id})
    for lease_id, rev in (("another", 0), ("mine", -1), ("mine", 1), ("another", -1)):
        statement = write(app, Fence(run.id, lease_id, document["rev"] + rev, document["token"]), document)
        assert app.store().run(commits.write_statements([statement]))["n"] == 0, (lease_id, rev)
    assert app.runs.find_one({"_id": run.id}) == stored
    held = write(app, Fence(run.id, "mine", document["rev"], document["token"]), document)
    assert app.store().run(commits.write_statements([held]))["n"] == 1
    assert app.runs.find_one({"_id": run.id})["rev"] == document["rev"] + 1, "the next write cannot be taken for this one"
    assert app.store().run(commits.write_statements([held]))["n"] == 0


@pytest.mark.parametrize("write", [commit, save_checkpoint, mark_alone, fail], ids=lambda write: write.__name__)
def test_a_write_for_a_run_without_a_lease_makes_none(app: Streamline, flow: Workflow, write: Write) -> None:
    """A field below `lease` would make one that no sweep can recover."""
    run = flow.start()
    document = app.store().run(claims.claim_run(run.id, None, "mine", "host:1:x", 30))
    flow.cancel(run.id)
    statement = write(app, Fence(run.id, "mine", document["rev"], document["token"]), document)
    before = app.runs.find_one({"_id": run.id})
    assert app.store().run(commits.write_statements([statement]))["n"] == 0
    assert app.runs.find_one({"_id": run.id}) == before


def test_a_renewal_extends_only_leases_of_which_it_names_run_and_claim(app: Streamline, flow: Workflow) -> None:
    """A lease whose holder does not drive its run any more, or has lost it, must end."""
    runs = flow.start_many([1, 2, 3, 4])
    ids = [run.id for run in runs]
    assert app.store().run(claims.claim_runs(ids[:2], None, "mine", "host:1:x", 30)) == 2
    assert app.store().run(claims.claim_runs(ids[2:3], None, "another", "host:1:x", 30)) == 1
    before = {stored["_id"]: stored.get("lease") for stored in app.runs.find()}
    # The holder has claimed two runs at once, and drives only the first of them. It has lost the third, and the fourth was released.
    assert app.store().run(commits.renew([ids[0], *ids[2:]], ["mine"], 600)) == 1
    after = {stored["_id"]: stored.get("lease") for stored in app.runs.find()}
    assert after[ids[0]]["expiresAt"] > before[ids[0]]["expiresAt"]
    assert [after[run_id] for run_id in ids[1:]] == [before[run_id] for run_id in ids[1:]]
