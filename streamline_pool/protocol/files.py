"""Every query and update of files, named, as data. Does no I/O: store.py runs them, files.py says in which order.

Files have the layout of GridFS in the bucket `<prefix>files`, so every GridFS tool reads them. They are written by
operations of our own and not by the driver's bucket, because each of these may be repeated: the driver's upload under
an id that an attempt of unknown outcome has begun fails, and what it has left must be deleted while that attempt may
still be writing. Here the content of an id never changes, so that two attempts that mix make the same file.

- `<prefix>files.files`: `{_id, filename: run id, length, chunkSize, uploadDate, metadata: {runId, archives?}}`.
  `uploadDate` is the server's. The driver's index on `filename` finds the files of a run.
- `<prefix>files.chunks`: `{_id: "<file id>/<n>", files_id, n, data}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamline_pool.domain.errors import StoreUnavailableError

from .operations import Command, Find, Reply

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

CHUNK_BYTES = 255 * 1024
"""The size of a chunk that GridFS drivers choose: it fits with its fields into 256 KiB."""

_DUPLICATE_KEY = 11000


# --- storing -------------------------------------------------------------------------------------------------------


def any_file() -> Find:
    """One file, if there are any: then the indexes exist as well."""
    return Find(name="any_file", collection=FILES, filter={}, projection={"_id": 1}, limit=1)


def ensure_file_index() -> Command:
    """GridFS's index of files, with the name and key that drivers give it; does nothing when it exists."""
    spec = {"name": "filename_1_uploadDate_1", "key": {"filename": 1, "uploadDate": 1}}
    return Command(name="ensure_file_index", collection=FILES, verb="createIndexes", body={"indexes": [spec]})


def ensure_chunk_index() -> Command:
    """GridFS's index of chunks, with the name and key that drivers give it; does nothing when it exists."""
    spec = {"name": "files_id_1_n_1", "key": {"files_id": 1, "n": 1}, "unique": True}
    return Command(name="ensure_chunk_index", collection=_CHUNKS, verb="createIndexes", body={"indexes": [spec]})


def insert_file(file_id: str, run_id: str, length: int) -> Command:
    """Store a file's record; a record that is there stays as it is. The upload's time is the server's."""
    record = {"filename": {"$literal": run_id}, "length": {"$toLong": length}, "chunkSize": CHUNK_BYTES, "uploadDate": "$$NOW"}
    record["metadata"] = {"runId": {"$literal": run_id}}
    update = [{"$replaceWith": {"$mergeObjects": [record, "$$ROOT"]}}]
    body = {"updates": [{"q": {"_id": file_id}, "u": update, "upsert": True}]}
    return Command(name="insert_file", collection=FILES, verb="update", body=body, parse=_stored_or_there)


def insert_chunks(file_id: str, first: int, chunks: Sequence[bytes]) -> Command:
    """Store chunks number `first` and following; those that are there stay as they are, and they are the same."""
    documents = [{"_id": f"{file_id}/{n}", "files_id": file_id, "n": n, "data": data} for n, data in enumerate(chunks, first)]
    body = {"documents": documents, "ordered": False}
    return Command(name="insert_chunks", collection=_CHUNKS, verb="insert", body=body, parse=_stored_or_there)


def _stored_or_there(reply: Reply) -> None:
    for error in reply.get("writeErrors", ()):
        if error.get("code") != _DUPLICATE_KEY:
            raise StoreUnavailableError(f"a file could not be stored: {str(error.get('errmsg'))[:500]}", transient=True)


# --- reading -------------------------------------------------------------------------------------------------------

_RECORD = {"metadata": 1, "length": 1}


def files_of(run_id: str, file_ids: Sequence[str]) -> Find:
    """The records of these files, if they are of that run: a marker that somebody has forged opens no other run's file."""
    query = {"_id": {"$in": list(file_ids)}, "metadata.runId": run_id}
    return Find(name="files_of", collection=FILES, filter=query, projection=_RECORD)


def files_of_runs(run_ids: Sequence[str]) -> Find:
    """The records of all files of these runs, those that no document refers to (any more) included."""
    return Find(name="files_of_runs", collection=FILES, filter={"filename": {"$in": list(run_ids)}}, projection=_RECORD)


def read_chunks(file_id: str) -> Find:
    """The chunks of one file, in any order."""
    return Find(name="read_chunks", collection=_CHUNKS, filter={"files_id": file_id}, projection={"_id": 0, "n": 1, "data": 1})


# --- removing ------------------------------------------------------------------------------------------------------


def delete_chunks(file_ids: Sequence[str]) -> Command:
    """Delete the content of these files."""
    body = {"deletes": [{"q": {"files_id": {"$in": list(file_ids)}}, "limit": 0}]}
    return Command(name="delete_chunks", collection=_CHUNKS, verb="delete", body=body, parse=_all_deleted)


def delete_files(file_ids: Sequence[str]) -> Command:
    """Delete the records of these files. Yields how many there were."""
    body = {"deletes": [{"q": {"_id": {"$in": list(file_ids)}}, "limit": 0}]}
    return Command(name="delete_files", collection=FILES, verb="delete", body=body, parse=_all_deleted)


def _all_deleted(reply: Reply) -> int:
    if reply.get("writeErrors"):
        raise StoreUnavailableError(f"files could not be deleted: {str(reply['writeErrors'][0].get('errmsg'))[:500]}", transient=True)
    return int(reply["n"])


def mark_archived(file_ids: Sequence[str], collection: str) -> Command:
    """Note with these files that their runs are kept in `collection` (its stored name), for who looks for orphans."""
    update: Mapping[str, Any] = {"$addToSet": {"metadata.archives": collection}}
    body = {"updates": [{"q": {"_id": {"$in": list(file_ids)}}, "u": update, "multi": True}]}
    return Command(name="mark_archived", collection=FILES, verb="update", body=body, parse=_stored_or_there)
