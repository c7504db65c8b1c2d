"""How a run begins and is read, as data, and what a client asks the server about itself.

Owns the insert of new runs and the reads by id and by key. Claims, commits, recovery and control operations have modules of
their own. Every write is `w: majority, j: true`, and every read that decides is a majority read on the primary (storage/).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamline_pool.domain.document import RunDocument

from .codec import SERVER_TICK
from .engine_indexes import IDEMPOTENCY
from .operations import Command, Find, Query, Reply
from .server_codes import DUPLICATE_KEY

__all__ = ["build_info", "get_run", "get_runs_by_key", "insert_runs", "is_taken", "server_info"]


def server_info() -> Command:
    """Yields the reply of `hello`: version of the protocol, topology and the server's clock."""
    return Command(name="server_info", collection="", verb="hello", body={}, parse=dict, writes=False)


def build_info() -> Command:
    """Yields the reply of `buildInfo`: the server's version."""
    return Command(name="build_info", collection="", verb="buildInfo", body={}, parse=dict, writes=False)


def insert_runs(documents: Sequence[RunDocument]) -> Command:
    """Store new runs. Yields the errors `[{index, code, keyPattern, …}]` of those that were refused.

    Each run gets `bornAt`, which the server sets when it stores the run: it shows which events are younger than the run.
    """
    stored = [{**document, "bornAt": SERVER_TICK} for document in documents]
    body = {"documents": stored, "ordered": False}
    return Command(name="insert_runs", collection="runs", verb="insert", body=body, parse=_write_errors)


def _write_errors(reply: Reply) -> list[Mapping[str, Any]]:
    return list(reply.get("writeErrors", ()))


def is_taken(error: Mapping[str, Any]) -> bool:
    """Whether an error of `insert_runs` says that a stored run has the id or the idempotency key of the new one.

    A unique index that users have put on the collection refuses with the same code, and for another reason.
    """
    fields = error.get("keyPattern")
    return error.get("code") == DUPLICATE_KEY and (fields is None or dict(fields) in ({"_id": 1}, dict(IDEMPOTENCY.key)))


# --- reading -------------------------------------------------------------------------------------------------------


def get_run(workflow_id: str | None, run_id: str) -> Find:
    """The run with that id, if it is of that workflow. None: of any workflow."""
    query: Query = {"_id": run_id} if workflow_id is None else {"_id": run_id, "workflowId": workflow_id}
    return Find(name="get_run", collection="runs", filter=query, limit=1)


def get_runs_by_key(workflow_id: str, keys: Sequence[str]) -> Find:
    """The runs of that workflow that have these idempotency keys. Index streamline_idempotency."""
    query = {"workflowId": workflow_id, "idempotencyKey": {"$in": list(keys)}}
    return Find(name="get_runs_by_key", collection="runs", filter=query)
