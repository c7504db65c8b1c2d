"""Outputs in documents beside their runs, on a real server: together in few commands, for every reader, whatever happens to the run."""

from __future__ import annotations

import asyncio
import functools
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
from stored_runs import stored
from workers import Pool, run_until_idle

from streamline_pool import DataCorruptionError, Run, StepOptions, StoreUnavailableError, Streamline
from streamline_pool.protocol.codec import encode_payload
from streamline_pool.protocol.operations import Op
from streamline_pool.protocol.outputs import DOCUMENT_BYTES_MAX, NewOutput, insert_outputs
from streamline_pool.protocol.payloads import EXTERNAL_BYTES
from streamline_pool.storage.files import putting_file
from streamline_pool.storage.outputs import putting_output
from streamline_pool.storage.store import AsyncStore
from support import eventually, present

LARGE = "x" * EXTERNAL_BYTES


def outputs(app: Streamline) -> Any:
    return app.store().collection("outputs")


def output_id(app: Streamline, run: Run | str, step: int = 0) -> str:
    return str(stored(app, run)["steps"][step]["output"]["$external"])


class Recording(AsyncStore):
    """Records the names of its operations."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.names: list[str] = []

    async def run(self, op: Op, session: Any = None) -> Any:
        self.names.append(op.name)
        return await super().run(op, session)


def test_the_form_and_the_index(app: Streamline) -> None:
    """The reference describes them, and an output without its run id could never be removed."""
    flow = app.workflow("flow", steps={"make": lambda ctx: LARGE})
    run = flow.execute(flow.start().id)
    document = outputs(app).find_one()
    assert list(document) == ["_id", "runId", "at", "data"]
    assert (document["_id"], document["runId"], document["data"]) == (output_id(app, run), run.id, encode_payload(LARGE, "x"))
    assert abs(document["at"].as_datetime() - run.created_at).total_seconds() < 60
    assert set(outputs(app).index_information()) == {"_id_", "streamline_output_run"}
    plan = outputs(app).find({"runId": {"$in": [run.id]}}).explain()["queryPlanner"]["winningPlan"]
    assert plan["inputStage"]["indexName"] == "streamline_output_run"


def test_what_is_not_above_the_limit_stays_in_the_run(app: Streamline) -> None:
    flow = app.workflow("flow", steps={"make": lambda ctx: LARGE[:-100]})
    run = flow.execute(flow.start().id)
    assert stored(app, run)["output"] == LARGE[:-100]
    assert outputs(app).count_documents({}) == 0


def test_each_output_is_written_once(app: Streamline) -> None:
    """The last output is also the run's, and later commits must not send earlier outputs again."""
    flow = app.workflow("flow", steps={name: lambda ctx: LARGE for name in ("a", "b", "c")})
    run = flow.execute(flow.start().id)
    document = stored(app, run)
    assert document["output"] == document["steps"][2]["output"]
    assert outputs(app).count_documents({}) == 3
    assert len(encode_payload(document, "x")) < 2_500


def test_many_outputs_share_commands(app: Streamline) -> None:
    """One command for each output would make a step with an output cost two round trips of its own."""
    names: list[str] = []

    async def make(ctx: Any) -> str:
        return LARGE

    async def end(ctx: Any) -> int:
        return len(ctx.get_output("make"))

    async def nap(ctx: Any) -> None:
        ctx.sleep(0.05)

    flow = app.workflow("flow", steps={"make": make, "nap": nap, "end": end})
    runs = [flow.start() for _ in range(60)]

    async def drive() -> None:
        store = app.connections.use(Recording(app.where, app.env))
        async with Pool(app) as pool:
            await pool.until(lambda: app.runs.count_documents({"status": "done"}) == len(runs), timeout=30)
        names.extend(store.names)

    asyncio.run(drive())
    assert [stored(app, run)["output"] for run in runs] == [len(LARGE)] * len(runs)
    assert names.count("insert_outputs") <= 20
    assert names.count("read_outputs") <= 40


def test_a_repeated_insert_is_a_success_and_changes_nothing(app: Streamline) -> None:
    """After a lost reply the whole command is repeated, and some of its outputs may be stored already."""
    one, two = (NewOutput(name, "r", encode_payload(name, "x")) for name in ("one", "two"))
    app.store().run(insert_outputs([one]))
    before = outputs(app).find_one({"_id": "one"})
    app.store().run(insert_outputs([one, two, one]))
    assert outputs(app).count_documents({}) == 2
    assert outputs(app).find_one({"_id": "one"}) == before


