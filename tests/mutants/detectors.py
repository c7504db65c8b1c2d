"""What can find a mutant: the explorer, the quick, slow and chaos tests, the nemesis. Each is run in a copy of the tree.

Owns the commands of the detectors, their time limits, and the reading of their ends.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from .copies import Copy
from .mutant import Mutant

__all__ = ["DETECTORS", "Finding", "Search", "Verdict", "commands", "detect", "verdict_of"]

DETECTORS = ("explorer", "quick", "slow", "chaos", "nemesis")
_MARKS = {"quick": "not slow and not chaos", "slow": "slow and not chaos", "chaos": "chaos"}
_END_S = 10.0  # for a test run that is told to end: it ends its servers and pools
_FAILED = re.compile(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", re.MULTILINE)
_SCHEDULE = re.compile(r"^.*seed.*$", re.MULTILINE | re.IGNORECASE)
_FINDING = re.compile(r"^finding: (.*)$", re.MULTILINE)
_SAYS = {"explorer": _SCHEDULE, "nemesis": _FINDING}


class Verdict(StrEnum):
    """What came of a detector's run."""

    FOUND = "found"
    MISSED = "missed"
    LATE = "no end"  # it was stopped at its time limit, and had found nothing
    BROKEN = "broken"  # it could not run: a collection error, a wrong option, a file that does not exist


@dataclass(frozen=True, slots=True)
class Finding:
    """The end of one detector's run over one tree."""

    verdict: Verdict
    seconds: float
    by: str = ""  # the test that failed, or the explorer's line about its seed; the last lines of the output if it is broken


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """How hard the detectors search."""

    likely_only: bool  # only the test files that the mutants name
    limit_s: float  # of one detector
    schedules: int
    seed: int
    nemesis_s: float  # how long the nemesis makes faults


def commands(detector: str, mutants: Sequence[Mutant], search: Search) -> list[list[str]]:
    """The commands of a detector, in the order in which they are run until one of them finds something. Empty: it does not apply."""
    if detector == "explorer":
        more = mutants[0].explorer if len(mutants) == 1 else ()
        return [["-m", "tests.simulation.explorer", "--no-shrink", "--schedules", str(search.schedules), "--seed", str(search.seed), *more]]
    if detector == "nemesis":
        command = ["-m", "streamline_pool.supervisor.cli", "chaos", "--embedded", "--members", "1", "--lease", "2"]
        return [[*command, "--seconds", str(search.nemesis_s), "--seed", str(search.seed), "--evidence", "evidence"]]
    likely = list(dict.fromkeys(f"tests/{name}" for mutant in mutants for name in mutant.likely))
    pytest = ["-m", "pytest", "-p", "no:cacheprovider", "-q", "-x", "-m", _MARKS[detector]]
    if detector == "chaos":
        return [[*pytest, "tests/chaos"]]
    first = [[*pytest, *likely]] if likely else []
    return first if search.likely_only else [*first, pytest]


def detect(copy: Copy, detector: str, mutants: Sequence[Mutant], search: Search) -> Finding:
    """Run a detector over a copy in which one of these mutants is applied, or none of them."""
    began = time.monotonic()
    finding = Finding(Verdict.MISSED, 0.0)
    for command in commands(detector, mutants, search):
        left_s = search.limit_s - (time.monotonic() - began)
        code, output = _run(copy, command, left_s)
        verdict = verdict_of(detector, code)
        finding = Finding(verdict, time.monotonic() - began, _by(detector, verdict, output))
        if verdict is not Verdict.MISSED:
            break
    return finding


def verdict_of(detector: str, code: int | None) -> Verdict:
    """What an exit status says; None: the detector was stopped at its time limit."""
    if code is None:
        return Verdict.LATE
    if code == 0 or (code == 5 and detector in _MARKS):  # pytest: no test has this mark
        return Verdict.MISSED
    return Verdict.FOUND if code == 1 else Verdict.BROKEN


def _by(detector: str, verdict: Verdict, output: str) -> str:
    if verdict is Verdict.BROKEN:
        return " / ".join(output.splitlines()[-3:])
    found = _SAYS.get(detector, _FAILED).search(output)
    return "" if found is None or verdict is not Verdict.FOUND else found[found.re.groups]


def _run(copy: Copy, command: Iterable[str], limit_s: float) -> tuple[int | None, str]:
    """Exit status (None: stopped at the limit) and output of a Python command in the copy."""
    log = Path(copy.scratch, "output.txt")
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=copy.tree, env=dict(copy.environ()), stdout=output, stderr=output, start_new_session=True
        )
        try:
            code: int | None = process.wait(max(0.1, limit_s))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
    return code, log.read_text(errors="replace")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the detector and all that it has started. Its own clean-up comes first: it stops servers, which have groups of their own."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
