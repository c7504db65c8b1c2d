"""Outputs beside the document: what goes where, and what could be mistaken for a marker."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from streamline_pool import PayloadTooLargeError, ValidationError
from streamline_pool.protocol.codec import PAYLOAD_BYTES_MAX, as_payload, check_payload, decode_payload, encode_payload
from streamline_pool.protocol.payloads import EXTERNAL_BYTES, OUTPUT_BYTES_MAX, external_ids, is_external, split_output, with_outputs
from support import shown

OVERHEAD = len(encode_payload("", "x"))


@pytest.mark.parametrize("value", [None, True, 1, 1.5, "text", b"bytes", [1, (2, 3)], {"a": {"$b.c": 1}}, {"$external": 7}, {}], ids=shown)
def test_small_values_are_stored_as_they_are(value: Any) -> None:
    stored, content, size = split_output(value, "output", lambda: "f-1")
    assert (stored, size) == as_payload(value, "output")
    assert content is None


@pytest.mark.parametrize("over", [0, 1])
def test_the_boundary_is_exact(over: int) -> None:
    """One byte off, and the limit that users read about is another one."""
    value = "x" * (EXTERNAL_BYTES - OVERHEAD + over)
    stored, content, size = split_output(value, "output", lambda: "f-1")
    if over:
        assert stored == {"$external": "f-1"}
        assert content is not None
        assert decode_payload(content) == value
        assert len(encode_payload(stored, "x")) - 10 <= size <= len(encode_payload(stored, "x")) + 20, "the size is the document's share"
    else:
        assert (stored, content, size) == (value, None, EXTERNAL_BYTES)


def test_a_value_that_looks_like_a_marker_is_never_taken_for_one() -> None:
    """A handler that returns another run's marker would otherwise read that run's output."""
    stored, content, _ = split_output({"$external": "f-of-another-run"}, "output", lambda: "f-1")
    assert stored == {"$external": "f-1"}
    assert content is not None
    assert decode_payload(content) == {"$external": "f-of-another-run"}
    for value in ({"$external": "f", "more": 1}, {"$external": None}, [{"$external": "f"}], "$external"):
        assert not is_external(value)
        assert split_output(value, "output", lambda: "f-1").content is None


def test_limits_of_outputs_and_of_everything_else() -> None:
    between = b"x" * (PAYLOAD_BYTES_MAX + 1)
    assert split_output(between, "output", lambda: "f-1").stored == {"$external": "f-1"}
    for call in (as_payload, check_payload):
        with pytest.raises(PayloadTooLargeError, match=f"limit is {PAYLOAD_BYTES_MAX}"):
            call(between, "checkpoint")
    assert as_payload(between, "output", OUTPUT_BYTES_MAX)[0] == between
    exact = b"x" * (OUTPUT_BYTES_MAX - len(encode_payload(b"", "x")))
    assert split_output(exact, "output", lambda: "f-1").content is not None
    with pytest.raises(PayloadTooLargeError, match=f"output of step a: {OUTPUT_BYTES_MAX + 1} bytes, and the limit is {OUTPUT_BYTES_MAX}"):
        split_output(exact + b"x", "output of step a", lambda: "f-1")
    with pytest.raises(ValidationError, match=r"output\.a: cannot store"):
        split_output({"a": object(), "b": between}, "output", lambda: "f-1")


def test_what_a_later_step_sees_is_what_a_reader_sees() -> None:
    value = {"rows": [(1, datetime(2024, 1, 2, 3, 4, 5, 678_999, UTC))], "bulk": "x" * EXTERNAL_BYTES}
    content = split_output(value, "output", lambda: "f-1").content
    assert content is not None
    assert decode_payload(content)["rows"] == [[1, datetime(2024, 1, 2, 3, 4, 5, 678_000, UTC)]]


@pytest.mark.parametrize("damaged", [b"", b"\x05\0\0\0\0", b"junk", encode_payload("x" * 50, "x")[:-3]])
def test_damaged_content_is_a_value_error(damaged: bytes) -> None:
    with pytest.raises(ValueError, match="not a payload"):
        decode_payload(damaged)


def test_markers_are_found_and_replaced() -> None:
    document = {
        "_id": "r",
        "steps": [{"stepId": "a", "output": {"$external": "f1"}}, {"stepId": "b"}, {"stepId": "c", "output": {"$external": "f2"}}, "junk"],
        "output": {"$external": "f2"},
        "input": {"$external": "mine"},
    }
    assert external_ids(document) == ["f1", "f2"]
    whole = with_outputs(document, {"f1": 1, "f2": [2]})
    assert [step["output"] for step in whole["steps"] if step != "junk" and "output" in step] == [1, [2]]
    assert (whole["output"], whole["input"], whole["steps"][3]) == ([2], {"$external": "mine"}, "junk")
    assert document["output"] == {"$external": "f2"}, "the original is left alone"
    assert with_outputs(document, {"f1": 1})["output"] == {"$external": "f2"}
    assert external_ids({"_id": "r", "steps": None}) == []
    assert external_ids({"_id": "r", "steps": 7}) == []
