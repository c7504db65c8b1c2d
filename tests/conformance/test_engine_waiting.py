"""`wait_for`: returns when the run has ended, raises when it has not, and survives the loss of every signal."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from workers import Pool

from streamline_pool import Streamline, WorkflowNotFoundError
from streamline_pool.protocol.signals import send_signal


@pytest.fixture
def quick(app: Streamline) -> Any:
    return app.workflow("quick", steps={"a": lambda ctx: "ended"})


def test_an_ended_run_is_returned_at_once(quick: Any) -> None:
    run = quick.execute(quick.start().id)
    assert quick.wait_for(run.id, timeout=0).output == "ended"


def test_a_waiting_caller_is_woken_by_a_signal_and_not_by_its_poll(app: Streamline, quick: Any) -> None:
    run = quick.start()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(quick.wait_for, run.id, timeout=30, poll_interval=30)
        time.sleep(0.1)  # until it subscribes; an earlier wake-up would only make the test easier
        began = time.monotonic()
        quick.execute(run.id)
        assert waiting.result(10).status == "done"
    assert time.monotonic() - began < 5


def test_workers_and_cancel_wake_waiting_callers(app: Streamline, quick: Any) -> None:
    first, second = quick.start(), quick.start(start_at=3600)

    async def play() -> list[str]:
        async with Pool(app) as pool:
            waiting = [asyncio.create_task(quick.wait_for_async(run.id, timeout=20, poll_interval=20)) for run in (first, second)]
            await asyncio.sleep(0.1)
            await quick.cancel_async(second.id)
            statuses = [str((await task).status) for task in waiting]
            await pool.until_idle()
            return statuses

    began = time.monotonic()
    assert asyncio.run(play()) == ["done", "cancelled"]
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(("timeout", "poll"), [(0, 1.0), (0.3, 1.0), (0.3, 0.2), (0.3, 0.25)])
def test_the_built_in_timeout_error_is_raised_on_time(quick: Any, timeout: float, poll: float) -> None:
    run = quick.start(start_at=3600)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=f"run {run.id} is still draft"):
        quick.wait_for(run.id, timeout=timeout, poll_interval=poll)
    assert timeout <= time.monotonic() - began < timeout + 1.5


def test_an_unknown_run_is_not_waited_for(quick: Any) -> None:
    with pytest.raises(WorkflowNotFoundError):
        quick.wait_for("unknown")


def test_the_loss_of_a_signal_costs_one_poll(app: Streamline, quick: Any) -> None:
    run = quick.start()
    signals = app.store().collection("signals")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(quick.wait_for, run.id, timeout=20, poll_interval=0.2)
        signals.drop()  # while a client tails it
        quick.execute(run.id)
        assert waiting.result(10).status == "done"


def test_waiting_works_where_signals_cannot_be_tailed(app: Streamline, quick: Any) -> None:
    """The server may lack capped collections, or a restore may have made the collection a plain one."""
    run = quick.start()
    signals = app.store().collection("signals")
    signals.drop()
    signals.insert_one({"kind": "none"})
    with pytest.raises(TimeoutError):
        quick.wait_for(run.id, timeout=0.2, poll_interval=0.1)
    threading.Timer(0.1, quick.execute, (run.id,)).start()
    assert quick.wait_for(run.id, timeout=20, poll_interval=0.1).status == "done"


def test_a_waiting_caller_that_falls_behind_the_signals_still_returns(app: Streamline, quick: Any) -> None:
    """A capped collection drops its oldest documents, and a cursor at such a document fails with an error."""
    run = quick.start()
    store = app.store()
    signals = store.collection("signals")
    signals.drop()
    signals.database.create_collection(signals.name, capped=True, size=4096)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(quick.wait_for, run.id, timeout=20, poll_interval=0.1)
        for number in range(300):
            store.run(send_signal("due", store.now(), lane="x", runId=str(number)))
        quick.execute(run.id)
        assert waiting.result(15).status == "done"


def test_a_hundred_callers_that_wait_for_one_run_all_return(app: Streamline, quick: Any) -> None:
    run = quick.start()

    async def play() -> set[str]:
        async with app:
            waiting = [asyncio.create_task(quick.wait_for_async(run.id, timeout=20)) for _ in range(100)]
            await quick.execute_async(run.id)
            return {str(ended.output) for ended in await asyncio.gather(*waiting)}

    assert asyncio.run(play()) == {"ended"}
