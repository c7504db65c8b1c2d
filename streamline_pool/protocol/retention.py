"""Every query and update that removes or moves ended runs, named, as data. Does no I/O: housekeeping.py gives the order.

Owns what counts as old. Every condition is made once and stands in the search and again in the write that acts on what
was found, so that a run which has been revived in between is left alone. Ages are judged by the server's `$$NOW`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamline_pool.domain.errors import StoreUnavailableError
from streamline_pool.domain.model import TERMINAL

from .files import FILES
from .operations import Command, Find, Reply

__all__ = [
    "ARCHIVE",
    "IDENTITY",
    "SLICE",
    "copy_runs",
    "delete_copies",
    "delete_runs",
    "delete_same_runs",
    "ended_before",
    "existing_runs",
    "expired",
    "identify_runs",
    "scan",
    "uploaded_before",
]

Document = dict[str, Any]

ARCHIVE = "runs_archive"

SLICE = 1_000
"""Documents that one look goes through, and with it the most that one write removes. A guess: some milliseconds of work
for the server, and ids and times of so many runs are some 100 kB."""

IDENTITY = ("status", "endedAt", "createdAt", "rev", "acts")
"""What tells one state of an ended run from every other: each write of a holder raises `rev`, every act `acts`."""

_TERMINAL = {"$in": sorted(status.value for status in TERMINAL)}
_AGE_MS_MAX = 200 * 365 * 86_400_000  # no run is as old; the server refuses what leads before the year 0


# --- conditions ----------------------------------------------------------------------------------------------------


def ended_before(age_s: float, tenant: tuple[str, Any] | None = None) -> Document:
    """Runs that ended at least `age_s` seconds ago; of one tenant only, given as (field, value)."""
    condition: Document = {"status": _TERMINAL, "$expr": _at_least_ago("$endedAt", age_s)}
    if tenant is None:
        return condition
    field, value = tenant
    return {"$and": [condition, {field: {"$eq": value}}]}  # whatever the field is called, it replaces no part of the condition


def expired() -> Document:
    """Ended runs whose `context.expireAt` is a date that has passed."""
    return {"status": _TERMINAL, "$expr": _at_least_ago("$context.expireAt", 0.0)}


def uploaded_before(age_s: float) -> Document:
    """Files that were stored at least `age_s` seconds ago."""
    return {"metadata.runId": {"$type": "string"}, "$expr": _at_least_ago("$uploadDate", age_s)}


def _at_least_ago(path: str, age_s: float) -> Document:
    # In an expression whatever is missing or of another type is less than any date; only dates have an age.
    instant = {"$subtract": ["$$NOW", min(round(age_s * 1000), _AGE_MS_MAX)]}
    return {"$and": [{"$eq": [{"$type": path}, "date"]}, {"$lte": [path, instant]}]}


# --- looking -------------------------------------------------------------------------------------------------------


def scan(collection: str, after: str, condition: Mapping[str, Any], fields: Sequence[str]) -> Command:
    """The next SLICE documents after the id `after`. Yields `(last id or None, [documents that meet the condition])`.

    By id, and so many at a time whether they match or not: no index of ages is needed, and a look at a collection of
    any size in which nothing matches is still a short one. Index: _id_.
    """
    pipeline: list[Document] = [
        {"$match": {"_id": {"$gt": after}}},  # of text only, as all our ids are
        {"$sort": {"_id": 1}},
        {"$limit": SLICE},
        {
            "$facet": {
                "last": [{"$group": {"_id": None, "id": {"$max": "$_id"}}}],
                "found": [{"$match": dict(condition)}, {"$project": dict.fromkeys(fields, 1) or {"_id": 1}}],
            }
        },
    ]
    body = {"pipeline": pipeline, "cursor": {}, "hint": "_id_", "readConcern": {"level": "majority"}}
    name = "scan_files" if collection == FILES else "scan_runs"
    return Command(name=name, collection=collection, verb="aggregate", body=body, parse=_scanned, writes=False)


def _scanned(reply: Reply) -> tuple[str | None, list[Document]]:
    batch = reply["cursor"]["firstBatch"]
    if not batch or not batch[0]["last"]:
        return None, []
    return batch[0]["last"][0]["id"], batch[0]["found"]


def existing_runs(collection: str, run_ids: Sequence[str]) -> Find:
    """Which of these runs are in that collection."""
    return Find(name="existing_runs", collection=collection, filter={"_id": {"$in": list(run_ids)}}, projection={"_id": 1})


def identify_runs(collection: str, run_ids: Sequence[str]) -> Find:
    """In what state these runs are in that collection: the fields of IDENTITY."""
    projection = dict.fromkeys(IDENTITY, 1)
    return Find(name="identify_runs", collection=collection, filter={"_id": {"$in": list(run_ids)}}, projection=projection)


# --- deleting ------------------------------------------------------------------------------------------------------


def delete_runs(run_ids: Sequence[str], condition: Mapping[str, Any]) -> Command:
    """Delete those of the runs that still meet the condition. Yields how many."""
    statement = {"q": {"_id": {"$in": list(run_ids)}, **condition}, "limit": 0}
    return Command(name="delete_runs", collection="runs", verb="delete", body={"deletes": [statement]}, parse=_deleted)


def delete_same_runs(identities: Sequence[Mapping[str, Any]]) -> Command:
    """Delete those runs that are still in exactly the state given. Yields how many."""
    return Command(name="delete_same_runs", collection="runs", verb="delete", body=_each(identities), parse=_deleted)


def delete_copies(collection: str, identities: Sequence[Mapping[str, Any]]) -> Command:
    """Delete those copies that are in exactly the state given. Yields how many."""
    return Command(name="delete_copies", collection=collection, verb="delete", body=_each(identities), parse=_deleted)


def _each(identities: Sequence[Mapping[str, Any]]) -> Document:
    # A field that is missing is None here, which in a filter means null or missing.
    queries = [{"_id": found["_id"], **{name: {"$eq": found.get(name)} for name in IDENTITY}} for found in identities]
    return {"deletes": [{"q": query, "limit": 1} for query in queries], "ordered": False}


def _deleted(reply: Reply) -> int:
    if reply.get("writeErrors"):
        raise StoreUnavailableError(f"runs could not be deleted: {str(reply['writeErrors'][0].get('errmsg'))[:500]}", transient=True)
    return int(reply["n"])


# --- archiving -----------------------------------------------------------------------------------------------------


def copy_runs(run_ids: Sequence[str], condition: Mapping[str, Any], into: str) -> Command:
    """Copy those of the runs that still meet the condition to the collection with the stored name `into`.

    By the server, so that the copy is the document byte for byte. A copy that is there is replaced by a later state of the
    same run only: an earlier archiver's that arrives late must not replace it, and another run with this id stays.
    """
    known = {"$and": [{"$eq": ["$$new.createdAt", "$createdAt"]}, {"$gte": [_changes("$$new."), _changes("$")]}]}
    merge = {
        "into": into,
        "on": "_id",
        "whenMatched": [{"$replaceWith": {"$cond": [known, "$$new", "$$ROOT"]}}],
        "whenNotMatched": "insert",
    }
    pipeline = [{"$match": {"_id": {"$in": list(run_ids)}, **condition}}, {"$merge": merge}]
    return Command(name="copy_runs", collection="runs", verb="aggregate", body={"pipeline": pipeline, "cursor": {}})


def _changes(prefix: str) -> Document:
    """How often a run has been written to: `rev` and `acts` only ever grow."""
    return {"$add": [{"$cond": [{"$isNumber": f"{prefix}{name}"}, f"{prefix}{name}", 0]} for name in ("rev", "acts")]}
