"""Lists of runs, a page at a time. Client procedures, without I/O.

Owns the checks of a list's filters, when a list counts as large, and how long it may take. The queries are in
protocol/run_list.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from streamline_pool.domain.errors import StoreUnavailableError, ValidationError, WorkflowNotFoundError
from streamline_pool.protocol import run_list, server_codes
from streamline_pool.protocol.codec import check_payload, check_text
from streamline_pool.protocol.engine_indexes import list_indexes
from streamline_pool.protocol.run_document import check_run_id
from streamline_pool.protocol.run_list import LIST_FIELDS, Cursor, RunFilter, index_for
from streamline_pool.storage.driver_errors import has_code
from streamline_pool.storage.indexes import check_field, making_indexes
from streamline_pool.storage.procedures import Procedure

__all__ = [
    "LARGE", "LIST_SECONDS_MAX", "RunPage", "SlowList",
    "context_path", "finding_slow_list", "indexing_lists", "listing_runs",
]  # fmt: skip

LARGE = 10_000
"""Runs that a server reads and sorts in some tens of milliseconds. A list of more needs an index; a guess."""

LIST_SECONDS_MAX = 10.0  # how long a list may take the server; a guess: a person waits no longer


class RunPage(NamedTuple):
    """One page of a list."""

    runs: list[dict[str, Any]]  # as stored
    after: str | None  # the run after which the next page begins; None: this is the last page


class SlowList(NamedTuple):
    """Why a list may be slow."""

    runs: int  # about how many are stored; the server may read them all
    field: str  # the field without an index, as `indexing_lists` takes it


def context_path(name: str, where: str) -> str:
    """The path of a field of the context: "customer" means "context.customer". Raises ValidationError; `where` names the argument."""
    path = name if name.startswith("context.") else f"context.{name}"
    return check_field(path, where)


def finding_slow_list(wanted: RunFilter) -> Procedure[SlowList | None]:
    """Whether the server may read more than LARGE runs for this list, because no index serves it. None: it need not."""
    _check_filter(wanted)
    count = yield run_list.estimate_runs()
    if count <= LARGE:
        return None
    try:
        indexes = yield list_indexes("runs")
    except StoreUnavailableError as exc:
        if not has_code(exc, server_codes.NAMESPACE_NOT_FOUND, server_codes.UNAUTHORIZED):
            raise
        return None  # there are no runs, or the user may not know
    is_served, narrowing = run_list.serving_indexes(wanted, indexes)
    for path in () if is_served else narrowing:
        is_served = is_served or (yield run_list.count_matching(wanted, path, LARGE + 1)) <= LARGE
    return None if is_served else SlowList(count, run_list.most_selective(wanted))


def listing_runs(
    wanted: RunFilter, *, limit: int, after: str | None = None, fields: Sequence[str] = (), seconds_max: float = LIST_SECONDS_MAX
) -> Procedure[RunPage]:
    """A page of up to `limit` runs, newest first, from the run `after` on, which is not part of it.

    The order of two stored runs never changes, so a run is on one page only, whatever is stored or deleted meanwhile.
    `fields`: only these fields, and `_id`; none: whole documents. Raises ValidationError for a filter that cannot be right,
    WorkflowNotFoundError if there is no run `after`, TimeoutError if the server needs more than `seconds_max`.
    """
    _check_filter(wanted)
    cursor = None if after is None else (yield from _finding_cursor(after))
    try:
        found = yield run_list.list_runs(wanted, limit=limit + 1, after=cursor, fields=fields, seconds_max=seconds_max)
    except StoreUnavailableError as exc:
        if not has_code(exc, server_codes.TIME_EXCEEDED):
            raise
        raise TimeoutError(f"MongoDB has not found the runs within {seconds_max:g} s") from exc
    page = found[:limit]
    return RunPage(page, page[-1]["_id"] if len(found) > limit else None)


def _finding_cursor(run_id: str) -> Procedure[Cursor]:
    found: list[Mapping[str, Any]] = yield run_list.read_cursor(check_run_id(run_id))
    if not found:
        raise WorkflowNotFoundError(f"there is no run {run_id!r} after which a page could begin; it may have been deleted", run_id=run_id)
    created_at = found[0].get("createdAt")
    if not isinstance(created_at, datetime):
        raise ValidationError(f"run {run_id}: its createdAt is {created_at!r}, so it has no place in a list by age")
    return Cursor(created_at, run_id)


def indexing_lists(fields: Sequence[str]) -> Procedure[list[str]]:
    """Create the index that serves lists by each of `fields`: a word of LIST_FIELDS, or "context.…". Returns their names.

    Raises ValidationError for another field. Does nothing where an index exists.
    """
    for name in fields:
        if name not in LIST_FIELDS and not name.startswith("context."):
            raise ValidationError(f"index {name!r}: there are {', '.join(LIST_FIELDS)}, and context.NAME for a field of the context")
        check_field(name, "index")
    return (yield from making_indexes([index_for(name) for name in dict.fromkeys(fields)]))


def _check_filter(wanted: RunFilter) -> None:
    """Raise ValidationError for a value that no run can have."""
    texts = {"workflow": wanted.workflow_id, "queue": wanted.queue, "user": wanted.user_id, "error code": wanted.error_code}
    for where, text in (*texts.items(), *(("tag", tag) for tag in wanted.tags)):
        if text is not None and not check_text(text, where):
            raise ValidationError(f"{where}: an empty text; leave the filter out to list all runs")
    for path, values in wanted.context.items():
        check_field(path, "context")
        for value in values:
            check_payload(value, path)
    if wanted.created_from and wanted.created_before and wanted.created_from >= wanted.created_before:
        raise ValidationError(f"since {wanted.created_from} is not before until {wanted.created_before}: no run can be in between")
