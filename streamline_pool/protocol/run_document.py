"""The stored shape of a run: making one, reading one, what a payload may be, and the engine's indexes.

Owns every field name and the limits on stored values. Does no I/O; `bson` is used as a codec only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import bson
from bson.raw_bson import RawBSONDocument

from streamline_pool.domain.definition import Definition
from streamline_pool.domain.errors import DataCorruptionError, PayloadTooLargeError, ValidationError
from streamline_pool.domain.model import TERMINAL, Run, RunStatus, StepState, StepStatus

__all__ = [
    "CODEC", "EVENT_INDEXES", "HOST_INDEXES", "PAYLOAD_BYTES_MAX", "PAYLOAD_DEPTH_MAX", "RUN_INDEXES", "SERVER_TICK", "SLOTS",
    "as_payload", "as_stored", "check_payload", "check_run_id", "check_text", "decode_payload", "encode_payload", "make_context",
    "misfit", "new_run", "packed", "parse_run", "size_of",
]  # fmt: skip

Document = dict[str, Any]

CODEC: bson.CodecOptions[Document] = bson.CodecOptions(
    tz_aware=True,
    tzinfo=UTC,
    uuid_representation=bson.binary.UuidRepresentation.STANDARD,
    datetime_conversion=bson.DatetimeConversion.DATETIME_AUTO,
    unicode_decode_error_handler="replace",
)
"""How every document is written and read: instants aware in UTC, UUIDs as BSON subtype 4.

What another program has stored and Python has no value for (a date beyond the year 9999, text that is not UTF-8) is
read as the nearest thing: one such document must not make a whole batch unreadable.
"""

_RAW_CODEC: bson.CodecOptions[Any] = CODEC.with_options(document_class=RawBSONDocument)

SLOTS = 16
"""Runs are spread over this many slots, so that workers claim from different ends of the queue. Derived: a find
merges one index scan per lane and slot, and MongoDB merges at most 200 of them; see DESIGN, "claim"."""

PAYLOAD_BYTES_MAX = 12 * 1024 * 1024
"""The largest single payload; a document ends at 16 MiB and holds the other steps' outputs as well."""

PAYLOAD_DEPTH_MAX = 100
"""Levels of a payload. MongoDB stores 180 and takes 200 in a command, which wraps a payload in some of its own."""

NEW_RUN_BYTES_MAX = 15 * 1024 * 1024
"""The largest run that can be started. A document ends at 16 MiB; one that is full could not even be claimed."""

SERVER_TICK = bson.Timestamp(0, 0)
"""As a field of an inserted document: the server stores its logical time instead, higher than all it has given before.

Which of two inserts came first is thereby told without anybody's clock: instants are estimates on whichever host made them.
"""

_SCALARS = (type(None), bool, float)
_LEAVES = frozenset({type(None), bool, int, float, str, bytes, datetime})
_INT64 = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexDefinition:
    """One index, as `createIndexes` takes it."""

    name: str
    key: Mapping[str, int]
    partial: Mapping[str, Any] | None = None
    unique: bool = False
    expire_after_s: int | None = None

    def spec(self) -> Document:
        """The element of `createIndexes.indexes`."""
        spec: Document = {"name": self.name, "key": dict(self.key)}
        if self.partial is not None:
            spec["partialFilterExpression"] = dict(self.partial)
        if self.unique:
            spec["unique"] = True
        if self.expire_after_s is not None:
            spec["expireAfterSeconds"] = self.expire_after_s
        return spec


RUN_INDEXES: tuple[IndexDefinition, ...] = (
    # Claimable now or later. A lane is queue, workflow and version: runs that a pool cannot run are never looked at.
    IndexDefinition(
        name="streamline_due",
        key={"lane": 1, "slot": 1, "priority": -1, "wakeAt": 1},
        partial={"wakeAt": {"$exists": True}},
    ),
    # Runs in flight, few at any time; the owner is in the key so that releasing one worker's reads no documents.
    IndexDefinition(
        name="streamline_lease",
        key={"lease.expiresAt": 1, "lease.owner": 1},
        partial={"lease.expiresAt": {"$exists": True}},
    ),
    IndexDefinition(
        name="streamline_idempotency",
        key={"workflowId": 1, "idempotencyKey": 1},
        partial={"idempotencyKey": {"$type": "string"}},
        unique=True,
    ),
    # Runs that wait for an event, so that one sent to all finds them; by id, so that it gets through them in one pass.
    IndexDefinition(name="streamline_awaits", key={"awaits": 1, "_id": 1}, partial={"awaits": {"$exists": True}}),
)
"""The indexes that the engine itself needs. A step's commit touches none of their fields."""

