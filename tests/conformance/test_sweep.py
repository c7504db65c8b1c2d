"""The steward's sweep on a real server: what it finds when there is more than one search shows."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson.datetime_ms import DatetimeMS

from streamline_pool import Streamline
from streamline_pool.storage.store import AsyncStore
from streamline_pool.supervisor.ipc.messages import FromSteward, WorkDue
from streamline_pool.supervisor.steward.duty import DutyTools, StewardBoot
from streamline_pool.supervisor.steward.stream_subscribers import StreamSubscribers
from streamline_pool.supervisor.steward.sweep import SWEEP_LIMIT, Sweep
from streamline_pool.supervisor.steward.wake_ups import WakeUps


class Received:
    """The supervisor's end of the pipe."""

    unsent_bytes = 0

    def __init__(self) -> None:
        self.messages: list[FromSteward] = []

    def send(self, message: FromSteward) -> None:
        self.messages.append(message)

    send_latest = send


class SlowSearches(AsyncStore):
    """A store that does not answer searches for due runs from the start of the queue."""

    names: tuple[str, ...] = ()

    async def run(self, op: Any, session: Any = None) -> Any:
        self.names += (op.name,)
        if op.name == "find_due_before" and "$gt" not in op.filter["wakeAt"]:
            await asyncio.sleep(3600)
        return await super().run(op, session)


async def sweep(app: Streamline, store: AsyncStore | None = None, times: int = 1) -> list[FromSteward]:
    received = Received()
    boot = StewardBoot(host_id="host:1:x", host="host", pid=1, first=False)
    tools = DutyTools(app, app.settings, app.env, boot, received)
    if store is not None:
        tools.store = store
    duty_sweep = Sweep(tools, WakeUps(tools), StreamSubscribers(tools))
    await tools.store.ensure()
    try:
        for _ in range(times):
            await tools.attempt(duty_sweep._sweep)
        await asyncio.sleep(0.01)
        return received.messages
    finally:
        await tools.publisher.close()
        await app.close_async()


def test_runs_that_are_due_soon_do_not_hide_one_that_is_overdue_in_another_queue(app: Streamline) -> None:
    """A thousand timers in the next seconds are an ordinary load. The wake-up of the overdue run was lost."""
    busy = app.workflow("busy", queue="a", steps={"only": lambda ctx: None})
    quiet = app.workflow("quiet", queue="b", steps={"only": lambda ctx: None})
    busy.start_many([None] * (SWEEP_LIMIT + 100))
    now = app.store().now()
    app.runs.update_many({}, {"$set": {"wakeAt": now + timedelta(seconds=5)}})
    overdue = quiet.start()
    app.runs.update_one({"_id": overdue.id}, {"$set": {"wakeAt": now - timedelta(minutes=1)}})
    messages = asyncio.run(sweep(app))
    assert [message.run_id for message in messages if isinstance(message, WorkDue) and message.overdue] == [overdue.id]


def test_a_search_that_takes_too_long_does_not_keep_the_sweep_from_expired_leases(app: Streamline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Millions of due runs that no worker can run make a search from the start of the queue longer than its timeout."""
    flow = app.workflow("flow", steps={"only": lambda ctx: None})
    run = flow.start()
    lease = {"id": "x", "owner": "dead", "token": 1, "expiresAt": app.store().now() - timedelta(seconds=5)}
    app.runs.update_one({"_id": run.id}, {"$unset": {"wakeAt": ""}, "$set": {"lease": lease}})
    monkeypatch.setattr("streamline_pool.supervisor.steward.sweep.READ_TIMEOUT_S", 0.1)

    async def play() -> None:
        store = app.connections.use(SlowSearches(app.where, app.env))
        await sweep(app, store, times=3)
        assert "recover_expired" in store.names

    asyncio.run(play())
    assert "lease" not in app.runs.find_one({})


def test_the_sweep_that_recovers_a_run_wakes_a_worker(app: Streamline) -> None:
    """The runs of a dead host have waited for their leases already. Without it they would wait for the next sweep, too."""
    run = app.workflow("flow", steps={"only": lambda ctx: None}).start()
    lease = {"id": "x", "owner": "dead", "token": 1, "expiresAt": app.store().now() - timedelta(seconds=5)}
    app.runs.update_one({"_id": run.id}, {"$unset": {"wakeAt": ""}, "$set": {"lease": lease}})
    messages = asyncio.run(sweep(app))
    assert [message for message in messages if isinstance(message, WorkDue)] == [WorkDue(run_id=None, count=1, overdue=True)]


@pytest.mark.parametrize("odd", [DatetimeMS(-62_200_000_000_000), [datetime(2020, 1, 1, tzinfo=UTC)]], ids=["year 0", "a list"])
def test_dates_that_python_cannot_hold_end_no_steward(app: Streamline, odd: Any) -> None:
    """A steward compared them with dates, in runs and in the records of subscribers, and died of a TypeError; so did the next one."""
    flow = app.workflow("flow", steps={"only": lambda ctx: None})
    app.runs.update_one({"_id": flow.start().id}, {"$set": {"wakeAt": odd}})
    app.store().collection("hosts").insert_one({"_id": "odd", "listener": True, "expireAt": DatetimeMS(300_000_000_000_000)})

    async def play() -> None:
        await sweep(app)
        boot = StewardBoot(host_id="host:1:x", host="host", pid=1, first=False)
        tools = DutyTools(app, app.settings, app.env, boot, Received())
        await StreamSubscribers(tools).refresh()
        await tools.publisher.close()
        await app.close_async()

    asyncio.run(play())
