"""The steward's tail of the signals on a real server: overrun, and on a collection that is not capped."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
from bson import ObjectId

from streamline_pool import StoreUnavailableError, Streamline
from streamline_pool.config.asyncio_tasks import end_tasks
from streamline_pool.protocol import signals
from streamline_pool.protocol.codec import SERVER_TICK
from streamline_pool.protocol.operations import Op, Tail
from streamline_pool.storage.base import TAIL_AWAIT_S
from streamline_pool.storage.store import AsyncStore
from streamline_pool.supervisor.ipc.messages import FromSteward, RunChanged
from streamline_pool.supervisor.steward.duty import DutyTools, StewardBoot
from streamline_pool.supervisor.steward.signal_tail import SignalTail
from streamline_pool.supervisor.steward.stream_subscribers import StreamSubscribers
from streamline_pool.supervisor.steward.wake_ups import WakeUps
from support import eventually

SMALL_BYTES = 4096  # the smallest capped collection


class Counting(AsyncStore):
    """A store that remembers the names of its operations. The first tail fails with `fault`, if there is one."""

    names: tuple[str, ...] = ()
    fault: StoreUnavailableError | None = None

    async def run(self, op: Op, session: Any = None) -> Any:
        self.names += (op.name,)
        return await super().run(op, session)

    async def tail(self, tail: Tail, wait_s: float = TAIL_AWAIT_S) -> AsyncGenerator[dict[str, Any] | None, None]:
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        async for signal in super().tail(tail, wait_s):
            yield signal


class Received:
    """The supervisor's end of the pipe: the runs that "cancel" signals named. `on_first` is called at the first one."""

    unsent_bytes = 0

    def __init__(self, on_first: Callable[[], object]) -> None:
        self.run_ids: list[str] = []
        self._on_first = on_first

    def send(self, message: FromSteward) -> None:
        if isinstance(message, RunChanged):
            self.run_ids.append(message.run_id)
            if len(self.run_ids) == 1:
                self._on_first()

    send_latest = send


def cancel_signal(app: Streamline, run_id: str, *, behind: timedelta = timedelta()) -> None:
    """Write a signal as a process does whose clock is `behind`."""
    store = app.store()
    store.run(signals.send_signal("cancel", store.now() - behind, runId=run_id, owner=None))


async def tailing(
    app: Streamline,
    during: Callable[[Received], Awaitable[None]],
    *,
    on_first: Callable[[], object] = lambda: None,
    fault: StoreUnavailableError | None = None,
) -> Counting:
    """Run the duty while `during` does something. Returns its store."""
    store = app.connections.use(Counting(app.where, app.env))
    store.fault = fault
    received = Received(on_first)
    boot = StewardBoot(host_id="host:1:x", host="host", pid=1, first=False)
    tools = DutyTools(app, app.settings, app.env, boot, received)
    task = asyncio.create_task(SignalTail(tools, WakeUps(tools), StreamSubscribers(tools)).run())
    try:
        await during(received)
    finally:
        await end_tasks([task])
        await tools.publisher.close()
        await app.close_async()
    return store


async def heard(app: Streamline, received: Received, run_id: str, *, behind: timedelta = timedelta()) -> None:
    """Send one signal after the other until the tail has read one of them."""
    numbers = itertools.count()

    def sent_and_read() -> bool:
        cancel_signal(app, f"{run_id}-{next(numbers)}", behind=behind)
        return any(name.startswith(run_id) for name in received.run_ids)

    await asyncio.to_thread(eventually, sent_and_read)


def small_collection(app: Streamline) -> None:
    app.runs.database.create_collection("workflow_signals", capped=True, size=SMALL_BYTES)


def facts(app: Streamline) -> tuple[bool, int]:
    """Whether the collection of signals is capped, and its size in bytes."""
    stats = app.runs.database.command("collStats", "workflow_signals")
    return stats["capped"], stats["maxSize"]


def test_an_overrun_tail_goes_on_and_leaves_the_capped_collection_as_it_is(app: Streamline) -> None:
    """The server deletes the signal at which the tail stands. The driver ends the cursor, and the tail opens another one."""
    small_collection(app)

    def overrun() -> None:
        for number in range(200):
            cancel_signal(app, f"flood-{number}")

    async def during(received: Received) -> None:
        await heard(app, received, "before")
        await heard(app, received, "after")

    store = asyncio.run(tailing(app, during, on_first=overrun))
    assert "cap_signals" not in store.names
    assert facts(app) == (True, SMALL_BYTES)


@pytest.mark.parametrize(
    "text", ["CollectionScan died due to position in capped collection being deleted", "not authorized on capped_shop"]
)
def test_an_error_whose_text_speaks_of_capped_collections_changes_none(app: Streamline, text: str) -> None:
    """To convert a collection that is capped removes its signals and breaks the tails of all hosts, which then do the same."""
    small_collection(app)
    store = asyncio.run(tailing(app, lambda received: heard(app, received, "later"), fault=StoreUnavailableError(text, transient=False)))
    assert "cap_signals" not in store.names
    assert facts(app) == (True, SMALL_BYTES)


def test_an_ordinary_collection_of_signals_is_made_capped_and_read(app: Streamline) -> None:
    """The collection was dropped, and an insert made it again, without a limit and without tails."""
    cancel_signal(app, "first")
    store = asyncio.run(tailing(app, lambda received: heard(app, received, "later")))
    assert store.names.count("cap_signals") == 1
    assert facts(app) == (True, signals.SIGNALS_BYTES)


def test_a_signal_of_a_process_whose_clock_is_behind_is_read(app: Streamline) -> None:
    """Its server time may come from a member of the replica set with a wrong clock. Its wake-ups would all be left to the sweep."""
    app.init_db()

    async def during(received: Received) -> None:
        await heard(app, received, "right")
        await heard(app, received, "behind", behind=timedelta(hours=1))

    asyncio.run(tailing(app, during))


def test_malformed_signals_of_another_program_end_nothing(make_app: Callable[..., Streamline]) -> None:
    """A steward that fails on one takes all duties of its host with it, and each restart is counted."""
    app = make_app()
    app.workflow("w", steps={"a": lambda ctx: 1})
    app.init_db()
    (lane,) = app.lanes()
    due = {"kind": "due", "lane": lane}
    malformed: list[dict[str, Any]] = [
        {"kind": "cancel"}, {"kind": "cancel", "runId": 7}, {"kind": "cancel", "runId": ObjectId()},
        {"kind": "cancel", "runId": "r", "owner": 7},
        due, due | {"wakeAt": "soon"}, due | {"at": 5}, due | {"wakeAt": app.store().now(), "count": "many"},
        due | {"wakeAt": app.store().now(), "runId": 7}, {"kind": "due", "lane": ["x"]},
    ]  # fmt: skip

    async def during(received: Received) -> None:
        await heard(app, received, "before")
        app.store().collection("signals").insert_many([{"tick": SERVER_TICK, **signal} for signal in malformed])
        await heard(app, received, "after")
        assert all(isinstance(run_id, str) for run_id in received.run_ids)

    asyncio.run(tailing(app, during))