EVENT_INDEXES: tuple[IndexDefinition, ...] = (
    IndexDefinition(name="streamline_event", key={"name": 1, "bornAt": 1}),
    # Events whose sender has not finished: a steward does when the sender died.
    IndexDefinition(name="streamline_pending", key={"at": 1}, partial={"pending": True}),
)

HOST_INDEXES: tuple[IndexDefinition, ...] = (IndexDefinition(name="streamline_expire", key={"expireAt": 1}, expire_after_s=0),)


def check_payload(value: Any, where: str) -> int:
    """The encoded size of `value` in bytes; a ValidationError with the path of the first value BSON cannot hold.

    Raises PayloadTooLargeError above PAYLOAD_BYTES_MAX.
    """
    kind = type(value)
    if kind in _SCALARS or (kind is int and -_INT64 <= value < _INT64):
        return 16
    return len(encode_payload(value, where))


def size_of(document: Mapping[str, Any]) -> int:
    """The encoded size in bytes of what has been read from the database."""
    return len(bson.encode(document, codec_options=CODEC))


def check_text(value: object, where: str) -> str:
    """`value` if it is text that can be stored; a ValidationError otherwise."""
    if not isinstance(value, str):
        raise ValidationError(f"{where}: must be text, not {type(value)}")
    check_payload(value, where)
    return value


def check_run_id(run_id: object) -> str:
    """`run_id` if it can name a run; a ValidationError otherwise."""
    if not isinstance(run_id, str) or not 1 <= len(run_id) <= 100:
        raise ValidationError(f"run_id {run_id!r}: a run id is text of 1 to 100 characters")
    return check_text(run_id, "run_id")


def as_payload(value: Any, where: str, bytes_max: int = PAYLOAD_BYTES_MAX) -> tuple[Any, int]:
    """`value` as a reader will find it, and its size: a later step sees the same here as it would after a crash.

    Tuples are lists, instants are aware and have whole milliseconds, and what a handler does to the original
    afterwards changes nothing. Raises as `check_payload` does, with `bytes_max` as the limit.
    """
    kind = type(value)
    if kind in _SCALARS or (kind is int and -_INT64 <= value < _INT64):
        return value, 16
    encoded = encode_payload(value, where, bytes_max)
    return (value if kind is str else decode_payload(encoded)), len(encoded)


def packed(document: Document) -> tuple[Any, int]:
    """A document in its stored form, to be sent as it is now without being encoded again, and its size in bytes.

    Raises ValidationError for what BSON cannot hold.
    """
    try:
        encoded = bson.encode(document, codec_options=CODEC)
    except Exception as exc:  # noqa: BLE001 -- as in `encode_payload`
        raise ValidationError(f"cannot store {document.get('name')!r}: {exc}") from None
    return RawBSONDocument(encoded, codec_options=_RAW_CODEC), len(encoded)


def decode_payload(encoded: bytes) -> Any:
    """The value of which `encode_payload` made these bytes; a ValueError for bytes that are damaged."""
    try:
        return bson.decode(encoded, codec_options=CODEC)[""]
    except (bson.errors.BSONError, KeyError) as exc:
        raise ValueError(f"not a payload: {exc}") from exc


def encode_payload(value: Any, where: str, bytes_max: int = PAYLOAD_BYTES_MAX) -> bytes:
    """A payload as bytes: the BSON document `{"": value}`, which begins with its length. Raises as `check_payload` does."""
    try:
        encoded = bson.encode({"": value}, codec_options=CODEC)
    except Exception as exc:  # noqa: BLE001 -- encoding calls user code: a mapping's own methods may raise anything
        path, reason = _first_unstorable(value, where, ())
        raise ValidationError(f"{path}: {reason or exc}", path=path) from None
    size = len(encoded)
    if size > bytes_max:
        raise PayloadTooLargeError(
            f"{where}: {size} bytes, and the limit is {bytes_max}; store it elsewhere and pass a reference", path=where, size=size
        )
    if size > 7 * PAYLOAD_DEPTH_MAX and _is_too_deep(value):  # the shortest level takes seven bytes
        raise ValidationError(f"{where}: nested more than {PAYLOAD_DEPTH_MAX} levels deep", path=where)
    return encoded


