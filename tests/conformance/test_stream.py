"""`app.events.stream()`: the events of the whole cluster, from real pools and programs, each exactly once or counted as missed."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pool_process import ROOT, PoolProcess, running
from pymongo.read_concern import ReadConcern
from workers import Pool

from streamline_pool import Event, InvalidStateError, Streamline, ValidationError, embedded, global_event_bus
from streamline_pool.events import stream as stream_module
from streamline_pool.events.publisher import EVENT_DATA_BYTES_MAX
from streamline_pool.events.stream import EventStream
from streamline_pool.protocol import event_stream
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
def app(mongodb_uri: str, database: str, tmp_path: Path) -> Iterator[Streamline]:
    """The pools' application in the test's own process, as a client."""
    (tmp_path / "client_app.py").write_text(APP)
    spec = importlib.util.spec_from_file_location("client_app", tmp_path / "client_app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    client: Streamline = module.app
    client.mongodb_uri, client.database = mongodb_uri, database
    with client:
        yield client


@pytest.fixture
def start(tmp_path: Path, mongodb_uri: str, database: str) -> Iterator[Callable[..., PoolProcess]]:
    """Starts pools of one worker each, unless told otherwise; they end with the test."""
    with ExitStack() as pools:

        def make(workers: int = 1, *options: str) -> PoolProcess:
            folder = tmp_path / f"pool{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            return pools.enter_context(running(folder, APP, mongodb_uri, "--workers", str(workers), *options, database=database))

        yield make


def on_record(app: Streamline, pools: int) -> None:
    """Wait until that many pools have said in the database that they are alive: a stream waits for these only."""
    eventually(lambda: len(app.workers()) == pools)


def run_two(app: Streamline, runs: int) -> list[str]:
    """Have the pools work off that many runs; their ids."""
    started = app.workflows["two"].start_many([None] * runs)
    for run in started:
        assert app.workflows["two"].wait_for(run.id, timeout=30).status == "done"
    return [run.id for run in started]


def read_until(stream: EventStream, name: str, count: int = 1, timeout: float = 20.0) -> list[Event]:
    """What the stream gives, up to the last of `count` events of that name. It is closed if they do not come."""
    timers_fired = threading.Timer(timeout, stream.close)
    timers_fired.start()
    read = []
    for event in stream:
        read.append(event)
        count -= event.name == name
        if not count:
            break
    timers_fired.cancel()
    assert not count, f"{count} × {name} missing after {len(read)} events, missed {stream.missed}: {read[-20:]}"
    return read


def signals_of(app: Streamline, kind: str) -> int:
    signals = app.store().collection("signals").with_options(read_concern=ReadConcern("local"))  # they are not written by majority
    count: int = signals.count_documents({"kind": kind})
    return count


# --- several hosts --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stream_gives_every_event_of_every_pool_exactly_once_from_its_first_moment(
    app: Streamline, start: Callable[..., PoolProcess]
) -> None:
    """A dashboard that misses the beginning, or counts a run twice, is worse than none."""
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
        assert pids & set(pool.workers()), "both pools are heard"
    assert {event.workflow_id for event in read} == {"two"}
    assert all(event.at.tzinfo is not None for event in read)


def test_nothing_is_written_while_nobody_streams(app: Streamline, start: Callable[..., PoolProcess]) -> None:
    """Throughput would pay for what nobody reads: before the first stream, and after the last."""
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
    """The successor of a dead worker knows nothing of what its predecessor was told."""
    start(1).ready()
    on_record(app, 1)
    with app.events.stream() as stream:
        run = app.workflows["deadly"].start()
        read = read_until(stream, "workflow:completed")
        names = [event.name for event in read if event.run_id == run.id]  # what the dead one had not sent yet died with it
        assert names[-4:] == ["workflow:recovered", "step:started", "step:completed", "workflow:completed"]
        run_two(app, 3)
        assert len(read_until(stream, "workflow:completed", 3)) == 3 * len(EVENTS_OF_TWO)


def test_a_pool_started_later_publishes_from_its_first_run_on(app: Streamline, start: Callable[..., PoolProcess]) -> None:
    """It has not heard the call. Its runs are due already when its workers come up."""
    runs = app.workflows["two"].start_many([None] * 10)
    with app.events.stream() as stream:
        start(2)
        read = read_until(stream, "workflow:completed", len(runs))
        assert Counter((event.name, event.step_id) for event in read) == dict.fromkeys(EVENTS_OF_TWO, 10)


@pytest.mark.slow
def test_a_stream_that_goes_on_is_served_beyond_its_first_word(
    app: Streamline, start: Callable[..., PoolProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listener is forgotten when it is silent, so a stream must not be."""
    monkeypatch.setattr(stream_module, "_RENEW_S", 0.2)
    start(1).ready()
    on_record(app, 1)
    hosts = app.store().collection("hosts")
    with app.events.stream() as stream:
        (record,) = hosts.find({"listener": True})
        # As if its record and the signals so far had been lost: the next word brings all of it back.
        hosts.delete_one({"_id": record["_id"]})
        eventually(lambda: hosts.find_one({"_id": record["_id"]}))
        run_two(app, 1)
        assert len(read_until(stream, "workflow:completed")) == len(EVENTS_OF_TWO)
    eventually(lambda: not list(hosts.find({"listener": True})))


