"""The server fails: its primary steps down, dies, freezes, its disk is full, all of it is stopped. Owns these faults."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from streamline_pool.chaos.servers import ask
from streamline_pool.chaos.stage import Fault, NoTurn, Stage, some_seconds

__all__ = ["FAULTS"]

_BLOCK_BYTES = 1024 * 1024
_STEP_DOWN_S = 5


@contextlib.contextmanager
def _step_down(stage: Stage) -> Iterator[None]:
    primary = stage.server.primary()
    stage.strikes(None)
    reply = ask(primary, replSetStepDown=_STEP_DOWN_S, secondaryCatchUpPeriodSecs=2)
    if not reply.get("ok"):
        raise NoTurn(f"the primary does not step down: {reply.get('errmsg')}")
    stage.server.primary()
    yield


@contextlib.contextmanager
def _kill_primary(stage: Stage) -> Iterator[None]:
    member = stage.server.primary()
    stage.strikes(None)
    member.kill()
    stage.server.primary()
    stage.turn.ended = stage.now()  # another member is elected; the dead one comes back as a secondary
    yield
    member.restart()
    stage.server.wait_whole()


@contextlib.contextmanager
def _freeze_primary(stage: Stage) -> Iterator[None]:
    member = stage.server.primary()
    stage.strikes(None)
    member.suspend()
    try:
        yield
    finally:
        member.resume()
    stage.server.wait_whole()


@contextlib.contextmanager
def _stop_database(stage: Stage) -> Iterator[None]:
    stage.strikes(None)
    for member in stage.server.owned:
        member.halt()
    yield
    for member in stage.server.owned:
        member.restart()
    stage.server.wait_whole()


@contextlib.contextmanager
def _disk_full(stage: Stage) -> Iterator[None]:
    member = stage.server.primary()
    disk = stage.server.disks.get(member.port)
    if disk is None:
        raise NoTurn("the primary has no disk of its own")
    stage.strikes(None)
    ballast = disk / "ballast"
    _fill(ballast)
    try:
        yield
    finally:
        ballast.unlink()
    member.restart()  # it may have ended: MongoDB stops when it cannot write its journal
    stage.server.wait_whole()


def _fill(ballast: Path) -> None:
    """Write until nothing more fits."""
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            os.write(file.fileno(), bytes(_BLOCK_BYTES))


FAULTS = (
    Fault(
        name="step-down",
        what="the primary steps down, and another is elected",
        happens=_step_down,
        needs=frozenset({"members"}),
        hold_max=0.0,
    ),
    Fault(
        name="kill-primary",
        what="SIGKILL of the primary of a set of three; it comes back later",
        happens=_kill_primary,
        needs=frozenset({"members"}),
        hold_min=some_seconds,
        hold_max=15.0,
    ),
    Fault(
        name="freeze-primary",
        what="SIGSTOP of the primary: connections stay open, and get no answer",
        happens=_freeze_primary,
        needs=frozenset({"server"}),
        hold_min=some_seconds,
        hold_max=20.0,
    ),
    Fault(
        name="stop-database",
        what="every member is stopped, for up to 60 s",
        happens=_stop_database,
        needs=frozenset({"server"}),
        hold_min=some_seconds,
        hold_max=60.0,
    ),
    Fault(
        name="disk-full",
        what="the disk of the primary is full",
        happens=_disk_full,
        needs=frozenset({"disk"}),
        hold_min=some_seconds,
        hold_max=20.0,
    ),
)
