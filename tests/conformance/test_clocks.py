"""Sleeps and deadlines on a host whose clock is wrong: the server's clock plans them, and the server's clock ends them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from stored_runs import stored

from streamline_pool import Context, Streamline
from streamline_pool.config.env import Env, system_env
from streamline_pool.domain import waits
from streamline_pool.domain.change import Change
from streamline_pool.protocol import claims, commits
from streamline_pool.protocol.operations import Fence
from streamline_pool.storage.server_clock import ServerClock

HALF_AN_HOUR_S = 1_800.0
ENDINGS: dict[str, Callable[[Context], None]] = {
    "sleep": lambda ctx: ctx.sleep(HALF_AN_HOUR_S),
    "wait": lambda ctx: ctx.wait("?", timeout=HALF_AN_HOUR_S),
    "wait for an event": lambda ctx: ctx.wait_for("news", timeout=HALF_AN_HOUR_S),
}


def off_by(hours: int) -> Env:
    """A host whose time of day is wrong by so many hours. Its monotonic clock is right."""
    system = system_env()

    class Clock:
        monotonic = staticmethod(system.clock.monotonic)

        @staticmethod
        def now() -> datetime:
            return system.clock.now() + timedelta(hours=hours)

    return replace(system, clock=Clock())


@pytest.mark.parametrize("hours", [1, -1], ids=["ahead", "behind"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_host_whose_clock_is_wrong_plans_and_ends_waits_as_every_other(
    make_app: Callable[..., Streamline], ending: str, hours: int
) -> None:
    """A clock that is an hour ahead must not end a sleep of half an hour, and must not plan it an hour later."""
    app = make_app(env=off_by(hours))
    flow = app.workflow("flow", steps={"rest": ENDINGS[ending], "end": lambda ctx: 1})
    run = flow.execute(flow.start().id)
    until, entered_at = stored(app, run)["wakeAt"], stored(app, run)["steps"][0]["startedAt"]  # the server's clock wrote the second
    assert timedelta(minutes=29) < until - entered_at < timedelta(minutes=50)
    app.runs.update_one({"_id": run.id}, [{"$set": {"wakeAt": "$$NOW"}}])  # as after a resume or a recovery
    flow.execute(run.id)
    document = stored(app, run)
    assert (document["status"], document["steps"][0]["status"], document["wakeAt"]) == ("waiting", "waiting", until)


def ended(kind: str, document: Any, now: datetime) -> Change:
    return waits.wake(document, 0, now) if kind == "sleep" else waits.time_out(document, 0, now)


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_server_refuses_the_end_of_a_wait_before_its_time(app: Streamline, ending: str) -> None:
    """A worker's idea of the server's time may be wrong: its last reading is old, or a new primary's clock is another."""
    flow = app.workflow("flow", steps={"rest": ENDINGS[ending], "end": lambda ctx: 1})
    run = flow.execute(flow.start().id)
    app.runs.update_one({"_id": run.id}, [{"$set": {"wakeAt": "$$NOW"}}])
    store = app.store()
    document = store.run(claims.claim_run(run.id, None, "mine", "host:1:x", 30))
    fence = Fence(run.id, "mine", document["rev"], document["token"])
    change = ended(ending, document, store.now() + timedelta(hours=1))
    assert store.run(commits.write_statements([commits.commit(fence, change, store.now(), 0)]))["n"] == 0
    past = change._replace(not_before=store.now() - timedelta(seconds=1))
    assert store.run(commits.write_statements([commits.commit(fence, past, store.now(), 0)]))["n"] == 1


@pytest.mark.parametrize("ending", ["wait", "wait for an event"])
def test_the_server_decides_that_the_deadline_of_a_claimed_run_has_come(
    make_app: Callable[..., Streamline], monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """A worker whose reading of the server's clock was slow parked the run and claimed it again, until its reading came there."""
    app = make_app()
    flow = app.workflow("flow", steps={"rest": ENDINGS[ending], "end": lambda ctx: 1})
    run = flow.execute(flow.start().id)
    due = app.store().now() - timedelta(seconds=1)
    app.runs.update_one({"_id": run.id}, {"$set": {"wakeAt": due, "steps.0.waitingFor.expiresAt": due}})
    told = ServerClock.now
    monkeypatch.setattr(ServerClock, "now", lambda self: told(self) - timedelta(minutes=1))
    assert flow.execute(run.id).status == "done"
