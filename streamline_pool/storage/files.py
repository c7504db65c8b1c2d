"""Files beside the runs, as procedures: store a file, load the outputs of a run, delete files.

Owns the order of the operations. A file's record is written before its chunks and deleted after them. Every file that a
crash leaves therefore has a record, by which `dropping_orphans` (retention.py) finds it. A file is complete when its
chunks have the length that the record says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from streamline_pool.domain.errors import DataCorruptionError
from streamline_pool.protocol import files
from streamline_pool.protocol.codec import decode_payload
from streamline_pool.protocol.files import CHUNK_BYTES
from streamline_pool.protocol.payloads import EXTERNAL_KEY, external_ids, is_external, with_outputs

from .procedures import Procedure

__all__ = ["dropping_files", "loading_outputs", "putting_file", "reading_outputs"]

_COMMAND_CHUNKS = 32  # 8 MiB in one command; a command ends at 16 MiB
_DROP_MAX = 100  # files whose content one command deletes; at 64 MiB each some 25 000 chunks


def putting_file(file_id: str, content: bytes, run_id: str) -> Procedure[None]:
    """Store a file durably, before any document refers to it. `content` is that of `split_output`.

    May be repeated under the same id, with the same content only. Raises StoreUnavailableError.
    """
    if not (yield files.any_file()):
        # A database without files has no need of these indexes. A user with readWrite may create them.
        yield files.ensure_file_index()
        yield files.ensure_chunk_index()
    yield files.insert_file(file_id, run_id, len(content))
    for first, chunks in _commands(content):
        yield files.insert_chunks(file_id, first, chunks)


def _commands(content: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """The chunks of each command, with the number of the first one."""
    size = _COMMAND_CHUNKS * CHUNK_BYTES
    for start in range(0, len(content), size):
        part = content[start : start + size]
        yield start // CHUNK_BYTES, [part[place : place + CHUNK_BYTES] for place in range(0, len(part), CHUNK_BYTES)]


def loading_outputs(document: Mapping[str, Any]) -> Procedure[dict[str, Any]]:
    """A copy of a run document with every output in it. Reads nothing when the document holds all of them.

    Raises DataCorruptionError, which names run, file and step, when a file is missing or damaged.
    """
    return with_outputs(document, (yield from reading_outputs(document, external_ids(document))))


def reading_outputs(document: Mapping[str, Any], file_ids: Sequence[str]) -> Procedure[dict[str, Any]]:
    """The values in these files of a run, by file id. Raises as `loading_outputs` does."""
    if not file_ids:
        return {}
    lengths = {record["_id"]: record["length"] for record in (yield files.files_of(document["_id"], file_ids))}
    values = {}
    for file_id in file_ids:
        if file_id not in lengths:
            raise _damaged(document, file_id, "there is no such file of this run")
        chunks = yield files.read_chunks(file_id)
        try:
            values[file_id] = decode_payload(_joined(chunks, lengths[file_id]))
        except ValueError as exc:
            raise _damaged(document, file_id, str(exc)) from exc
    return values


def _joined(chunks: Sequence[Mapping[str, Any]], length: int) -> bytes:
    """The content of a file. Raises ValueError when a part of it is missing."""
    content = b"".join(chunk["data"] for chunk in sorted(chunks, key=lambda chunk: chunk["n"]))
    if len(content) != length:
        raise ValueError(f"it has {len(content)} of {length} bytes")
    return content


def _damaged(document: Mapping[str, Any], file_id: str, reason: str) -> DataCorruptionError:
    steps = document.get("steps") or ()
    holders = [step["stepId"] for step in steps if is_external(step.get("output")) and step["output"][EXTERNAL_KEY] == file_id]
    where = f"output of step {holders[0]}" if holders else "output"
    remedy = f"restore it, or rewind the run to step {holders[0]}" if holders else "restore it"
    return DataCorruptionError(
        f"run {document['_id']}: {where} is in file {file_id}, and {reason}; {remedy}", run_id=document["_id"], file_id=file_id
    )


def dropping_files(file_ids: Sequence[str]) -> Procedure[int]:
    """Delete files, in batches. Ids of files that do not exist are allowed. Returns how many files there were."""
    dropped = 0
    for start in range(0, len(file_ids), _DROP_MAX):
        batch = file_ids[start : start + _DROP_MAX]
        yield files.delete_chunks(batch)
        dropped += yield files.delete_files(batch)
    return dropped
