"""The parts of the page, and how each is measured. Owns the commands of the programs that measure; they own what they measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import soak
from .forms import mutants_of, nemesis_of
from .results import ROOT

__all__ = ["PARTS", "PartFailedError"]


FOR_THE_NEMESIS = (
    "commit-without-fence",
    "claim-of-a-leased-run",
    "recover-without-expiry",
    "recovery-keeps-the-lease",
    "pause-forgets-wake-at",
    "resume-forgets-wake-at",
    "wait-loses-its-deadline",
    "search-is-skipped",
    "answer-whose-reply-was-lost-is-refused",
    "key-is-not-unique",
    "delivery-is-not-noted-as-seen",
    "cancel-keeps-the-lease",
)
"""Mutants that the nemesis tries: of each kind of call and fault some."""


class PartFailedError(Exception):
    """The program that measures a part has left no result. The page keeps the result that is stored, or says "Not measured."."""


def _run(*arguments: str) -> Any:
    """Run a program that is given `--json FILE` in addition. Its exit status may say that it found something; what counts is the result."""
    with tempfile.TemporaryDirectory(prefix="streamline-reliability-") as folder:
        file = Path(folder, "result.json")
        command = [sys.executable, "-m", *arguments, "--json", str(file)]
        status = subprocess.run(command, cwd=ROOT).returncode
        try:
            return json.loads(file.read_text("utf-8"))
        except (FileNotFoundError, json.JSONDecodeError) as exc:
            raise PartFailedError(f"{' '.join(command)} ended with status {status} and without a result: {exc}") from exc


def _explorer(options: Namespace) -> Any:
    processes = str(os.cpu_count() or 1)
    return _run("tests.simulation.explorer", "--schedules", str(options.schedules), "--seed", str(options.seed), "--processes", processes)


def _mutants(options: Namespace) -> Any:
    """Every mutant by the explorer and the tests, and some by the nemesis, which has to be able to fail, too."""
    if options.mutant_tables:
        return mutants_of(*(json.loads(file.read_text("utf-8")) for file in options.mutant_tables))
    nemesis = _run("tests.mutants", "--names", ",".join(FOR_THE_NEMESIS), "--detectors", "nemesis")
    return mutants_of(_run("tests.mutants"), nemesis)


def _nemesis(options: Namespace) -> Any:
    return nemesis_of(_run("streamline_pool.supervisor.cli", "chaos", "--embedded", "--seconds", str(60 * options.nemesis_minutes)))


def _soak(options: Namespace) -> Any:
    chosen = soak.Options(
        runs=options.runs, seconds=60 * options.minutes, workers=options.workers, interval_s=options.interval, seed=options.seed
    )
    return soak.measure(chosen)


PARTS: dict[str, Callable[[Namespace], Any]] = {"explorer": _explorer, "mutants": _mutants, "nemesis": _nemesis, "soak": _soak}
"""Part → what measures it. The result is plain JSON."""
