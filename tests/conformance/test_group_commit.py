"""Writes of several runs in one command: each has the outcome of its own run, also when the reply is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from faulty_store import Faults, FaultyAsyncStore, hasty_env

from streamline_pool import Streamline
from streamline_pool.domain import transitions
from streamline_pool.engine.group_commit import GroupCommitter
from streamline_pool.engine.write_outcome import WriteOutcome
from streamline_pool.protocol import claims, commits, recovery
from streamline_pool.protocol.operations import Fence, Statement

NO_FAULTS = Faults("none", 0, 0)


def claimed(app: Streamline, count: int) -> list[Statement]:
    """The writes that store the first results of so many runs; all are held by one claim."""
    flow = app.workflow("flow", steps={name: lambda ctx: 1 for name in ("first", "last")})
    ids = [run.id for run in flow.start_many([None] * count)]
    store = app.store()
    assert store.run(claims.claim_runs(ids, None, "mine", "host:1:x", 30)) == count
    statements = []
    for document in store.run(claims.read_claimed(ids, "mine")):
        fence = Fence(document["_id"], "mine", document["rev"], document["token"])
        change = transitions.advance(document, 0, "result", {}, store.now())
        statements.append(commits.commit(fence, change, store.now(), 0))
    return statements


def outcomes(app: Streamline, statements: Sequence[Statement], faults: Faults = NO_FAULTS) -> list[WriteOutcome]:
    """What became of each of the statements, which go in one command."""

    async def send() -> list[WriteOutcome]:
        store = FaultyAsyncStore(app.where, hasty_env())
        store.faults = faults
        committer = GroupCommitter(store, hasty_env())
        committer.start()
        try:
            return await asyncio.wait_for(asyncio.gather(*map(committer.write, statements)), 20)
        finally:
            await committer.close()
            await store.close()

    return asyncio.run(send())


def lose(app: Streamline, run_id: str) -> None:
    app.runs.update_one({"_id": run_id}, [{"$set": {"lease.expiresAt": {"$subtract": ["$$NOW", 1]}}}])
    assert app.store().run(recovery.recover_expired(3)) == 1


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)], ids=["held first", "lost first", "paused first"])
def test_each_write_of_a_command_has_the_outcome_of_its_own_run(app: Streamline, order: tuple[int, ...]) -> None:
    """A worker that goes on with a run which it has lost enters a step beside its successor."""
    held, lost, paused = claimed(app, 3)
    lose(app, lost.fence.run_id)
    app.pause_run(paused.fence.run_id)
    sent = [(held, lost, paused)[place] for place in order]
    wanted = [(WriteOutcome.COMMITTED, WriteOutcome.FENCED, WriteOutcome.PAUSED)[place] for place in order]
    assert outcomes(app, sent) == wanted


@pytest.mark.parametrize("kind", ["lost", "unknown"])
def test_a_write_whose_reply_was_lost_is_stored_once_and_known_from_a_read(app: Streamline, kind: str) -> None:
    statements = claimed(app, 2)
    faults = Faults(kind, 1)
    assert outcomes(app, statements, faults) == [WriteOutcome.COMMITTED] * 2
    assert faults.hit == ["commit_runs"]
    for stored in app.runs.find():
        assert (stored["rev"], stored["currentStepId"], stored["steps"][0]["output"]) == (1, "last", "result")


def test_a_lost_run_is_fenced_also_when_the_reply_was_lost(app: Streamline) -> None:
    """An error says nothing about the write. Neither success nor failure may be assumed."""
    statements = claimed(app, 2)
    lose(app, statements[0].fence.run_id)
    assert outcomes(app, statements, Faults("lost", 1)) == [WriteOutcome.FENCED, WriteOutcome.COMMITTED]


RELEASES: dict[str, Callable[[Streamline, str], Any]] = {
    "cancel": lambda app, run_id: app.cancel_run(run_id),
    "recovery": lose,
    "rewind": lambda app, run_id: app.rewind_run(run_id, "first"),
}


@pytest.mark.parametrize("taken_by", RELEASES)
def test_a_release_that_was_not_stored_is_not_taken_for_stored_after_another_process_took_the_lease(app: Streamline, taken_by: str) -> None:
    """A run without a lease looks released. Only `rev` and `token` tell whose write removed it."""
    (statement,) = claimed(app, 1)
    run_id, fence = statement.fence.run_id, statement.fence
    document = app.runs.find_one({"_id": run_id})
    now = app.store().now()
    release = commits.commit(fence, transitions.release(document, 0, now, was_entered=True), now, 0)
    assert app.store().run(commits.write_statements([statement]))["n"] == 1  # an earlier write of the holder, of unknown outcome
    RELEASES[taken_by](app, run_id)
    assert outcomes(app, [release]) == [WriteOutcome.FENCED]
