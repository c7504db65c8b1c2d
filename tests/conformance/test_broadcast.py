"""The publishing side of `app.events.stream()`: when it sends, what it gives up under overload, and when it stops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from pymongo.read_concern import ReadConcern
from workers import Worker, run_until_idle

from streamline_pool import Event, Streamline
from streamline_pool.config.env import system_env
from streamline_pool.domain.errors import StoreUnavailableError
from streamline_pool.events import publisher as module
from streamline_pool.events.publisher import EventPublisher
from streamline_pool.protocol.operations import Op
from streamline_pool.storage.store import AsyncStore
from support import eventually


def event(number: int, data: Any = None) -> Event:
    return Event(name="mine", run_id="r", workflow_id="w", step_id=None, data=number if data is None else data, at=datetime.now(UTC))


def batches(app: Streamline) -> list[dict[str, Any]]:
    # Signals are not written by majority, and so not read by it.
    signals = app.store().collection("signals").with_options(read_concern=ReadConcern("local"))
    return list(signals.find({"kind": "events"}, sort=[("$natural", 1)]))


def numbers(app: Streamline) -> list[int]:
    """Of the events sent, in the order in which they were written."""
    return [batch["first"] + place for batch in batches(app) for place in range(len(batch["events"]))]


def publishing(app: Streamline, scenario: Callable[[EventPublisher], Any], settle: Callable[[], bool] = lambda: True) -> None:
    """Run a scenario with a broadcaster at work in its loop; it is closed once that has settled."""

    async def run() -> None:
        store = app.store_async()
        await store.ensure()
        broadcaster = EventPublisher(store, app.env)
        broadcaster.start()
        outcome = scenario(broadcaster)
        if asyncio.iscoroutine(outcome):
            await outcome
        async with asyncio.timeout(15):
            while not await asyncio.to_thread(settle):
                await asyncio.sleep(0.01)
        await broadcaster.close()
        await app.close_async()

    asyncio.run(run())


def test_a_busy_publisher_sends_few_batches_in_order(app: Streamline) -> None:
    """One command for each event would cost a busy worker more than its steps do."""

    async def scenario(broadcaster: EventPublisher) -> None:
        broadcaster.serve_subscribers([("l", 60.0)])
        for number in range(500):
            broadcaster.publish(event(number))
            await asyncio.sleep(0)

    publishing(app, scenario, settle=lambda: len(numbers(app)) == 500)
    assert numbers(app) == list(range(500))
    assert [each["data"] for batch in batches(app) for each in batch["events"]] == list(range(500))
    assert len(batches(app)) < 50
    assert batches(app)[0]["greets"] == [{"listener": "l", "number": 0}]


def test_the_oldest_give_way_and_the_numbers_tell(app: Streamline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BACKLOG_MAX", 10)

    def scenario(broadcaster: EventPublisher) -> None:
        broadcaster.serve_subscribers([("l", 60.0)])
        for number in range(25):
            broadcaster.publish(event(number))

    publishing(app, scenario)
    assert numbers(app) == list(range(15, 25))
    assert batches(app)[0]["greets"] == [{"listener": "l", "number": 0}], "so that a reader knows that it has missed 15"


def test_a_backlog_is_bounded_in_bytes_too(app: Streamline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand events of 32 KiB would be 300 MB in a worker."""
    monkeypatch.setattr(module, "_BACKLOG_BYTES_MAX", 100_000)

    def scenario(broadcaster: EventPublisher) -> None:
        broadcaster.serve_subscribers([("l", 60.0)])
        for number in range(20):
            broadcaster.publish(event(number, "x" * 30_000))

    publishing(app, scenario)
    assert numbers(app) == [17, 18, 19]


def test_what_a_handler_emits_is_sent_as_it_was_then(app: Streamline) -> None:
    def scenario(broadcaster: EventPublisher) -> None:
        broadcaster.serve_subscribers([("l", 60.0)])
        data = {"x": 1}
        broadcaster.publish(event(0, data))
        data["x"] = 2

    publishing(app, scenario)
    assert batches(app)[0]["events"][0]["data"] == {"x": 1}


def test_what_cannot_be_stored_is_left_out(app: Streamline) -> None:
    def scenario(broadcaster: EventPublisher) -> None:
        broadcaster.serve_subscribers([("l", 60.0)])
        for data in (object(), "x" * 13_000_000):
            broadcaster.publish(event(0, data))

    publishing(app, scenario)
    odd, large = (each["data"] for batch in batches(app) for each in batch["events"])
    assert odd == {"$omitted": None}
    assert large["$omitted"] > 13_000_000


def test_what_the_server_refuses_holds_up_nothing_else(app: Streamline) -> None:
    """A name may be as long as it likes; a batch that is sent again for ever would be the last one of its publisher."""

    def scenario(broadcaster: EventPublisher) -> None:
        broadcaster.serve_subscribers([("l", 60.0)])
        broadcaster.publish(replace(event(0), name="x" * 17_000_000))
        broadcaster.publish(event(1))

    publishing(app, scenario, settle=lambda: numbers(app) == [1])


def test_a_listener_that_is_silent_is_served_no_more(app: Streamline) -> None:
    """A program that watched events and was killed must not cost the cluster anything for ever."""

    async def scenario(broadcaster: EventPublisher) -> None:
        broadcaster.serve_subscribers([("short", 0.05), ("over", -1.0)])
        assert broadcaster.active
        async with asyncio.timeout(5):
            while broadcaster.active:
                await asyncio.sleep(0.01)
        broadcaster.publish(event(0))

    publishing(app, scenario)
    assert numbers(app) == []
    assert [greeting["listener"] for batch in batches(app) for greeting in batch["greets"]] == ["short"]


