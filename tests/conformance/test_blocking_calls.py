"""Calls on `ctx` that wait for the database: what they have stored stays, and a database that does not answer is no failure of the step."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from workers import Pool, run_until_idle

from streamline_pool import Context, InvalidStateError, StoreUnavailableError, Streamline, create_hook, execute_parallel
from streamline_pool.engine.active_run import Save
from streamline_pool.storage.procedures import Procedure
from streamline_pool.storage.store import AsyncStore


async def _by_gather(save: Callable[[], Any]) -> None:
    async def branch() -> None:
        save()

    await asyncio.gather(branch(), branch())


async def _by_task_group(save: Callable[[], Any]) -> None:
    async def branch() -> None:
        save()

    async with asyncio.TaskGroup() as group:
        group.create_task(branch())
        group.create_task(branch())


async def _by_threads(save: Callable[[], Any]) -> None:
    await execute_parallel([save, save])


async def _by_hand(save: Callable[[], Any]) -> None:
    with suppress(StoreUnavailableError):
        save()
    await asyncio.sleep(0.01)  # in the same turn of the loop no call would be sent
    save()


@pytest.mark.parametrize("make", [_by_gather, _by_task_group, _by_threads])
def test_a_step_whose_saves_get_no_answer_is_entered_again_uncounted(
    app: Streamline, monkeypatch: pytest.MonkeyPatch, make: Callable[[Callable[[], Any]], Any]
) -> None:
    """However many saves fail at once, and however their errors come out of the handler."""
    entered: list[int] = []
    _no_answers(app, monkeypatch, while_true=lambda: len(entered) == 1)

    async def saving(ctx: Context) -> None:
        entered.append(ctx.attempt)
        await make(lambda: ctx.checkpoint("done"))

    run_id = app.workflow("w", steps={"s": (saving, {"retries": 1})}).start().id
    run_until_idle(app)
    run = app.get_run(run_id)
    assert run is not None
    assert run.status == "done", run.error
    assert (len(entered), run.steps[0].attempts) == (2, 2)


def test_a_hook_that_could_not_be_stored_may_be_asked_for_again(app: Streamline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler has no token of the first."""
    tried: list[None] = []
    _no_answers(app, monkeypatch, while_true=lambda: len(tried) == 1)
    tokens: list[str] = []

    async def asking(ctx: Context) -> None:
        def ask() -> None:
            tried.append(None)
            tokens.append(create_hook(ctx, "approve").token)

        await _by_hand(ask)
        ctx.wait("approve")

    run_id = app.workflow("w", steps={"s": (asking, {"retries": 1})}).start().id
    run_until_idle(app)
    assert app.resume_hook(tokens[0], "yes").run_id == run_id


def _no_answers(app: Streamline, monkeypatch: pytest.MonkeyPatch, while_true: Callable[[], bool]) -> None:
    """Blocking calls get no answer for so long."""
    store = app.store()
    drive = store.drive_within

    def drive_within(seconds: float, procedure: Procedure[Any]) -> Any:
        if while_true():
            procedure.close()
            raise StoreUnavailableError("away", transient=True)
        return drive(seconds, procedure)

    monkeypatch.setattr(store, "drive_within", drive_within)


