"""Every query and update of the engine, named, as data. Does no I/O: store.py runs them. Outside acts are in acts.py.

Owns filters and update operators of runs that start, are claimed, held and recovered, of signals and of hosts. All
writes are `w: majority, j: true`, all reads that decide are majority reads on the primary (store.py sees to both).
Filters of states are derived from model.py's tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .codec import SERVER_TICK
from .operations import Command, Fence, Find, Op, Signal, Statement, Tail

__all__ = ["Command", "Fence", "Find", "Op", "Signal", "Statement", "Tail"]

Document = dict[str, Any]


def server_info() -> Command:
    """`hello`: version of the protocol, topology and the server's clock."""
    return Command(name="server_info", collection="", verb="hello", body={}, parse=dict, writes=False)


def build_info() -> Command:
    """`buildInfo`: the server's version."""
    return Command(name="build_info", collection="", verb="buildInfo", body={}, parse=dict, writes=False)


def insert_runs(documents: Sequence[Document]) -> Command:
    """Store new runs. Yields the errors `[{index, code, keyPattern, …}]` of those that were refused.

    Each gets `bornAt`, which nobody knows before the server has stored it: which events are younger than the run.
    """
    stored = [{**document, "bornAt": SERVER_TICK} for document in documents]
    return Command(
        name="insert_runs",
        collection="runs",
        verb="insert",
        body={"documents": stored, "ordered": False},
        parse=lambda reply: list(reply.get("writeErrors", ())),
    )


# --- reading -------------------------------------------------------------------------------------------------------


def get_run(workflow_id: str | None, run_id: str) -> Find:
    """The run with that id, if it is of that workflow; None: of any."""
    query: Document = {"_id": run_id} if workflow_id is None else {"_id": run_id, "workflowId": workflow_id}
    return Find(name="get_run", collection="runs", filter=query, limit=1)


def get_runs_by_key(workflow_id: str, keys: Sequence[str]) -> Find:
    """The runs that own these idempotency keys of that workflow."""
    query = {"workflowId": workflow_id, "idempotencyKey": {"$in": list(keys)}}
    return Find(name="get_runs_by_key", collection="runs", filter=query)
