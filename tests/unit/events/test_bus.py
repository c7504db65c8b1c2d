"""The event bus: which subscriber gets which event, that a failing subscriber affects no other, and that publishers never wait."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from streamline_pool import Event, EventBus, ValidationError
from streamline_pool.events import bus as module
from streamline_pool.events.event import ENGINE_EVENTS
from support import eventually


def event(name: str, number: int = 0) -> Event:
    return Event(name=name, run_id="r", workflow_id="w", step_id=None, data=number, at=datetime.now(UTC))


@pytest.fixture
def bus() -> Iterator[EventBus]:
    made = EventBus()
    yield made
    made.close()


def test_a_subscriber_gets_the_events_of_its_name_and_the_star_gets_all(bus: EventBus) -> None:
    received: list[tuple[str, str]] = []
    bus.on("a", lambda e: received.append(("a", e.name)))
    bus.on("*", lambda e: received.append(("*", e.name)))
    for name in ("a", "b"):
        bus.publish(event(name))
    bus.close()
    assert received == [("a", "a"), ("*", "a"), ("*", "b")]


def test_once_means_once_and_off_means_off(bus: EventBus) -> None:
    received: list[str] = []
    bus.once("a", lambda e: received.append("once"))
    gone = bus.on("a", lambda e: received.append("never"))
    bus.off("a", gone)
    bus.off("a", gone)
    bus.publish(event("a"))
    bus.publish(event("a"))
    bus.close()
    assert received == ["once"]
    assert not bus.active


def test_flush_returns_when_what_was_published_is_delivered(bus: EventBus) -> None:
    """A program that reads what a subscriber has collected must know that it is complete."""
    assert bus.flush(), "no event was published"
    go_on, received = threading.Event(), []
    bus.on("a", lambda e: go_on.wait(10))
    bus.on("*", lambda e: received.append(e.data))
    for number in range(3):
        bus.publish(event("a", number))
    assert not bus.flush(timeout_s=0.05)
    go_on.set()
    assert bus.flush()
    assert received == [0, 1, 2]


def test_events_arrive_in_the_order_they_were_published(bus: EventBus) -> None:
    received: list[int] = []
    bus.on("a", lambda e: received.append(e.data))
    for number in range(100):
        bus.publish(event("a", number))
    bus.close()
    assert received == list(range(100))


def test_a_raising_subscriber_is_logged_and_affects_no_other(bus: EventBus, caplog: pytest.LogCaptureFixture) -> None:
    received: list[str] = []

    def bad(e: Event) -> None:
        raise SystemError("mine")

    bus.on("a", bad)
    bus.on("a", lambda e: received.append("good"))
    with caplog.at_level(logging.ERROR):
        bus.publish(event("a"))
        bus.publish(event("a"))
        bus.close()
    assert received == ["good", "good"]
    assert [record.message for record in caplog.records] == ["subscriber_failed"] * 2


def test_a_subscriber_may_unsubscribe_and_publish_from_within(bus: EventBus) -> None:
    received: list[str] = []

    def first(e: Event) -> None:
        bus.off("a", first)
        received.append(e.name)
        bus.publish(event("b"))

    bus.on("a", first)
    bus.on("b", lambda e: received.append(e.name))
    bus.publish(event("a"))
    bus.publish(event("a"))
    eventually(lambda: received == ["a", "b"])


def test_a_slow_subscriber_costs_events_and_not_the_publisher(bus: EventBus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that waited for a subscriber would stop committing."""
    go = threading.Event()
    received: list[int] = []

    def slow(e: Event) -> None:
        go.wait()
        received.append(e.data)

    bus.on("a", slow)
    for number in range(module._BACKLOG_MAX + 100):
        bus.publish(event("a", number))
    go.set()
    bus.close(30)
    assert bus.dropped in (99, 100)  # the subscriber may have taken one
    assert received[-1] == module._BACKLOG_MAX + 99, "the newest are kept"


def test_a_hanging_subscriber_does_not_delay_the_end_of_the_program(bus: EventBus) -> None:
    forever = threading.Event()
    bus.on("a", lambda e: forever.wait())
    for _ in range(module._BACKLOG_MAX + 1):
        bus.publish(event("a"))
    bus.close(0.05)
    forever.set()


def test_there_is_no_thread_without_a_subscriber(bus: EventBus) -> None:
    bus.publish(event("a"))
    assert bus._thread is None


def test_a_closed_bus_can_be_used_again(bus: EventBus) -> None:
    received: list[str] = []
    bus.on("a", lambda e: received.append(e.name))
    bus.close()
    bus.publish(event("a"))
    eventually(lambda: received == ["a"])


@pytest.mark.parametrize(("name", "subscriber"), [("", print), (None, print), (5, print), ("a", None), ("a", "print")])
def test_a_subscription_that_cannot_work_is_refused(bus: EventBus, name: Any, subscriber: Any) -> None:
    with pytest.raises(ValidationError):
        bus.on(name, subscriber)


# --- misspelt names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("workflow:complete", "workflow:completed"),
        ("step:retry", "step:retry-scheduled"),
        ("engine:errors", "engine:error"),
        ("step:zzz", None),
    ],
)
@pytest.mark.parametrize("call", ["on", "once", "stream"])
def test_a_name_with_an_engine_prefix_that_no_event_has_is_refused(bus: EventBus, call: str, name: str, nearest: str | None) -> None:
    """The subscriber of a misspelt name is never called, which looks like a system in which nothing fails."""
    arguments = (name,) if call == "stream" else (name, print)
    with pytest.raises(ValidationError) as caught:
        getattr(bus, call)(*arguments)
    assert f"no event is named {name!r}" in str(caught.value)
    assert (f"did you mean {nearest!r}?" in str(caught.value)) is (nearest is not None)
    assert not bus.active


@pytest.mark.parametrize(("name", "nearest"), [("workflow.completed", "workflow:completed"), ("Workflow:Completed", "workflow:completed")])
def test_a_name_that_looks_like_an_engine_event_is_said(bus: EventBus, name: str, nearest: str, caplog: pytest.LogCaptureFixture) -> None:
    """It may be the user's own event, so it is accepted."""
    with caplog.at_level(logging.WARNING):
        bus.on(name, print)
    said = f"event_name_unusual: {name!r} is not {nearest!r}, an event of the engine that is much like it"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_the_users_own_names_are_not_remarked_upon(bus: EventBus, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for name in ("order:completed", "mine", "*", "payment failed", "a", *ENGINE_EVENTS):
            bus.on(name, print)
    assert caplog.records == []
