"""Every BSON type has one plain form in JSON."""

from __future__ import annotations

import json
import re
import uuid
from datetime import UTC, datetime
from typing import Any

import bson
import pytest
from bson.binary import Binary
from bson.code import Code
from bson.datetime_ms import DatetimeMS
from bson.dbref import DBRef
from bson.decimal128 import Decimal128
from bson.int64 import Int64
from bson.max_key import MaxKey
from bson.min_key import MinKey
from bson.raw_bson import RawBSONDocument
from bson.regex import Regex
from bson.son import SON
from bson.timestamp import Timestamp

from streamline_pool.protocol.codec import decode_document, encode_document
from streamline_pool.protocol.plain_json import json_text
from support import shown

ID = bson.ObjectId("65f0c0ffee65f0c0ffee65f0")
UUID = uuid.UUID("12345678-1234-5678-1234-567812345678")

FORMS: list[tuple[Any, Any]] = [
    (None, None),
    (True, True),
    (7, 7),
    (Int64(2**40), 2**40),
    (1.5, 1.5),
    (float("nan"), None),
    (float("inf"), None),
    ("text", "text"),
    ([1, "a", None], [1, "a", None]),
    ({"a": {"b": [1]}}, {"a": {"b": [1]}}),
    (SON([("b", 1), ("a", 2)]), {"b": 1, "a": 2}),
    (datetime(2026, 11, 28, 12, 30, 1, 5000, tzinfo=UTC), "2026-11-28T12:30:01.005000Z"),
    (DatetimeMS(253_402_300_800_000), 253_402_300_800_000),  # the year 10000
    (Timestamp(1_700_000_000, 3), {"t": 1_700_000_000, "i": 3}),
    (ID, str(ID)),
    (b"\x00\xff", "AP8="),
    (Binary(b"\x00\xff", 128), "AP8="),
    (UUID, str(UUID)),
    (Decimal128("0.10"), "0.10"),
    (Decimal128("NaN"), "NaN"),
    (Regex("^a.b", "im"), {"pattern": "^a.b", "options": "im"}),
    (re.compile("^a", re.IGNORECASE), {"pattern": "^a", "options": "i"}),
    (Code("return 1"), "return 1"),
    (DBRef("orders", ID), {"$ref": "orders", "$id": str(ID)}),
    (MinKey(), "MinKey"),
    (MaxKey(), "MaxKey"),
]


@pytest.mark.parametrize(("value", "form"), FORMS, ids=shown)
def test_a_value_has_one_plain_form(value: Any, form: Any) -> None:
    assert json.loads(json_text({"value": value})) == {"value": form}


@pytest.mark.parametrize(("value", "form"), FORMS, ids=shown)
def test_a_value_that_was_stored_and_read_has_the_same_form(value: Any, form: Any) -> None:
    """The reader's types differ from the writer's: bytes, patterns, dates beyond the year 9999."""
    read = decode_document(encode_document({"value": value}))
    assert json.loads(json_text(read))["value"] == ({"pattern": "^a", "options": "iu"} if isinstance(value, re.Pattern) else form)


def test_no_value_is_shown_as_python_writes_it() -> None:
    text = json_text([value for value, _ in FORMS])
    assert not re.search(r"\w+\(", text.replace("return 1", "")), text
    assert "<" not in text


def test_other_mappings_and_sequences_are_plain_too() -> None:
    raw = RawBSONDocument(bson.encode({"a": 1}))
    assert json.loads(json_text({"raw": raw, "tuple": (1, 2), "set": {3}, 4: "key"})) == {
        "raw": {"a": 1},
        "tuple": [1, 2],
        "set": [3],
        "4": "key",
    }


def test_one_line_unless_asked_otherwise() -> None:
    assert json_text({"a": [1, 2]}) == '{"a":[1,2]}'
    assert json_text({"a": 1}, indented=True) == '{\n  "a": 1\n}'
