"""The event publisher: when it sends, what it drops under overload, when it stops; and which events are published."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from pymongo.read_concern import ReadConcern
from workers import run_until_idle

from streamline_pool import Event, Streamline
from streamline_pool.config.env import system_env
from streamline_pool.domain.errors import StoreUnavailableError
from streamline_pool.events import publisher as publisher_module
from streamline_pool.events.publisher import EventPublisher
from streamline_pool.protocol.operations import Op
from streamline_pool.storage.store import AsyncStore
from streamline_pool.worker.worker import Worker
from support import eventually


def event(number: int, data: Any = None) -> Event:
    return Event(name="mine", run_id="r", workflow_id="w", step_id=None, data=number if data is None else data, at=datetime.now(UTC))


def batches(app: Streamline) -> list[dict[str, Any]]:
    # Signals are not written by majority, and so not read by it.
    signals = app.store().collection("signals").with_options(read_concern=ReadConcern("local"))
    return list(signals.find({"kind": "events"}, sort=[("$natural", 1)]))


def numbers(app: Streamline) -> list[int]:
    """The numbers of the sent events, in the order in which they were written."""
    return [batch["first"] + place for batch in batches(app) for place in range(len(batch["events"]))]


def publishing(app: Streamline, scenario: Callable[[EventPublisher], Any], is_sent: Callable[[], bool] = lambda: True) -> None:
    """Run a scenario with a started publisher in its event loop. Once `is_sent()` is true, close it."""

    async def run() -> None:
        store = app.store_async()
        await store.ensure()
        publisher = EventPublisher(store, app.env)
        publisher.start()
        outcome = scenario(publisher)
        if asyncio.iscoroutine(outcome):
            await outcome
        async with asyncio.timeout(15):
            while not await asyncio.to_thread(is_sent):
                await asyncio.sleep(0.01)
        await publisher.close()
        await app.close_async()

    asyncio.run(run())


def test_a_busy_publisher_sends_few_batches_in_order(app: Streamline) -> None:
    """One command for each event would cost a busy worker more than its steps do."""

    async def scenario(publisher: EventPublisher) -> None:
        publisher.serve_subscribers([("l", 60.0)])
        for number in range(500):
            publisher.publish(event(number))
            await asyncio.sleep(0)

    publishing(app, scenario, is_sent=lambda: len(numbers(app)) == 500)
    assert numbers(app) == list(range(500))
    assert [each["data"] for batch in batches(app) for each in batch["events"]] == list(range(500))
    assert len(batches(app)) < 50
    assert batches(app)[0]["greets"] == [{"listener": "l", "number": 0}]


def test_a_full_backlog_drops_the_oldest_events_and_the_numbers_show_it(app: Streamline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher_module, "_BACKLOG_MAX", 10)

    def scenario(publisher: EventPublisher) -> None:
        publisher.serve_subscribers([("l", 60.0)])
        for number in range(25):
            publisher.publish(event(number))

    publishing(app, scenario)
    assert numbers(app) == list(range(15, 25))
    assert batches(app)[0]["greets"] == [{"listener": "l", "number": 0}], "so that a subscriber counts 15 missed events"


def test_a_backlog_is_bounded_in_bytes_too(app: Streamline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand events of 32 KiB would need 300 MB in a worker."""
    monkeypatch.setattr(publisher_module, "_BACKLOG_BYTES_MAX", 100_000)

    def scenario(publisher: EventPublisher) -> None:
        publisher.serve_subscribers([("l", 60.0)])
        for number in range(20):
            publisher.publish(event(number, "x" * 30_000))

    publishing(app, scenario)
    assert numbers(app) == [17, 18, 19]


def test_later_changes_of_emitted_data_are_not_sent(app: Streamline) -> None:
    def scenario(publisher: EventPublisher) -> None:
        publisher.serve_subscribers([("l", 60.0)])
        data = {"x": 1}
        publisher.publish(event(0, data))
        data["x"] = 2

    publishing(app, scenario)
    assert batches(app)[0]["events"][0]["data"] == {"x": 1}


def test_data_that_cannot_be_stored_is_left_out(app: Streamline) -> None:
    def scenario(publisher: EventPublisher) -> None:
        publisher.serve_subscribers([("l", 60.0)])
        for data in (object(), "x" * 13_000_000):
            publisher.publish(event(0, data))

    publishing(app, scenario)
    odd, large = (each["data"] for batch in batches(app) for each in batch["events"])
    assert odd == {"$omitted": None}
    assert large["$omitted"] > 13_000_000


def test_a_batch_that_the_server_refuses_does_not_delay_the_next(app: Streamline) -> None:
    """A name has no length limit. If a refused batch were sent again for ever, its publisher would send no other."""

    def scenario(publisher: EventPublisher) -> None:
        publisher.serve_subscribers([("l", 60.0)])
        publisher.publish(replace(event(0), name="x" * 17_000_000))
        publisher.publish(event(1))

    publishing(app, scenario, is_sent=lambda: numbers(app) == [1])


def is_active(publisher: EventPublisher) -> bool:
    """Read anew at each call: a type checker takes the property for constant."""
    return publisher.active