def test_a_listener_heard_of_again_is_not_greeted_again(app: Streamline) -> None:
    """Its numbers would start anew, and what it had missed would be forgotten."""

    async def scenario(broadcaster: EventPublisher) -> None:
        broadcaster.serve_subscribers([("l", 60.0)])
        broadcaster.publish(event(0))
        async with asyncio.timeout(5):
            while not await asyncio.to_thread(batches, app):
                await asyncio.sleep(0.01)
        broadcaster.serve_subscribers([("l", 60.0), ("m", 60.0)])
        broadcaster.publish(event(1))

    publishing(app, scenario)
    greetings = [greeting for batch in batches(app) for greeting in batch["greets"]]
    assert greetings == [{"listener": "l", "number": 0}, {"listener": "m", "number": 1}]


class ForgetfulStore(AsyncStore):
    """Writes what it is given, and loses the first two replies."""

    lost = 0

    async def run(self, op: Op, session: Any = None) -> Any:
        reply = await super().run(op, session)
        if self.lost < 2:
            self.lost += 1
            raise StoreUnavailableError(f"{op.name}: the reply is lost, a fault of this test", transient=True)
        return reply


def test_a_batch_of_unknown_outcome_is_sent_again_and_read_once(app: Streamline, make_app: Callable[..., Streamline]) -> None:
    """Neither loss nor doubling: the numbers make one event of two copies."""

    async def scenario(subscriber: str) -> None:
        store = ForgetfulStore(app.where, app.env)
        broadcaster = EventPublisher(store, app.env)
        broadcaster.start()
        broadcaster.serve_subscribers([(subscriber, 60.0)])
        for number in range(3):
            broadcaster.publish(event(number))
        async with asyncio.timeout(10):
            while len(await asyncio.to_thread(batches, app)) < 3:
                await asyncio.sleep(0.01)
        await broadcaster.close()
        await store.close()

    with make_app().events.stream() as stream:
        asyncio.run(scenario(stream._subscription.id))
        assert [next(stream).data for _ in range(3)] == [0, 1, 2]
        assert numbers(app)[:6] == [0, 1, 2, 0, 1, 2]
        assert stream.missed == 0
        assert not stream._subscription.mailbox._events


# --- which events there are -----------------------------------------------------------------------------------------


def test_every_event_of_a_run_is_published(app: Streamline) -> None:
    """A name that is never published is a promise to subscribers that is not kept. `workflow:recovered` is in test_stream.py."""
    heard: list[str] = []
    app.events.on("*", lambda each: heard.append(each.name))
    steps: dict[str, Any] = {
        "sleeps": lambda ctx: ctx.sleep(0.01),
        "skipped": (lambda ctx: 1, {"skip_if": lambda ctx: True}),
        "retried": (lambda ctx: 1 / (ctx.attempt - 1), {"retries": 2, "retry_delay": 0}),
    }
    app.workflow("good", steps=steps).start()
    app.workflow("bad", steps={"a": (lambda ctx: 1 / 0, {"retries": 1})}).start()
    unwanted = app.workflow("unwanted", steps={"a": lambda ctx: 1})
    unwanted.cancel(unwanted.start().id)
    unwanted.pause(unwanted.start().id)
    run_until_idle(app)
    wanted = {
        *(f"workflow:{what}" for what in ("started", "completed", "failed", "waiting", "resumed", "cancelled", "retry", "paused")),
        *(f"step:{what}" for what in ("started", "completed", "failed", "waiting", "skipped", "retry-scheduled")),
    }
    eventually(lambda: wanted <= set(heard))


def test_a_defect_of_ours_is_an_engine_error(make_app: Callable[..., Streamline]) -> None:
    """The run is recovered when its lease runs out; who watches learns at once that it will have to."""
    broken: list[bool] = []

    def chance() -> float:
        if broken:
            raise ZeroDivisionError("a defect")
        return 0.5

    app = make_app(env=replace(system_env(), random=chance))
    heard: list[Event] = []
    app.events.on("engine:error", heard.append)
    run = app.workflow("w", steps={"a": lambda ctx: broken.append(True) or 1 / 0}).start()
    app.workflows["w"].execute(run.id)
    (event,) = eventually(lambda: heard)
    assert (event.run_id, event.workflow_id, event.data) == (run.id, "w", {"run_id": run.id})


def test_a_claim_that_fails_is_a_scheduler_error_once(app: Streamline) -> None:
    """Once for each outage: a worker tries once a second, and nobody wants to be told as often."""
    heard: list[Event] = []
    app.events.on("scheduler:error", heard.append)
    run = app.workflow("w", steps={"a": lambda ctx: 1}).start()
    runs = app.store().collection("runs")
    runs.database.command("collMod", runs.name, index={"name": "streamline_due", "hidden": True})

    async def scenario() -> None:
        worker = Worker(app, app.settings, owner="test:1:1", index=0, total=1)
        task = asyncio.create_task(worker.run())
        async with asyncio.timeout(10):
            while worker.status().consecutive_failures < 3:
                await asyncio.sleep(0.01)
        await asyncio.to_thread(runs.database.command, "collMod", runs.name, index={"name": "streamline_due", "hidden": False})
        async with asyncio.timeout(10):
            while (await app.workflows["w"].get_async(run.id)).status != "done":  # type: ignore[union-attr]
                await asyncio.sleep(0.01)
        worker.drain()
        await task
        await app.close_async()

    asyncio.run(scenario())
    app.events.close()
    (event,) = heard
    assert "find_due" in event.data["error"]
    assert event.run_id is None
