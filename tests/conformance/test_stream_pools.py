"""`app.events.stream()` with real pools: each event of the whole cluster arrives exactly once, or is counted as missed."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pool_client import loaded_app
from pool_process import PoolProcess, running
from pymongo.read_concern import ReadConcern
from stream_reading import read_until

from streamline_pool import Streamline, embedded
from streamline_pool.events import subscription
from streamline_pool.protocol import event_stream
from streamline_pool.protocol.codec import SERVER_TICK
from support import eventually

APP = """
import os
from streamline_pool import Streamline

app = Streamline()

two = app.workflow("two")

@two.step
async def first(ctx):
    return os.getpid()

@two.step
def second(ctx):
    return os.getpid()

loud = app.workflow("loud")

@loud.step
def shout(ctx):
    for number in range(ctx.input):
        ctx.emit("shout", number)

deadly = app.workflow("deadly")

@deadly.step
def die(ctx):
    if ctx.attempt == 1:
        os.kill(os.getpid(), 9)
    return os.getpid()

bulky = app.workflow("bulky")

@bulky.step
def big(ctx):
    return "x" * ctx.input
"""

EVENTS_OF_TWO = [
    ("workflow:started", None),
    ("step:started", "first"),
    ("step:completed", "first"),
    ("step:started", "second"),
    ("step:completed", "second"),
    ("workflow:completed", None),
]


@pytest.fixture
def app(mongodb_uri: str, database: str) -> Iterator[Streamline]:
    """The application of the pools, used as a client in the test's own process."""
    with loaded_app(APP, mongodb_uri, database) as client:
        yield client


@pytest.fixture
def start(tmp_path: Path, mongodb_uri: str, database: str) -> Iterator[Callable[..., PoolProcess]]:
    """Starts a pool of `workers` worker processes. All pools end with the test."""
    with ExitStack() as pools:

        def make(workers: int = 1, *options: str) -> PoolProcess:
            folder = tmp_path / f"pool{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            return pools.enter_context(running(folder, APP, mongodb_uri, "--workers", str(workers), *options, database=database))

        yield make


def on_record(app: Streamline, pools: int) -> None:
    """Wait until so many pools have a record in the database. A stream waits for the answers of these pools only."""
    eventually(lambda: len(app.workers()) == pools)


def run_two(app: Streamline, runs: int) -> list[str]:
    """Start so many runs of workflow `two`, and wait until the pools have completed them. Returns their ids."""
    started = app.workflows["two"].start_many([None] * runs)
    for run in started:
        assert app.workflows["two"].wait_for(run.id, timeout=30).status == "done"
    return [run.id for run in started]


def signals_of(app: Streamline, kind: str) -> int:
    signals = app.store().collection("signals").with_options(read_concern=ReadConcern("local"))  # not written with majority
    count: int = signals.count_documents({"kind": kind})
    return count


@pytest.mark.slow
def test_a_stream_gives_every_event_of_every_pool_exactly_once_from_its_first_moment(
    app: Streamline, start: Callable[..., PoolProcess]
) -> None:
    """A dashboard that misses the first events, or counts a run twice, shows wrong numbers."""
    pools = [start(2).ready(), start(2).ready()]
    on_record(app, 2)
    run_two(app, 3)
    run_ids: list[str] = []

    def both_have_worked() -> bool:
        run_ids.extend(run_two(app, 10))
        pids = {app.runs.find_one({"_id": run_id})["steps"][0]["output"] for run_id in run_ids}
        return all(pids & set(pool.workers()) for pool in pools)

    with app.events.stream() as stream:
        eventually(both_have_worked, timeout=30)
        read = read_until(stream, "workflow:completed", len(run_ids))
        assert stream.missed == 0
    by_run: dict[str | None, list[tuple[str, str | None]]] = {}
    for event in read:
        by_run.setdefault(event.run_id, []).append((event.name, event.step_id))
    assert by_run == dict.fromkeys(run_ids, EVENTS_OF_TWO), "each once, in order, and none of the runs before"
    pids = {event.data for event in read if event.name == "step:completed"}
    for pool in pools:
        assert pids & set(pool.workers()), "the events of both pools arrive"
    assert {event.workflow_id for event in read} == {"two"}
    assert all(event.at.tzinfo is not None for event in read)


def test_nothing_is_written_without_a_subscriber(app: Streamline, start: Callable[..., PoolProcess]) -> None:
    """Events that no subscriber reads would cost throughput, before the first stream and after the last."""
    start(2).ready()
    on_record(app, 1)
    run_two(app, 20)
    assert signals_of(app, "events") == 0
    with app.events.stream() as stream:
        run_two(app, 5)
        read_until(stream, "workflow:completed", 5)
    assert signals_of(app, "events") > 0

    def is_silent() -> bool:
        before = signals_of(app, "events")
        run_two(app, 1)
        return signals_of(app, "events") == before

    eventually(is_silent, timeout=5)


def test_workers_born_later_publish_too(app: Streamline, start: Callable[..., PoolProcess]) -> None:
    """The new worker in the place of a dead one does not know the subscribers yet."""
    start(1).ready()
    on_record(app, 1)
    with app.events.stream() as stream:
        run = app.workflows["deadly"].start()
        read = read_until(stream, "workflow:completed")
        names = [event.name for event in read if event.run_id == run.id]  # events that the dead worker had not sent are lost
        assert names[-4:] == ["workflow:recovered", "step:started", "step:completed", "workflow:completed"]
        run_two(app, 3)
        assert len(read_until(stream, "workflow:completed", 3)) == 3 * len(EVENTS_OF_TWO)


