"""Events to all that come before, beside and after the beginning of a wait: the search of the run finds what the delivery cannot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from stored_runs import stored
from workers import Pool, run_until_idle

from streamline_pool import Streamline, Workflow
from streamline_pool.config.env import system_env
from streamline_pool.domain import waits
from streamline_pool.protocol import claims, commits, recovery
from streamline_pool.protocol.operations import Fence
from streamline_pool.storage.store import AsyncStore


def listening(app: Streamline) -> Workflow:
    return app.workflow("listening", steps={"listen": lambda ctx: ctx.wait_for("news"), "end": lambda ctx: ctx.get_output("listen")})


@pytest.mark.parametrize("point", ["handler.after", "commit.before", "commit.after"])
def test_an_event_to_all_that_comes_while_a_wait_begins_is_received(make_app: Callable[..., Streamline], point: str) -> None:
    """The sender finds no waiter, or the run has searched already: one of the two must see the other."""
    sent: list[int] = []

    def probe(reached: str) -> None:
        if reached == point and not sent:
            sent.append(app.send_event("news", "here"))

    app = make_app(env=replace(system_env(), probe=probe))
    flow = listening(app)
    run = flow.start()

    async def play() -> None:
        async with Pool(app) as pool:
            await pool.until(lambda: stored(app, run)["status"] == "done")

    asyncio.run(play())
    assert stored(app, run)["output"] == "here"


@pytest.mark.parametrize("ago_s", [None, 1], ids=["no deadline", "past its deadline"])
def test_a_run_whose_worker_died_before_its_search_receives_the_event_all_the_same(app: Streamline, ago_s: float | None) -> None:
    """Every claim of a run in an event wait searches first, also one for its deadline: the event was there in time."""
    flow = listening(app)
    run = flow.start()
    app.send_event("news", "here")
    store = app.store()
    document: Any = store.run(claims.claim_run(run.id, None, "lost", "host:1:x", 30))
    wanted: Any = {"type": "event", "reason": "event news", "eventName": "news"}
    if ago_s is not None:
        wanted["expiresAt"] = store.now() - timedelta(seconds=ago_s)
    change = waits.await_event(document, 0, wanted, {})
    fence = Fence(run.id, "lost", document["rev"], document["token"])
    assert store.run(commits.write_statements([commits.commit(fence, change, store.now(), 0)]))["n"] == 1
    assert store.run(recovery.release_owner("host:1:x", 3, {})) == 1
    run_until_idle(app)
    assert (stored(app, run)["status"], stored(app, run)["output"]) == ("done", "here")


def test_runs_that_begin_to_wait_together_do_not_each_open_a_connection(app: Streamline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver opens a connection for each operation that is under way, and keeps it for minutes."""
    under_way, most = 0, 0
    run_one = AsyncStore.run

    async def counted(store: AsyncStore, op: Any, session: Any = None) -> Any:
        nonlocal under_way, most
        if op.name != "find_event_for":
            return await run_one(store, op, session)
        under_way += 1
        most = max(most, under_way)
        try:
            return await run_one(store, op, session)
        finally:
            under_way -= 1

    monkeypatch.setattr(AsyncStore, "run", counted)
    flow = listening(app)
    runs = flow.start_many([None] * 80)
    app.send_event("news", "here")

    async def play() -> None:
        async with Pool(app) as pool:
            await pool.until_idle()

    asyncio.run(play())
    assert {stored(app, run)["status"] for run in runs} == {"done"}
    assert 1 < most <= 16
