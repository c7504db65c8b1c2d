"""Outputs that are too large for the run's document: what goes into the document, and what into a file beside it.

Owns the marker that stands for such an output and the limits. Pure: files.py stores and loads, documents.py encodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any, NamedTuple, TypeGuard

from .codec import as_payload, decode_payload, encode_payload

__all__ = [
    "EXTERNAL_BYTES",
    "EXTERNAL_KEY",
    "OUTPUT_BYTES_MAX",
    "SplitOutput",
    "external_ids",
    "is_external",
    "split_output",
    "with_outputs",
]

EXTERNAL_BYTES = 256 * 1024
"""A larger output is kept in a file. The contract's figure: a document is rewritten whole at every step, a file never."""

OUTPUT_BYTES_MAX = 64 * 1024 * 1024
"""The largest output. The contract's figure; it is held in memory twice while it is stored."""

EXTERNAL_KEY = "$external"
"""The one key of the mapping that stands in the document for an output in a file; its value is the file's id."""

_MARKER_BYTES = 40  # of the marker without the id in it


class SplitOutput(NamedTuple):
    """One output, as it is to be stored."""

    stored: Any  # what goes into the document, as a reader will find it: the value, or the marker
    content: bytes | None  # what goes into the file, first; None: there is no file
    size: int  # bytes that `stored` takes in the document


def split_output(value: Any, where: str, file_id: str) -> SplitOutput:
    """What to store of an output: itself, or the marker `{"$external": file_id}` and the content of that file.

    A value which is itself such a mapping goes into a file whatever its size, so that a marker is always ours. The value
    that later steps are to see is `documents.decode_payload(content)`, or `stored` without a file. Raises ValidationError
    with the path of what BSON cannot hold, PayloadTooLargeError above OUTPUT_BYTES_MAX.
    """
    if type(value) in (NoneType, bool, int, float):
        stored, size = as_payload(value, where)
        return SplitOutput(stored, None, size)
    encoded = encode_payload(value, where, OUTPUT_BYTES_MAX)
    if len(encoded) <= EXTERNAL_BYTES:
        stored = decode_payload(encoded)
        if not is_external(stored):
            return SplitOutput(stored, None, len(encoded))
    return SplitOutput({EXTERNAL_KEY: file_id}, encoded, _MARKER_BYTES + len(file_id.encode()))


def is_external(stored: Any) -> TypeGuard[Mapping[str, str]]:
    """True for the marker of an output in a file, and for whatever could be mistaken for one."""
    return isinstance(stored, Mapping) and len(stored) == 1 and isinstance(stored.get(EXTERNAL_KEY), str)


def external_ids(document: Mapping[str, Any]) -> list[str]:
    """Ids of the files that a run document refers to: its steps' outputs and its own, each once."""
    return list(dict.fromkeys(output[EXTERNAL_KEY] for output in _outputs(document) if is_external(output)))


def with_outputs(document: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a run document with each marker replaced by the value of its file; markers of other files stay."""
    steps = document.get("steps")
    whole = _with_output(document, values)
    if isinstance(steps, list):
        whole["steps"] = [_with_output(step, values) if isinstance(step, Mapping) else step for step in steps]
    return whole


def _with_output(holder: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    output = holder.get("output")
    if is_external(output) and output[EXTERNAL_KEY] in values:
        return {**holder, "output": values[output[EXTERNAL_KEY]]}
    return dict(holder)


def _outputs(document: Mapping[str, Any]) -> Iterator[Any]:
    steps = document.get("steps")
    for holder in (*(steps if isinstance(steps, list) else ()), document):
        if isinstance(holder, Mapping):
            yield holder.get("output")
