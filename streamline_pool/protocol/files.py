"""Queries and updates of files, as data. Owns the layout of files; storage/files.py has the order of the operations.

Files have the layout of GridFS in the bucket `<prefix>files`, so every GridFS tool reads them. This package writes them by
its own operations and not by the driver's bucket, because each of these may be repeated. The driver's upload fails under
an id that an attempt of unknown outcome has begun, and the rest of that attempt must be deleted while it may still be
writing. Here the content of an id never changes, so two attempts at the same time make the same file.

- `<prefix>files.files`: `{_id, filename: run id, length, chunkSize, uploadDate, metadata: {runId, archives?}}`.
  `uploadDate` is the server's. The driver's index on `filename` finds the files of a run.
- `<prefix>files.chunks`: `{_id: "<file id>/<n>", files_id, n, data}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .operations import Command, Find, deleted
from .stored_once import stored_or_there

__all__ = [
    "CHUNK_BYTES",
    "FILES",
    "any_file",
    "delete_chunks",
    "delete_files",
    "ensure_chunk_index",
    "ensure_file_index",
    "files_of",
    "files_of_runs",
    "insert_chunks",
    "insert_file",
    "mark_archived",
    "read_chunks",
]

FILES = "files.files"
_CHUNKS = "files.chunks"
_CHUNK_KEY = {"files_id": 1, "n": 1}

CHUNK_BYTES = 255 * 1024
"""The size of a chunk that GridFS drivers choose: with its fields it fits into 256 KiB."""


# --- storing -------------------------------------------------------------------------------------------------------


def any_file() -> Find:
    """One file, if there is one. The indexes exist once there is a file."""
    return Find(name="any_file", collection=FILES, filter={}, projection={"_id": 1}, limit=1)


def ensure_file_index() -> Command:
    """GridFS's index of files, with the name and key that drivers give it. Does nothing when it exists."""
    spec = {"name": "filename_1_uploadDate_1", "key": {"filename": 1, "uploadDate": 1}}
    return Command(name="ensure_file_index", collection=FILES, verb="createIndexes", body={"indexes": [spec]})


def ensure_chunk_index() -> Command:
    """GridFS's index of chunks, with the name and key that drivers give it. Does nothing when it exists."""
    spec = {"name": "files_id_1_n_1", "key": _CHUNK_KEY, "unique": True}
    return Command(name="ensure_chunk_index", collection=_CHUNKS, verb="createIndexes", body={"indexes": [spec]})


def insert_file(file_id: str, run_id: str, length: int) -> Command:
    """Store a file's record. An existing record stays as it is. The time of the upload is the server's.

    Raises ValidationError when the server refuses it for good: a validator or an index that users have put on the collection.
    """
    record = {"filename": {"$literal": run_id}, "length": {"$toLong": length}, "chunkSize": CHUNK_BYTES, "uploadDate": "$$NOW"}
    record["metadata"] = {"runId": {"$literal": run_id}}
    update = [{"$replaceWith": {"$mergeObjects": [record, "$$ROOT"]}}]
    body = {"updates": [{"q": {"_id": file_id}, "u": update, "upsert": True}]}
    return Command(name="insert_file", collection=FILES, verb="update", body=body, parse=stored_or_there("a file"))


def insert_chunks(file_id: str, first: int, chunks: Sequence[bytes]) -> Command:
    """Store chunks number `first` and following. Existing chunks stay as they are: they have the same content.

    Raises ValidationError as `insert_file` does.
    """
    documents = [{"_id": f"{file_id}/{n}", "files_id": file_id, "n": n, "data": data} for n, data in enumerate(chunks, first)]
    body = {"documents": documents, "ordered": False}
    return Command(name="insert_chunks", collection=_CHUNKS, verb="insert", body=body, parse=stored_or_there("a file", _CHUNK_KEY))


# --- reading -------------------------------------------------------------------------------------------------------

_RECORD = {"metadata": 1, "length": 1}


def files_of(run_id: str, file_ids: Sequence[str]) -> Find:
    """The records of these files, if they are of that run: a forged marker opens no file of another run."""
    query = {"_id": {"$in": list(file_ids)}, "metadata.runId": run_id}
    return Find(name="files_of", collection=FILES, filter=query, projection=_RECORD)


def files_of_runs(run_ids: Sequence[str]) -> Find:
    """The records of all files of these runs, also of files to which no document refers.

    Applications may have files of their own in the bucket, also under the name of a run. Those have no such `metadata.runId`.
    """
    ids = list(run_ids)
    query = {"filename": {"$in": ids}, "metadata.runId": {"$in": ids}}
    return Find(name="files_of_runs", collection=FILES, filter=query, projection=_RECORD)


def read_chunks(file_id: str) -> Find:
    """The chunks of one file, in any order."""
    return Find(name="read_chunks", collection=_CHUNKS, filter={"files_id": file_id}, projection={"_id": 0, "n": 1, "data": 1})


# --- removing ------------------------------------------------------------------------------------------------------


def delete_chunks(file_ids: Sequence[str]) -> Command:
    """Delete the content of these files."""
    body = {"deletes": [{"q": {"files_id": {"$in": list(file_ids)}}, "limit": 0}]}
    return Command(name="delete_chunks", collection=_CHUNKS, verb="delete", body=body, parse=deleted("files"))


def delete_files(file_ids: Sequence[str]) -> Command:
    """Delete the records of these files. Yields how many there were."""
    body = {"deletes": [{"q": {"_id": {"$in": list(file_ids)}}, "limit": 0}]}
    return Command(name="delete_files", collection=FILES, verb="delete", body=body, parse=deleted("files"))


def mark_archived(file_ids: Sequence[str], collection: str) -> Command:
    """Record that the runs of these files are archived in `collection` (its stored name), so that the files are no orphans."""
    update: Mapping[str, Any] = {"$addToSet": {"metadata.archives": collection}}
    body = {"updates": [{"q": {"_id": {"$in": list(file_ids)}}, "u": update, "multi": True}]}
    return Command(name="mark_archived", collection=FILES, verb="update", body=body, parse=stored_or_there("the mark of a file"))