def test_saves_without_an_answer_keep_nothing_in_memory(app: Streamline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler for which progress is a favour tries row after row. Each error knows frames that know its row."""
    entered: list[int] = []
    _no_answers(app, monkeypatch, while_true=lambda: len(entered) == 1)

    async def saving(ctx: Context) -> int:
        entered.append(ctx.attempt)
        for row in range(50):
            with suppress(StoreUnavailableError):
                ctx.checkpoint([row])
            await asyncio.sleep(0.001)
        gc.collect()
        return sum(type(each) is Save for each in gc.get_objects())

    run_id = app.workflow("w", steps={"s": saving}).start().id
    run_until_idle(app)
    run = app.get_run(run_id)
    assert run is not None
    assert run.output == 1, "the first one, whose outcome is not known"


def test_a_handler_that_computes_between_two_saves_is_not_interrupted(make_app: Callable[..., Streamline]) -> None:
    """The database answers at once, and the handler keeps the loop from turning for longer than a call may."""
    entered: list[int] = []

    async def saving(ctx: Context) -> str:
        entered.append(ctx.attempt)
        ctx.checkpoint("begun")
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            pass
        ctx.checkpoint("computed")
        return "done"

    app = make_app(stall_timeout_s=3.0)  # so a call may take 1 s
    run_id = app.workflow("w", steps={"s": (saving, {"retries": 1})}).start().id
    run_until_idle(app)
    run = app.get_run(run_id)
    assert run is not None
    assert (run.status, run.output, entered) == ("done", "done", [1])


def test_what_a_thread_has_saved_stays_when_its_handler_is_given_up(app: Streamline) -> None:
    """The handler waits for its thread, whatever comes, so it counts as stuck in the middle of a save."""
    saved: list[int] = []

    async def saving(ctx: Context) -> Any:
        if ctx.attempt > 1:
            return ctx.get_checkpoint()

        def save_rows() -> None:
            with suppress(Exception):
                for row in range(1, 1_000_000):
                    ctx.checkpoint(row)
                    saved.append(row)

        rows = asyncio.get_running_loop().run_in_executor(None, save_rows)
        while not rows.done():
            with suppress(asyncio.CancelledError):
                await asyncio.shield(rows)
        return None

    workflow = app.workflow("w", steps={"s": (saving, {"retries": 2, "retry_delay": 0.5, "timeout": 0.1})})

    async def main() -> Any:
        async with Pool(app) as pool:
            run = await workflow.start_async()
            await pool.until(lambda: app.runs.find_one({"_id": run.id, "status": "done"}) is not None)
            return (await workflow.get_async(run.id)).output  # type: ignore[union-attr]

    assert asyncio.run(main()) in (saved[-1], saved[-1] + 1)  # one more, if the thread never heard of its last save


@pytest.mark.parametrize("is_async", [True, False])
def test_a_thread_that_a_step_has_left_stores_nothing_in_the_next_step(app: Streamline, is_async: bool) -> None:
    """It had passed the first check of `ctx.checkpoint` when its step ended: as here, where only the second one is made."""
    left: list[Context] = []
    refused: list[Exception] = []

    def late_save() -> None:
        try:
            left[0]._port.save_checkpoint(left[0]._intents, "of step one", 20)
        except InvalidStateError as exc:
            refused.append(exc)

    def two(ctx: Context) -> Any:
        late_save()
        return ctx.get_checkpoint()

    async def two_async(ctx: Context) -> Any:
        return two(ctx)

    workflow = app.workflow("w", steps={"one": left.append, "two": two_async if is_async else two})
    run_id = workflow.start().id
    run_until_idle(app)
    run = workflow.get(run_id)
    assert run is not None
    assert (run.status, run.output, len(refused)) == ("done", None, 1)


def test_a_condition_may_wait_for_a_thread_that_asks_for_an_output(app: Streamline) -> None:
    """Conditions run on the event loop, so a thread that waited for the loop would wait for ever."""

    def is_long(ctx: Context) -> bool:
        with ThreadPoolExecutor(1) as threads:
            return ctx.input == "first" or len(threads.submit(ctx.get_output, "make").result(20)) > 1_000

    steps: dict[str, Any] = {
        "make": lambda ctx: "x" * 10_000,
        "nap": lambda ctx: ctx.sleep(0.01),
        "use": (lambda ctx: "used", {"run_if": is_long}),
    }
    workflow = app.workflow("w", steps=steps)

    async def main() -> list[Any]:
        async with Pool(app) as pool:
            runs = []
            for given in ("first", "second"):  # so the worker has learnt that the condition asks for no output
                runs.append(await workflow.start_async(given))
                await pool.until(lambda: app.runs.count_documents({"status": {"$in": ["done", "failed"]}}) == len(runs))
            return [app.get_run(run.id) for run in runs]

    assert [(run.status, run.output) for run in asyncio.run(main())] == [("done", "used")] * 2


def test_a_condition_that_was_left_behind_may_wait_for_its_thread(app: Streamline) -> None:
    """It goes on although it was cancelled, and keeps the loop until its thread has the output."""
    got: list[int] = []

    async def stubborn(ctx: Context) -> bool:
        if ctx.input == "first":
            return True
        for _ in range(3):
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.9)
        with ThreadPoolExecutor(1) as threads:
            got.append(len(threads.submit(ctx.get_output, "make").result(20)))
        return True

    use: Any = (lambda ctx: "used", {"run_if": stubborn, "retries": 1, "timeout": 0.2})
    workflow = app.workflow("w", steps={"make": lambda ctx: "x" * 10_000, "nap": lambda ctx: ctx.sleep(0.01), "use": use})

    started: list[Any] = []

    async def main() -> None:
        async with Pool(app) as pool:
            for given in ("first", "second"):
                started.append(await workflow.start_async(given))
                await pool.until(lambda: app.runs.count_documents({"status": {"$in": ["done", "failed"]}}) == len(started))
            while not got:
                await asyncio.sleep(0.01)

    asyncio.run(main())
    assert got == [10_000]


def test_a_run_that_is_stopped_while_its_outputs_are_read_is_released_before_it_enters_a_step(
    app: Streamline, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, go_on = threading.Event(), threading.Event()
    entered: list[str] = []
    run_op = AsyncStore.run

    async def run(self: AsyncStore, op: Any, session: Any = None) -> Any:
        if op.name == "read_outputs" and entered:
            reading.set()
            await asyncio.to_thread(go_on.wait, 20)
        return await run_op(self, op, session)

    monkeypatch.setattr(AsyncStore, "run", run)

    def use(ctx: Context) -> int:
        ctx.get_output("make")
        entered.append(ctx.run_id)
        return 1

    workflow = app.workflow("w", steps={"make": lambda ctx: "x" * 10_000, "nap": lambda ctx: ctx.sleep(0.01), "use": use})

    async def main() -> Any:
        async with Pool(app) as pool:
            first = await workflow.start_async()
            await pool.until(lambda: app.runs.find_one({"_id": first.id, "status": "done"}) is not None)
            second = await workflow.start_async()
            await pool.until(reading.is_set)
            pool.workers[0].stop(1.0)
            go_on.set()
            await pool.until(lambda: app.runs.find_one({"_id": second.id, "lease": {"$exists": False}}) is not None)
            return app.runs.find_one({"_id": second.id})

    stopped = asyncio.run(main())
    step = stopped["steps"][2]
    assert (len(entered), stopped["status"], step["status"], step["attempts"], stopped["crashes"]) == (1, "running", "pending", 0, 0)


@pytest.mark.slow
def test_handlers_that_save_at_once_in_a_slow_database_do_not_outlive_their_leases(
    make_app: Callable[..., Streamline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each save is answered, so none has failed; but all together take three leases, and the loop renews none meanwhile."""
    first, second = (make_app(stall_timeout_s=30.0, concurrency=30, lease_s=4.0) for _ in range(2))
    store = first.store()
    drive = store.drive_within

    def drive_slowly(seconds: float, procedure: Procedure[Any]) -> Any:
        time.sleep(min(0.5, seconds))
        return drive(seconds, procedure)

    monkeypatch.setattr(store, "drive_within", drive_slowly)
    go, is_over = threading.Event(), threading.Event()
    elsewhere: list[str] = []

    async def saving(ctx: Context) -> None:
        while not go.is_set():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # all wake in one turn
        with suppress(StoreUnavailableError):
            ctx.checkpoint("done")

    first.workflow("w", steps={"s": saving}).start_many([None] * 24)
    second.workflow("w", steps={"s": lambda ctx: elsewhere.append(ctx.run_id)})

    def work_elsewhere() -> None:
        async def main() -> None:
            async with Pool(second, recover_every_s=0.2):
                await asyncio.to_thread(is_over.wait)

        asyncio.run(main())

    async def main() -> None:
        async with Pool(first) as pool:
            await pool.until(lambda: first.runs.count_documents({"lease": {"$exists": True}}) == 24)
            other = asyncio.create_task(asyncio.to_thread(work_elsewhere))
            await asyncio.sleep(0.5)
            go.set()
            await pool.until(lambda: first.runs.count_documents({"status": "done"}) == 24, timeout=60)
            is_over.set()
            await other

    asyncio.run(main())
    assert elsewhere == []


@pytest.mark.slow
def test_a_handler_that_saves_without_a_pause_fails_and_is_told_why(make_app: Callable[..., Streamline]) -> None:
    """It was entered again and again, without a count and without a log line."""
    app = make_app(stall_timeout_s=3.0)
    entered: list[int] = []

    async def saving(ctx: Context) -> None:
        entered.append(ctx.attempt)
        for row in range(1_000_000):
            ctx.checkpoint(row)

    run_id = app.workflow("w", steps={"s": (saving, {"retries": 2, "retry_delay": 0.01})}).start().id
    run_until_idle(app, timeout=60)
    run = app.get_run(run_id)
    assert run is not None
    assert (run.status, entered) == ("failed", [1, 2])
    assert "without a pause; await something between them" in str(run.error)