def test_a_subscriber_that_is_not_renewed_expires(app: Streamline) -> None:
    """A killed program that had subscribed must not cost the cluster anything for long."""

    async def scenario(publisher: EventPublisher) -> None:
        publisher.serve_subscribers([("short", 0.05), ("over", -1.0)])
        assert is_active(publisher)
        async with asyncio.timeout(5):
            while is_active(publisher):
                await asyncio.sleep(0.01)
        publisher.publish(event(0))

    publishing(app, scenario)
    assert numbers(app) == []
    assert [greeting["listener"] for batch in batches(app) for greeting in batch["greets"]] == ["short"]


def test_a_renewed_subscriber_is_not_greeted_again(app: Streamline) -> None:
    """Otherwise its count would start again, and missed events would not be counted."""

    async def scenario(publisher: EventPublisher) -> None:
        publisher.serve_subscribers([("l", 60.0)])
        publisher.publish(event(0))
        async with asyncio.timeout(5):
            while not await asyncio.to_thread(batches, app):
                await asyncio.sleep(0.01)
        publisher.serve_subscribers([("l", 60.0), ("m", 60.0)])
        publisher.publish(event(1))

    publishing(app, scenario)
    greetings = [greeting for batch in batches(app) for greeting in batch["greets"]]
    assert greetings == [{"listener": "l", "number": 0}, {"listener": "m", "number": 1}]


class ForgetfulStore(AsyncStore):
    """Performs each operation, and loses the first two replies."""

    lost = 0

    async def run(self, op: Op, session: Any = None) -> Any:
        reply = await super().run(op, session)
        if self.lost < 2:
            self.lost += 1
            raise StoreUnavailableError(f"{op.name}: the reply is lost, a fault of this test", transient=True)
        return reply


def test_a_batch_of_unknown_outcome_is_sent_again_and_read_once(app: Streamline, make_app: Callable[..., Streamline]) -> None:
    """No event is lost or doubled: both copies have the same number."""

    async def scenario(subscriber: str) -> None:
        store = ForgetfulStore(app.where, app.env)
        publisher = EventPublisher(store, app.env)
        publisher.start()
        publisher.serve_subscribers([(subscriber, 60.0)])
        for number in range(3):
            publisher.publish(event(number))
        async with asyncio.timeout(10):
            while len(await asyncio.to_thread(batches, app)) < 3:
                await asyncio.sleep(0.01)
        await publisher.close()
        await store.close()

    with make_app().events.stream() as stream:
        asyncio.run(scenario(stream._subscription.id))
        assert [next(stream).data for _ in range(3)] == [0, 1, 2]
        assert numbers(app)[:6] == [0, 1, 2, 0, 1, 2]
        assert stream.missed == 0
        assert not stream._subscription.mailbox._events


# --- which events there are -----------------------------------------------------------------------------------------


def test_every_event_of_a_run_is_published(app: Streamline) -> None:
    """Subscribers rely on every documented name. `workflow:recovered` is tested in test_stream_pools.py."""
    received: list[str] = []
    app.events.on("*", lambda each: received.append(each.name))
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
    eventually(lambda: wanted <= set(received))


def test_a_defect_of_the_engine_is_an_engine_error(make_app: Callable[..., Streamline]) -> None:
    """The run is recovered only when its lease expires. Subscribers get the error at once."""
    broken: list[bool] = []

    def chance() -> float:
        if broken:
            raise ZeroDivisionError("a defect")
        return 0.5

    def fail(ctx: Any) -> float:
        broken.append(True)
        return 1 / 0

    app = make_app(env=replace(system_env(), random=chance))
    received: list[Event] = []
    app.events.on("engine:error", received.append)
    run = app.workflow("w", steps={"a": fail}).start()
    app.workflows["w"].execute(run.id)
    (event,) = eventually(lambda: received)
    assert (event.run_id, event.workflow_id, event.data) == (run.id, "w", {"run_id": run.id})


def test_a_claim_that_fails_is_a_scheduler_error_once(app: Streamline) -> None:
    """Once for each outage: a worker retries every second, and an event per attempt would be too many."""
    received: list[Event] = []
    app.events.on("scheduler:error", received.append)
    run = app.workflow("w", steps={"a": lambda ctx: 1}).start()
    runs = app.store().collection("runs")
    runs.database.command("collMod", runs.name, index={"name": "streamline_claimable", "hidden": True})

    async def scenario() -> None:
        worker = Worker(app, app.settings, owner="test:1:1", index=0, total=1)
        task = asyncio.create_task(worker.run())
        async with asyncio.timeout(10):
            while worker.status().consecutive_failures < 3:
                await asyncio.sleep(0.01)
        await asyncio.to_thread(runs.database.command, "collMod", runs.name, index={"name": "streamline_claimable", "hidden": False})
        async with asyncio.timeout(10):
            while (await app.workflows["w"].get_async(run.id)).status != "done":  # type: ignore[union-attr]
                await asyncio.sleep(0.01)
        worker.drain()
        await task
        await app.close_async()

    asyncio.run(scenario())
    app.events.close()
    (event,) = received
    assert "find_due" in event.data["error"]
    assert event.run_id is None
