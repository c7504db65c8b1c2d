"""The supervisor and children that misbehave: real processes with scripted behaviour (scripted_pool.py)."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import psutil
import pytest
from pool_process import PoolProcess, running

from support import eventually

SCRIPTED = Path(__file__).parents[1] / "scripted_pool.py"
Start = Callable[[str], AbstractContextManager[PoolProcess]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    return lambda script: running(tmp_path, "", "", command=[sys.executable, str(SCRIPTED), script])


@pytest.mark.slow
def test_a_child_that_does_not_read_stalls_no_other(start: Start) -> None:
    """Its pipe is full; a supervisor that waited for room would wait for ever, and no signal would reach it."""
    with start("does_not_read") as pool:
        eventually(lambda: pool.logged("woken_often"))
        assert not pool.logged("child_stalled"), "while that child was still alive"
        eventually(lambda: pool.logged("child_stalled"), timeout=30)
        eventually(lambda: pool.logged("child_died"))
        pool.signal(signal.SIGTERM)
        assert pool.exit_code() == 0


def test_a_child_that_writes_nonsense_is_replaced(start: Start) -> None:
    with start("sends_nonsense") as pool:
        eventually(lambda: pool.logged("child_garbled"))
        eventually(lambda: len(pool.logged("child_died")) == 2)
        eventually(lambda: len(pool.children()) == 3)
        pool.signal(signal.SIGTERM)
        assert pool.exit_code() == 0


def test_a_boot_failure_stops_the_pool_with_its_own_exit_code(start: Start) -> None:
    with start("cannot_start") as pool:
        assert pool.exit_code() == 78
        assert pool.logged("boot_failed")[0]["error"] == "this cannot work"
        assert not pool.logged("child_died")


def test_a_crash_loop_ends_within_its_budget(start: Start) -> None:
    with start("crash_loop") as pool:
        assert pool.exit_code() == 1
        assert len(pool.logged("child_died")) in (4, 5), "three restarts, and the worker that was started beside the fourth"
        assert pool.logged("restart_budget_exceeded")


@pytest.mark.slow
def test_a_pool_does_not_wait_for_ever_for_a_child_that_never_gets_ready(start: Start) -> None:
    with start("never_ready") as pool:
        assert pool.exit_code(timeout=30) == 1
        assert len(pool.logged("child_stalled")) == 4


def test_a_signal_to_the_whole_group_counts_once(start: Start) -> None:
    """A terminal sends Ctrl-C to all: children that followed it would die in the middle of their steps."""
    with start("well_behaved") as pool:
        pool.ready()
        for pid in (*(child.pid for child in pool.children()), pool.pid):
            os.kill(pid, signal.SIGINT)
        assert pool.exit_code() == 0
        assert not pool.logged("child_died")
        assert len(pool.logged("pool_ends")) == 1


def test_children_hold_only_their_own_end_of_their_own_pipe(start: Start) -> None:
    """A sibling that keeps a copy keeps the pipe open, and the supervisor does not notice the death."""
    with start("well_behaved") as pool:
        pool.ready()
        pool.signal(signal.SIGTTIN)
        eventually(lambda: len(pool.children()) == 4)
        for child in pool.children():
            # Its own end, and the two of the event loop's self-pipe.
            eventually(partial(has_three_sockets, child))


def has_three_sockets(process: psutil.Process) -> bool:
    return len(unix_sockets(process)) == 3


def unix_sockets(process: psutil.Process) -> list[str]:
    folder = Path(f"/proc/{process.pid}/fd")
    return [target for fd in folder.iterdir() if (target := os.readlink(fd)).startswith("socket:")]
