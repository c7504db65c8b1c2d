"""Outputs that are too large for a run's document: stored beside it, returned like any other output, limited to 64 MiB."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from workers import run_until_idle

from streamline_pool import DataCorruptionError, PayloadTooLargeError, Streamline, WorkflowNotFoundError, create_hook
from streamline_pool.client.run_control import getting_run, pausing_run
from streamline_pool.protocol import recovery
from streamline_pool.protocol.operations import Find
from streamline_pool.protocol.outputs import DOCUMENT_BYTES_MAX
from streamline_pool.protocol.payloads import EXTERNAL_BYTES, OUTPUT_BYTES_MAX
from streamline_pool.storage.procedures import ProcedureRun
from support import present

LARGE = b"x" * (EXTERNAL_BYTES + 1)


def marker(stored: Any) -> bool:
    return isinstance(stored, dict) and list(stored) == ["$external"]


def test_a_large_output_is_stored_beside_the_run_and_readers_get_its_value(app: Streamline) -> None:
    """A large document would be rewritten at every step, and cannot be larger than 16 MiB."""
    seen: list[Any] = []
    flow = app.workflow(
        "flow",
        steps={
            "make": lambda ctx: LARGE,
            "use": lambda ctx: seen.append(ctx.get_output("make")),
            "ask": (lambda ctx: "entered", {"condition": lambda ctx, run: run.step("make").output == LARGE}),
            "end": lambda ctx: ctx.get_output("make"),
        },
    )
    run = flow.execute(flow.start().id)
    assert seen == [LARGE]
    assert [run.output, run.step("make").output, run.step("ask").output] == [LARGE, LARGE, "entered"]
    stored = app.runs.find_one({"_id": run.id})
    assert marker(stored["steps"][0]["output"])
    assert marker(stored["output"])
    assert marker(run.to_dict()["output"]), "`to_dict` is the stored document"
    for reader in (flow.get, flow.wait_for):
        read = reader(run.id)
        assert read is not None
        assert read.output == LARGE


def test_another_worker_loads_what_the_first_has_stored(app: Streamline) -> None:
    """After a sleep, a crash or a wait no process has the value in memory."""
    flow = app.workflow(
        "flow",
        steps={
            "make": lambda ctx: {"data": LARGE},
            "nap": lambda ctx: ctx.sleep(0.01),
            "end": lambda ctx: len(ctx.get_output("make")["data"]),
        },
    )
    run = flow.start()
    run_until_idle(app)
    ended = flow.wait_for(run.id, timeout=10)
    assert ended.output == len(LARGE)


def test_the_limit_is_64_mib_and_beyond_it_the_step_fails_at_once(app: Streamline) -> None:
    """The step must not be retried, because a second attempt would return the same."""
    calls: list[int] = []

    def make(ctx: Any) -> bytes:
        calls.append(1)
        return bytes(ctx.input)

    flow = app.workflow("flow", steps={"make": make})
    most = OUTPUT_BYTES_MAX - 100
    assert len(flow.execute(flow.start(most).id).output) == most
    failed = flow.execute(flow.start(OUTPUT_BYTES_MAX + 1).id)
    assert (failed.status, present(failed.error)["code"]) == ("failed", "PAYLOAD_TOO_LARGE")
    assert len(calls) == 2


@pytest.mark.parametrize("early", [True, False])
def test_a_large_answer_is_an_output_like_any_other(app: Streamline, early: bool) -> None:
    tokens: list[str] = []

    def ask(ctx: Any) -> None:
        tokens.append(create_hook(ctx, "send the file").token)
        if early:
            app.resume_hook(tokens[0], LARGE)
        ctx.wait("send the file")

    flow = app.workflow("flow", steps={"ask": ask, "end": lambda ctx: ctx.get_output("ask"), "sign": lambda ctx: ctx.wait("sign")})
    run = flow.execute(flow.start().id)
    if not early:
        assert app.resume_hook(tokens[0], LARGE).run.step("ask").output == LARGE
        run = flow.execute(run.id)
    assert run.step("end").output == LARGE
    signed = flow.resume(run.id, [LARGE])
    assert signed.step("sign").output == [LARGE]
    assert all(marker(step["output"]) for step in app.runs.find_one({"_id": run.id})["steps"])


def test_a_payload_above_the_limit_is_refused_and_nothing_is_stored(app: Streamline) -> None:
    flow = app.workflow("flow", steps={"ask": lambda ctx: ctx.wait("?")})
    run = flow.execute(flow.start().id)
    with pytest.raises(PayloadTooLargeError):
        flow.resume(run.id, b"x" * (OUTPUT_BYTES_MAX + 1))
    assert flow.resume(run.id, "small").step("ask").output == "small"
    assert app.store().collection("outputs").count_documents({}) == app.store().collection("files.files").count_documents({}) == 0


def test_an_output_that_looks_like_a_marker_comes_back_as_it_was(app: Streamline) -> None:
    """Otherwise a handler could make the engine read any file, or make it fail for a file that does not exist."""
    odd = {"$external": "of my own"}
    flow = app.workflow("flow", steps={"make": lambda ctx: odd, "end": lambda ctx: [ctx.get_output("make")]})
    assert flow.execute(flow.start().id).output == [odd]


def test_a_lost_output_fails_only_its_run_and_is_named(app: Streamline) -> None:
    flow = app.workflow("flow", steps={"make": lambda ctx: LARGE, "nap": lambda ctx: ctx.sleep(0.01), "end": lambda ctx: 1})
    run = flow.execute(flow.start().id)
    app.store().collection("outputs").delete_many({})
    run_until_idle(app)
    stored = app.runs.find_one({"_id": run.id})
    assert (stored["status"], stored["error"]["code"], stored["error"]["stepId"]) == ("failed", "DATA_CORRUPTION", "end")
    with pytest.raises(DataCorruptionError, match="output of step make"):
        flow.get(run.id)
    assert flow.rewind_to(run.id, "end").status == "running"  # it takes effect, so it returns; the step finds the loss again
    run_until_idle(app)
    with pytest.raises(DataCorruptionError, match="output of step make"):
        flow.get(run.id)
    assert flow.rewind_to(run.id, "make").status == "running"
    run_until_idle(app)
    assert present(flow.get(run.id)).status == "done"


@pytest.mark.parametrize("call", ["get", "pause"])
def test_a_run_that_is_deleted_while_it_is_read_is_not_there_and_not_corrupted(app: Streamline, call: str) -> None:
    """A reader reads the document, and then its files. A clean-up in between deletes both, and a false report of damage alarms people."""
    flow = app.workflow("flow", steps={"make": lambda ctx: LARGE})
    run = flow.execute(flow.start().id)
    procedure: Any = getting_run(flow.id, run.id) if call == "get" else pausing_run(app.services, flow.id, run.id, None)
    reading: Any = ProcedureRun(procedure)

    def go_on(until: Callable[[], bool]) -> Any:
        while not until():
            reading.answer(app.store().run(reading.effect))
        return reading.result()

    go_on(lambda: isinstance(reading.effect, Find) and reading.effect.collection != "runs")
    assert app.cleanup_old_runs(0) == 1
    if call == "get":
        assert go_on(lambda: reading.effect is None) is None
    else:
        with pytest.raises(WorkflowNotFoundError):
            go_on(lambda: reading.effect is None)


def test_subscribers_get_the_value(app: Streamline) -> None:
    received: dict[str, Any] = {}
    app.events.on("*", lambda event: received.update({event.name: event.data}))
    flow = app.workflow("flow", steps={"make": lambda ctx: LARGE})
    flow.execute(flow.start().id)
    app.events.flush()
    assert received["step:completed"] == received["workflow:completed"] == LARGE


CRASHING = """
import os, signal, sys
from streamline_pool import Streamline
app = Streamline(sys.argv[1], database=sys.argv[2])
flow = app.workflow("flow", steps={"make": lambda ctx: b"x" * int(sys.argv[5])})
from streamline_pool.storage.store import AsyncStore
run_op = AsyncStore.run
async def dying(self, op, session=None):
    if op.name == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)
    return await run_op(self, op, session)
