"""The nemesis itself: it finds nothing in this package, and it finds a package whose commits have no fence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import REPOSITORY, environ_without_settings

pytestmark = pytest.mark.chaos


def nemesis(tmp_path: Path, *options: str, package: Path = REPOSITORY) -> tuple[int, dict[str, Any], str]:
    """Run `streamline-pool chaos` of the package in that folder. Returns its exit code, its report, and what it printed."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "streamline_pool.supervisor.cli", "chaos", "--embedded", "--seed", "7"]
    command += ["--json", str(report), "--evidence", str(tmp_path / "evidence"), *options]
    environ = environ_without_settings(PYTHONPATH=str(package))
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=280)
    print(done.stdout, done.stderr)
    return done.returncode, json.loads(report.read_text()), done.stdout


def without_the_fence(folder: Path) -> Path:
    """A copy of the package whose commits name neither the lease nor the revision that they follow."""
    shutil.copytree(REPOSITORY / "streamline_pool", folder / "streamline_pool", ignore=shutil.ignore_patterns("__pycache__"))
    module = folder / "streamline_pool" / "protocol" / "commits.py"
    fence = '"lease.id": fence.lease_id, "rev": fence.rev, "paused"'
    text = module.read_text()
    assert fence in text, "the commit filter has another form now: adapt this test"
    module.write_text(text.replace(fence, '"paused"'))
    return folder


@pytest.mark.timeout(300)
def test_commits_without_a_fence_are_found(tmp_path: Path) -> None:
    """A nemesis that finds nothing in 1 400 runs proves nothing if it would not find this."""
    package = without_the_fence(tmp_path / "mutant")
    options = ("--members", "1", "--lease", "2", "--seconds", "25", "--faults", "freeze-in-commit")
    code, report, text = nemesis(tmp_path, *options, package=package)

    assert code == 1
    assert report["faults"]["freeze-in-commit"]["turns"] >= 1
    assert report["duplicates"] > 0
    assert "finding: " in text
    assert os.listdir(tmp_path / "evidence")
