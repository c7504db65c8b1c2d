"""Outputs beside the runs, as procedures: store one, load those of a run, find those of removed runs.

Owns which output is a document (protocol/outputs.py) and which is a file (files.py), and that every reader finds both. Runs
of earlier versions have files from 256 KiB on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from streamline_pool.domain.errors import DataCorruptionError
from streamline_pool.protocol import outputs
from streamline_pool.protocol.codec import decode_payload
from streamline_pool.protocol.outputs import DOCUMENT_BYTES_MAX, NewOutput
from streamline_pool.protocol.payloads import EXTERNAL_KEY, external_ids, is_external, with_outputs

from .files import putting_file, reading_file
from .procedures import Procedure

__all__ = ["Wanted", "dropping_outputs", "loading_outputs", "putting_output", "reading_outputs"]

_DROP_MAX = 1_000  # outputs that one command deletes
_PREFIX_BYTES = 4  # content begins with its own length


class Wanted(NamedTuple):
    """An output to be read, and the document that refers to it."""

    document: Mapping[str, Any]
    id: str


def putting_output(output: NewOutput) -> Procedure[None]:
    """Store an output durably, before any document refers to it. `content` is that of `split_output`.

    May be repeated under the same id, with the same content only. Raises StoreUnavailableError, ValidationError.
    """
    if len(output.content) <= DOCUMENT_BYTES_MAX:
        yield outputs.insert_outputs([output])
    else:
        yield from putting_file(output.id, output.content, output.run_id)


def loading_outputs(document: Mapping[str, Any]) -> Procedure[dict[str, Any]]:
    """A copy of a run document with every output in it. Reads nothing when the document holds all of them.

    Raises DataCorruptionError, which names run, output and step, when an output is missing or damaged.
    """
    wanted = [Wanted(document, output_id) for output_id in external_ids(document)]
    values = {}
    for output, content in zip(wanted, (yield from reading_outputs(wanted)), strict=True):
        if isinstance(content, DataCorruptionError):
            raise content
        try:
            values[output.id] = decode_payload(content)
        except ValueError as exc:
            raise _damaged(output, str(exc)) from exc
    return with_outputs(document, values)


def reading_outputs(wanted: Sequence[Wanted]) -> Procedure[list[bytes | DataCorruptionError]]:
    """The content of each of these outputs, or the error that it is missing or damaged. One query for all that are documents."""
    if not wanted:
        return []
    found = {stored["_id"]: stored for stored in (yield outputs.read_outputs([output.id for output in wanted]))}
    contents: list[bytes | DataCorruptionError] = []
    for output in wanted:
        stored = found.get(output.id)
        try:
            if stored is None:
                contents.append((yield from reading_file(output.id, output.document["_id"])))
            else:
                contents.append(_content(stored, output))
        except ValueError as exc:
            contents.append(_damaged(output, str(exc)))
    return contents


def _content(stored: Mapping[str, Any], output: Wanted) -> bytes:
    """The content of a stored output. Raises ValueError if it is of another run, or not whole."""
    data = stored.get("data")
    if stored.get("runId") != output.document["_id"]:
        raise ValueError("there is no such output of this run")
    if not isinstance(data, bytes) or int.from_bytes(data[:_PREFIX_BYTES], "little") != len(data):
        raise ValueError("it is not whole")
    return data


def _damaged(output: Wanted, reason: str) -> DataCorruptionError:
    run_id, steps = output.document["_id"], output.document.get("steps") or ()
    holders = [step["stepId"] for step in steps if is_external(step.get("output")) and step["output"][EXTERNAL_KEY] == output.id]
    where = f"output of step {holders[0]}" if holders else "output"
    remedy = f"restore it, or rewind the run to step {holders[0]}" if holders else "restore it"
    return DataCorruptionError(
        f"run {run_id}: {where} is stored beside the run under id {output.id}, and {reason}; {remedy}", run_id=run_id, output_id=output.id
    )


# --- removing ------------------------------------------------------------------------------------------------------


def dropping_outputs(output_ids: Sequence[str]) -> Procedure[int]:
    """Delete outputs that are documents, in batches. Ids that do not exist are allowed. Returns how many there were."""
    dropped = 0
    for start in range(0, len(output_ids), _DROP_MAX):
        dropped += yield outputs.delete_outputs(output_ids[start : start + _DROP_MAX])
    return dropped
