"""Encoded documents with binary values that PyMongo refuses to read."""

from __future__ import annotations

import re
from typing import Any

import bson
import pytest
from bson import Binary
from hypothesis import given, settings
from hypothesis import strategies as st

from streamline_pool.protocol.codec import decode_document
from streamline_pool.protocol.malformed_binaries import READ_AS, readable

keys = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=3)
scalars: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), keys, st.binary(max_size=3), st.uuids(),
    st.sampled_from([
        bson.ObjectId(b"x" * 12), bson.Timestamp(1, 2), bson.Decimal128("1.5"), bson.MinKey(), bson.MaxKey(), bson.Regex("a", "i"),
        bson.Code("f"), bson.Code("f", {"a": [1, "b"]}), bson.DBRef("c", 1, x=2), bson.Int64(3), Binary(b"x", 2), Binary(b"x" * 15, 4),
        Binary(b"", 4),
    ]),
)  # fmt: skip
documents = st.dictionaries(keys, st.recursive(scalars, lambda s: st.lists(s, max_size=3) | st.dictionaries(keys, s, max_size=3)))


def _as_read(value: Any) -> Any:
    """The value with each malformed UUID as bytes of the subtype `READ_AS`."""
    if isinstance(value, Binary) and value.subtype == 4 and len(value) != 16:
        return Binary(bytes(value), READ_AS)
    if isinstance(value, dict):
        return {key: _as_read(item) for key, item in value.items()}
    return [_as_read(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=60, derandomize=True)
@given(documents)
def test_a_document_is_read_whole_whatever_stands_beside_a_malformed_uuid(document: dict[str, Any]) -> None:
    """A walk that misjudges the length of one type would change bytes of another value."""
    encoded = bson.encode(document, codec_options=bson.CodecOptions(uuid_representation=4))
    assert decode_document(encoded) == _as_read(document)
    assert decode_document(readable(encoded)) == _as_read(document)


@settings(max_examples=100, derandomize=True)
@given(documents, st.data())
def test_bytes_that_are_no_document_raise_one_error(document: dict[str, Any], data: st.DataObject) -> None:
    """The content of an output may be damaged anywhere; the walk must end, and with the one error that its callers expect."""
    encoded = bytearray(bson.encode(document, codec_options=bson.CodecOptions(uuid_representation=4)))
    for _ in range(data.draw(st.integers(0, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert len(readable(bytes(encoded))) == len(encoded)
        decode_document(bytes(encoded))
    except ValueError as exc:
        assert re.match(r"not a BSON document: ", str(exc)), exc


@pytest.mark.parametrize("encoded", [b"", b"\0", b"\5\0\0\0", b"\xff\xff\xff\xff\0", b"\x0c\0\0\0\x03a\0\xff\xff\xff\x7f\0"])
def test_a_length_beyond_the_end_is_refused(encoded: bytes) -> None:
    with pytest.raises(ValueError, match="not a BSON document"):
        readable(encoded)
