"""Removes a password from what `ps` shows of this process. Linux only; elsewhere it does nothing.

A URI that is given as a flag is part of the argument list, which every user of the machine can read in /proc/PID/cmdline,
and which forked children inherit. The kernel reads that text from this process's own memory, so overwriting it there
is enough (as setproctitle and PostgreSQL do). The environment has no such problem: /proc/PID/environ is private.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from streamline_pool.config.settings import redact_uri

__all__ = ["hide_password"]

_ARG_START, _ARG_END = 48, 49  # 1-based fields of /proc/PID/stat (proc(5))


def hide_password(uri: str, proc: Path = Path("/proc/self")) -> None:
    """Overwrite `uri` in this process's argument list by its redacted form. Never fails: it is a precaution."""
    secret, shown = uri.encode(), redact_uri(uri).encode()
    if secret == shown:
        return
    try:
        present = proc.joinpath("cmdline").read_bytes()
        # The name in parentheses may hold spaces; the first field after it is field 3.
        fields = proc.joinpath("stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[_ARG_START - 3]), int(fields[_ARG_END - 3])
    except (OSError, ValueError, IndexError):
        return
    if len(present) != end - start:  # the list was moved or changed before; these addresses would belong to something else
        return
    at = present.find(secret)
    while at >= 0:
        ctypes.memmove(start + at, shown[: len(secret)].ljust(len(secret)), len(secret))
        at = present.find(secret, at + len(secret))
