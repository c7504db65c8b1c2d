"""`streamline-pool demo`: it proves what it says, and fails when that is not so. From a wheel: tests/test_packaging.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from streamline_pool.demo.pool_process import APP
from streamline_pool.demo.program import run_demo
from streamline_pool.demo.workflow import count_source, index
from support import REPOSITORY, environ_without_settings

COMMAND = [sys.executable, "-m", "streamline_pool.supervisor.cli", "demo"]


def demo(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The command in `folder`, as a user types it."""
    environ = environ_without_settings(PYTHONPATH=str(REPOSITORY))
    return subprocess.run([*COMMAND, *options], cwd=folder, env=environ, capture_output=True, text=True, timeout=55)


def pools() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if APP in child.cmdline()]


def test_help_and_wrong_options_need_no_checkout(tmp_path: Path) -> None:
    done = demo(tmp_path, "--help")
    assert done.returncode == 0
    for option in ("--limit", "--workers", "--concurrency"):
        assert option in done.stdout
    wrong = demo(tmp_path, "--workers", "0")
    assert wrong.returncode == 2
    assert "'--workers': 0 is not in the range" in wrong.stderr


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_it_loses_a_worker_and_no_result(tmp_path: Path) -> None:
    """On a sample of the files: a worker is killed, totals are equal, no result is accepted twice, and the folder stays empty."""
    done = demo(tmp_path, "--limit", "300")
    assert done.returncode == 0, done.stdout + done.stderr
    printed = done.stdout
    table = dict(re.findall(r"^(\S[a-z ]+?)  +(.+)$", printed, re.MULTILINE))
    assert re.search(r"killed worker \d+ with SIGKILL; it held \d+ runs", printed)
    assert re.fullmatch(r"\d+\.\d\d s for the \d+ runs of the killed worker", table["recovery time"])
    assert table["duplicates accepted"] == "0"
    stored, directly = table["functions"].split()
    assert int(stored) == int(directly) > 1000
    assert printed.endswith("\nequal\n")
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []
    assert pools() == []


@pytest.mark.slow
def test_it_notices_at_once_when_its_pool_has_ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Once it waited two minutes for a dead pool, and then deleted the log with the reason."""
    start_many = index.start_many

    def start_and_kill(inputs: list[dict[str, str]]) -> None:
        start_many(inputs)
        (pool,) = [child for child in psutil.Process().children() if APP in child.cmdline()]
        pool.kill()

    monkeypatch.setattr(index, "start_many", start_and_kill)
    assert run_demo(limit=300, workers=4, concurrency=16) == 1
    printed = capsys.readouterr().err
    assert "the pool ended by itself with code -9; its log ends:" in printed
    assert '"event":"ready"' in printed


@pytest.mark.slow
def test_it_fails_when_the_totals_differ(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A comparison that cannot fail proves nothing. Here the direct count is wrong."""
    wrong = "streamline_pool.demo.program.count_source"  # here, not in the workers
    monkeypatch.setattr(wrong, lambda source: count_source(source) | {"lines": 1})
    assert run_demo(limit=100, workers=4, concurrency=16) == 1
    assert "NOT EQUAL" in capsys.readouterr().out
