"""Values that look like operators, expressions or markers, and every type that BSON has. Owns how two values are compared."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import bson
from bson.datetime_ms import DatetimeMS
from hypothesis import strategies as st

from streamline_pool.protocol.codec import CODEC

__all__ = ["REFUSED", "TEXTS", "VALUES", "any_values", "nested", "same"]


def nested(levels: int) -> Any:
    """A value of so many levels."""
    value: Any = "bottom"
    for level in range(levels):
        value = {"$set": value} if level % 2 else [value]
    return value


TEXTS = [
    "$set", "$$NOW", "$$ROOT._id", "$$REMOVE", "$input", "$", "$$", "a.b", ".", "$external", '{"$gt": ""}', "null", "\n", "ключ", "\0", " ",
    "' || 1", "%s", "{0}", "\\u0000", "__proto__", "x" * 300,
]  # fmt: skip

VALUES: dict[str, Any] = {
    "an update operator": {"$set": {"status": "done"}, "$unset": {"lease": ""}},
    "an expression": {"$add": ["$x", 1], "$literal": {"$literal": 1}},
    "a removal": ["$$REMOVE", {"a": "$$REMOVE"}, "$$NOW", "$$CLUSTER_TIME"],
    "a filter": {"$gt": "", "$where": "1", "$expr": {"$eq": [1, 1]}},
    "a marker of an output": {"$external": "there is no such output"},
    "nearly a marker": [{"$external": "x"}, {"$external": 1}, {"$external": "x", "y": 1}],
    "dotted keys": {"a.b": 1, ".": {"..": 2}, "0": [3], "a": {"b": 4}},
    "an empty key": {"": {"": 1}},
    "no value": [None, {}, [], ""],
    "field names of runs": {"_id": 1, "status": "failed", "steps": [], "lease": {"id": 1}, "wakeAt": None, "expireAt": "soon"},
    "half a reference": {"$ref": "c"},
    "no reference": [{"$ref": 5, "$id": 1}, {"$id": 1}],
    "a reference": [bson.DBRef("c", 1), {"deep": bson.DBRef("c", bson.ObjectId(b"x" * 12), "db", more=2)}],
    "extended JSON": {"$oid": "0" * 24, "$date": 1, "$numberLong": "1", "$binary": {"base64": "", "subType": "00"}},
    "numbers": [0, -0.0, 1.0, 2**31, -(2**63), bson.Int64(1), bson.Decimal128("1.10"), bson.Decimal128("NaN"), 5e-324],
    "no numbers": [float("nan"), float("inf"), float("-inf")],
    "truth": [True, 1, False, 0],
    "times": [datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC), DatetimeMS(2**60)],
    "timestamps": [bson.Timestamp(0, 0), bson.Timestamp(1, 2)],
    "bytes": [b"", b"\0\xff", bson.Binary(b"x", 2), bson.Binary(b"x", 5), bson.Binary(b"x" * 16, 3), bson.Binary(b"x", 128), UUID(int=1)],
    "code": [bson.Code("$$NOW"), bson.Code("f", {"$set": 1})],
    "patterns": [bson.Regex("^$", "i"), bson.Regex("(((")],
    "ends": [bson.MinKey(), bson.MaxKey(), bson.ObjectId(b"x" * 12)],
    "texts": TEXTS,
    "deep": nested(96),
}  # fmt: skip
"""What is stored as it is, by what it is."""

REFUSED: dict[str, Any] = {
    "a mapping that is read as a reference": {"deep": [{"$ref": "c", "$id": 1, "more": 2}]},
    "a scope that is read as a reference": bson.Code("f", {"$ref": "c", "$id": 1}),
    "a malformed UUID": {"deep": [bson.Binary(b"x" * 15, 4)]},
    "a time that the server replaces": bson.Timestamp(0, 0),
    "too deep": nested(101),
    "a lone surrogate": {"a": "\ud800"},
    "a NUL in a key": {"a\0b": 1},
    "a key that is no text": {1: 2},
    "a time without a zone": [datetime(2026, 1, 1)],  # noqa: DTZ001 -- that is the point
    "a number beyond 64 bits": 2**63,
    "a type that BSON does not have": {"a": object()},
}
"""What no door lets in, by what it is."""

_texts = st.one_of(st.sampled_from(TEXTS), st.text(st.characters(exclude_categories=["Cs"]), max_size=5))
_keys = _texts.filter(lambda text: "\0" not in text)
_leaves = st.one_of(
    _texts,
    st.sampled_from([leaf for value in VALUES.values() if isinstance(value, list) for leaf in value]),
    st.integers(-(2**63), 2**63 - 1),
)
any_values: st.SearchStrategy[Any] = st.recursive(
    _leaves, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_keys, inner, max_size=3)), max_leaves=8
)
"""Values that BSON can hold. Few of them are refused."""


def same(found: Any, sent: Any) -> bool:
    """Whether the two are the same BSON: types, order of keys, and NaN included. PyMongo reads a large `int` as its subclass `Int64`."""
    encoded, expected = (bson.encode({"": value}, codec_options=CODEC) for value in (found, sent))
    return encoded == expected and (isinstance(found, type(sent)) or isinstance(sent, type(found)))