def _is_too_deep(value: Any) -> bool:
    level = [value] if isinstance(value, (Mapping, list, tuple)) else []
    for _ in range(PAYLOAD_DEPTH_MAX):
        items = (item for outer in level for item in (outer.values() if isinstance(outer, Mapping) else outer))
        level = [item for item in items if type(item) not in _LEAVES and isinstance(item, (Mapping, list, tuple))]
        if not level:
            return False
    return True


_INSTEAD: Mapping[type, str] = {
    date: "; use an aware datetime, or its isoformat()",
    time: "; use its isoformat()",
    timedelta: "; use its total_seconds()",
    Decimal: "; use bson.Decimal128, or text",
    set: "; use a list",
    frozenset: "; use a list",
}
"""What to do about the types that people try most."""


def _first_unstorable(value: Any, path: str, above: tuple[int, ...]) -> tuple[str, str]:
    """Path and reason of the first value that cannot be stored; an empty reason when none is found."""
    if id(value) in above:
        return path, "refers to itself, and a document cannot"
    if len(above) > PAYLOAD_DEPTH_MAX:
        return path, f"nested more than {PAYLOAD_DEPTH_MAX} levels deep"
    try:
        if isinstance(value, Mapping):
            for key, item in value.items():
                if not isinstance(key, str):
                    return f"{path}.{key!r}", f"keys must be text, not {type(key)}"
                if "\0" in key:
                    return f"{path}.{key!r}", "keys cannot hold a NUL character"
                found = _first_unstorable(item, f"{path}.{key}", (*above, id(value)))
                if found[1]:
                    return found
        elif isinstance(value, (list, tuple)):
            for place, item in enumerate(value):
                found = _first_unstorable(item, f"{path}[{place}]", (*above, id(value)))
                if found[1]:
                    return found
        else:
            bson.encode({"": value}, codec_options=CODEC)
    except OverflowError:
        return path, f"cannot store {value!r}: whole numbers end at 64 bits, and dates at the year 9999"
    except UnicodeError:
        return path, "cannot store this text: it holds a lone surrogate, which UTF-8 cannot"
    except Exception:  # noqa: BLE001 -- as above
        return path, f"cannot store {type(value)}{_INSTEAD.get(type(value), '')}"
    return path, ""


def new_run(
    definition: Definition,
    *,
    run_id: str,
    input: Any,
    context: Any,
    meta: Mapping[str, Any] | None,
    idempotency_key: str | None,
    priority: int,
    queue: str,
    due_at: datetime,
    user_id: str | None,
    tags: Sequence[str],
    slot: int,
    now: datetime,
    act_id: str,
) -> Document:
    """The document of a run that nobody has touched: claimable from `due_at`, `draft` until then if that is later."""
    document: Document = {
        "_id": run_id,
        "workflowId": definition.workflow_id,
        "version": definition.version,
        "status": (RunStatus.DRAFT if due_at > now else RunStatus.RUNNING).value,
        "steps": [{"stepId": step.id, "status": StepStatus.PENDING.value, "attempts": 0} for step in definition.steps],
        "currentStepId": definition.steps[0].id,
        "context": context,
        "input": input,
        "output": None,
        "error": None,
        "createdAt": now,
        "updatedAt": now,
        "startedAt": None,
        "endedAt": None,
        "paused": False,
        "userId": user_id,
        "tags": list(tags),
        "meta": dict(meta) if meta is not None else None,
        "priority": priority,
        "queue": queue,
        # From here on: fields that the engine schedules by.
        "lane": definition.lane_of(queue),
        "slot": slot,
        "wakeAt": due_at,
        "token": 0,
        "rev": 0,
        "acts": 0,
        "lastAct": act_id,
        "waitGen": 0,
        "crashes": 0,
        "failures": 0,
    }
    if idempotency_key is not None:
        document["idempotencyKey"] = idempotency_key
    return document


