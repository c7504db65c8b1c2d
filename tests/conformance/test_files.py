"""Files of large outputs, on a real server: any size, any interruption, by both APIs, and readable by every GridFS tool."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from typing import Any

import gridfs
import pytest
from old_runs import file_ids, meddling
from pymongo import MongoClient

from streamline_pool import DataCorruptionError, StoreUnavailableError, Streamline
from streamline_pool.protocol.codec import encode_payload
from streamline_pool.protocol.files import CHUNK_BYTES
from streamline_pool.protocol.operations import Command, Find, Op, Signal
from streamline_pool.protocol.payloads import split_output
from streamline_pool.storage.files import dropping_files, putting_file
from streamline_pool.storage.outputs import loading_outputs
from streamline_pool.storage.procedures import Effect
from streamline_pool.storage.store import Store
from support import REPOSITORY

OVERHEAD = len(encode_payload(b"", "x"))
BULK = "ü" * 200_000


def run_with(file_id: str, run_id: str = "r") -> dict[str, Any]:
    marker = {"$external": file_id}
    return {"_id": run_id, "steps": [{"stepId": "a", "output": marker}, {"stepId": "b", "output": 2}], "output": marker}


def put(app: Streamline, file_id: str, value: Any, run_id: str = "r") -> None:
    content = encode_payload(value, "x", 2**30)
    app.store().drive(putting_file(file_id, content, run_id))


def load(app: Streamline, file_id: str, run_id: str = "r") -> Any:
    return app.store().drive(loading_outputs(run_with(file_id, run_id)))["output"]


def operation(effect: Effect) -> Op:
    """The effect, which must be a database operation."""
    assert isinstance(effect, Command | Find | Signal)
    return effect


def collections(app: Streamline) -> set[str]:
    return set(app.client[app.where.database].list_collection_names())


SIZES = [0, 1, CHUNK_BYTES - OVERHEAD - 1, CHUNK_BYTES - OVERHEAD, CHUNK_BYTES - OVERHEAD + 1, 2 * CHUNK_BYTES - OVERHEAD, 20_000_000]


@pytest.mark.parametrize("size", SIZES)
def test_what_was_put_is_loaded_by_both_apis_and_by_the_drivers_bucket(app: Streamline, size: int) -> None:
    """If one chunk were missing at a size boundary, the output of a finished step would be lost."""
    value = bytes(n % 251 for n in range(1000)) * (size // 1000 + 1)
    value = value[:size]
    content = encode_payload(value, "x", 2**30)
    app.store().drive(putting_file("f-sync", content, "r"))

    async def both() -> dict[str, Any]:
        store = app.store_async()
        await store.drive(putting_file("f-async", content, "r"))
        loaded: dict[str, Any] = await store.drive(loading_outputs(run_with("f-async")))
        await app.close_async()
        return loaded

    loaded = asyncio.run(both())
    assert loaded["output"] == value
    assert [step["output"] for step in loaded["steps"]] == [value, 2]
    assert load(app, "f-sync") == value
    bucket = gridfs.GridFSBucket(app.client[app.where.database], "workflow_files")
    for file_id in ("f-sync", "f-async"):
        stream = bucket.open_download_stream(file_id)
        assert stream.read() == content
        assert (stream.filename, stream.metadata, stream.length) == ("r", {"runId": "r"}, len(content))


def test_a_file_that_the_drivers_bucket_wrote_is_loaded(app: Streamline) -> None:
    """An operator who restores files with other tools must find them accepted."""
    bucket = gridfs.GridFSBucket(app.client[app.where.database], "workflow_files")
    content = encode_payload(BULK, "x")
    bucket.upload_from_stream_with_id("f", "r", content, metadata={"runId": "r"})
    assert load(app, "f") == BULK
    indexes = app.store().collection("files.chunks").index_information()
    put(app, "g", BULK)
    assert app.store().collection("files.chunks").index_information() == indexes


@pytest.mark.parametrize("count", range(6))
def test_a_put_that_was_interrupted_is_completed_by_a_repeat(app: Streamline, count: int) -> None:
    """After a crash, the driver's own upload would fail for ever under the same id."""
    content = encode_payload(b"x" * (64 * CHUNK_BYTES + 5), "x", 2**30)  # as much as three commands
    begun = putting_file("f", content, "r")
    answer: Any = None
    for _ in range(count):
        answer = app.store().run(operation(begun.send(answer)))
    begun.close()
    app.store().drive(putting_file("f", content, "r"))
    assert load(app, "f") == b"x" * (64 * CHUNK_BYTES + 5)
    assert app.store().collection("files.chunks").count_documents({}) == 65
    assert app.store().collection("files.files").count_documents({}) == 1


