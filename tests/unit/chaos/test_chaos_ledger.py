"""The ledger: a note survives the death of its process, and its clock is one for all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from streamline_pool.chaos.ledger import Ledger, LedgerTail, real_monotonic
from support import REPOSITORY

NOTES_AND_DIES = """
import os, signal, sys
from streamline_pool.chaos.ledger import Ledger
ledger = Ledger(sys.argv[1])
ledger.note("entry", run="r", n=1)
if os.fork() == 0:
    ledger.note("entry", run="r", n=2)
    os._exit(0)
os.wait()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_notes_of_a_process_that_is_killed_and_of_its_fork_are_all_there(tmp_path: Path) -> None:
    """The ledger is the witness of what a killed process did, so it must not depend on a clean end."""
    command = [sys.executable, "-c", NOTES_AND_DIES, str(tmp_path)]
    before = real_monotonic()
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=False)
    notes = sorted(LedgerTail(tmp_path).read(), key=lambda note: int(note["n"]))

    assert done.returncode == -signal.SIGKILL
    assert [note["n"] for note in notes] == [1, 2]
    assert len({note["pid"] for note in notes}) == 2
    assert before <= notes[0]["at"] <= notes[1]["at"] <= real_monotonic()


def test_a_reader_gets_each_note_once_and_leaves_half_a_line_for_later(tmp_path: Path) -> None:
    ledger, tail = Ledger(tmp_path), LedgerTail(tmp_path)
    ledger.note("entry", n=1)
    with (tmp_path / "other.jsonl").open("w") as other:
        other.write('{"kind": "exit", "n": ')
        other.flush()
        assert [note["n"] for note in tail.read()] == [1]
        other.write("2}\n")
    ledger.note("entry", n=3)

    assert sorted(note["n"] for note in tail.read()) == [2, 3]
    assert not list(tail.read())
    assert len(tail.notes) == 3


def test_the_clock_of_the_ledger_is_that_of_the_kernel() -> None:
    """Notes of processes with a faked clock are compared with notes of others."""
    first = time.clock_gettime(time.CLOCK_MONOTONIC)
    assert first <= real_monotonic() <= time.clock_gettime(time.CLOCK_MONOTONIC)