def misfit(document: Mapping[str, Any]) -> str | None:
    """Why the engine cannot work with this document, or None: a field it relies on is missing or of another type.

    Looked at once per claim, so that a document which some other program changed fails that run alone.
    """
    for name, kind in _RELIED_ON:
        if not isinstance(document.get(name), kind):
            return f"field {name!r} is {document.get(name)!r}, expected {kind.__name__}"
    try:
        RunStatus(document["status"])
    except ValueError:
        return f"field 'status' is {document['status']!r}, which is no status"
    steps = document["steps"]
    if not steps:
        return "field 'steps' is empty"
    if not isinstance(document.get("waitGen", 0), int):
        return f"field 'waitGen' is {document['waitGen']!r}, expected a whole number"
    for name in ("inbox", "seen"):
        if not isinstance(document.get(name, []), list):
            return f"field {name!r} is {document[name]!r}, expected a list"
    for place, step in enumerate(steps):
        reason = _step_misfit(step)
        if reason:
            return f"steps[{place}]: {reason}"
    ids = [step["stepId"] for step in steps]
    if len(set(ids)) != len(ids):
        return f"two steps have one id: {', '.join(ids)}"
    current = document.get("currentStepId")
    if current is not None and current not in ids:
        return f"field 'currentStepId' is {current!r}, which is none of the steps {', '.join(ids)}"
    for step in steps:
        if (step["stepId"] == current) if step["status"] in _ENDED else (current is None):
            return f"field 'currentStepId' is {current!r}, but step {step['stepId']} is {step['status']}"
    return None


_RELIED_ON: tuple[tuple[str, type], ...] = (
    ("workflowId", str),
    ("version", str),
    ("status", str),
    ("steps", list),
    ("context", dict),
    ("lane", str),
    ("rev", int),
    ("token", int),
    ("crashes", int),
    ("failures", int),
)
_STEP_STATUSES = frozenset(status.value for status in StepStatus)
_WAITS = ("human", "webhook", "timer", "event")
_ENDED = frozenset(status.value for status in (StepStatus.DONE, StepStatus.FAILED, StepStatus.SKIPPED))


def _step_misfit(step: Any) -> str | None:
    if not isinstance(step, dict) or not isinstance(step.get("stepId"), str):
        return f"{step!r} is not a step"
    if not isinstance(step.get("status"), str) or step["status"] not in _STEP_STATUSES:
        return f"status {step.get('status')!r} is no status of a step"
    if not isinstance(step.get("attempts"), int):
        return f"attempts is {step.get('attempts')!r}, expected a whole number"
    if not isinstance(step.get("startedAt"), (datetime, type(None))):
        return f"startedAt is {step['startedAt']!r}, expected a date"
    for hook in step.get("hooks", []) if isinstance(step.get("hooks", []), list) else [step["hooks"]]:
        if not isinstance(hook, dict) or not isinstance(hook.get("hash"), bytes) or not isinstance(hook.get("gen"), int):
            return f"hooks: {hook!r} is not a hook"
    if step["status"] == StepStatus.WAITING:
        waiting_for = step.get("waitingFor")
        if not isinstance(waiting_for, dict) or waiting_for.get("type") not in _WAITS:
            return "waiting, but 'waitingFor' does not say for what"
        if waiting_for["type"] != "timer" and not isinstance(step.get("gen"), int):
            return f"waiting, and gen is {step.get('gen')!r}, expected a whole number"
        if waiting_for["type"] == "timer" and not isinstance(waiting_for.get("resumeAt"), datetime):
            return f"waitingFor.resumeAt is {waiting_for.get('resumeAt')!r}, expected a date"
        if not isinstance(waiting_for.get("expiresAt"), (datetime, type(None))):
            return f"waitingFor.expiresAt is {waiting_for['expiresAt']!r}, expected a date"
        if waiting_for["type"] == "event" and not isinstance(waiting_for.get("eventName"), str):
            return f"waitingFor.eventName is {waiting_for.get('eventName')!r}, expected text"
    return None


