"""What a refused payload says: the path of the value, what it is, and what to store instead."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any

import bson
import pytest

from streamline_pool import ValidationError
from streamline_pool.domain.done import DONE
from streamline_pool.protocol.codec import PAYLOAD_DEPTH_MAX, as_payload, check_payload
from streamline_pool.protocol.payloads import split_output
from streamline_pool.protocol.run_document import make_context
from support import shown

NAIVE = datetime(2026, 1, 1, 12)  # noqa: DTZ001 -- what these tests are about
AWARE = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Stamp(datetime):
    """A class of another library that is a datetime."""


class Nowhere(tzinfo):
    """A time zone that has no offset. The standard library calls a datetime with it naive."""

    def utcoffset(self, at: datetime | None) -> None:
        return None

    dst = utcoffset

    def tzname(self, at: datetime | None) -> str:
        return "nowhere"


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Order:
    item: str


class PydanticModel:
    """What every model of pydantic 2 has; importing pydantic would make it a dependency of the tests."""

    __pydantic_validator__ = None

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        return {}


class OldPydanticModel:
    __fields__: dict[str, Any] = {}  # noqa: RUF012 -- as pydantic 1 has it

    def json(self) -> str:
        return "{}"

    def dict(self) -> dict[str, Any]:
        return {}


class Attrs:
    __attrs_attrs__ = ()


class Array:
    """What numpy's arrays and scalars have."""

    def tolist(self) -> list[int]:
        return [1]


class Frame:
    """What the tables of pandas and polars have."""

    def to_dict(self) -> dict[str, Any]:
        return {}


class Plain:
    def __init__(self) -> None:
        self.item = "book"


async def fetch() -> int:
    return 1


async def fetch_many() -> Any:
    yield 1


def numbers() -> Iterator[int]:
    yield 1


def coroutine() -> Any:
    made = fetch()
    made.close()
    return made