@pytest.mark.parametrize("kind", ["lost", "unknown"])
def test_a_put_survives_a_fault_in_each_of_its_operations(app: Streamline, kind: str) -> None:
    """The store repeats a write of unknown outcome; a chunk that was already stored must not be an error."""

    class Faulty(Store):
        seen, strike = 0, 0

        def run(self, op: Op, session: Any = None) -> Any:
            self.seen += 1
            if self.seen != self.strike:
                return super().run(op, session)
            if kind == "unknown":
                super().run(op, session)
            raise StoreUnavailableError("a fault of this test", transient=True)

    store = app.connections.use(Faulty(app.where, app.env))
    for number in range(1, 20):
        store.seen, store.strike = 0, number
        put(app, f"f-{number}", BULK)
        faulty, store.strike = store.seen > number, 0
        assert load(app, f"f-{number}") == BULK
        if not faulty and store.seen < number:
            assert number > 3
            return
    raise AssertionError("a put of twenty operations")


def test_the_same_file_put_by_two_at_once_is_stored_once(app: Streamline) -> None:
    """The first attempt, whose outcome is unknown, may still write when the second begins."""
    content = encode_payload(b"x" * 3_000_000, "x")
    writers = [threading.Thread(target=put, args=(app, "f", b"x" * 3_000_000)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert load(app, "f") == b"x" * 3_000_000
    assert app.store().collection("files.chunks").count_documents({}) == -(-len(content) // CHUNK_BYTES)


@pytest.mark.slow
def test_processes_that_put_the_first_files_at_once_all_succeed(app: Streamline, mongodb_uri: str, database: str) -> None:
    """Each process finds no file yet and creates the indexes."""
    code = (
        "import sys; from streamline_pool import Streamline; from streamline_pool.storage.files import putting_file;"
        "from streamline_pool.protocol.codec import encode_payload; app = Streamline(sys.argv[1], database=sys.argv[2]);"
        "app.store().drive(putting_file(sys.argv[3], encode_payload('x' * 600_000, 'x'), 'r')); app.close()"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, mongodb_uri, database, f"f-{n}"], cwd=REPOSITORY) for n in range(4)]
    assert [process.wait(50) for process in started] == [0, 0, 0, 0]
    assert [load(app, f"f-{n}") for n in range(4)] == ["x" * 600_000] * 4
    assert set(app.store().collection("files.chunks").index_information()) == {"_id_", "files_id_1_n_1"}
    assert set(app.store().collection("files.files").index_information()) == {"_id_", "filename_1_uploadDate_1"}


def test_a_missing_or_damaged_file_is_a_corruption_that_names_it(app: Streamline) -> None:
    """A truncated output must not be taken for a complete one by the next step."""
    put(app, "f", b"x" * 1_000_000)
    chunks = app.store().collection("files.chunks")
    with pytest.raises(DataCorruptionError, match=r"run r: output of step a .* id g, and there is no such output of this run") as caught:
        load(app, "g")
    assert caught.value.context == {"run_id": "r", "output_id": "g"}
    for lost in (3, 1, 0):
        chunk = chunks.find_one_and_delete({"files_id": "f", "n": lost})
        with pytest.raises(DataCorruptionError, match=r"output of step a is stored beside the run under id f, and it has \d+ of \d+ bytes"):
            load(app, "f")
        chunks.insert_one(chunk)
    assert load(app, "f") == b"x" * 1_000_000
    for damage in ({"$unset": {"data": ""}}, {"$set": {"data": "text"}}, {"$set": {"n": "text"}}):
        whole = chunks.find_one_and_update({"files_id": "f", "n": 1}, damage)
        with pytest.raises(DataCorruptionError, match="a part of it was damaged by another program"):
            load(app, "f")
        chunks.replace_one({"_id": whole["_id"]}, whole)
    records = app.store().collection("files.files")
    record = records.find_one_and_update({"_id": "f"}, {"$unset": {"length": ""}})
    with pytest.raises(DataCorruptionError, match="its record was damaged by another program"):
        load(app, "f")
    records.replace_one({"_id": "f"}, record)
    chunks.delete_many({})
    with pytest.raises(DataCorruptionError, match=r"it has 0 of 1\d+ bytes; restore it, or rewind the run to step a"):
        load(app, "f")


def test_a_forged_marker_opens_no_file_of_another_run(app: Streamline) -> None:
    """The answer of a person or a webhook could contain the marker of another run's output."""
    put(app, "f", "secret", run_id="theirs")
    assert load(app, "f", run_id="theirs") == "secret"
    with pytest.raises(DataCorruptionError, match="there is no such output of this run"):
        load(app, "f", run_id="mine")


def test_dropping_is_idempotent_and_leaves_the_rest(app: Streamline) -> None:
    for name in ("f", "g", "h"):
        put(app, name, BULK)
    drive = app.store().drive
    assert drive(dropping_files(["f", "nothing", "g"])) == 2
    assert drive(dropping_files(["f", "g"])) == 0
    assert drive(dropping_files([])) == 0
    assert load(app, "h") == BULK
    assert app.store().collection("files.chunks").distinct("files_id") == ["h"]


def test_an_interrupted_drop_keeps_the_record_until_the_chunks_are_gone(app: Streamline) -> None:
    """Chunks without a record would never be found again."""
    put(app, "f", BULK)
    begun = dropping_files(["f"])
    app.store().run(operation(next(begun)))
    begun.close()
    assert app.store().collection("files.chunks").count_documents({}) == 0
    assert app.store().collection("files.files").count_documents({}) == 1
    assert app.store().drive(dropping_files(["f"])) == 1


@pytest.mark.parametrize("before", ["insert_chunks", "delete_files"])
def test_a_clean_up_that_meets_the_writer_leaves_no_chunks_without_a_record(app: Streamline, before: str) -> None:
    """The run is deleted while its last output is written. Chunks without a record would stay for ever."""
    if before == "insert_chunks":
        meddling(app, before, lambda: app.store().drive(dropping_files(["f"])))
        put(app, "f", BULK)
    else:
        meddling(app, "delete_files", lambda: put(app, "f", BULK))
        app.store().drive(dropping_files(["f"]))
    file_ids(app)  # compares records and chunks
    app.store().drive(dropping_files(sorted(file_ids(app))))
    assert file_ids(app) == set()


def test_the_time_of_upload_is_the_servers(app: Streamline) -> None:
    """Orphans are recognised by their age; a wrong clock on one host must not make a new file look old."""
    put(app, "f", BULK)
    uploaded = app.store().collection("files.files").find_one()["uploadDate"]
    app.store().drive(app.store().syncing_clock())
    assert abs((app.store().now() - uploaded).total_seconds()) < 5
    put(app, "f", BULK)
    assert app.store().collection("files.files").find_one()["uploadDate"] == uploaded, "a repeat changes nothing"


def test_an_application_without_large_outputs_creates_no_file_collections(app: Streamline) -> None:
    flow = app.workflow("flow", steps={"a": lambda ctx: "small"})
    run = flow.execute(flow.start().id)
    assert run.output == "small"
    assert app.store().drive(loading_outputs(run.document)) == run.to_dict()
    assert not [name for name in collections(app) if "files" in name]


def test_a_document_without_markers_is_loaded_without_any_operation() -> None:
    with pytest.raises(StopIteration):
        next(loading_outputs({"_id": "r", "steps": [{"output": 1}], "output": None}))


def test_a_marker_passes_a_holders_write(app: Streamline) -> None:
    """MongoDB restricts field names with a dollar sign in updates."""
    flow = app.workflow("flow", steps={"a": lambda ctx: 1})
    run = flow.start()
    marker = split_output("x" * 300_000, "output", lambda: "f").stored
    step = {**run.document["steps"][0], "output": marker}
    change = {"$set": {"steps.0": step, "output": marker}}
    body = {"updates": [{"q": {"_id": run.id}, "u": change}], "ordered": False}
    reply = app.store().run(Command(name="commit_runs", collection="runs", verb="update", body=body, parse=dict))
    assert not reply.get("writeErrors")
    assert reply["n"] == 1
    put(app, "f", "x" * 300_000, run.id)
    document = app.runs.find_one({"_id": run.id})
    assert app.store().drive(loading_outputs(document))["steps"][0]["output"] == "x" * 300_000


def test_the_role_readwrite_is_sufficient(guarded: str) -> None:
    """The indexes are created at the first write, as by the driver, and a pool's user has only the role readWrite."""
    with Streamline(f"mongodb://writer:s3cret@{guarded}/shop", collection_prefix="rights_") as app:
        put(app, "f", BULK)
        assert load(app, "f") == BULK
        assert app.store().drive(dropping_files(["f"])) == 1
    with MongoClient[dict[str, Any]](f"mongodb://writer:s3cret@{guarded}/shop") as client:
        assert set(client["shop"]["rights_files.chunks"].index_information()) == {"_id_", "files_id_1_n_1"}


def test_prefixes_do_not_mix(make_app: Any) -> None:
    one, other = make_app(), make_app(collection_prefix="other_")
    put(one, "f", BULK)
    with pytest.raises(DataCorruptionError):
        load(other, "f")
    assert CHUNK_BYTES == 261_120, "the drivers' own chunk size, which their tools expect"
