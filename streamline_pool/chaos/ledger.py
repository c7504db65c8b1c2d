"""The ledger: what handlers and clients saw, in files beside the database. Owns their form, and a clock that no fault can fake.

One file per process, opened for appending; one line of JSON per note, in one write. So a killed process loses no note that it made,
and a note needs no database. `at` is the kernel's monotonic clock, one for all processes of a machine. It is read by a system call of
its own, because a library that fakes clocks replaces the functions of the C library.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["FOLDER_VARIABLE", "Ledger", "LedgerTail", "Note", "real_monotonic"]

Note = dict[str, Any]

FOLDER_VARIABLE = "STREAMLINE_CHAOS_LEDGER"
_CLOCK_GETTIME = {"x86_64": 228, "aarch64": 113}.get(platform.machine())  # the number of the system call
_CLOCK_MONOTONIC = 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_libc = ctypes.CDLL(None) if _CLOCK_GETTIME is not None and os.name == "posix" else None


def real_monotonic() -> float:
    """Seconds of the kernel's monotonic clock. Only elsewhere than on Linux (x86-64, arm64) can a library fake it."""
    if _libc is None or _CLOCK_GETTIME is None:
        return time.monotonic()
    moment = _Timespec()
    _libc.syscall(_CLOCK_GETTIME, _CLOCK_MONOTONIC, ctypes.byref(moment))
    return float(moment.seconds + moment.nanoseconds / 1e9)


class Ledger:
    """Appends notes to a file of the present process in `folder`. Also right after a fork: the child has a file of its own."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._pid = 0
        self._fd = -1
        self._lock = threading.Lock()

    def note(self, kind: str, **fields: Any) -> None:
        """Append one line, `at` now unless `fields` say otherwise. OSError if the file cannot be opened."""
        line = json.dumps({"kind": kind, "at": real_monotonic(), "pid": os.getpid(), **fields}, default=repr)
        with self._lock:
            if self._pid != os.getpid():
                self._fd = os.open(self._folder / f"{os.getpid()}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                self._pid = os.getpid()
            os.write(self._fd, line.encode() + b"\n")


class LedgerTail:
    """Reads the notes of all files of a folder, each once, as they are written."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._offsets: dict[Path, int] = {}
        self.notes: list[Note] = []  # all that were read, in the order of reading

    def read(self) -> Iterator[Note]:
        """The notes since the last call. A line that is not complete yet is left for the next call."""
        for path in sorted(self._folder.glob("*.jsonl")):
            offset = self._offsets.get(path, 0)
            if path.stat().st_size == offset:
                continue
            with path.open("rb") as file:
                file.seek(offset)
                *lines, rest = file.read().split(b"\n")
                self._offsets[path] = file.tell() - len(rest)
            for line in lines:
                note: Note = json.loads(line)
                self.notes.append(note)
                yield note
