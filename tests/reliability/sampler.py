"""Reads what processes hold: memory, descriptors, threads, sockets, and the server's connections.

Owns the readings; flatness.py judges them. Linux only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

__all__ = ["QUANTITIES", "read_connections", "read_process"]

QUANTITIES = ("uss_mib", "pss_mib", "anonymous_mib", "descriptors", "threads", "sockets")
"""Of each process. USS is memory that no other process shares. PSS adds the process's part of what it shares. Anonymous memory is all that
is backed by no file, whether it is shared or not: it does not rise when a page that was shared since the fork is copied, as USS does."""

_MIB = 1024 * 1024


def read_process(process: psutil.Process) -> dict[str, float]:
    """The QUANTITIES of one process. Raises psutil.NoSuchProcess if it has ended."""
    memory = process.memory_full_info()
    try:
        folder = f"/proc/{process.pid}/fd"
        targets = [_target(f"{folder}/{name}") for name in os.listdir(folder)]
    except FileNotFoundError:
        raise psutil.NoSuchProcess(process.pid) from None
    return {
        "uss_mib": memory.uss / _MIB,
        "pss_mib": memory.pss / _MIB,
        "anonymous_mib": _anonymous_kib(process.pid) / 1024,
        "descriptors": len(targets),
        "threads": process.num_threads(),
        "sockets": sum(target.startswith("socket:") for target in targets),
    }


def _anonymous_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    found = [line for line in lines if line.startswith("RssAnon:")]
    return int(found[0].split()[1]) if found else 0  # a process that has ended and is not reaped has no such line


def _target(path: str) -> str:
    """What a descriptor refers to; nothing for one that was closed meanwhile."""
    try:
        return os.readlink(path)
    except FileNotFoundError:
        return ""


def read_connections(client: Any) -> float:
    """Connections that are open at the server, by all clients."""
    status: Mapping[str, Any] = client.admin.command("serverStatus")
    return float(status["connections"]["current"])
