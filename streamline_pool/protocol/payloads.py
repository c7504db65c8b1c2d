"""Outputs that are too large for the run document: what goes into the document, and what is stored beside it.

Owns the marker that replaces such an output, and the limits. Pure: storage/outputs.py stores and loads, codec.py encodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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

EXTERNAL_BYTES = 4 * 1024
"""A larger output is stored beside the run. A fixed limit, which is documented.

Each step rewrites the whole document of its run, with all outputs in it. What is beside the run is written once. Measured in
docs/decisions/0016-outputs-beside-the-run.md: from here on the second write costs less than the rewriting.
"""

OUTPUT_BYTES_MAX = 64 * 1024 * 1024
"""The largest output. A fixed limit of the public contract. It is in memory twice while it is stored."""

EXTERNAL_KEY = "$external"
"""The only key of the marker, the mapping that replaces an output in the document. Its value is the id under which the output is stored."""

_MARKER_BYTES = 40  # of the marker without the id


class SplitOutput(NamedTuple):
    """One output, ready to be stored. The content is stored before the document."""

    stored: Any  # for the document, as a reader will find it: the value, or the marker
    content: bytes | None  # to be stored beside the run; None: the value is in the document
    size: int  # bytes that `stored` takes in the document


def split_output(value: Any, where: str, new_id: Callable[[], str]) -> SplitOutput:
    """What to store of an output: the value, or the marker `{"$external": id}` with a new id and the content beside the run.

    A value that has the form of a marker is always stored beside the run, so that every stored marker is one of ours. Later
    steps see `codec.decode_payload(content)`, or `stored` when there is no content.

    Raises ValidationError with the path of a value that BSON cannot hold, PayloadTooLargeError above OUTPUT_BYTES_MAX.
    """
    if type(value) in (NoneType, bool, int, float):
        stored, size = as_payload(value, where)
        return SplitOutput(stored, None, size)
    encoded = encode_payload(value, where, OUTPUT_BYTES_MAX)
    if len(encoded) <= EXTERNAL_BYTES:
        stored = value if type(value) is str else decode_payload(encoded)
        if not is_external(stored):
            return SplitOutput(stored, None, len(encoded))
    output_id = new_id()
    return SplitOutput({EXTERNAL_KEY: output_id}, encoded, _MARKER_BYTES + len(output_id.encode()))


def is_external(stored: Any) -> TypeGuard[Mapping[str, str]]:
    """True for the marker of an output beside its run, and for every value of the same form."""
    return isinstance(stored, Mapping) and len(stored) == 1 and isinstance(stored.get(EXTERNAL_KEY), str)


def external_ids(document: Mapping[str, Any]) -> list[str]:
    """Ids of what a run document refers to: the outputs of its steps and its own output, each id once."""
    return list(dict.fromkeys(output[EXTERNAL_KEY] for output in _outputs(document) if is_external(output)))


def with_outputs(document: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a run document with each marker replaced by its value. `values` is by output id; other markers stay."""
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
