"""Ended runs with files, and clean-up calls that a test interrupts or kills. Owns no assertion about what is deleted."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from bson import Timestamp

from streamline_pool import Streamline
from streamline_pool.protocol.codec import encode_payload
from streamline_pool.protocol.operations import Op
from streamline_pool.protocol.outputs import NewOutput
from streamline_pool.storage.files import putting_file
from streamline_pool.storage.outputs import putting_output
from streamline_pool.storage.store import Store
from support import REPOSITORY

__all__ = [
    "LONG_AGO_DAYS",
    "archive",
    "file_ids",
    "files",
    "ids",
    "killed_at",
    "meddling",
    "outputs",
    "put_file",
    "put_output",
    "put_run",
    "revive",
    "use",
]

S = TypeVar("S", bound=Store)
LONG_AGO_DAYS = 400
BULK = encode_payload("x" * 300_000, "x")


def put_run(app: Streamline, run_id: str, *, days: float | None = LONG_AGO_DAYS, status: str = "done", **fields: Any) -> str:
    """Store a run that ended `days` days ago (None: it has not ended). Returns its id."""
    ended_at = None if days is None else datetime.now(UTC) - timedelta(days=days)
    document = {
        "_id": run_id,
        "workflowId": "flow",
        "version": "1.0.0",
        "status": status,
        "steps": [{"stepId": "a", "status": "done", "attempts": 1, "output": None}],
        "currentStepId": None,
        "context": {},
        "createdAt": datetime.now(UTC) - timedelta(days=500),
        "updatedAt": ended_at,
        "endedAt": ended_at,
        "rev": 3,
        "acts": 0,
        **fields,
    }
    app.runs.insert_one(document)
    return run_id


def put_file(app: Streamline, file_id: str, run_id: str, *, days: float = 0) -> None:
    """Store a file of that run, uploaded `days` days ago."""
    app.store().drive(putting_file(file_id, BULK, run_id))
    files(app).update_one({"_id": file_id}, {"$set": {"uploadDate": datetime.now(UTC) - timedelta(days=days)}})


def put_output(app: Streamline, output_id: str, run_id: str, *, days: float = 0) -> None:
    """Store an output beside that run, `days` days ago."""
    app.store().drive(putting_output(NewOutput(output_id, run_id, BULK)))
    at = Timestamp(round((datetime.now(UTC) - timedelta(days=days)).timestamp()), 1)
    outputs(app).update_one({"_id": output_id}, {"$set": {"at": at}})


def outputs(app: Streamline) -> Any:
    """The collection of outputs beside the runs."""
    return app.store().collection("outputs")


def files(app: Streamline) -> Any:
    """The collection of the files' records."""
    return app.store().collection("files.files")


def archive(app: Streamline) -> Any:
    """The collection of archived runs."""
    return app.store().collection("runs_archive")


def ids(collection: Any) -> set[str]:
    """The `_id`s in a collection."""
    return {document["_id"] for document in collection.find({}, {"_id": 1})}


def file_ids(app: Streamline) -> set[str]:
    """The ids of all files. Their records and their chunks must agree."""
    records = ids(files(app))
    assert records == set(app.store().collection("files.chunks").distinct("files_id")), "records and chunks belong together"
    return records


class Meddling(Store):
    """A store that calls `meddle` once, immediately before the first operation named `before`."""

    meddle: Callable[[], object] | None = None
    before = ""

    def run(self, op: Op, session: Any = None) -> Any:
        if op.name == self.before and self.meddle is not None:
            meddle, self.meddle = self.meddle, None
            meddle()
        return super().run(op, session)


def meddling(app: Streamline, before: str, meddle: Callable[[], object]) -> None:
    """Call `meddle` once, immediately before the application's next operation named `before`."""
    store = use(app, Meddling(app.where, app.env))
    store.before, store.meddle = before, meddle


def use(app: Streamline, store: S) -> S:
    """Close the application's store and give it this one."""
    app.store().close()
    return app.connections.use(store)


def revive(app: Streamline, *run_ids: str, **more: Any) -> None:
    """Write what `rewind_to` writes, as far as retention reads it; `more` are further fields."""
    sets = {"status": "running", "endedAt": None, **more}
    app.store().collection("runs").update_many({"_id": {"$in": list(run_ids)}}, {"$set": sets, "$inc": {"acts": 1}})


def killed_at(operation: str, when: str, call: str, uri: str, database: str) -> None:
    """Make `call` in a process that is killed immediately before or after (`when`) its first operation named `operation`."""
    code = f"""
import os, signal, sys
from streamline_pool import Streamline
from streamline_pool.storage.store import Store

class Dying(Store):
    def run(self, op, session=None):
        if op.name == {operation!r} and {when!r} == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        answer = super().run(op, session)
        if op.name == {operation!r}:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

app = Streamline(sys.argv[1], database=sys.argv[2])
app.connections.use(Dying(app.where, app.env))
app.{call}
"""
    ended = subprocess.run([sys.executable, "-c", code, uri, database], cwd=REPOSITORY, timeout=50, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, (operation, ended)
