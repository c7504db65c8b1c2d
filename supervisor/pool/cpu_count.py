"""How many CPUs this process may use: the number of workers that `--workers auto` means."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["usable_cpus"]

_CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")


def usable_cpus(limit_file: Path = _CGROUP_LIMIT) -> int:
    """CPUs that this process may use, at least 1: the smaller of its affinity mask and a container's quota (cgroup v2), rounded up.

    A container limited to 2 CPUs on a 64-CPU host would otherwise get 64 workers.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = limit_file.read_text().split()
        limit = -(-int(quota) // int(period))
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        limit = allowed
    return max(1, min(allowed, limit))