def test_a_pool_started_later_publishes_from_its_first_run_on(app: Streamline, start: Callable[..., PoolProcess]) -> None:
    """It has not received the call of the subscriber. Its runs are due before its workers start."""
    runs = app.workflows["two"].start_many([None] * 10)
    with app.events.stream() as stream:
        start(2)
        read = read_until(stream, "workflow:completed", len(runs))
        assert Counter((event.name, event.step_id) for event in read) == dict.fromkeys(EVENTS_OF_TWO, 10)


@pytest.mark.slow
def test_an_open_stream_renews_its_subscription(
    app: Streamline, start: Callable[..., PoolProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subscriber that does not renew its subscription expires."""
    monkeypatch.setattr(subscription, "_RENEW_S", 0.2)
    start(1).ready()
    on_record(app, 1)
    hosts = app.store().collection("hosts")
    with app.events.stream() as stream:
        (record,) = hosts.find({"listener": True})
        # As if its record and its signals had been lost: the next renewal writes both again.
        hosts.delete_one({"_id": record["_id"]})
        eventually(lambda: hosts.find_one({"_id": record["_id"]}))
        run_two(app, 1)
        assert len(read_until(stream, "workflow:completed")) == len(EVENTS_OF_TWO)
    eventually(lambda: not list(hosts.find({"listener": True})))


@pytest.mark.slow
def test_a_subscriber_whose_signal_was_lost_is_found_in_the_database(app: Streamline, start: Callable[..., PoolProcess]) -> None:
    """A lost signal costs time and nothing else."""
    start(1, "--lease", "2").ready()
    app.store().run(event_stream.put_subscriber("listener:lost", "h", 1))
    answers = {"kind": "heard", "listeners": "listener:lost"}
    eventually(lambda: app.store().collection("signals").find_one(answers), timeout=20)


def test_malformed_records_of_another_program_are_ignored(app: Streamline, start: Callable[..., PoolProcess]) -> None:
    """A steward that fails on one would fail again after every restart, until the restart budget of the pool is used up."""
    app.init_db()
    hosts, signals = app.store().collection("hosts"), app.store().collection("signals")
    hosts.insert_many([{"_id": 5, "listener": True}, {"_id": "x", "listener": True, "expireAt": "never"}])
    pool = start(1, "--lease", "2").ready()
    with app.events.stream("workflow:completed") as stream:
        malformed: list[dict[str, Any]] = [{"kind": kind, "listener": 7} for kind in ("listen", "unlisten", "heard", "events")]
        malformed.append({"kind": "heard", "listeners": [stream._subscription.id]})
        signals.insert_many([{"tick": SERVER_TICK, **signal} for signal in malformed])
        run_two(app, 1)
        read_until(stream, "workflow:completed")
    assert not pool.logged("child_died")


@pytest.mark.slow
def test_a_frozen_pool_delays_a_stream_by_two_seconds_and_is_named(
    app: Streamline, start: Callable[..., PoolProcess], caplog: pytest.LogCaptureFixture
) -> None:
    """A host that hangs must not make a dashboard hang."""
    pool = start(1).ready()
    on_record(app, 1)
    (record,) = app.workers()
    pool.signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        with app.events.stream():
            took = time.monotonic() - started
    finally:
        pool.signal(signal.SIGCONT)
    assert 1.9 < took < 5
    (warning,) = [entry for entry in caplog.records if entry.message == "stream_incomplete"]
    assert warning.pools == [record["_id"]]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_overload_is_counted_to_the_event(app: Streamline, start: Callable[..., PoolProcess]) -> None:
    """More events than a worker and a stream can queue: the lost ones are counted, the newest are kept."""
    start(1).ready()
    on_record(app, 1)
    emitted = 30_000
    with app.events.stream() as stream:
        run = app.workflows["loud"].start(emitted)
        assert app.workflows["loud"].wait_for(run.id, timeout=40).status == "done"
        eventually(lambda: stream._subscription.mailbox._events[-1].name == "workflow:completed")
        read = read_until(stream, "workflow:completed")
        assert stream.missed > 0
        assert len(read) + stream.missed == emitted + 4, "started, step started, step completed, completed"
    numbers = [event.data for event in read if event.name == "shout"]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == emitted - 1


@pytest.mark.chaos
def test_an_outage_is_reported_by_the_stewards(app: Streamline, start: Callable[..., PoolProcess], mongod: embedded.EmbeddedServer) -> None:
    """When the database is back, subscribers get the events of the outage, and the stream goes on by itself."""
    pool = start(1, "--log-level", "debug").ready()
    on_record(app, 1)
    with app.events.stream() as stream:
        mongod.kill()
        eventually(lambda: pool.logged("scheduler:circuit-open") and pool.logged("steward_retries"), timeout=30)
        mongod.restart()
        read = read_until(stream, "scheduler:circuit-closed", timeout=30)
        names = [event.name for event in read]
        assert {"scheduler:error", "scheduler:circuit-open", "scheduler:circuit-closed"} <= set(names)
        assert all(event.data["error"] for event in read if event.name == "scheduler:error")
        run_two(app, 1)
        read_until(stream, "workflow:completed")
