"""New runs: checks what `start` and `start_many` were given, and makes the documents to store.

Owns the limits of the start options. Pure; starting.py stores the documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from streamline_pool.config.env import Env
from streamline_pool.domain.definition import Definition, check_queue
from streamline_pool.domain.document import RunDocument
from streamline_pool.domain.errors import ValidationError
from streamline_pool.domain.model import seconds
from streamline_pool.protocol.codec import check_payload, check_text
from streamline_pool.protocol.run_document import SLOTS, as_stored, check_run_id, make_context, new_run

__all__ = ["NewRun", "RunMaker", "RunRequest", "StartOptions"]

_PRIORITY_MAX = 1_000_000
_KEY_CHARACTERS_MAX = 500
_DELAY_MAX_S = 100 * 365 * 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StartOptions:
    """What all runs of one call of `start` or `start_many` share, as the caller gave it. `RunMaker` checks it."""

    meta: Mapping[str, Any] | None
    priority: int  # -1 000 000..1 000 000; higher is claimed first
    queue: str | None  # None: the workflow's queue
    start_at: datetime | timedelta | float | None  # an aware instant, or a delay (seconds); None: now
    user_id: str | None
    tags: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """One run that a caller asks for, beside the shared options."""

    input: Any
    run_id: str | None = None  # None: a new id
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRun:
    """A run that is checked and ready to be stored."""

    place: int  # of its request in the call, from 0
    document: RunDocument  # as a reader will find it
    id_is_given: bool  # the caller chose the id, so another run may have it
    size_bytes: int


class RunMaker:
    """Makes the documents of one call's runs. The constructor checks what the runs share; all errors are ValidationErrors."""

    def __init__(self, env: Env, definition: Definition, options: StartOptions, now: datetime) -> None:
        meta, priority = options.meta, options.priority
        if type(priority) is not int or not -_PRIORITY_MAX <= priority <= _PRIORITY_MAX:
            raise ValidationError(f"start: priority {priority!r} is not a whole number within ±1 000 000")
        if meta is not None and not isinstance(meta, Mapping):
            raise ValidationError(f"start: meta must be a mapping, not {type(meta)}")
        check_payload(meta, "meta")
        self._env = env
        self._definition = definition
        self._options = options
        self._tags = _check_tags(options.tags)
        if options.user_id is not None:
            check_text(options.user_id, "start: user_id")
        self._queue = definition.queue if options.queue is None else check_queue(options.queue)
        self._now = now
        self._due_at = _due_at(options.start_at, now)

    def make(self, place: int, request: RunRequest) -> NewRun:
        """The run of one request. Raises PayloadTooLargeError as well."""
        definition, options, env = self._definition, self._options, self._env
        check_payload(request.input, "input")
        context = make_context(definition.make_context, request.input, f"workflow {definition.workflow_id}")
        check_payload(context, "context")
        key = request.idempotency_key
        document = new_run(
            definition,
            run_id=check_run_id(request.run_id) if request.run_id is not None else env.new_id(),
            input=request.input,
            context=context,
            meta=options.meta,
            idempotency_key=None if key is None else _check_key(key),
            priority=options.priority,
            queue=self._queue,
            due_at=self._due_at,
            user_id=options.user_id,
            tags=self._tags,
            slot=int(env.random() * SLOTS),
            now=self._now,
            start_id=env.new_id(),
        )
        stored, size_bytes = as_stored(document)
        return NewRun(place=place, document=stored, id_is_given=request.run_id is not None, size_bytes=size_bytes)


def _check_tags(tags: object) -> list[str]:
    if isinstance(tags, str) or not isinstance(tags, Iterable):
        raise ValidationError(f"start: tags must be a sequence of texts, not {tags!r}")
    return [check_text(tag, "start: tags") for tag in tags]


def _check_key(key: object) -> str:
    if not isinstance(key, str) or not 1 <= len(key) <= _KEY_CHARACTERS_MAX:
        raise ValidationError(f"idempotency_key {key!r}: a key is text of 1 to {_KEY_CHARACTERS_MAX} characters")
    return check_text(key, "idempotency_key")


def _due_at(start_at: datetime | timedelta | float | None, now: datetime) -> datetime:
    """When the run may be claimed first: aware UTC, whole milliseconds."""
    if start_at is None:
        return now
    if isinstance(start_at, datetime):
        if start_at.tzinfo is None:
            raise ValidationError(f"start: start_at {start_at!r} has no time zone; use an aware datetime such as datetime.now(UTC)")
        moment = start_at.astimezone(UTC)
        return moment.replace(microsecond=moment.microsecond // 1000 * 1000)
    delay_s = seconds(start_at, "start: start_at", zero_ok=True)
    if delay_s > _DELAY_MAX_S:
        raise ValidationError(f"start: start_at lies {delay_s:g} seconds ahead, which is more than a hundred years")
    return now + timedelta(milliseconds=round(delay_s * 1000))
