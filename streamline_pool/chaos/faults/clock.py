"""The clock of host b jumps by an hour. Owns these faults; libfaketime performs them (needs.py loads it into that host)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from streamline_pool.chaos.needs import CLOCK_FILE
from streamline_pool.chaos.stage import Fault, Stage, some_seconds

__all__ = ["FAULTS"]

_NEEDS = frozenset({"faketime"})


def _jump(offset: str) -> Callable[[Stage], AbstractContextManager[None]]:
    """The wall clock of host b is off by so much for as long as the fault lasts. Then it jumps back."""

    @contextlib.contextmanager
    def happens(stage: Stage) -> Iterator[None]:
        host = next(host for host in stage.hosts if host.name == "b")
        clock = host.folder / CLOCK_FILE
        stage.strikes(host.workers())
        clock.write_text(f"{offset}\n")
        try:
            yield
        finally:
            clock.write_text("+0\n")

    return happens


FAULTS = (
    Fault(
        name="clock-ahead",
        what="the clock of host b jumps one hour ahead, and later back",
        happens=_jump("+3600"),
        needs=_NEEDS,
        hold_min=some_seconds,
        hold_max=20.0,
    ),
    Fault(
        name="clock-behind",
        what="the clock of host b jumps one hour back, and later ahead",
        happens=_jump("-3600"),
        needs=_NEEDS,
        hold_min=some_seconds,
        hold_max=20.0,
    ),
)