AsyncStore.run = dying
flow.execute(sys.argv[4])
"""


FILE_BYTES = DOCUMENT_BYTES_MAX + 1  # is stored as a file


@pytest.mark.parametrize(
    ("size", "operation", "left"),
    [(20_000, "insert_outputs", 0), (20_000, "commit_runs", 1), (FILE_BYTES, "insert_file", 0), (FILE_BYTES, "insert_chunks", 1)],
)
def test_a_crash_between_output_and_commit_loses_nothing(
    make_app: Callable[..., Streamline], mongodb_uri: str, database: str, size: int, operation: str, left: int
) -> None:
    """The step and its output are repeated, and the output of the dead process must be deleted with the run."""
    app = make_app()  # with its usual lease: 16 MiB take a while on a busy machine
    flow = app.workflow("flow", steps={"make": lambda ctx: b"y" * size})
    run = flow.start()
    command = [sys.executable, "-c", CRASHING, mongodb_uri, database, operation, run.id, str(size)]
    died = subprocess.run(command, timeout=50, capture_output=True)
    assert died.returncode == -9, died.stderr
    app.runs.update_one({"_id": run.id}, {"$set": {"lease.expiresAt": run.created_at}})
    app.store().run(recovery.recover_expired(3))
    run_until_idle(app)
    ended = flow.wait_for(run.id, timeout=20)
    assert ended.output == b"y" * size
    assert ended.step("make").attempts == 2
    beside = {name: app.store().collection(name) for name in ("outputs", "files.files", "files.chunks")}
    assert beside["files.files" if size == FILE_BYTES else "outputs"].count_documents({}) == left + 1
    assert app.cleanup_old_runs(0) == 1
    assert {name: collection.count_documents({}) for name, collection in beside.items()} == dict.fromkeys(beside, 0)