def parse_run(document: Mapping[str, Any]) -> Run:
    """The `Run` of a stored document. Raises DataCorruptionError naming the first field that does not fit."""
    try:
        _check_reachable(document)
        return Run(
            id=document["_id"],
            workflow_id=_typed(document, "workflowId", str),
            version=_typed(document, "version", str),
            status=RunStatus(document["status"]),
            steps=tuple(_parse_step(step) for step in _typed(document, "steps", list)),
            current_step_id=document.get("currentStepId"),
            input=document.get("input"),
            context=document.get("context") or {},
            output=document.get("output"),
            error=document.get("error"),
            meta=document.get("meta"),
            user_id=document.get("userId"),
            tags=tuple(document.get("tags") or ()),
            priority=document.get("priority", 0),
            queue=document.get("queue", "default"),
            paused=bool(document.get("paused", False)),
            created_at=_typed(document, "createdAt", datetime),
            updated_at=_typed(document, "updatedAt", datetime),
            started_at=document.get("startedAt"),
            ended_at=document.get("endedAt"),
            document=document,
        )
    except (KeyError, TypeError, ValueError) as exc:
        run_id = document.get("_id")
        raise DataCorruptionError(
            f"run {run_id}: the stored document was changed by another program: {_describe(exc)}; mend it, or delete it", run_id=run_id
        ) from exc


def _check_reachable(document: Mapping[str, Any]) -> None:
    """A live run that no claim and no recovery will ever find: its readers are the only ones who can say so."""
    if document["status"] in TERMINAL or document.get("paused") is True:
        return
    lease, slot = document.get("lease"), document.get("slot")
    if isinstance(lease, Mapping) and isinstance(lease.get("expiresAt"), datetime):
        return
    if not isinstance(document.get("wakeAt"), datetime):
        waiting = [
            step for step in document["steps"] if step["stepId"] == document["currentStepId"] and step["status"] == StepStatus.WAITING
        ]
        if not waiting or waiting[0]["waitingFor"]["type"] == "timer":
            raise ValueError(f"it is neither leased ({lease!r}) nor due ({document.get('wakeAt')!r}), so no worker will find it")
        return
    _typed(document, "lane", str)
    if not isinstance(slot, int) or not 0 <= slot < SLOTS:
        raise ValueError(f"field 'slot' is {slot!r}, expected 0 to {SLOTS - 1}, so no worker will find it")


def _describe(exc: Exception) -> str:
    return f"field {exc.args[0]!r} is missing" if isinstance(exc, KeyError) else str(exc)


def _typed(document: Mapping[str, Any], name: str, kind: type) -> Any:
    value = document[name]
    if not isinstance(value, kind):
        raise TypeError(f"field {name!r} is {value!r}, expected {kind.__name__}")
    return value


def _parse_step(step: Any) -> StepState:
    if not isinstance(step, Mapping):
        raise TypeError(f"{step!r} in 'steps' is not a step")
    duration_ms = step.get("durationMs")
    return StepState(
        step_id=_typed(step, "stepId", str),
        status=StepStatus(step["status"]),
        attempts=_typed(step, "attempts", int),
        output=step.get("output"),
        error=step.get("error"),
        waiting_for=step.get("waitingFor"),
        retry_after=step.get("retryAfter"),
        started_at=step.get("startedAt"),
        ended_at=step.get("endedAt"),
        duration=None if duration_ms is None else duration_ms / 1000,
    )


def as_stored(document: Document) -> tuple[Document, int]:
    """What a reader will find after this new run has been written, and its size in bytes.

    Raises PayloadTooLargeError when it could not grow any more.
    """
    encoded = bson.encode(document, codec_options=CODEC)
    if len(encoded) > NEW_RUN_BYTES_MAX:
        raise PayloadTooLargeError(
            f"start: the run would take {len(encoded)} bytes (a mapping input counts twice: it is the context as well), and the limit is "
            f"{NEW_RUN_BYTES_MAX}; store the bulk elsewhere and pass a reference",
            size=len(encoded),
        )
    return bson.decode(encoded, codec_options=CODEC), len(encoded)


def make_context(make: Callable[[Any], Any] | None, input: Any, where: str) -> Any:
    """The first context of a run: what `context=` makes of the input, else a copy of a mapping input, else empty."""
    context = make(input) if make is not None else input if isinstance(input, Mapping) else {}
    if not isinstance(context, Mapping):
        raise ValidationError(f"{where}: context= must return a mapping, not {type(context)}")
    if "$ref" in context and "$id" in context:
        raise ValidationError(f"{where}: BSON reads a context with both $ref and $id as a database reference; rename one of the keys")
    return dict(context)