def test_every_reader_gets_the_value(app: Streamline) -> None:
    flow = app.workflow("flow", steps={"make": lambda ctx: [LARGE], "ask": lambda ctx: ctx.wait("?"), "end": lambda ctx: LARGE})
    run = flow.execute(flow.start().id)
    readers: list[Callable[[], Run | None]] = [
        lambda: flow.get(run.id),
        lambda: app.get_run(run.id),
        lambda: flow.pause(run.id),
        lambda: flow.resume(run.id),
        lambda: asyncio.run(_read_async(app, run.id)),
        lambda: flow.resume(run.id, {"answer": LARGE}),
        lambda: flow.execute(run.id),
        lambda: flow.wait_for(run.id, timeout=5),
        lambda: flow.rewind_to(run.id, "end"),
        lambda: flow.cancel(run.id),
    ]
    for reader in readers:
        read = present(reader())
        assert read.step("make").output == [LARGE]
        assert read.step("ask").output in (None, {"answer": LARGE})
        assert read.output == (LARGE if read.status == "done" else None)
    assert present(flow.get(run.id)).step("ask").output == {"answer": LARGE}


async def _read_async(app: Streamline, run_id: str) -> Run | None:
    run = await app.get_run_async(run_id)
    await app.close_async()
    return run


def test_each_look_up_gives_a_value_of_its_own(app: Streamline) -> None:
    """A handler that changes what it got must not change what the next attempt gets."""

    def use(ctx: Any) -> Any:
        ctx.get_output("make").append("changed")
        return ctx.get_output("make") == [LARGE]

    flow = app.workflow("flow", steps={"make": lambda ctx: [LARGE], "use": use})
    assert flow.execute(flow.start().id).output is True


def test_files_of_earlier_versions_are_read(app: Streamline) -> None:
    """Before, every output above 256 KiB was a file, and such runs go on after the upgrade."""
    value = "y" * 300_000
    seen: list[Any] = []
    steps = {"make": lambda ctx: "replaced", "nap": lambda ctx: ctx.sleep(0.01), "use": lambda ctx: seen.append(ctx.get_output("make"))}
    flow = app.workflow("flow", steps=steps)
    run = flow.execute(flow.start().id)
    app.store().drive(putting_file("old-file", encode_payload(value, "x"), run.id))
    app.runs.update_one({"_id": run.id}, {"$set": {"steps.0.output": {"$external": "old-file"}}})
    assert present(flow.get(run.id)).step("make").output == value
    run_until_idle(app)
    assert seen == [value]
    assert app.cleanup_old_runs(0) == 1
    assert app.store().collection("files.files").count_documents({}) == 0


@pytest.mark.parametrize("over", [0, 1])
def test_beyond_one_document_it_is_a_file(app: Streamline, over: int) -> None:
    """MongoDB's limit is 16 MiB; the longest run id must fit in beside the content."""
    run_id = "ü" * 100
    content = encode_payload(b"x" * (DOCUMENT_BYTES_MAX + over - len(encode_payload(b"", "x"))), "x", 2**30)
    app.store().drive(putting_output(NewOutput("o", run_id, content)))
    assert (outputs(app).count_documents({}), app.store().collection("files.files").count_documents({})) == (1 - over, over)


def test_a_pause_during_the_handler_keeps_the_output(app: Streamline) -> None:
    """The holder's first commit misses, and its second form must refer to the same output."""
    flow = app.workflow("flow", steps={"make": lambda ctx: [LARGE, flow.pause(ctx.run_id).paused], "end": lambda ctx: 1})
    run = flow.execute(flow.start().id)
    assert (run.paused, run.step("make").output) == (True, [LARGE, True])
    assert outputs(app).count_documents({}) == 1
    flow.resume(run.id)
    assert flow.execute(run.id).status == "done"


def test_a_cancel_during_the_handler_leaves_an_output_that_goes_with_its_run(app: Streamline) -> None:
    """The output is stored before the commit, and the commit is refused."""

    def make(ctx: Any) -> str:
        app.runs.update_one({"_id": ctx.run_id}, {"$set": {"status": "cancelled", "endedAt": run.created_at}, "$unset": {"lease": ""}})
        return LARGE

    flow = app.workflow("flow", steps={"make": make})
    run = flow.start()
    flow.execute(run.id)
    eventually(lambda: outputs(app).count_documents({}) == 1)
    read = present(flow.get(run.id))
    assert (read.status, read.step("make").output) == ("cancelled", None)
    assert app.cleanup_old_runs(0) == 1
    assert outputs(app).count_documents({}) == 0


