"""Files beside the runs, as procedures: store a file, read it, delete files. outputs.py says which outputs are files.

Owns the order of the operations. A file's record is written before its chunks and deleted after them. Every file that a
crash leaves therefore has a record, by which `dropping_orphans` (retention.py) finds it. A clean-up may meet a writer whose
run was deleted. So the writer writes the record again at its end, and the clean-up deletes chunks again at its end: either
the record comes after the delete, and a later clean-up finds the file, or all chunks come before the second delete.
A file is complete when its chunks have the length that the record says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from streamline_pool.domain.errors import StoreUnavailableError
from streamline_pool.protocol import files, server_codes
from streamline_pool.protocol.files import CHUNK_BYTES
from streamline_pool.protocol.operations import Command

from .driver_errors import has_code
from .procedures import Procedure

__all__ = ["dropping_files", "putting_file", "reading_file"]

_COMMAND_CHUNKS = 32  # 8 MiB in one command; a command ends at 16 MiB
_DROP_MAX = 100  # files whose content one command deletes; at 64 MiB each some 25 000 chunks


def putting_file(file_id: str, content: bytes, run_id: str) -> Procedure[None]:
    """Store a file durably, before any document refers to it. `content` is that of `split_output`.

    May be repeated under the same id, with the same content only. Raises StoreUnavailableError, ValidationError.
    """
    if not (yield files.any_file()):
        # A database without files has no need of these indexes. A user with readWrite may create them.
        yield from _ensuring(files.ensure_file_index())
        yield from _ensuring(files.ensure_chunk_index())
    yield files.insert_file(file_id, run_id, len(content))
    for first, chunks in _commands(content):
        yield files.insert_chunks(file_id, first, chunks)
    yield files.insert_file(file_id, run_id, len(content))


def _ensuring(index: Command) -> Procedure[None]:
    try:
        yield index
    except StoreUnavailableError as exc:
        # Another index is in the way, or chunks of another tool are. Files are found without this index, only more slowly.
        if not has_code(exc, *server_codes.INDEX_CONFLICT, server_codes.DUPLICATE_KEY):
            raise


def _commands(content: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """The chunks of each command, with the number of the first one."""
    size = _COMMAND_CHUNKS * CHUNK_BYTES
    for start in range(0, len(content), size):
        part = content[start : start + size]
        yield start // CHUNK_BYTES, [part[place : place + CHUNK_BYTES] for place in range(0, len(part), CHUNK_BYTES)]


def reading_file(file_id: str, run_id: str) -> Procedure[bytes]:
    """The content of a file of that run. Raises ValueError when there is no such file, or a part of it is missing."""
    records = yield files.files_of(run_id, [file_id])
    if not records:
        raise ValueError("there is no such output of this run")
    return _joined((yield files.read_chunks(file_id)), records[0].get("length"))


def _joined(chunks: Sequence[Mapping[str, Any]], length: object) -> bytes:
    """The content of a file. Raises ValueError when a part of it is missing, or was damaged by another program."""
    if not isinstance(length, int):
        raise ValueError("its record was damaged by another program")
    if not all(isinstance(chunk.get("n"), int) and isinstance(chunk.get("data"), bytes) for chunk in chunks):
        raise ValueError("a part of it was damaged by another program")
    content = b"".join(chunk["data"] for chunk in sorted(chunks, key=lambda chunk: chunk["n"]))
    if len(content) != length:
        raise ValueError(f"it has {len(content)} of {length} bytes")
    return content


def dropping_files(file_ids: Sequence[str]) -> Procedure[int]:
    """Delete files, in batches. Ids of files that do not exist are allowed. Returns how many files there were."""
    dropped = 0
    for start in range(0, len(file_ids), _DROP_MAX):
        batch = file_ids[start : start + _DROP_MAX]
        yield files.delete_chunks(batch)
        dropped += yield files.delete_files(batch)
        yield files.delete_chunks(batch)
    return dropped