@pytest.mark.slow
def test_a_call_that_was_lost_is_found_by_a_sweep(app: Streamline, start: Callable[..., PoolProcess]) -> None:
    """Losing a signal costs time and nothing else, here as everywhere."""
    start(1, "--lease", "2").ready()
    app.store().run(event_stream.put_listener("listener:unheard", "h", 1))
    answers = {"kind": "heard", "listeners": "listener:unheard"}
    eventually(lambda: app.store().collection("signals").find_one(answers), timeout=20)


def test_records_that_another_program_has_put_there_harm_nobody(app: Streamline, start: Callable[..., PoolProcess]) -> None:
    """A steward that stumbles over one would stumble again after every restart, until the pool has used up its budget."""
    app.init_db()
    hosts, signals = app.store().collection("hosts"), app.store().collection("signals")
    hosts.insert_many([{"_id": 5, "listener": True}, {"_id": "x", "listener": True, "expireAt": "never"}])
    pool = start(1, "--lease", "2").ready()
    with app.events.stream("workflow:completed") as stream:
        now = app.store().now()
        signals.insert_many([{"kind": kind, "at": now, "listener": 7} for kind in ("listen", "unlisten", "heard", "events")])
        signals.insert_one({"kind": "heard", "at": now, "listeners": [stream._subscription.id]})
        run_two(app, 1)
        read_until(stream, "workflow:completed")
    assert not pool.logged("child_died")


@pytest.mark.slow
def test_a_frozen_pool_delays_a_stream_by_two_seconds_and_is_named(
    app: Streamline, start: Callable[..., PoolProcess], caplog: pytest.LogCaptureFixture
) -> None:
    """A host that hangs must not take the dashboard with it."""
    pool = start(1).ready()
    on_record(app, 1)
    (record,) = app.workers()
    pool.signal(signal.SIGSTOP)
    try:
        begun = time.monotonic()
        with app.events.stream():
            took = time.monotonic() - begun
    finally:
        pool.signal(signal.SIGCONT)
    assert 1.9 < took < 5
    (warning,) = [entry for entry in caplog.records if entry.message == "stream_incomplete"]
    assert warning.pools == [record["_id"]]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_overload_is_counted_to_the_event(app: Streamline, start: Callable[..., PoolProcess]) -> None:
    """More than a worker keeps and more than a reader has room for: what is lost is known, and the newest is kept."""
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
    """When the database is back, whoever watches learns that it was away; and the stream goes on by itself."""
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


# --- programs -------------------------------------------------------------------------------------------------------


def test_programs_are_heard_too(app: Streamline, make_app: Callable[..., Streamline]) -> None:
    """A run may be driven, and cancelled, where no pool is."""
    other = make_app()
    workflow = other.workflow("w", steps={"a": lambda ctx: ctx.emit("mine", {"x": [1]}), "b": lambda ctx: 1})
    run, unwanted = workflow.start(), workflow.start()
    with app.events.stream() as stream:
        workflow.execute(run.id)
        workflow.cancel(unwanted.id, reason="why not")
        # An act is sent at once, the rest in batches: two publishers, between which there is no order.
        read = read_until(stream, "workflow:completed")
        read += [] if any(event.name == "workflow:cancelled" for event in read) else read_until(stream, "workflow:cancelled")
        assert stream.missed == 0
    assert Counter((event.name, event.run_id, event.step_id) for event in read) == {
        ("workflow:started", run.id, None): 1,
        ("step:started", run.id, "a"): 1,
        ("mine", run.id, "a"): 1,
        ("step:completed", run.id, "a"): 1,
        ("step:started", run.id, "b"): 1,
        ("step:completed", run.id, "b"): 1,
        ("workflow:completed", run.id, None): 1,
        ("workflow:cancelled", unwanted.id, None): 1,
    }
    assert {event.name: event.data for event in read}["mine"] == {"x": [1]}
    assert {event.name: event.data for event in read}["workflow:cancelled"] == "why not"


