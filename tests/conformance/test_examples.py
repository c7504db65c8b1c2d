"""The examples work: as programs, and as applications of the command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from streamline_pool.supervisor.cli.app_loader import import_app

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*words: str, folder: Path = REPOSITORY) -> str:
    """Run a program, which must end with 0. Returns what it prints."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("STREAMLINE_")}
    environ["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environ, capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def processes_in(folder: Path) -> list[int]:
    """The processes whose current folder it is. By name they could be those of another test or of another user."""
    return [process.pid for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(folder)]


EXAMPLES = sorted(path.stem for path in (REPOSITORY / "examples").glob("*.py") if path.stem != "__init__")

PRINTS: dict[str, tuple[str, ...]] = {
    "hello_world": ("is done: {'greeting': 'Hello, world!', 'characters': 13}",),
    "wait_and_resume": (
        "run 1 is waiting: a person is asked to approve the expense, {'amount': 120}",
        "run 1 is done: booked, approved by Ann",
        "run 2 is done: no answer came; the expense is refused",
    ),
    "order_as_code": (
        "run 1 is failed at pack lamp-2: ['lamp-1'] are packed",
        "run 1 is waiting at wait: ['lamp-1', 'lamp-2', 'lamp-3'] are packed, each once",
        "run 1 is done: {'boxes': ['lamp-1', 'lamp-2', 'lamp-3'], 'paid': '60 paid, reference pay'}",
    ),
    "sleep": ("welcome, Ann; the run is waiting until", "the run is done: Ann, are you still there?"),
    "conditional": (
        "run 1 is done, charged 25: price done, check_for_fraud skipped, discount done, thank skipped, charge done",
        "run 2 is done, charged 270: price done, check_for_fraud done, discount skipped, thank done, charge done",
    ),
    "newsletter": ("the run is waiting; a person is asked to read the draft:", "the run is done: sent to reader-1@example.org, reader-2@"),
    "ai_pipeline": (
        "waiting for a review; writing took 2 attempts, scores {'style': 0.9, 'facts': 0.4, 'tone': 0.9}",
        "published 3 paragraphs, reviewed by Ann",
    ),
    "approval_http": (
        "the boss answers: 200",
        "a second answer with the same link: 401 HOOK_TOKEN_INVALID",
        "the run: 200 {'output': 'a lamp ordered', 'status': 'done'}",
    ),
    "multi_tenant": ("acme: ['acme: 3', 'acme: 3']", "zeta: ['zeta: 9']", "2 of its runs removed, 1 of other tenants kept"),
    "parallel": ("asked 6 suppliers", "elm: TimeoutError('tasks[4] took longer", "is done: {'supplier': 'birch'"),
}
"""What each example prints. The two that start pools have tests of their own."""


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_is_an_application(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    app, threads = import_app(f"examples.{name}:app")
    assert len(app.workflows) == 1
    assert threads == []


def test_every_example_is_run() -> None:
    assert {*PRINTS, "stdlib_index", "web_scraper"} == set(EXAMPLES)  # stdlib_index is the demonstration, run by test_demo.py


@pytest.mark.parametrize("name", [name if name == "hello_world" else pytest.param(name, marks=pytest.mark.slow) for name in PRINTS])
def test_each_runs_by_one_command_and_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    """A new user runs an example first, from any folder."""
    printed = run(str(REPOSITORY / "examples" / f"{name}.py"), folder=tmp_path)
    for words in PRINTS[name]:
        assert words in printed
    assert list(tmp_path.iterdir()) == []
    assert processes_in(tmp_path) == []


def test_the_demonstration_is_an_example_too(tmp_path: Path) -> None:
    assert "Usage: streamline-pool demo" in run(str(REPOSITORY / "examples" / "stdlib_index.py"), "--help", folder=tmp_path)


@pytest.mark.slow
def test_the_web_scraper_saves_every_page_of_a_real_site() -> None:
    printed = run("examples/web_scraper.py")
    assert "19 of 19 runs are done, 19 pages are saved" in printed
    assert re.search(r"^ +\d{4,} bytes +\d+ links +Python: package json$", printed, re.MULTILINE)
