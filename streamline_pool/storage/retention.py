"""Removing and archiving ended runs, as procedures. They work in batches. Any number of processes may run them, stop and repeat them.

Owns the order of the writes, which makes a crash harmless:

- delete: first the run, then what is stored beside it: its outputs and files. A crash leaves outputs without a run, which a
  later call removes. It never leaves a run without its outputs.
- archive: first the copy, durably, then the delete of exactly the state that the archive holds. A run is in one of the two
  collections, or for a moment in both. The next call that finds it in both deletes it from the first.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from streamline_pool.domain.errors import StoreUnavailableError, ValidationError
from streamline_pool.protocol import durable_events, files, outputs, retention, server_codes
from streamline_pool.protocol.expressions import NOT_REWINDABLE_TEXTS
from streamline_pool.protocol.files import FILES
from streamline_pool.protocol.retention import ARCHIVE, IDENTITY, SLICE

from .driver_errors import has_code
from .files import dropping_files
from .outputs import dropping_outputs
from .procedures import Procedure

__all__ = ["archiving", "check_archive", "deleting", "dropping_orphans", "forgetting_events"]

log = logging.getLogger("streamline_pool")

_ORPHAN_AGE_S = 86_400.0
"""A day, a guess: an output without a run is an orphan at once, but a restore of a database in parts takes time."""

_COPY_MAX = 200
"""Runs copied by one command. Measured: some 50 ms for small runs, and more at once are no faster. With runs of one MiB each
the command must still end within the socket timeout."""

_MARK_MAX = 1_000  # outputs that one command marks as archived: a command ends at 16 MiB

_ENGINE_COLLECTIONS = ("runs", "hosts", "signals", "events", "outputs", "files.files", "files.chunks")
_NAME_BYTES_MAX = 120  # MongoDB allows 255 with the database's name and a dot


def deleting(condition: Mapping[str, Any], *, dry_run: bool) -> Procedure[int]:
    """Delete every run that meets the condition, and its outputs. Returns how many; `dry_run` only counts."""
    count = 0
    after: str | None = ""
    while after is not None:
        after, found = yield retention.scan("runs", after, condition, ())
        run_ids = [run["_id"] for run in found]
        if dry_run or not run_ids:
            count += len(run_ids)
            continue
        # Read before the delete, so that outputs of a later run with the same id are not among them.
        owned = yield from _owned_by(run_ids)
        count += yield retention.delete_runs(run_ids, condition)
        yield from _dropping_unowned(owned)
    return count


def archiving(condition: Mapping[str, Any], collection: str, stored_name: str, *, dry_run: bool) -> Procedure[int]:
    """Move every run that meets the condition to `collection`. Returns how many; `dry_run` only counts.

    The two names are those of `check_archive`.
    """
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
    """Copy these runs to the archive, then delete those that the archive holds. Returns how many were deleted."""
    # Before the copy, so that no copy refers to an output that counts as an orphan. After it again: a run that was rewound and
    # has ended again between the two has further outputs.
    yield from _marking_archived(run_ids, collection, stored_name)
    yield retention.copy_runs(run_ids, condition, stored_name)
    yield from _marking_archived(run_ids, collection, stored_name)
    copies = yield retention.identify_runs(collection, run_ids)
    moved: int = (yield retention.delete_same_runs(copies)) if copies else 0
    if moved < len(run_ids):
        yield from _reconciling(run_ids, copies, collection, stored_name)
    return moved


def _marking_archived(run_ids: Sequence[str], collection: str, stored_name: str) -> Procedure[None]:
    """Record at what is stored beside these runs where they are archived. `dropping_orphans` knows only the usual archive by itself."""
    if collection == ARCHIVE:
        return
    owned = [beside for beside in (yield from _owned_by(run_ids)) if stored_name not in beside.archives]
    for start in range(0, len(owned), _MARK_MAX):
        batch = owned[start : start + _MARK_MAX]
        if file_ids := [beside.id for beside in batch if beside.is_file]:
            yield files.mark_archived(file_ids, stored_name)
        if output_ids := [beside.id for beside in batch if not beside.is_file]:
            yield outputs.mark_outputs_archived(output_ids, stored_name)


def _reconciling(run_ids: Sequence[str], copies: Sequence[Mapping[str, Any]], collection: str, stored_name: str) -> Procedure[None]:
    """Some runs were not moved. Delete the copies of runs that were revived; log the runs that cannot be archived at all."""
    in_archive = {copy["_id"]: copy for copy in copies}
    revived, refused = [], []
    for run in (yield retention.identify_runs("runs", run_ids)):
        copy = in_archive.get(run["_id"])
        if copy is None:
            continue  # revived before it was copied
        if copy.get("createdAt") != run.get("createdAt"):
            refused.append(run["_id"])
        elif any(copy.get(name) != run.get(name) for name in IDENTITY):
            # `rev` and `acts` only grow, so no call will ever delete the run because of this copy.
            revived.append(copy)
    if revived:
        yield retention.delete_copies(collection, revived)
    if refused:
        log.warning("archive_has_other_run", extra={"collection": stored_name, "run_ids": refused[:10], "count": len(refused)})


def forgetting_events() -> Procedure[int]:
    """Delete events to all that no stored run can receive any more. Returns how many.

    A run receives events that are younger than itself, also after it has ended, if it is rewound. So these are the events
    that are older than every run that is not cancelled. An archived run cannot be rewound.
    """
    try:
        return (yield from _forgetting_outdated((yield from _finding_oldest())))
    except StoreUnavailableError as exc:
        if not has_code(exc, server_codes.BAD_VALUE):
            raise
        # An index is missing: no pool of this version has connected yet. Without it this would read every run.
        log.info("events_kept", extra={"reason": exc.message})
        return 0


def _finding_oldest() -> Procedure[Any]:
    """The `bornAt` of the oldest run that is not cancelled, or of an older one. None: there is no such run."""
    oldest = yield durable_events.oldest_runs()
    receivers = [run for run in oldest if run.get("status") not in NOT_REWINDABLE_TEXTS]
    if not receivers and len(oldest) == durable_events.OLDEST_READ:
        receivers = oldest[-1:]  # what comes behind these cancelled runs was not read, and may be any run
    return receivers[0]["bornAt"] if receivers else None


def _forgetting_outdated(before: Any) -> Procedure[int]:
    forgotten = 0
    while found := (yield durable_events.find_outdated(before, retention.SLICE)):
        forgotten += yield durable_events.forget_events([event["_id"] for event in found], before)
        if len(found) < retention.SLICE:
            break
    return forgotten


def dropping_orphans() -> Procedure[int]:
    """Delete outputs whose run exists nowhere, after a crash between two writes or a removal by the TTL. Returns how many."""
    dropped = 0
    after: str | None = ""
    while after is not None:
        old = retention.uploaded_before(_ORPHAN_AGE_S)
        after, found = yield retention.scan(FILES, after, old, ("metadata",))
        dropped += yield from _dropping_unowned([_file(record) for record in found])
    run_ids = yield outputs.runs_with_outputs("", SLICE)
    while run_ids:
        # The runs first: most exist, and then no output of theirs is read.
        gone = yield from _gone(ARCHIVE, (yield from _gone("runs", run_ids)))
        if gone:
            owned = [_output(record) for record in (yield outputs.outputs_of_runs(gone, _ORPHAN_AGE_S))]
            dropped += yield from _dropping_unowned(owned)
        run_ids = yield outputs.runs_with_outputs(run_ids[-1], SLICE)
    return dropped


class _Beside(NamedTuple):
    """An output that is stored beside its run, or a file."""

    id: str
    run_id: str
    archives: Sequence[str]  # stored names of the collections into which the run was archived, except the usual one
    is_file: bool


def _file(record: Mapping[str, Any]) -> _Beside:
    return _Beside(record["_id"], record["metadata"]["runId"], record["metadata"].get("archives") or (), is_file=True)


def _output(record: Mapping[str, Any]) -> _Beside:
    return _Beside(record["_id"], record["runId"], record.get("archives") or (), is_file=False)


def _owned_by(run_ids: Sequence[str]) -> Procedure[list[_Beside]]:
    """Everything that is stored beside these runs, also that to which no run refers."""
    owned = [_output(record) for record in (yield outputs.outputs_of_runs(run_ids))]
    return owned + [_file(record) for record in (yield files.files_of_runs(run_ids))]


def _dropping_unowned(owned: Sequence[_Beside]) -> Procedure[int]:
    """Delete those whose run is neither stored nor archived."""
    runs = dict.fromkeys(beside.run_id for beside in owned)
    # The runs are read before the archives: a run that is moved between the two reads is then found by the second.
    gone = yield from _gone("runs", list(runs))
    gone = yield from _gone(ARCHIVE, gone)
    for archive in (yield from _named_archives(owned, gone)):
        gone = yield from _gone(archive, gone)
    lost = set(gone)
    dropped = yield from dropping_outputs([beside.id for beside in owned if beside.run_id in lost and not beside.is_file])
    return dropped + (yield from dropping_files([beside.id for beside in owned if beside.run_id in lost and beside.is_file]))


def _named_archives(owned: Sequence[_Beside], run_ids: Sequence[str]) -> Procedure[list[str]]:
    """The archives, except the usual one, in which one of these runs may be."""
    if not run_ids:
        return []
    wanted = set(run_ids)
    # The marks are read again: a run that was moved since `owned` was read has been marked since then. It was marked before it was moved.
    marked = [*owned, *(yield from _owned_by(run_ids))]
    return sorted({f"/{name}" for beside in marked if beside.run_id in wanted for name in beside.archives})


def _gone(collection: str, run_ids: list[str]) -> Procedure[list[str]]:
    """Those of the runs that are not in that collection."""
    if not run_ids:
        return []
    existing = {run["_id"] for run in (yield retention.existing_runs(collection, run_ids))}
    return [run_id for run_id in run_ids if run_id not in existing]


def check_archive(to: str | None, prefix: str) -> tuple[str, str]:
    """Where to archive: the name of the collection for operations, and its stored name. Raises ValidationError.

    `to` is the argument of `archive_old_runs`: None, or the stored name of a collection.
    """
    if to is None or to == prefix + ARCHIVE:
        return ARCHIVE, prefix + ARCHIVE
    where = "archive_old_runs: to"
    if not isinstance(to, str) or not to:
        raise ValidationError(f"{where}: the name of a collection, not {to!r}")
    if to in {prefix + name for name in _ENGINE_COLLECTIONS}:
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