def test_a_local_execution_under_way_joins_in(
    app: Streamline, make_app: Callable[..., Streamline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody tells a program that somebody streams; it looks now and then."""
    monkeypatch.setattr("streamline_pool.events.publisher._POLL_EVERY_S", 0.05)
    go = threading.Event()
    other = make_app()

    def patient(ctx: Any) -> int:
        while not go.wait(0.02):
            ctx.emit("tick")
        return 1

    workflow = other.workflow("w", steps={"a": patient})
    run = workflow.start()
    thread = threading.Thread(target=workflow.execute, args=(run.id,))
    thread.start()
    try:
        eventually(lambda: app.get_run(run.id).step("a").status == "running")
        with app.events.stream() as stream:
            read_until(stream, "tick")
            go.set()
            read_until(stream, "workflow:completed")
    finally:
        go.set()
        thread.join()


def test_acts_before_the_stream_are_not_in_it(app: Streamline) -> None:
    """Acts are published whether anybody listens or not, so that the moment of listening must decide."""
    workflow = app.workflow("w", steps={"a": lambda ctx: 1})
    before, after = workflow.start_many([None, None])
    workflow.cancel(before.id)
    with app.events.stream() as stream:
        workflow.cancel(after.id)
        assert [event.run_id for event in read_until(stream, "workflow:cancelled")] == [after.id]


def test_names_and_run_narrow_a_stream(app: Streamline) -> None:
    workflow = app.workflow("w", steps={"a": lambda ctx: ctx.emit("mine"), "b": lambda ctx: 1})
    wanted, other = workflow.start_many([None, None])
    with (
        app.events.stream("mine") as mine,
        app.events.stream(["mine", "workflow:completed"], run_id=wanted.id) as both,
        app.events.stream("*", run_id=wanted.id) as everything,
        app.events.stream({"*", "mine"}) as all_runs,
    ):
        for run in (other, wanted):
            workflow.execute(run.id)
        assert [event.run_id for event in read_until(mine, "mine", 2)] == [other.id, wanted.id]
        assert [event.name for event in read_until(both, "workflow:completed")] == ["mine", "workflow:completed"]
        assert {event.run_id for event in read_until(everything, "workflow:completed")} == {wanted.id}
        assert {event.run_id for event in read_until(all_runs, "workflow:completed", 2)} == {wanted.id, other.id}
        assert [stream.missed for stream in (mine, both, everything, all_runs)] == [0, 0, 0, 0]


def test_data_too_large_for_an_event_is_left_out_and_its_size_told(app: Streamline) -> None:
    """One such output after the other would push everybody's wake-up signals out of the ring."""
    workflow = app.workflow("w", steps={"a": lambda ctx: ctx.input})
    with app.events.stream("step:completed") as stream:
        for size in (EVENT_DATA_BYTES_MAX - 100, EVENT_DATA_BYTES_MAX + 100):
            workflow.execute(workflow.start("x" * size).id)
        small, large = read_until(stream, "step:completed", 2)
    assert small.data == "x" * (EVENT_DATA_BYTES_MAX - 100)
    assert list(large.data) == ["$omitted"]
    assert EVENT_DATA_BYTES_MAX + 100 < large.data["$omitted"] < EVENT_DATA_BYTES_MAX + 200


def test_a_late_worker_in_this_process_is_heard(app: Streamline) -> None:
    """A worker without a supervisor looks for listeners when it starts."""
    run = app.workflow("w", steps={"a": lambda ctx: 1}).start()

    async def work() -> None:
        async with Pool(app) as pool:
            await pool.until(lambda: app.get_run(run.id).status == "done")

    other = Streamline(app.mongodb_uri, database=app.database)
    with other, other.events.stream() as stream:
        asyncio.run(work())
        assert read_until(stream, "workflow:completed")[0].name == "workflow:started"


# --- iterating and closing ------------------------------------------------------------------------------------------


def test_async_iteration_in_any_loop(app: Streamline) -> None:
    """One stream, two event loops after each other, and a plain `for` in the end."""
    workflow = app.workflow("w", steps={"a": lambda ctx: 1})

    async def opened() -> EventStream:
        return await app.events.stream_async("workflow:completed")

    async def one(stream: EventStream) -> str | None:
        run = await workflow.start_async()
        await workflow.execute_async(run.id)
        async with asyncio.timeout(10):
            async for event in stream:
                assert event.run_id == run.id
                break
        await app.close_async()
        return event.run_id

    stream = asyncio.run(opened())
    assert asyncio.run(one(stream)) != asyncio.run(one(stream))
    run = workflow.execute(workflow.start().id)
    assert next(stream).run_id == run.id
    stream.close()
    assert list(stream) == []


def test_a_waiting_reader_does_not_hold_up_its_loop_and_ends_with_the_block(app: Streamline) -> None:
    async def scenario() -> list[Event]:
        async with await app.events.stream_async() as stream:

            async def read() -> list[Event]:
                return [event async for event in stream]

            reader = asyncio.create_task(read())
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            return await reader

    assert asyncio.run(scenario()) == []


@pytest.mark.parametrize("how", ["close", "app"])
def test_closing_ends_whoever_iterates(app: Streamline, how: str) -> None:
    """Otherwise a program that watches events could not be ended but by force."""
    stream = app.events.stream()
    done = threading.Event()

    def read() -> None:
        for _ in stream:
            pass
        done.set()

    reader = threading.Thread(target=read)
    reader.start()
    stream.close() if how == "close" else app.close()
    assert done.wait(5)
    reader.join()
    assert not [thread for thread in threading.enumerate() if thread.name == "streamline-stream"]
    assert not list(app.store().collection("hosts").find({"listener": True}))
    stream.close()


def test_a_stream_that_was_forgotten_ends_by_itself(app: Streamline) -> None:
    """`for event in app.events.stream(): break` leaves nobody who could close it."""
    workflow = app.workflow("w", steps={"a": lambda ctx: 1})
    stream = app.events.stream()
    workflow.execute(workflow.start().id)
    for _ in stream:
        break
    del stream
    eventually(lambda: not list(app.store().collection("hosts").find({"listener": True})))


def test_a_slow_reader_delays_nobody(app: Streamline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "_QUEUE_MAX", 10)
    workflow = app.workflow("w", steps={"a": lambda ctx: [ctx.emit("mine", number) for number in range(100)]})
    with app.events.stream() as slow, app.events.stream("workflow:completed") as quick:
        workflow.execute(workflow.start().id)
        read_until(quick, "workflow:completed")
        eventually(lambda: slow.missed == 104 - 10)
        assert [event.data for event in read_until(slow, "workflow:completed")][:8] == list(range(92, 100))


def test_a_fork_cannot_use_the_parents_stream(app: Streamline) -> None:
    """Its thread is not there, and what it would close is the parent's."""
    workflow = app.workflow("w", steps={"a": lambda ctx: 1})
    with app.events.stream() as stream:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what is tested here
            pid = os.fork()
        if pid == 0:
            code = 1
            try:
                next(stream)
            except InvalidStateError:
                stream.close()
                app.events.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        workflow.execute(workflow.start().id)
        read_until(stream, "workflow:completed")


def test_a_program_may_end_without_closing_its_stream(mongodb_uri: str, database: str) -> None:
    """A thread that must be joined would keep the program alive for ever."""
    program = "from streamline_pool import Streamline; app = Streamline(); stream = app.events.stream(); print('on')"
    target = {"STREAMLINE_MONGODB_URI": mongodb_uri, "STREAMLINE_DATABASE": database, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, env={**os.environ, **target})
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "on\n", "")


# --- what is refused ------------------------------------------------------------------------------------------------


def test_the_global_bus_cannot_be_streamed() -> None:
    with pytest.raises(ValidationError, match=r"app\.events\.stream"):
        global_event_bus.stream()


@pytest.mark.parametrize(("names", "run_id"), [("", None), ([], None), (5, None), ([None], None), (["a", ""], None), (None, ""), (None, 5)])
def test_a_stream_that_cannot_be_meant_is_refused(app: Streamline, names: Any, run_id: Any) -> None:
    with pytest.raises(ValidationError):
        app.events.stream(names, run_id=run_id)


def test_a_listener_is_no_pool(app: Streamline) -> None:
    """`workers`, `runs show` and `doctor` would take it for a host that could run something."""
    with app.events.stream():
        assert app.store().collection("hosts").count_documents({}) == 1
        assert app.workers() == []
