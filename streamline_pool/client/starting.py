"""Starting runs: storing new runs, and finding what is stored already under their ids and keys. Client procedures, without I/O.

Owns the order of the inserts and of the "due" signals. new_runs.py checks the input and makes the documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from streamline_pool.domain.definition import Definition
from streamline_pool.domain.document import RunDocument
from streamline_pool.domain.errors import InvalidStateError, StoreUnavailableError, ValidationError
from streamline_pool.domain.model import Run, RunStatus
from streamline_pool.protocol import run_lifecycle
from streamline_pool.protocol.operations import error_text
from streamline_pool.protocol.run_document import parse_run
from streamline_pool.storage.procedures import Procedure

from .new_runs import NewRun, RunMaker, RunRequest, StartOptions
from .services import Services

__all__ = ["starting_run", "starting_runs"]

_INSERT_MAX = 1_000  # runs in one command; measured: no gain beyond
_INSERT_BYTES_MAX = 8 * 1024 * 1024  # of one command; a guess
_INSERT_TRIES = 5  # of one run whose key or id is taken by runs that are gone a moment later; a guess: more means a loop elsewhere
_SLOW_INSERT_S = 0.2  # well within the time that a worker waits for a run that was announced
_COMMIT_GUESS = timedelta(seconds=0.3)  # until a caller's transaction commits; if that was too early, the steward's sweep finds the run

Stored = dict[int, RunDocument]
"""Stored documents by the place of their request in the call."""


def starting_run(
    services: Services, definition: Definition, request: RunRequest, options: StartOptions, session: Any = None
) -> Procedure[Run]:
    """Store one run; see `Workflow.start`."""
    yield from services.ensure(session)
    maker = RunMaker(services.env, definition, options, services.now())
    runs = yield from _inserting(services, definition, [maker.make(0, request)], ask_first=session is not None)
    return runs[0]


def starting_runs(
    services: Services,
    definition: Definition,
    inputs: Sequence[Any],
    keys: Sequence[str] | None,
    options: StartOptions,
    session: Any = None,
) -> Procedure[list[Run]]:
    """Store one run for each input; see `Workflow.start_many`."""
    inputs = _check_sequence(inputs, "inputs")
    given: Sequence[str | None] = [None] * len(inputs) if keys is None else _check_sequence(keys, "idempotency_keys")
    if len(given) != len(inputs):
        raise ValidationError(f"start_many: {len(inputs)} inputs, but {len(given)} idempotency_keys; give one for each input")
    requests = [RunRequest(input=input, idempotency_key=key) for input, key in zip(inputs, given, strict=True)]
    yield from services.ensure(session)
    maker = RunMaker(services.env, definition, options, services.now())
    new = [maker.make(place, request) for place, request in enumerate(requests)]
    return (yield from _inserting(services, definition, new, ask_first=session is not None))


def _check_sequence(value: object, where: str) -> list[Any]:
    """The items of an argument of `start_many`. A text would be its characters, a mapping its keys, and a set has no order."""
    if isinstance(value, (str, bytes, Mapping, set, frozenset)) or not isinstance(value, Iterable):
        raise ValidationError(f"start_many: {where}: a list, not {type(value)}")
    return list(value)


def _inserting(services: Services, definition: Definition, new: list[NewRun], *, ask_first: bool) -> Procedure[list[Run]]:
    """Insert the runs. One whose key or id is taken is replaced by the stored run. A key twice in the call is one run.

    `ask_first`: find taken keys and ids before the insert, because a duplicate key would abort the caller's transaction.
    """
    places = _places_of_keys(new)
    missing = [run for run in new if places[run.place] == run.place]
    stored: Stored = {}
    if ask_first:
        stored = yield from _finding_taken(definition, missing)
        missing = [run for run in missing if run.place not in stored]
    since = new[0].document["createdAt"] if new else services.now()
    for chunk in _chunks(missing):
        now = services.now()
        _space_out([run.document for run in chunk], since, now)
        since = now
        stored |= yield from _inserting_chunk(services, definition, chunk, in_transaction=ask_first)
    return [parse_run(stored.get(place, new[place].document)) for place in places]


def _places_of_keys(new: Sequence[NewRun]) -> list[int]:
    """For each run the place of the first one with its idempotency key: its own place, unless the key was there before."""
    first: dict[str, int] = {}
    return [first.setdefault(run.document["idempotencyKey"], run.place) if "idempotencyKey" in run.document else run.place for run in new]


def _inserting_chunk(
    services: Services, definition: Definition, chunk: list[NewRun], *, in_transaction: bool, tries: int = _INSERT_TRIES
) -> Procedure[Stored]:
    """Insert some runs and send a "due" signal. Returns what is stored in the place of those that were refused."""
    asked_at = services.env.clock.monotonic()
    signal_first = len(chunk) == 1 and chunk[0].document["status"] == RunStatus.RUNNING.value and not in_transaction
    if signal_first:
        # The signal overtakes the insert by a moment at most, and a worker waits that long. This saves half a round trip.
        yield from _signalling_due(services, chunk, timedelta(0))
    errors = yield run_lifecycle.insert_runs([run.document for run in chunk])
    if not signal_first or services.env.clock.monotonic() - asked_at > _SLOW_INSERT_S:
        yield from _signalling_due(services, chunk, _COMMIT_GUESS if in_transaction else timedelta(0))
    for error in errors:
        if not run_lifecycle.is_taken(error):
            raise StoreUnavailableError(f"insert_runs: MongoDB refuses: {error_text(error)}", transient=False)
    taken = [chunk[error["index"]] for error in errors]
    stored = yield from _resolving_taken(definition, taken)
    free_again = [run for run in taken if run.place not in stored]
    if free_again and tries > 1:
        # The run that was in the way was deleted between the insert and the look-up.
        stored |= yield from _inserting_chunk(services, definition, free_again, in_transaction=in_transaction, tries=tries - 1)
    elif free_again:
        document = free_again[0].document
        raise InvalidStateError(
            f"start: other clients store and delete runs with key {document.get('idempotencyKey')!r} or id {document['_id']!r} "
            f"all the time: {_INSERT_TRIES} inserts were refused, and no such run was found afterwards; start again later",
            run_id=document["_id"],
        )
    return stored


def _signalling_due(services: Services, chunk: list[NewRun], later: timedelta) -> Procedure[None]:
    first = chunk[0].document
    run_id = first["_id"] if len(chunk) == 1 else None
    yield from services.signal("due", wakeAt=first["wakeAt"] + later, lane=first["lane"], runId=run_id, count=len(chunk))


def _finding_by_key(definition: Definition, runs: Sequence[NewRun]) -> Procedure[Stored]:
    """The stored runs that have the idempotency keys of these new runs already."""
    keys = {run.place: run.document["idempotencyKey"] for run in runs if "idempotencyKey" in run.document}
    if not keys:
        return {}
    documents = yield run_lifecycle.get_runs_by_key(definition.workflow_id, list(keys.values()))
    found: Mapping[str, RunDocument] = {document["idempotencyKey"]: document for document in documents}
    return {place: found[key] for place, key in keys.items() if key in found}


def _finding_taken(definition: Definition, runs: Sequence[NewRun]) -> Procedure[Stored]:
    """The stored runs that have the keys of these new runs. Raises InvalidStateError if a chosen id is taken."""
    found = yield from _finding_by_key(definition, runs)
    for run in runs:
        if run.id_is_given and run.place not in found and (yield run_lifecycle.get_run(None, run.document["_id"])):
            raise _id_is_taken(run.document["_id"])
    return found


def _resolving_taken(definition: Definition, taken: Sequence[NewRun]) -> Procedure[Stored]:
    """The stored documents behind refused inserts: the key's owner, or our own insert whose reply was lost.

    A run that is not in the result was refused because of a run that is not stored any more.
    """
    resolved = yield from _finding_by_key(definition, taken)
    for run in taken:
        if run.place in resolved:
            continue
        found = yield run_lifecycle.get_run(None, run.document["_id"])
        if not found:
            continue
        if found[0].get("startId") != run.document["startId"]:
            raise _id_is_taken(run.document["_id"])
        resolved[run.place] = found[0]
    return resolved


def _id_is_taken(run_id: str) -> InvalidStateError:
    return InvalidStateError(
        f"start: a run with id {run_id!r} exists already; choose another id, leave it out, or use an idempotency key", run_id=run_id
    )


def _space_out(documents: list[RunDocument], since: datetime, now: datetime) -> None:
    """Spread the `wakeAt` of runs that are due at once over the time it took to make them, in the order of the inputs.

    So claims follow that order. And a poll can begin behind the runs that are claimed, which it cannot among equal
    `wakeAt`s (worker/poller.py says why it should).
    """
    step = max(timedelta(0), now - since) / len(documents)
    for place, document in enumerate(documents):
        if document["status"] == RunStatus.RUNNING.value:
            moment = since + step * place
            document["wakeAt"] = moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def _chunks(runs: list[NewRun]) -> list[list[NewRun]]:
    """Split for `insert`, by count and by bytes."""
    chunks: list[list[NewRun]] = []
    room_bytes = 0
    for run in runs:
        if not chunks or len(chunks[-1]) >= _INSERT_MAX or run.size_bytes > room_bytes:
            chunks.append([])
            room_bytes = _INSERT_BYTES_MAX
        chunks[-1].append(run)
        room_bytes -= run.size_bytes
    return chunks
