"""Queries and updates of outputs that are stored beside their runs, as data. Owns the form of these documents.

`<prefix>outputs`: `{_id, runId, at, data, archives?}`. `data` is the content of `payloads.split_output`. `at` is the server's
logical time of the insert. The content of an id never changes, so each of these operations may be repeated, also by two
processes at the same time. An output above DOCUMENT_BYTES_MAX is a file instead (files.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .codec import SERVER_TICK
from .operations import Command, Find, Reply, deleted
from .stored_once import stored_or_there

__all__ = [
    "DOCUMENT_BYTES_MAX",
    "OUTPUTS",
    "NewOutput",
    "delete_outputs",
    "insert_outputs",
    "mark_outputs_archived",
    "outputs_of_runs",
    "read_outputs",
    "runs_with_outputs",
]

OUTPUTS = "outputs"

DOCUMENT_BYTES_MAX = 16 * 1024 * 1024 - 8 * 1024
"""The largest content of such a document: MongoDB's limit less the other fields, of which a run id takes up to 400 bytes."""


class NewOutput(NamedTuple):
    """An output to be stored beside its run."""

    id: str
    run_id: str
    content: bytes


# --- storing -------------------------------------------------------------------------------------------------------


def insert_outputs(outputs: Iterable[NewOutput]) -> Command:
    """Store outputs. Those that exist stay as they are: they have the same content.

    Raises ValidationError when the server refuses one for good: a validator or an index that users have put on the collection.
    """
    documents = [{"_id": output.id, "runId": output.run_id, "at": SERVER_TICK, "data": output.content} for output in outputs]
    body = {"documents": documents, "ordered": False}
    return Command(name="insert_outputs", collection=OUTPUTS, verb="insert", body=body, parse=stored_or_there("an output"))


# --- reading -------------------------------------------------------------------------------------------------------


def read_outputs(output_ids: Sequence[str]) -> Find:
    """These outputs: `_id`, `runId` and `data` of each. The caller compares the run: a marker may be forged."""
    query = {"_id": {"$in": list(output_ids)}}
    return Find(name="read_outputs", collection=OUTPUTS, filter=query, projection={"runId": 1, "data": 1})


def outputs_of_runs(run_ids: Sequence[str], age_s: float = 0.0) -> Find:
    """Ids of all outputs of these runs that are at least so old, also of those to which no document refers.

    Index: streamline_output_run.
    """
    query: dict[str, Any] = {"runId": {"$in": list(run_ids)}}
    if age_s:
        instant = {"$subtract": ["$$NOW", round(age_s * 1000)]}
        query["$expr"] = {"$and": [{"$eq": [{"$type": "$at"}, "timestamp"]}, {"$lte": [{"$toDate": "$at"}, instant]}]}
    return Find(name="outputs_of_runs", collection=OUTPUTS, filter=query, projection={"runId": 1, "archives": 1})


def runs_with_outputs(after: str, limit: int) -> Command:
    """The next runs that have outputs, by id. Yields their ids; none when there is no further one.

    It reads `limit` entries of the index streamline_output_run and no document, so it is short, however large the outputs are.
    """
    pipeline: list[dict[str, Any]] = [
        {"$match": {"runId": {"$gt": after}}},
        {"$sort": {"runId": 1}},
        {"$limit": limit},
        {"$group": {"_id": "$runId"}},
        {"$sort": {"_id": 1}},
    ]
    body = {"pipeline": pipeline, "cursor": {"batchSize": limit}, "readConcern": {"level": "majority"}}
    return Command(name="runs_with_outputs", collection=OUTPUTS, verb="aggregate", body=body, parse=_run_ids, writes=False)


def _run_ids(reply: Reply) -> list[str]:
    return [found["_id"] for found in reply["cursor"]["firstBatch"]]


# --- removing ------------------------------------------------------------------------------------------------------


def delete_outputs(output_ids: Sequence[str]) -> Command:
    """Delete these outputs. Yields how many there were."""
    body = {"deletes": [{"q": {"_id": {"$in": list(output_ids)}}, "limit": 0}]}
    return Command(name="delete_outputs", collection=OUTPUTS, verb="delete", body=body, parse=deleted("outputs"))


def mark_outputs_archived(output_ids: Sequence[str], collection: str) -> Command:
    """Record that the runs of these outputs are archived in `collection` (its stored name), so that the outputs are no orphans."""
    update: Mapping[str, Any] = {"$addToSet": {"archives": collection}}
    body = {"updates": [{"q": {"_id": {"$in": list(output_ids)}}, "u": update, "multi": True}]}
    return Command(
        name="mark_outputs_archived", collection=OUTPUTS, verb="update", body=body, parse=stored_or_there("the mark of an output")
    )
