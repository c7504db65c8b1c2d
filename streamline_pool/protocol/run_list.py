"""Lists of runs, as data: which runs, in which order, which page, and which index serves them.

Owns the order of a list (newest first, by `createdAt` and then by `_id`, so that it is the same on every page), the filters
that a list can have, and the index that each filter needs. Does not decide whether a list without an index may be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from streamline_pool.domain.model import RunStatus

from .engine_indexes import IndexDefinition
from .expressions import status_texts
from .operations import Command, Find, Query, Reply

__all__ = [
    "LIST_FIELDS", "Cursor", "RunFilter", "Serving",
    "count_matching", "estimate_runs", "index_for", "list_runs", "most_selective", "read_cursor", "serving_indexes",
]  # fmt: skip

LIST_FIELDS: Mapping[str, str] = {
    # The word of the command: the field of the run. In the order of how much they usually narrow a list.
    "tag": "tags",
    "user": "userId",
    "error-code": "error.code",
    "workflow": "workflowId",
    "queue": "queue",
    "status": "status",
    "created": "createdAt",
}
"""What `index_for` can index, besides the fields of the context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFilter:
    """Which runs a list has. None or empty: any. A run must satisfy all that is given."""

    status: str | None = None
    workflow_id: str | None = None
    queue: str | None = None
    user_id: str | None = None
    tags: Sequence[str] = ()  # the run has all of them
    context: Mapping[str, Sequence[Any]] = field(
        default_factory=dict
    )  # path such as "context.customer" to the values that it may be equal to
    error_code: str | None = None  # of the run's error: only a failed run has one
    created_from: datetime | None = None  # aware; included
    created_before: datetime | None = None  # aware; not included


class Cursor(NamedTuple):
    """The place in a list after which the next page begins."""

    created_at: datetime
    run_id: str


class Serving(NamedTuple):
    """How the indexes of a collection serve a list."""

    is_served: bool  # no list like this one makes the server read many runs
    narrowing: Sequence[str]  # paths of filters with an index: the list is also served if few runs match one of them


# --- reading -------------------------------------------------------------------------------------------------------


def list_runs(
    wanted: RunFilter, *, limit: int, after: Cursor | None = None, fields: Sequence[str] = (), seconds_max: float | None = None
) -> Find:
    """Up to `limit` runs, newest first, from the place `after`. `fields`: only these, and `_id`; none: whole documents.

    After `seconds_max` seconds the server gives up (server_codes.TIME_EXCEEDED). Index: that of `index_for`, else what the
    server chooses; without any it reads every run.
    """
    query = _matching(wanted)
    if after is not None:
        # The first condition gives the index its bounds. The second leaves out what the earlier pages had of that instant.
        before: Query = {"createdAt": {"$lte": after.created_at}}
        remaining: Query = {"$or": [{"createdAt": {"$lt": after.created_at}}, {"_id": {"$lt": after.run_id}}]}
        query = {"$and": [query, before, remaining]}
    return Find(
        name="list_runs",
        collection="runs",
        filter=query,
        projection=dict.fromkeys(fields, 1) or None,
        sort=(("createdAt", -1), ("_id", -1)),
        limit=limit,
        seconds_max=seconds_max,
    )


def read_cursor(run_id: str) -> Find:
    """The `createdAt` of the run after which a page begins."""
    return Find(name="read_cursor", collection="runs", filter={"_id": run_id}, projection={"createdAt": 1}, limit=1)


def estimate_runs() -> Command:
    """Yields about how many runs are stored, from the collection's own count: no run is read."""
    return Command(name="estimate_runs", collection="runs", verb="count", body={}, parse=_count, writes=False)


def _count(reply: Reply) -> int:
    return int(reply["n"])


def _matching(wanted: RunFilter) -> Query:
    query: Query = {path: {"$eq": value} for path, value in _single_values(wanted)}
    if wanted.error_code is not None and wanted.status is None:
        query["status"] = {"$in": _WITH_ERROR}  # no other run has an error, and more indexes begin with the status
    if wanted.tags:
        query["tags"] = {"$all": list(wanted.tags)}
    for path, values in wanted.context.items():
        query[path] = {"$in": list(values)}
    created = {"$gte": wanted.created_from, "$lt": wanted.created_before}
    if any(created.values()):
        query["createdAt"] = {operator: instant for operator, instant in created.items() if instant is not None}
    return query


_WITH_ERROR = status_texts((RunStatus.FAILED, RunStatus.CANCELLED))


def _single_values(wanted: RunFilter) -> list[tuple[str, str]]:
    values = {
        "userId": wanted.user_id,
        "error.code": wanted.error_code,
        "workflowId": wanted.workflow_id,
        "queue": wanted.queue,
        "status": wanted.status,
    }
    return [(path, value) for path, value in values.items() if value is not None]


# --- indexes -------------------------------------------------------------------------------------------------------


def serving_indexes(wanted: RunFilter, indexes: Sequence[Mapping[str, Any]]) -> Serving:
    """How the indexes of the collection, as `listIndexes` describes them, serve a list.

    An index serves a list if it gives the runs in the order of the list, with one of the filters or without any. If it begins
    with a filter but has another order, the server reads and sorts all runs that match this filter.
    """
    keys = [list(index["key"]) for index in indexes if _serves_every_query(index)]
    filtered = [path for path in _matching(wanted) if path != "createdAt"]
    by_age = any(key[:2] == ["createdAt", "_id"] for key in keys)
    if any(key[0] in filtered and key[1:] == ["createdAt", "_id"] for key in keys):
        return Serving(True, ())
    if by_age and (not filtered or wanted.created_from is not None):
        return Serving(True, ())
    narrowing = tuple(path for path in filtered if any(key[0] == path for key in keys))
    # The more runs match a filter, the sooner a search by age finds a page of them. So the two together serve any list.
    return Serving(bool(narrowing) and by_age, narrowing)


def count_matching(wanted: RunFilter, path: str, limit: int) -> Command:
    """Yields how many runs match the filter of the list by this path, `limit` at most. Index: one that begins with `path`."""
    body = {"query": {path: _matching(wanted)[path]}, "limit": limit}
    return Command(name="count_matching", collection="runs", verb="count", body=body, parse=_count, writes=False)


def most_selective(wanted: RunFilter) -> str:
    """The field of the list that an index should begin with: a field of the context, else the first of LIST_FIELDS."""
    for path in wanted.context:
        return path
    filtered = _matching(wanted)
    return next((word for word, path in LIST_FIELDS.items() if path in filtered), "created")


def _serves_every_query(index: Mapping[str, Any]) -> bool:
    """False for an index that lacks some runs, or that the server does not use for comparisons of values."""
    leaves_out = any(index.get(option) for option in ("partialFilterExpression", "sparse", "hidden", "collation"))
    return not leaves_out and all(direction in (1, -1) for direction in index["key"].values())


def index_for(field: str) -> IndexDefinition:
    """The index that serves lists by `field`: a word of LIST_FIELDS, or a path such as "context.customer".

    It gives the runs in the order of the list, so a page costs the same however many runs there are: the server reads the runs of
    the page, and those that were created in the same millisecond as the last run of the page before it.
    """
    path = LIST_FIELDS.get(field, field)
    key = {} if path == "createdAt" else {path: 1}
    return IndexDefinition(name=f"streamline_list_{path}", key={**key, "createdAt": -1, "_id": -1})