def test_a_rewound_step_gets_a_new_output_and_the_old_one_goes_with_the_run(app: Streamline) -> None:
    number = itertools.count(1)
    flow = app.workflow("flow", steps={"make": lambda ctx: [LARGE, next(number)]})
    run = flow.execute(flow.start().id)
    first = output_id(app, run)
    assert flow.rewind_to(run.id, "make").output is None
    assert flow.execute(run.id).output == [LARGE, 2]
    assert output_id(app, run) != first
    assert outputs(app).count_documents({}) == 2
    assert app.cleanup_old_runs(0) == 1
    assert outputs(app).count_documents({}) == 0


def test_an_output_that_the_server_refuses_fails_its_run_only(app: Streamline) -> None:
    """Outputs of many runs go in one command. One that users' own validator refuses must not hold up the others."""
    app.init_db()
    app.client[app.where.database].command("collMod", "workflow_outputs", validator={"runId": {"$ne": "bad"}})

    async def make(ctx: Any) -> str:
        return LARGE

    flow = app.workflow("flow", steps={"make": make})
    for run_id in ("good-1", "bad", "good-2"):
        flow.start(run_id=run_id)
    run_until_idle(app)
    assert {run["_id"]: run["status"] for run in app.runs.find()} == {"good-1": "done", "good-2": "done", "bad": "failed"}
    assert stored(app, "bad")["error"]["code"] == "VALIDATION_ERROR"


@pytest.mark.parametrize("damage", [{"data": b"\xff\0\0\0"}, {"data": "text"}, {"runId": "another"}])
def test_a_damaged_output_fails_only_its_run(app: Streamline, damage: dict[str, Any]) -> None:
    flow = app.workflow(
        "flow", steps={"make": lambda ctx: LARGE, "nap": lambda ctx: ctx.sleep(0.01), "use": lambda ctx: ctx.get_output("make")}
    )
    run, other = (flow.execute(flow.start().id) for _ in range(2))
    outputs(app).update_one({"runId": run.id}, {"$set": damage})
    run_until_idle(app)
    assert stored(app, other)["status"] == "done"
    assert stored(app, run)["error"]["code"] == "DATA_CORRUPTION"
    with pytest.raises(DataCorruptionError, match="output of step make is stored beside the run under id"):
        flow.get(run.id)


# --- loading only what is asked for ----------------------------------------------------------------------------------


def reads_of(app: Streamline, flow: Any, count: int = 1) -> list[int]:
    """Drive runs of the flow one after the other in one worker. How many outputs each of them made the worker load."""
    loaded: list[int] = []

    async def drive() -> None:
        store = app.connections.use(Recording(app.where, app.env))
        async with Pool(app) as pool:
            for _ in range(count):
                store.names.clear()
                run = await flow.start_async()
                await pool.until(functools.partial(_has_ended, app, run.id), timeout=20)
                loaded.append(store.names.count("read_outputs"))

    asyncio.run(drive())
    return loaded


def _has_ended(app: Streamline, run_id: str) -> bool:
    return stored(app, run_id)["endedAt"] is not None


async def _nap(ctx: Any) -> None:
    ctx.sleep(0.01)


async def _make(ctx: Any) -> str:
    return LARGE


def test_a_step_that_asks_for_no_output_does_not_pay_for_any(app: Streamline) -> None:
    """A run of a hundred large outputs would load all of them after each of its sleeps."""

    async def small(ctx: Any) -> int:
        return 1

    flow = app.workflow("flow", steps={"make": _make, "nap": _nap, "end": small})
    first, *later = reads_of(app, flow, 3)
    assert first == 1, "nothing is known of the step yet"
    assert later == [0, 0]


