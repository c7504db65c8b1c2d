"""Reads what processes hold: memory, descriptors, threads, sockets, and the server's connections.

Owns the readings; flatness.py judges them. Linux only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import psutil

__all__ = ["QUANTITIES", "read_connections", "read_process"]

QUANTITIES = ("uss_mib", "pss_mib", "descriptors", "threads", "sockets")
"""Of each process. USS is memory that no other process shares. PSS adds the process's part of what it shares."""

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
        "descriptors": len(targets),
        "threads": process.num_threads(),
        "sockets": sum(target.startswith("socket:") for target in targets),
    }


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
