"""The command as a whole, on a mutant that a test without a database finds: it copies, applies, runs, judges, and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mutants.catalogue import named
from mutants.copies import ROOT, copied, sources_of, workshop
from mutants.detectors import Search, Verdict, detect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
NAME = "result-does-not-end-the-count-of-crashes"


def test_the_command_finds_a_mutant_and_names_the_test_and_leaves_the_tree_as_it_was(tmp_path: Path) -> None:
    """A mutant that stays in the tree would be a bug of the product."""
    (mutant,) = named([NAME])
    before = sources_of(mutant)
    table = tmp_path / "table.json"
    command = ["-m", "tests.mutants", "--names", NAME, "--detectors", "quick", "--likely-only", "--no-control", "--json", str(table)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "1 mutants: 1 found, 0 missed, 0 equivalent"), done.stderr
    (entry,) = json.loads(table.read_text())
    assert entry["detectors"]["quick"]["verdict"] == "found"
    assert entry["detectors"]["quick"]["by"].startswith("unit/domain/test_transitions.py::test_")
    assert sources_of(mutant) == before


def test_programs_in_a_copy_import_the_mutant_and_the_copy_is_removed() -> None:
    """With the original on the path, every mutant would be missed."""
    (mutant,) = named([NAME])
    with workshop() as shop:
        with copied(mutant, shop) as copy:
            program = "import inspect; from streamline_pool.domain import transitions; print(inspect.getsource(transitions))"
            shown = subprocess.run([sys.executable, "-c", program], cwd=copy.tree, env=copy.environ(), capture_output=True, text=True)
            assert mutant.old not in shown.stdout
            assert mutant.new in shown.stdout
        assert not copy.tree.exists()
    assert not shop.exists()


def test_a_detector_that_does_not_end_is_stopped_with_all_that_it_has_started() -> None:
    """A mutant may make a test wait for ever."""
    (mutant,) = named([NAME])
    endless = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import threading; threading.Event().wait()', 'endless-child'])"
    )
    with workshop() as shop, copied(None, shop) as copy:
        Path(copy.tree, "tests", "simulation", "explorer", "__main__.py").write_text(endless)
        finding = detect(copy, "explorer", [mutant], Search(likely_only=True, limit_s=3.0, schedules=1, seed=1, nemesis_s=40))
    assert finding.verdict is Verdict.LATE
    assert finding.seconds < 30
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "endless-child" not in running.replace("ps -eo args", "")