def test_a_step_gets_what_it_never_asked_for_before(app: Streamline) -> None:
    """What a step asks for may depend on its input. Then it is loaded while the handler waits, on a thread and on the loop."""
    asks: list[str | None] = [None, "make", "other", "make"]
    got: list[Any] = []

    async def on_loop(ctx: Any) -> None:
        wanted = asks[len(got) // 2]
        got.append(wanted and ctx.get_output(wanted))

    def on_thread(ctx: Any) -> None:
        wanted = asks[len(got) // 2]
        got.append(wanted and ctx.get_output(wanted))

    async def other(ctx: Any) -> str:
        return LARGE + "other"

    flow = app.workflow("flow", steps={"make": _make, "other": other, "nap": _nap, "loop": on_loop, "nap2": _nap, "thread": on_thread})
    loaded = reads_of(app, flow, 4)
    assert got == [None, None, LARGE, LARGE, LARGE + "other", LARGE + "other", LARGE, LARGE]
    assert loaded[0] > loaded[1], "the second run loads by the handler's own thread where it can"


@pytest.mark.parametrize("on_loop", [True, False])
def test_an_output_that_is_missing_when_the_handler_asks_for_it_ends_the_run(app: Streamline, on_loop: bool) -> None:
    """No attempt can succeed, just as if the output had been missed before the handler was entered."""
    entered: list[str] = []

    def use(ctx: Any) -> Any:
        entered.append(ctx.run_id)
        if len(entered) == 1:
            return None
        outputs(app).delete_many({"runId": ctx.run_id})
        return ctx.get_output("make")

    async def use_on_loop(ctx: Any) -> Any:
        return use(ctx)

    flow = app.workflow("flow", steps={"make": _make, "nap": _nap, "use": use_on_loop if on_loop else use}, defaults={"retries": 3})
    reads_of(app, flow, 2)
    assert len(entered) == 2
    error = stored(app, entered[1])["error"]
    assert (error["code"], error["stepId"]) == ("DATA_CORRUPTION", "use")
    assert "output of step make is stored beside the run" in error["message"]


def test_a_condition_gets_the_whole_run(app: Streamline) -> None:
    async def small(ctx: Any) -> int:
        return 1

    flow = app.workflow("flow")
    flow.step("make")(_make)
    flow.step("nap")(_nap)
    flow.step("end", condition=lambda ctx, run: run.step("make").output == LARGE)(small)
    reads_of(app, flow, 2)
    assert [run["output"] for run in app.runs.find()] == [1, 1]


def test_a_condition_whose_output_cannot_be_read_now_is_asked_again(app: Streamline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database is away for a moment. The condition has one attempt, and that failed the run."""

    def asks(ctx: Any) -> bool:
        return ctx.input == "first" or len(ctx.get_output("make")) == len(LARGE)

    options: StepOptions = {"run_if": asks, "retries": 1}
    flow = app.workflow("flow", steps={"make": lambda ctx: LARGE, "nap": lambda ctx: ctx.sleep(0.01), "use": (lambda ctx: "used", options)})
    flow.start("first")
    faults: list[str] = []
    store = app.store()
    drive = store.drive_within

    def failing(seconds: float, procedure: Any) -> Any:
        if faults:
            raise StoreUnavailableError(faults.pop(), transient=True)
        return drive(seconds, procedure)

    async def play() -> None:
        async with Pool(app) as pool:
            await pool.until_idle()
            second = await flow.start_async("second")
            monkeypatch.setattr(store, "drive_within", failing)
            faults.append("away")
            await pool.until(lambda: app.runs.find_one({"_id": second.id})["status"] in ("done", "failed"))
            assert faults == []

    asyncio.run(play())
    assert [(document["status"], document["output"]) for document in app.runs.find()] == [("done", "used")] * 2


def test_a_handler_left_behind_that_asks_for_an_output_after_the_end_of_its_worker_does_not_wait_for_ever(app: Streamline) -> None:
    """Its thread would keep the program from ending."""
    entered, go, over = threading.Event(), threading.Event(), threading.Event()

    def use(ctx: Any) -> None:
        if ctx.input == "first":
            return
        entered.set()
        go.wait(20)
        try:
            ctx.get_output("make")
        finally:
            over.set()

    flow = app.workflow("flow", steps={"make": lambda ctx: LARGE, "nap": lambda ctx: ctx.sleep(0.01), "use": use})
    flow.start("first")

    async def play() -> None:
        pool = Pool(app)
        async with pool:
            await pool.until_idle()
            await flow.start_async("second")
            await pool.until(entered.is_set)
            pool.workers[0].stop(0.1)
        go.set()
        assert await asyncio.to_thread(over.wait, 3)

    try:
        asyncio.run(play())
    finally:
        go.set()
