"""Ends a process with the one that started it. Owns the request to the kernel; the processes are those of hosts.py and the load tests."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["end_with_parent", "same_package"]

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies, by whatever signal. Linux only."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the request to the kernel
        os._exit(1)


def same_package(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child that shall import this very copy of the package, in whatever folder it runs."""
    root = str(Path(__file__).resolve().parents[2])
    return {**environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, environ.get("PYTHONPATH")]))}
