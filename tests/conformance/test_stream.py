"""`app.events.stream()` in programs: what it yields, how it is iterated over and closed, and which calls it refuses."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from pool_process import ROOT
from stream_reading import read_until
from workers import Pool

from streamline_pool import Context, Event, InvalidStateError, Streamline, ValidationError, global_event_bus
from streamline_pool.events import mailbox
from streamline_pool.events.publisher import EVENT_DATA_BYTES_MAX
from streamline_pool.events.stream import EventStream
from support import eventually, present

# --- programs -------------------------------------------------------------------------------------------------------


def test_events_of_programs_arrive_too(app: Streamline, make_app: Callable[..., Streamline]) -> None:
    """A program can execute and cancel runs without a pool."""
    other = make_app()
    workflow = other.workflow("w", steps={"a": lambda ctx: ctx.emit("mine", {"x": [1]}), "b": lambda ctx: 1})
    run, unwanted = workflow.start(), workflow.start()
    with app.events.stream() as stream:
        workflow.execute(run.id)
        workflow.cancel(unwanted.id, reason="why not")
        # The event of a control operation is sent at once, the others in batches: two publishers, with no order between them.
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


def test_a_local_execution_in_progress_begins_to_publish(
    app: Streamline, make_app: Callable[..., Streamline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No supervisor sends the subscribers to a program; it polls the database for them."""
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
        eventually(lambda: present(app.get_run(run.id)).step("a").status == "running")
        with app.events.stream() as stream:
            read_until(stream, "tick")
            go.set()
            read_until(stream, "workflow:completed")
    finally:
        go.set()
        thread.join()


def test_control_operations_before_the_stream_are_not_in_it(app: Streamline) -> None:
    """Events of control operations are published even without a subscriber. A stream must leave out the earlier ones."""
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


def test_data_too_large_for_an_event_is_left_out_and_its_size_given(app: Streamline) -> None:
    """Many large outputs would push the wake-ups of all pools out of the capped collection."""
    workflow = app.workflow("w", steps={"a": lambda ctx: ctx.input})
    with app.events.stream("step:completed") as stream:
        for size in (EVENT_DATA_BYTES_MAX - 100, EVENT_DATA_BYTES_MAX + 100):
            workflow.execute(workflow.start("x" * size).id)
        small, large = read_until(stream, "step:completed", 2)
    assert small.data == "x" * (EVENT_DATA_BYTES_MAX - 100)
    assert list(large.data) == ["$omitted"]
    assert EVENT_DATA_BYTES_MAX + 100 < large.data["$omitted"] < EVENT_DATA_BYTES_MAX + 200


def test_a_worker_started_later_in_this_process_publishes(app: Streamline) -> None:
    """A worker without a supervisor reads the subscribers from the database when it starts."""
    run = app.workflow("w", steps={"a": lambda ctx: 1}).start()

    async def work() -> None:
        async with Pool(app) as pool:
            await pool.until(lambda: present(app.get_run(run.id)).status == "done")

    other = Streamline(app.mongodb_uri, database=app.database)
    with other, other.events.stream() as stream:
        asyncio.run(work())
        assert read_until(stream, "workflow:completed")[0].name == "workflow:started"


# --- iterating and closing ------------------------------------------------------------------------------------------


def test_async_iteration_in_any_loop(app: Streamline) -> None:
    """One stream is used in two event loops, one after the other, and then in a plain `for`."""
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


def test_a_waiting_reader_does_not_block_its_event_loop_and_ends_with_the_block(app: Streamline) -> None:
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
def test_closing_ends_every_iteration(app: Streamline, how: str) -> None:
    """Otherwise a program that watches events could be ended only by a kill."""
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


def test_a_stream_without_references_ends_by_itself(app: Streamline) -> None:
    """After `for event in app.events.stream(): break` no reference is left by which the program could close it."""
    workflow = app.workflow("w", steps={"a": lambda ctx: 1})
    stream = app.events.stream()
    workflow.execute(workflow.start().id)
    for _ in stream:
        break
    del stream
    eventually(lambda: not list(app.store().collection("hosts").find({"listener": True})))


def test_a_slow_reader_delays_no_other_stream(app: Streamline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "_EVENTS_MAX", 10)

    def emit_many(ctx: Context) -> None:
        for number in range(100):
            ctx.emit("mine", number)

    workflow = app.workflow("w", steps={"a": emit_many})
    with app.events.stream() as slow, app.events.stream("workflow:completed") as quick:
        workflow.execute(workflow.start().id)
        read_until(quick, "workflow:completed")
        eventually(lambda: slow.missed == 104 - 10)
        assert [event.data for event in read_until(slow, "workflow:completed")][:8] == list(range(92, 100))


def test_a_fork_cannot_use_the_parents_stream(app: Streamline) -> None:
    """The reading thread does not exist in the child, and the subscription belongs to the parent."""
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
    """A thread that is no daemon would keep the program alive for ever."""
    program = "from streamline_pool import Streamline; app = Streamline(); stream = app.events.stream(); print('on')"
    target = {"STREAMLINE_MONGODB_URI": mongodb_uri, "STREAMLINE_DATABASE": database, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, env={**os.environ, **target})
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "on\n", "")


# --- what is refused ------------------------------------------------------------------------------------------------


def test_the_global_bus_cannot_be_streamed() -> None:
    with pytest.raises(ValidationError, match=r"app\.events\.stream"):
        global_event_bus.stream()


@pytest.mark.parametrize(("names", "run_id"), [("", None), ([], None), (5, None), ([None], None), (["a", ""], None), (None, ""), (None, 5)])
def test_malformed_names_and_run_ids_are_refused(app: Streamline, names: Any, run_id: Any) -> None:
    with pytest.raises(ValidationError):
        app.events.stream(names, run_id=run_id)


def test_a_subscriber_is_no_pool(app: Streamline) -> None:
    """`workers`, `runs show` and `doctor` would show it as a host with workers."""
    with app.events.stream():
        assert app.store().collection("hosts").count_documents({}) == 1
        assert app.workers() == []