@pytest.mark.parametrize(
    ("value", "way_out"),
    [
        (PydanticModel(), 'store value.model_dump(mode="json")'), (OldPydanticModel(), "store value.dict()"),
        (Order("book"), "store dataclasses.asdict(value)"), (Attrs(), "store attrs.asdict(value)"), (Colour.RED, "store value.value"),
        (coroutine(), "did you forget to await it?"), (fetch_many(), "[item async for item in value]"), (numbers(), "store list(value)"),
        (asyncio.Future(loop=asyncio.new_event_loop()), "did you forget to await it?"),
        ({1}, "store list(value)"), (frozenset({1}), "store list(value)"), (range(3), "store list(value)"),
            (iter([1]), "store list(value)"),
        ({"a": 1}.keys(), "store list(value)"), (map(str, [1]), "store list(value)"), (date(2026, 1, 1), "store value.isoformat()"),
        (time(1), "store value.isoformat()"), (timedelta(1), "store value.total_seconds()"),
        (Decimal("1.1"), "store bson.Decimal128(value), or str(value)"), (bytearray(b"x"), "store bytes(value)"),
        (memoryview(b"x"), "store bytes(value)"), (PurePosixPath("/a"), "store str(value)"), (ValueError("x"), "store str(value)"),
        (1j, "store [value.real, value.imag]"), (Array(), "store value.tolist()"), (Frame(), "store value.to_dict("),
        (numbers, "did you forget to call it?"), (Plain(), "store its fields as a mapping"), (2**63, "store str(value)"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_a_refusal_names_the_way_out(value: Any, way_out: str) -> None:
    """A user who reads only `cannot store <class 'X'>` has to look for the rest."""
    with pytest.raises(ValidationError) as caught:
        check_payload({"a": [value]}, "output of step x")
    assert str(caught.value).startswith("VALIDATION_ERROR: output of step x.a[0]: cannot store ")
    assert way_out in str(caught.value)
    assert caught.value.context["path"] == "output of step x.a[0]"


@pytest.mark.parametrize(
    ("context", "way_out"), [(Order("book"), "store dataclasses.asdict(value)"), (coroutine(), "did you forget to await it?")], ids=shown
)
def test_a_first_context_that_is_no_mapping_names_the_way_out(context: Any, way_out: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make_context(lambda input: context, None, "workflow w")
    assert way_out in str(caught.value)


def test_a_class_is_not_taken_for_one_of_its_objects() -> None:
    for kind in (Order, PydanticModel, Attrs, Array):
        with pytest.raises(ValidationError, match="a class"):
            check_payload(kind, "input")


def test_a_value_whose_attributes_raise_is_refused_like_any_other() -> None:
    class Hostile:
        def __getattribute__(self, name: str) -> Any:
            raise SystemError("mine")

    with pytest.raises(ValidationError, match=r"input\.a: cannot store"):
        check_payload({"a": Hostile()}, "input")


def test_a_key_that_is_no_text_names_the_way_out() -> None:
    with pytest.raises(ValidationError, match=r"input\.a\.5: keys must be text, not <class 'int'>; use str\(key\)"):
        check_payload({"a": {5: 1}}, "input")


@pytest.mark.parametrize("naive", [NAIVE, Stamp(2026, 1, 1), NAIVE.replace(tzinfo=Nowhere())], ids=["datetime", "a subclass", "no offset"])
@pytest.mark.parametrize(
    ("shape", "path"),
    [
        (lambda at: at, "input"), (lambda at: {"a": at}, "input.a"), (lambda at: [1, at], "input[1]"), (lambda at: (at,), "input[0]"),
        (lambda at: {"items": [{"when": AWARE}, {"when": at}]}, "input.items[1].when"),
        (lambda at: OrderedDict(when=at), "input.when"), (lambda at: {"many": list(range(5000)), "when": at}, "input.when"),
        (lambda at: bson.DBRef("orders", 1, None, {"when": [at]}), "input.when[0]"),
        (lambda at: [bson.Code("x", {"when": at})], "input[0].when"),
    ],
)  # fmt: skip
def test_a_datetime_without_a_time_zone_is_refused_with_its_path(shape: Any, path: str, naive: datetime) -> None:
    """It was taken for UTC. What a user in New York meant lies five hours away from it."""
    for call in (as_payload, check_payload, lambda value, where: split_output(value, where, lambda: "f")):
        with pytest.raises(ValidationError) as caught:
            call(shape(naive), "input")
        text = str(caught.value)
        assert text.startswith(f"VALIDATION_ERROR: {path}: cannot store a datetime without a time zone")
        assert "datetime.now(timezone.utc)" in text
        assert caught.value.context["path"] == path


def test_aware_datetimes_and_what_was_read_back_are_stored() -> None:
    """What the store gives back must be storable again, and tabs and nines in the bytes must not be taken for datetimes."""
    local = datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=-5)))
    value = {"at": [local, {"also": (AWARE, "\t")}], "nine": 9, "text": "\t" * 9, "id": bson.ObjectId(b"\t" * 12), "none": None}
    seen, _ = as_payload(value, "input")
    assert seen["at"][0] == local
    assert seen["at"][0].tzinfo is UTC
    assert as_payload(seen, "input")[0] == seen


def test_a_document_of_another_class_is_searched_for_datetimes_too() -> None:
    son = bson.SON([("a", [bson.SON([("at", NAIVE)])])])
    with pytest.raises(ValidationError, match=re.escape("input.a[0].at: ")):
        check_payload(son, "input")


def test_the_result_of_a_ctx_call_is_stored_as_nothing() -> None:
    """`lambda ctx: ctx.set("k", 1)` and a tuple of such calls are handlers that users write."""
    assert as_payload(DONE, "output")[0] is None
    assert as_payload([DONE, {"a": DONE}], "output")[0] == [None, {"a": None}]
    assert split_output(DONE, "output", lambda: "f").stored is None


def test_levels_inside_of_a_reference_count() -> None:
    """MongoDB refused such a run at the insert, with STORE_UNAVAILABLE, as if a repetition could help."""
    value: Any = 1
    for _ in range(PAYLOAD_DEPTH_MAX + 1):
        value = {"a": value}
    with pytest.raises(ValidationError, match="levels deep"):
        check_payload(bson.DBRef("orders", value), "input")


class NoMemory(Mapping[str, Any]):
    """A mapping for whose values there is no memory."""

    def __getitem__(self, key: str) -> Any:
        raise MemoryError

    def __iter__(self) -> Iterator[str]:
        return iter(["a"])

    def __len__(self) -> int:
        return 1


def test_a_lack_of_memory_is_not_blamed_on_the_value() -> None:
    """A run under memory pressure failed for good with VALIDATION_ERROR, though its output can be stored. (The nemesis found it.)"""
    with pytest.raises(MemoryError):
        as_payload({"a": NoMemory()}, "output")
    with pytest.raises(MemoryError):
        check_payload([NoMemory()], "output")
