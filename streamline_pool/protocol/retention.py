"""Queries and updates that remove or move ended runs, as data. storage/retention.py has the order of the operations.

Owns which runs count as old. A condition is in the search and again in the write that follows, so that a run which was
revived in between stays as it is. The server's `$$NOW` decides about ages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .expressions import TERMINAL_TEXTS
from .files import FILES
from .operations import Command, Expression, Find, Query, Reply, deleted

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

ARCHIVE = "runs_archive"

SLICE = 1_000
"""Documents that one search reads, and therefore the most that one write removes. A guess: some milliseconds of work for
the server, and some 100 kB of ids and times."""

IDENTITY = ("status", "endedAt", "createdAt", "rev", "acts")
"""The fields that distinguish one state of a run from every other: each write of a lease holder raises `rev`, each control
operation `acts`."""

_AGE_MS_MAX = 200 * 365 * 86_400_000  # no run is as old; the server refuses a date before the year 0


# --- conditions ----------------------------------------------------------------------------------------------------


def ended_before(age_s: float, tenant: tuple[str, Any] | None = None) -> Query:
    """Runs that ended at least `age_s` seconds ago. `tenant`, as (field, value), limits them to one tenant."""
    condition: Query = {"status": {"$in": TERMINAL_TEXTS}, "$expr": _at_least_ago("$endedAt", age_s)}
    if tenant is None:
        return condition
    field, value = tenant
    return {"$and": [condition, {field: {"$eq": value}}]}  # with `$and` the field cannot replace a part of the condition


def expired() -> Query:
    """Ended runs whose `context.expireAt` is a date that has passed."""
    return {"status": {"$in": TERMINAL_TEXTS}, "$expr": _at_least_ago("$context.expireAt", 0.0)}


def uploaded_before(age_s: float) -> Query:
    """Files that were stored at least `age_s` seconds ago."""
    return {"metadata.runId": {"$type": "string"}, "$expr": _at_least_ago("$uploadDate", age_s)}


def _at_least_ago(path: str, age_s: float) -> Expression:
    # In an expression a missing value, or one of another type, is less than any date. Only dates have an age.
    instant = {"$subtract": ["$$NOW", round(min(age_s * 1000, _AGE_MS_MAX))]}
    return {"$and": [{"$eq": [{"$type": path}, "date"]}, {"$lte": [path, instant]}]}


# --- searching -----------------------------------------------------------------------------------------------------


def scan(collection: str, after: str, condition: Mapping[str, Any], fields: Sequence[str]) -> Command:
    """Read the next SLICE documents after the id `after`. Yields `(last id or None, [documents that meet the condition])`.

    Each document has `_id` and `fields`. The search is by id and reads SLICE documents whether they match or not. So it
    needs no index of ages, and each command is short, however large the collection and however few its matches. Index: _id_.
    """
    pipeline: list[Expression] = [
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


def _scanned(reply: Reply) -> tuple[str | None, list[Mapping[str, Any]]]:
    batch = reply["cursor"]["firstBatch"]
    if not batch or not batch[0]["last"]:
        return None, []
    return batch[0]["last"][0]["id"], batch[0]["found"]


def existing_runs(collection: str, run_ids: Sequence[str]) -> Find:
    """Which of these runs are in that collection."""
    return Find(name="existing_runs", collection=collection, filter={"_id": {"$in": list(run_ids)}}, projection={"_id": 1})


def identify_runs(collection: str, run_ids: Sequence[str]) -> Find:
    """The state of these runs in that collection: the fields of IDENTITY."""
    projection = dict.fromkeys(IDENTITY, 1)
    return Find(name="identify_runs", collection=collection, filter={"_id": {"$in": list(run_ids)}}, projection=projection)


# --- deleting ------------------------------------------------------------------------------------------------------


def delete_runs(run_ids: Sequence[str], condition: Mapping[str, Any]) -> Command:
    """Delete those of the runs that still meet the condition. Yields how many."""
    statement = {"q": {"_id": {"$in": list(run_ids)}, **condition}, "limit": 0}
    return Command(name="delete_runs", collection="runs", verb="delete", body={"deletes": [statement]}, parse=deleted("runs"))


def delete_same_runs(identities: Sequence[Mapping[str, Any]]) -> Command:
    """Delete those runs that are still in exactly the state given. Yields how many."""
    return Command(name="delete_same_runs", collection="runs", verb="delete", body=_each(identities), parse=deleted("runs"))


def delete_copies(collection: str, identities: Sequence[Mapping[str, Any]]) -> Command:
    """Delete those copies that are in exactly the state given. Yields how many."""
    return Command(name="delete_copies", collection=collection, verb="delete", body=_each(identities), parse=deleted("runs"))


def _each(identities: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    # A missing field is None here. In a filter that means null or missing.
    queries = [{"_id": found["_id"], **{name: {"$eq": found.get(name)} for name in IDENTITY}} for found in identities]
    return {"deletes": [{"q": query, "limit": 1} for query in queries], "ordered": False}


# --- archiving -----------------------------------------------------------------------------------------------------


def copy_runs(run_ids: Sequence[str], condition: Mapping[str, Any], into: str) -> Command:
    """Copy those of the runs that still meet the condition to the collection with the stored name `into`.

    The server copies, so the copy is the document byte for byte. Only a later state of the same run replaces an existing
    copy: a late write of an earlier call must not replace it, and another run with this id stays.
    """
    is_later_state = {"$and": [{"$eq": ["$$new.createdAt", "$createdAt"]}, {"$gte": [_changes("$$new."), _changes("$")]}]}
    merge = {
        "into": into,
        "on": "_id",
        "whenMatched": [{"$replaceWith": {"$cond": [is_later_state, "$$new", "$$ROOT"]}}],
        "whenNotMatched": "insert",
    }
    pipeline = [{"$match": {"_id": {"$in": list(run_ids)}, **condition}}, {"$merge": merge}]
    return Command(name="copy_runs", collection="runs", verb="aggregate", body={"pipeline": pipeline, "cursor": {}})


def _changes(prefix: str) -> Expression:
    """How often a run was changed: `rev` and `acts` only grow."""
    return {"$add": [{"$cond": [{"$isNumber": f"{prefix}{name}"}, f"{prefix}{name}", 0]} for name in ("rev", "acts")]}
