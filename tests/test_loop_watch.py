"""The watch over event loops finds planted offenders, in the test that planted them or after the last one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = """
import sys
sys.path.insert(0, {folder!r})
from loop_watch import LoopWatchPlugin

def pytest_configure(config):
    config.pluginmanager.register(LoopWatchPlugin())
"""

OFFENDERS = """
import asyncio, gc
import pytest

kept = []

@pytest.fixture(scope="session")
def abandoned():
    loop = asyncio.new_event_loop()
    yield loop
    kept.append(loop.create_task(asyncio.sleep(60)))
    loop.run_until_complete(asyncio.sleep(0))

def leave_a_task(keep):
    loop = asyncio.new_event_loop()
    keep.append(loop.create_task(asyncio.sleep(60)))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()

def test_good():
    asyncio.run(asyncio.sleep(0))

def test_kept():
    leave_a_task(kept)

def test_destroyed():
    leave_a_task([])
    gc.collect()

async def fail():
    raise ValueError("planted")

async def fail_unseen():
    asyncio.ensure_future(fail())
    await asyncio.sleep(0.01)

def test_exception():
    asyncio.run(fail_unseen())

def test_good_again(SESSION):
    asyncio.run(asyncio.sleep(0))
"""


def outcome(folder: Path, offenders: str, *options: str) -> tuple[int, str]:
    """Exit code and output of a pytest session with these tests."""
    (folder / "conftest.py").write_text(CONFTEST.format(folder=str(Path(__file__).parent)))
    (folder / "test_planted.py").write_text(offenders)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "-rA", *options, "test_planted.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_task_that_is_left_fails_the_test_that_left_it(tmp_path: Path) -> None:
    """Python reports it when it collects the garbage: during another test, or after the last, when nothing fails any more."""
    code, printed = outcome(tmp_path, OFFENDERS.replace("SESSION", ""))
    assert code == 1
    for name, guilty in {"good": 0, "kept": 1, "destroyed": 1, "exception": 1, "good_again": 0}.items():
        assert (f"ERROR test_planted.py::test_{name} - " in printed) == bool(guilty), printed
    reports = [line for line in printed.splitlines() if line.startswith("a task is pending in a closed event loop: ")]
    assert len(reports) == 1, printed  # the summary repeats it after the test's name, cut to the terminal's width, or whole under CI
    assert "asyncio logs: Task was destroyed but it is pending!" in printed
    assert "asyncio logs: Task exception was never retrieved" in printed


@pytest.mark.parametrize("options", [("-n", "0"), ("-n", "1")], ids=["alone", "xdist"])
@pytest.mark.slow
def test_a_task_that_is_left_after_the_last_test_fails_the_session(tmp_path: Path, options: tuple[str, ...]) -> None:
    good = OFFENDERS.replace("SESSION", "abandoned")
    code, printed = outcome(tmp_path, good, "-k", "good", *options)
    assert "2 passed" in printed
    assert "a task is pending in an abandoned event loop: <Task pending" in printed
    assert code == 1, printed
    assert outcome(tmp_path, OFFENDERS.replace("SESSION", ""), "-k", "good", *options)[0] == 0
