"""The stored shape: what a payload may be, what a reader finds, and how a document that another program changed is recognised."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, cast
from uuid import UUID

import bson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamline_pool import DataCorruptionError, PayloadTooLargeError, ValidationError
from streamline_pool.domain.definition import Definition, make_step
from streamline_pool.domain.document import RunDocument
from streamline_pool.protocol.codec import CODEC, PAYLOAD_BYTES_MAX, PAYLOAD_DEPTH_MAX, as_payload, check_payload
from streamline_pool.protocol.run_document import as_stored, make_context, new_run, parse_run, validate_run_document
from support import shown

NOW = datetime(2026, 1, 1, tzinfo=UTC)
MICROSECONDS = datetime(2026, 1, 1, 12, 0, 0, 123456, tzinfo=UTC)
UID = UUID("12345678123456781234567812345678")


class Colour(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Thing: ...


class Hostile(Mapping[str, Any]):
    """A mapping whose methods raise what no codec expects."""

    def __getitem__(self, key: str) -> Any:
        raise SystemError("mine")

    def __iter__(self) -> Iterator[str]:
        raise SystemError("mine")

    def __len__(self) -> int:
        return 1


def nested(levels: int, kind: type = dict) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value} if kind is dict else [value]
    return value


def circle() -> dict[str, Any]:
    value: dict[str, Any] = {"a": [1]}
    value["a"].append(value)
    return value


STORABLE = [
    (None, None), (True, True), (0, 0), (2**63 - 1, 2**63 - 1), (-(2**63), -(2**63)), (1.5, 1.5), (math.inf, math.inf), ("", ""),
    ("ä\0😀", "ä\0😀"), (b"\0\xff", b"\0\xff"), ((1, (2,)), [1, [2]]), ([], []), ({}, {}),
    ({"a.b": 1, "$c": 2, "": 3}, {"a.b": 1, "$c": 2, "": 3}),
    ({"$set": {"$x.y": 1}}, {"$set": {"$x.y": 1}}), (UID, UID), (Colour.RED, "red"), (Level.HIGH, 3), ({"k": Colour.RED}, {"k": "red"}),
    (MICROSECONDS, datetime(2026, 1, 1, 12, 0, 0, 123000, tzinfo=UTC)),
    (datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=2))), datetime(2026, 1, 1, 10, tzinfo=UTC)),
    (bson.Decimal128("1.10"), bson.Decimal128("1.10")), (bson.ObjectId(b"a" * 12), bson.ObjectId(b"a" * 12)), (bson.Int64(5), 5),
    (nested(PAYLOAD_DEPTH_MAX), nested(PAYLOAD_DEPTH_MAX)), (nested(PAYLOAD_DEPTH_MAX, list), nested(PAYLOAD_DEPTH_MAX, list)),
]  # fmt: skip

UNSTORABLE = [
    (Thing(), "", "cannot store <class"), (Decimal("1.1"), "", "cannot store"), ({1, 2}, "", "cannot store <class 'set'>"),
    (2**63, "", "whole numbers end at 64 bits"), ({"a": [0, {"b": -(2**63) - 1}]}, ".a[1].b", "whole numbers end at 64 bits"),
    ({"items": [1, 2, 3, {"when": Thing()}]}, ".items[3].when", "cannot store <class"), ({1: "a"}, ".1", "keys must be text"),
    ({"a": {None: 1}}, ".a.None", "keys must be text"), ({"a\0b": 1}, ".'a\\x00b'", "keys cannot hold a NUL"),
    ("\ud800", "", "lone surrogate"), ({"a": ("x", "\udfff")}, ".a[1]", "lone surrogate"), (circle(), ".a[1]", "refers to itself"),
    (timedelta(1), "", "cannot store"), (lambda: 1, "", "cannot store"), (iter([1]), "", "cannot store"), (1j, "", "cannot store"),
    (nested(PAYLOAD_DEPTH_MAX + 1), "", "nested more than"), (nested(190), "", "nested more than"), (nested(5_000), "", "nested more than"),
    (nested(5_000, list), "", "nested more than"), (Hostile(), "", "cannot store"), ({"a": Hostile()}, ".a", "cannot store"),
    (range(3), "", "cannot store"), ({"re": [ValueError("x")]}, ".re[0]", "cannot store <class 'ValueError'>"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "read"), STORABLE, ids=shown)
def test_a_payload_reads_the_same_here_as_from_the_database(value: Any, read: Any) -> None:
    """Else a step would see one thing after its predecessor, and another after a crash between them."""
    seen, size = as_payload(value, "output")
    assert seen == read
    assert type(seen) is type(read) or isinstance(read, int)
    assert seen == bson.decode(bson.encode({"": value}, codec_options=CODEC), codec_options=CODEC)[""]
    assert check_payload(value, "output") == size


def test_not_a_number_is_a_number() -> None:
    assert math.isnan(as_payload(float("nan"), "output")[0])
    assert math.isnan(as_payload([float("nan")], "output")[0][0])


@pytest.mark.parametrize(("value", "path", "reason"), UNSTORABLE, ids=shown)
def test_an_unstorable_payload_is_refused_with_the_path_of_the_culprit(value: Any, path: str, reason: str) -> None:
    """The database would find it only after the handler has done its work, and refuse the whole command of many runs."""
    with pytest.raises(ValidationError) as caught:
        check_payload(value, "input")
    assert str(caught.value).startswith("VALIDATION_ERROR: input")
    assert reason in str(caught.value)
    if "nested" not in reason:
        assert str(caught.value).startswith(f"VALIDATION_ERROR: input{path}: ")


def test_the_size_limit_is_named_with_the_size_found() -> None:
    with pytest.raises(PayloadTooLargeError, match=rf"PAYLOAD_TOO_LARGE: output: \d+ bytes, and the limit is {PAYLOAD_BYTES_MAX}"):
        check_payload("x" * PAYLOAD_BYTES_MAX, "output")
    assert check_payload("x" * (PAYLOAD_BYTES_MAX - 100), "output") <= PAYLOAD_BYTES_MAX


def test_a_payload_is_a_copy() -> None:
    """A handler that goes on changing what it returned must not change what the next step sees."""
    mine = {"list": [1]}
    seen, _ = as_payload(mine, "output")
    mine["list"].append(2)
    assert seen == {"list": [1]}


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(json_like)
def test_whatever_is_accepted_can_be_written_and_read(value: Any) -> None:
    try:
        seen, _ = as_payload(value, "x")
    except ValidationError:
        return
    document = {"steps": [{"output": seen}]}
    assert bson.decode(bson.encode(document, codec_options=CODEC), codec_options=CODEC) == document


# --- documents ------------------------------------------------------------------------------------------------------


def a_document(**changes: Any) -> dict[str, Any]:
    steps = tuple(make_step("w", name, lambda ctx: 1, {}) for name in "ab")
    document = new_run(
        Definition(workflow_id="w", version="1", queue="q", steps=steps, make_context=None),
        run_id="r", input=1, context={}, meta=None, idempotency_key=None, priority=0, queue="q", due_at=NOW, user_id=None, tags=(), slot=0,
        now=NOW, start_id="x",
    )  # fmt: skip
    return {**document, **changes}


def test_a_new_run_is_sound_and_can_be_found_by_a_claim() -> None:
    document = a_document()
    assert validate_run_document(document) is None
    assert parse_run(document).status == "running"
    assert (document["wakeAt"], document["lane"]) == (NOW, "q/w/1")
    assert "lease" not in document
    assert "idempotencyKey" not in document, "null would be a key, and unique"


def test_a_run_that_is_due_later_is_a_draft() -> None:
    steps = (make_step("w", "a", lambda ctx: 1, {}),)
    later = new_run(
        Definition(workflow_id="w", version="1", queue="q", steps=steps, make_context=None),
        run_id="r", input=1, context={}, meta=None, idempotency_key="k", priority=0, queue="q", due_at=NOW + timedelta(seconds=1),
        user_id=None, tags=(), slot=0, now=NOW, start_id="x",
    )  # fmt: skip
    assert (later["status"], later["idempotencyKey"]) == ("draft", "k")


def test_a_run_that_could_not_grow_is_not_started() -> None:
    """A document filled to the brim has no room for a lease, and a claim of many runs would fail for it."""
    assert as_stored(cast(RunDocument, a_document(input="x" * (12 * 2**20))))[1] > 12 * 2**20
    with pytest.raises(PayloadTooLargeError, match="start: the run would take"):
        as_stored(cast(RunDocument, a_document(input="x" * (16 * 2**20 - 1000))))


STEP = {"stepId": "a", "status": "pending", "attempts": 0}
OTHER = {"stepId": "b", "status": "pending", "attempts": 0}

CHANGED_FIELDS = [
    ("workflowId", 5), ("workflowId", []), ("workflowId", {}), ("version", None), ("status", "weird"), ("status", []), ("status", None),
    ("steps", "x"), ("steps", []), ("steps", {}), ("steps", [5]), ("steps", [None]), ("steps", [{}]),
    ("steps", [{**STEP, "stepId": 5}, OTHER]),
    ("steps", [{**STEP, "status": "weird"}, OTHER]), ("steps", [{**STEP, "status": []}, OTHER]), ("steps", [{**STEP, "status": {}}, OTHER]),
    ("steps", [{**STEP, "attempts": "1"}, OTHER]), ("steps", [{**STEP, "attempts": 1.5}, OTHER]),
    ("steps", [{**STEP, "startedAt": "now"}, OTHER]),
    ("steps", [STEP, STEP]), ("steps", [{**STEP, "status": "waiting"}, OTHER]),
    ("steps", [{**STEP, "status": "waiting", "waitingFor": 3}, OTHER]),
    ("steps", [{**STEP, "status": "waiting", "waitingFor": {"type": "timer"}}, OTHER]), ("steps", [{**STEP, "status": "done"}, OTHER]),
    ("steps", [{**STEP, "status": "waiting", "waitingFor": {"type": "timer", "resumeAt": "soon"}}, OTHER]),
    ("steps", [STEP, {**OTHER, "status": "running"}]), ("steps", [STEP, {**OTHER, "status": "done"}]),
    ("currentStepId", "zzz"), ("currentStepId", 5), ("currentStepId", []), ("currentStepId", None),
    ("context", None), ("context", "x"), ("context", []), ("lane", None), ("rev", "1"), ("rev", 1.0), ("rev", None), ("token", "1"),
    ("crashes", None), ("failures", {}), ("waitGen", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), CHANGED_FIELDS, ids=shown)
def test_a_field_that_another_program_changed_is_named(field: str, value: Any) -> None:
    """The engine would otherwise raise in the middle of a claim, and take the batch with it."""
    reason = validate_run_document(a_document(**{field: value}))
    assert reason is not None
    assert field in reason or "step" in reason


def test_a_draft_whose_step_has_started_is_damaged() -> None:
    """A claim keeps the status of a run that waits, and no change leads from a draft to a result: it would fail as lost workers."""
    waiting = {**STEP, "status": "waiting", "waitingFor": {"type": "human"}, "gen": 1}
    assert "draft" in (validate_run_document(a_document(status="draft", steps=[waiting, OTHER])) or "")
    assert validate_run_document(a_document(status="draft")) is None


@pytest.mark.parametrize(
    "field", ["workflowId", "version", "status", "steps", "currentStepId", "context", "lane", "rev", "token", "crashes"]
)
def test_a_missing_field_is_named(field: str) -> None:
    document = a_document()
    del document[field]
    assert field in (validate_run_document(document) or "")


@given(st.sampled_from([*a_document()]), json_like)
def test_no_value_in_any_field_makes_the_check_itself_fail(field: str, value: Any) -> None:
    validate_run_document(a_document(**{field: value}))
    validate_run_document(a_document(steps=[{**STEP, field: value}, OTHER]))
    validate_run_document(a_document(steps=[value, OTHER]))


@given(st.sampled_from([*a_document()]), json_like)
def test_no_value_in_any_field_makes_reading_fail_in_another_way(field: str, value: Any) -> None:
    for document in (a_document(**{field: value}), a_document(steps=[value, OTHER]), a_document(steps=[{**STEP, field: value}, OTHER])):
        try:
            parse_run(document)
        except DataCorruptionError as exc:
            assert str(exc).startswith("DATA_CORRUPTION: run ")


@pytest.mark.parametrize("changes", [{"wakeAt": "soon"}, {"wakeAt": None}, {"lane": 5}, {"queue": "other"}, {"queue": None}], ids=shown)
def test_a_live_run_that_no_worker_can_find_says_so_when_read(changes: dict[str, Any]) -> None:
    """No other process will ever notice it, and a caller that waits for the run would wait for ever."""
    with pytest.raises(DataCorruptionError, match=r"no worker will find it|expected"):
        parse_run(a_document(**changes))


def test_leased_paused_and_ended_runs_need_no_wake_at() -> None:
    document = a_document()
    del document["wakeAt"]
    parse_run({**document, "lease": {"id": "l", "expiresAt": NOW}})
    parse_run({**document, "paused": True})
    parse_run({**document, "status": "done"})
    waiting = {**STEP, "status": "waiting", "waitingFor": {"type": "human", "reason": "x"}}
    parse_run({**document, "status": "waiting", "steps": [waiting, OTHER]})


@pytest.mark.parametrize(
    ("make", "given_input", "context"),
    [(None, {"a": 1}, {"a": 1}), (None, [1], {}), (None, None, {}), (lambda i: {"url": i["u"]}, {"u": 1}, {"url": 1})],
)
def test_the_context_is_made_of_the_input(make: Any, given_input: Any, context: Any) -> None:
    assert make_context(make, given_input, "workflow w") == context


def test_the_context_is_a_mapping() -> None:
    for bad in ([1], None, "x", {"$ref": "a", "$id": 1}):
        with pytest.raises(ValidationError, match="workflow w: "):
            make_context(lambda _, bad=bad: bad, 1, "workflow w")  # type: ignore[misc]
