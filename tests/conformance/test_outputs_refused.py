"""Outputs and files that the server refuses for good: users' own validators and indexes fail one run, and hold up nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from stored_runs import stored
from workers import run_until_idle

from streamline_pool import StoreUnavailableError, Streamline, ValidationError
from streamline_pool.engine.group_outputs import GroupOutputs
from streamline_pool.protocol.codec import encode_payload
from streamline_pool.protocol.files import CHUNK_BYTES
from streamline_pool.protocol.operations import Op
from streamline_pool.protocol.outputs import DOCUMENT_BYTES_MAX, NewOutput
from streamline_pool.protocol.payloads import EXTERNAL_BYTES
from streamline_pool.storage.files import putting_file
from streamline_pool.storage.outputs import putting_output
from streamline_pool.storage.store import AsyncStore

LARGE = "x" * EXTERNAL_BYTES
FILE_BYTES = DOCUMENT_BYTES_MAX + 1  # is stored as a file
CONTENT = encode_payload(b"x" * 3 * CHUNK_BYTES, "x")


def put_file(app: Streamline, file_id: str, run_id: str = "r") -> None:
    app.store().drive(putting_file(file_id, CONTENT, run_id))


def put_output(app: Streamline, output_id: str, run_id: str = "r") -> None:
    app.store().drive(putting_output(NewOutput(output_id, run_id, CONTENT)))


@pytest.mark.parametrize(("collection", "field"), [("files.files", "length"), ("files.chunks", "n")])
def test_a_file_that_the_server_refuses_fails_its_run_only(app: Streamline, collection: str, field: str) -> None:
    """The worker repeated the write for ever, and the run kept its place of execution even after it was cancelled."""
    app.client[app.where.database].create_collection(f"workflow_{collection}", validator={field: {"$type": "string"}})

    async def make(ctx: Any) -> Any:
        return b"x" * FILE_BYTES if ctx.run_id == "bad" else "small"

    flow = app.workflow("flow", steps={"make": make})
    for run_id in ("bad", "good"):
        flow.start(run_id=run_id)
    run_until_idle(app)
    assert {run["_id"]: run["status"] for run in app.runs.find()} == {"good": "done", "bad": "failed"}
    error = stored(app, "bad")["error"]
    assert error["code"] == "VALIDATION_ERROR"
    assert "file could not be stored" in error["message"]


@pytest.mark.parametrize(
    ("collection", "name", "key"),
    [
        ("files.chunks", "files_id_1_n_1", [("files_id", 1), ("n", 1)]),  # not unique
        ("files.chunks", "by_file", [("files_id", 1), ("n", 1)]),
        ("files.files", "filename_1_uploadDate_1", [("filename", 1)]),
    ],
)
def test_users_own_indexes_of_the_bucket_do_not_keep_a_file_from_being_stored(
    app: Streamline, collection: str, name: str, key: list[tuple[str, int]]
) -> None:
    """The server refused the engine's own index each time, so the file was never written."""
    app.store().collection(collection).create_index(key, name=name)
    put_file(app, "f")
    assert app.store().collection("files.chunks").count_documents({"files_id": "f"}) == -(-len(CONTENT) // CHUNK_BYTES)


def test_foreign_chunks_that_hinder_the_index_do_not_keep_a_file_from_being_stored(app: Streamline) -> None:
    app.store().collection("files.chunks").insert_many({"files_id": "theirs", "n": 0} for _ in range(2))
    put_file(app, "f")
    assert app.store().collection("files.chunks").count_documents({"files_id": "f"}) == -(-len(CONTENT) // CHUNK_BYTES)


def test_an_output_that_a_users_unique_index_refuses_fails_its_run(app: Streamline) -> None:
    """It counted as stored before, so the run referred to an output that did not exist."""
    app.init_db()
    app.store().collection("outputs").create_index("runId", name="one_each", unique=True)
    flow = app.workflow("flow", steps={"first": lambda ctx: LARGE, "second": lambda ctx: LARGE})
    run = flow.start()
    run_until_idle(app)
    document = stored(app, run)
    assert [step["status"] for step in document["steps"]] == ["done", "failed"]
    assert document["error"]["code"] == "VALIDATION_ERROR"
    assert "one_each" in document["error"]["message"]


@pytest.mark.parametrize(
    ("put", "collection", "field"),
    [(put_output, "outputs", "runId"), (put_file, "files.files", "filename"), (put_file, "files.chunks", "n")],
)
def test_only_the_same_id_counts_as_there(app: Streamline, put: Any, collection: str, field: str) -> None:
    app.store().collection(collection).create_index(field, name="users_own", unique=True)
    put(app, "one")
    put(app, "one")
    with pytest.raises(ValidationError, match="users_own"):
        put(app, "two")


def test_each_attempt_to_store_a_file_is_reported(app: Streamline, caplog: pytest.LogCaptureFixture) -> None:
    """Its worker counted as healthy, and no line of the log said why the run did not go on."""

    class Refused(AsyncStore):
        refusals = 2

        async def run(self, op: Op, session: Any = None) -> Any:
            if op.name == "insert_chunks" and self.refusals:
                self.refusals -= 1
                raise StoreUnavailableError("a fault of this test", transient=False)
            return await super().run(op, session)

    answers: list[bool] = []

    async def put() -> None:
        store = Refused(app.where, app.env)
        await GroupOutputs(store, app.env, answers.append).put(NewOutput("f", "r", b"x" * FILE_BYTES))
        await store.close()

    asyncio.run(put())
    assert answers == [False, False, True]
    assert [record.message for record in caplog.records] == ["output_not_stored"], "once for each output, not for each attempt"
