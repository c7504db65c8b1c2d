"""Removing and archiving ended runs, as procedures: in batches, by any number of processes, stopped and repeated at will.

Owns the order of the writes, which is what makes a crash harmless:

- delete: first the run, then its files. A crash leaves files without a run, which a later call removes, never a run
  without its files.
- archive: first the copy, durably, then the delete of exactly the state that the archive holds. A run is in one of the two
  collections, or for an instant in both, never in neither; who finds it in both deletes it from the first.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from streamline_pool.domain.errors import ValidationError
from streamline_pool.protocol import durable_events, files, retention
from streamline_pool.protocol.codec import SERVER_TICK
from streamline_pool.protocol.files import FILES
from streamline_pool.protocol.retention import ARCHIVE, IDENTITY

from .files import dropping_files
from .procedures import Effect, Procedure

__all__ = ["archiving", "check_archive", "deleting", "dropping_orphans", "forgetting_events"]

log = logging.getLogger("streamline_pool")

Document = dict[str, Any]

_ORPHAN_AGE_S = 86_400.0
"""A day, a guess: a file without a run is an orphan at once, but whoever restores a database in parts needs time."""

_COPY_MAX = 200
"""Runs copied by one command. Measured: some 50 ms for small ones, and more at once are no faster; at a MiB each the command
must still end within a socket's time."""

_ENGINES_OWN = ("runs", "hosts", "signals", "events", "files.files", "files.chunks")
_NAME_BYTES_MAX = 120  # MongoDB allows 255 with the database's name and a dot


def deleting(condition: Mapping[str, Any], *, dry_run: bool) -> Procedure[int]:
    """Delete every run that meets the condition, and its files. Returns how many; `dry_run` only counts."""
    count = 0
    after: str | None = ""
    while after is not None:
        after, found = yield retention.scan("runs", after, condition, ())
        run_ids = [run["_id"] for run in found]
        if dry_run or not run_ids:
            count += len(run_ids)
            continue
        owned = yield files.files_of_runs(run_ids)  # known before, so that those of a later run with this id are not among them
        count += yield retention.delete_runs(run_ids, condition)
        yield from _dropping_unowned(owned)
    return count


def archiving(condition: Mapping[str, Any], collection: str, stored_name: str, *, dry_run: bool) -> Procedure[int]:
    """Move every run that meets the condition to `collection` (its name for operations, then as stored). Returns how many."""
    count = 0
    after: str | None = ""
    while after is not None:
        after, found = yield retention.scan("runs", after, condition, ())
        run_ids = [run["_id"] for run in found]
        if dry_run:
            count += len(run_ids)
            continue
        for start in range(0, len(run_ids), _COPY_MAX):
            count += yield from _moving(run_ids[start : start + _COPY_MAX], condition, collection, stored_name)
    return count


def _moving(run_ids: Sequence[str], condition: Mapping[str, Any], collection: str, stored_name: str) -> Procedure[int]:
    if collection != ARCHIVE:
        owned = yield files.files_of_runs(run_ids)
        if owned:  # or they would be orphans, once their runs are where nobody looks
            yield files.mark_archived([file["_id"] for file in owned], stored_name)
    yield retention.copy_runs(run_ids, condition, stored_name)
    copies = yield retention.identify_runs(collection, run_ids)
    moved: int = (yield retention.delete_same_runs(copies)) if copies else 0
    if moved < len(run_ids):
        yield from _reconciling(run_ids, copies, collection, stored_name)
    return moved


def _reconciling(run_ids: Sequence[str], copies: Sequence[Document], collection: str, stored_name: str) -> Procedure[None]:
    """Some runs stayed. Withdraw the copies of those that were revived; say which cannot be archived at all."""
    in_archive = {copy["_id"]: copy for copy in copies}
    revived, refused = [], []
    for run in (yield retention.identify_runs("runs", run_ids)):
        copy = in_archive.get(run["_id"])
        if copy is None:
            continue  # revived before it was copied
        if copy.get("createdAt") != run.get("createdAt"):
            refused.append(run["_id"])
        elif any(copy.get(name) != run.get(name) for name in IDENTITY):
            # `rev` and `acts` only grow, so nobody will ever delete the run on the strength of this copy.
            revived.append(copy)
    if revived:
        yield retention.delete_copies(collection, revived)
    if refused:
        log.warning("archive_has_other_run", extra={"collection": stored_name, "run_ids": refused[:10], "count": len(refused)})


def forgetting_events() -> Procedure[int]:
    """Delete events sent to all that no run is left to want: those older than every run that has not ended. Returns how many."""
    live = yield durable_events.oldest_live_run()
    since = live[0].get("bornAt") if live else None
    if live and not isinstance(since, type(SERVER_TICK)):
        return 0  # another program has changed that run; which events it may want nobody knows
    forgotten: int = yield durable_events.forget_events(since)
    return forgotten


def dropping_orphans() -> Procedure[int]:
    """Drop files whose run exists nowhere: left by a crash between two writes, or by the TTL. Returns how many."""
    dropped = 0
    after: str | None = ""
    while after is not None:
        old = retention.uploaded_before(_ORPHAN_AGE_S)
        after, files = yield retention.scan(FILES, after, old, ("metadata",))
        dropped += yield from _dropping_unowned(files)
    return dropped


def _dropping_unowned(files: Sequence[Document]) -> Procedure[int]:
    """Drop those of the files whose run is neither stored nor archived."""
    runs: dict[str, set[str]] = {}
    for file in files:
        metadata = file["metadata"]
        archives = {f"/{name}" for name in metadata.get("archives") or ()}
        runs.setdefault(metadata["runId"], set()).update(archives)
    # The runs first: one that is moved between the two looks is then seen in the second.
    gone = yield from _gone("runs", list(runs))
    gone = yield from _gone(ARCHIVE, gone)
    for archive in sorted({name for run_id in gone for name in runs[run_id]}):
        gone = yield from _gone(archive, gone)
    lost = set(gone)
    return (yield from dropping_files([file["_id"] for file in files if file["metadata"]["runId"] in lost]))


def _gone(collection: str, run_ids: list[str]) -> Generator[Effect, Any, list[str]]:
    if not run_ids:
        return []
    existing = {run["_id"] for run in (yield retention.existing_runs(collection, run_ids))}
    return [run_id for run_id in run_ids if run_id not in existing]


def check_archive(to: str | None, prefix: str) -> tuple[str, str]:
    """Where to archive: the collection's name for operations, and as stored. Raises ValidationError."""
    if to is None or to == prefix + ARCHIVE:
        return ARCHIVE, prefix + ARCHIVE
    where = "archive_old_runs: to"
    if not isinstance(to, str) or not to:
        raise ValidationError(f"{where}: the name of a collection, not {to!r}")
    if to in {prefix + name for name in _ENGINES_OWN}:
        raise ValidationError(f"{where}: {to!r} is a collection of the engine itself; give another name")
    if "$" in to or "\0" in to or to.startswith((".", "system.")) or to.endswith(".") or ".." in to:
        raise ValidationError(
            f"{where}: {to!r} cannot be the name of a collection: no $, no empty part between dots, not beginning with 'system.'"
        )
    try:
        length = len(to.encode())
    except UnicodeError:
        raise ValidationError(f"{where}: {to!r} holds a lone surrogate, which cannot be stored") from None
    if length > _NAME_BYTES_MAX:
        raise ValidationError(f"{where}: {to[:40]!r}…: a name of at most {_NAME_BYTES_MAX} bytes")
    return f"/{to}", to
