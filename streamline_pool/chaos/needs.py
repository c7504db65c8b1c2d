"""What faults need: of the machine, of the rights of this process, of the database. Owns the checks, and the words for what is missing."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .servers import ChaosServer, can_mount
from .stage import Fault

__all__ = ["CLOCK_FILE", "clock_library", "host_environ", "missing"]

CLOCK_FILE = "clock"  # in the folder of a host: how far its clock is off, as libfaketime reads it
_FAKETIME = (
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib64/faketime/libfaketimeMT.so.1",
    "/usr/lib/faketime/libfaketimeMT.so.1",
)


def clock_library() -> str | None:
    """The library that fakes the clocks of a process."""
    given = os.environ.get("STREAMLINE_CHAOS_FAKETIME")
    return next((path for path in ([given] if given else _FAKETIME) if Path(path).exists()), None)


def missing(server: ChaosServer | None, members: int) -> dict[str, str]:
    """Which needs are not met, each with its words. `server`: None for private servers, of which there will be `members`."""
    lacks: dict[str, str] = {}
    if server is not None:
        lacks |= dict.fromkeys(("server", "disk", "members"), "needs control of the server: --embedded")
        lacks |= {} if server.can_be_proxied else {"network": "needs a replica set without TLS, which a proxy can read"}
    elif members < 3:
        lacks["members"] = "needs a set of three: --members 3"
    if server is None and not can_mount():
        lacks["disk"] = "needs the right to mount a file system (root)"
    if clock_library() is None:
        lacks["faketime"] = "needs libfaketime: Debian's package `faketime`"
    if not sys.platform.startswith("linux"):
        lacks["linux"] = "needs Linux"
    return lacks


def host_environ(name: str, home: Path, faults: Sequence[Fault]) -> dict[str, str]:
    """The environment of a host for these faults: on host b the clock can be faked, if one of them does that."""
    library = clock_library()
    if name != "b" or library is None or not any("faketime" in fault.needs for fault in faults):
        return {}
    clock = home / CLOCK_FILE
    clock.write_text("+0\n")
    return {
        **{"LD_PRELOAD": library, "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1"},
        # A jump of a real clock changes what time it is, not how much time has passed, nor the times of files.
        **{"DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"},
    }
