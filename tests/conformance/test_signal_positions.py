"""Where tails of the signals stand: no clock of a host decides it, so no signal is skipped, and none is read again and again."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import bson
from stream_reading import read_until

from streamline_pool import Streamline
from streamline_pool.protocol import signals
from streamline_pool.storage.store import AsyncStore, Store
from support import eventually

BEHIND = timedelta(hours=1)


class BehindStore(Store):
    """The store of a process whose server time is an hour behind: it asked a member of the replica set whose clock is wrong."""

    def now(self) -> datetime:
        return super().now() - BEHIND


class BehindAsyncStore(AsyncStore):
    """As `BehindStore`."""

    def now(self) -> datetime:
        return super().now() - BEHIND


def behind(make_app: Callable[..., Streamline]) -> Streamline:
    """Another program on the same database, an hour behind."""
    app = make_app()
    app.connections.use(BehindStore(app.where, app.env))

    async def install() -> None:
        app.connections.use(BehindAsyncStore(app.where, app.env))

    app.connections.loop_thread().call(install())
    return app


def test_a_caller_that_waits_is_woken_by_a_process_whose_clock_is_behind(app: Streamline, make_app: Callable[..., Streamline]) -> None:
    other = behind(make_app)
    for each in (app, other):
        each.workflow("w", steps={"a": lambda ctx: 1})
    workflow = app.workflows["w"]
    run = workflow.start()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(workflow.wait_for, run.id, poll_interval=60, timeout=60)
        eventually(lambda: app.store()._tails_open)
        other.workflows["w"].execute(run.id)
        assert waiting.result(10).status == "done"


def test_a_stream_has_the_events_of_a_process_whose_clock_is_behind(app: Streamline, make_app: Callable[..., Streamline]) -> None:
    workflow = behind(make_app).workflow("w", steps={"a": lambda ctx: 1})
    run = workflow.start()
    with app.events.stream() as stream:
        workflow.execute(run.id)
        assert {event.run_id for event in read_until(stream, "workflow:completed")} == {run.id}
        assert stream.missed == 0


def test_a_cursor_that_the_server_ends_is_opened_where_it_was(app: Streamline) -> None:
    """Opened at its beginning, it would read the whole collection again, half a minute of signals at full load."""
    app.init_db()
    store = app.store()
    collection = store.collection("signals")

    def write(second: int) -> None:
        collection.insert_one({"kind": "mine", "tick": bson.Timestamp(second, 1), "second": second})

    def cursors() -> list[Any]:
        pipeline = [{"$currentOp": {"idleCursors": True}}, {"$match": {"type": "idleCursor", "ns": collection.full_name}}]
        return [found["cursor"]["cursorId"] for found in store.client["admin"].aggregate(pipeline)]

    write(1000)
    write(2000)
    tail = store.tail(signals.signals_after(None, kind="mine"), 0.05)
    read = [(next(tail) or {})["second"] for _ in range(2)]
    assert next(tail) is None
    (cursor,) = cursors()
    store.database.command("killCursors", collection.name, cursors=[cursor])
    write(3000)
    while read[-1] != 3000:
        signal = next(tail)
        read += [] if signal is None else [signal["second"]]
    tail.close()
    assert read == [1000, 2000, 2000, 3000], "the last second is read once more, and nothing before it"
