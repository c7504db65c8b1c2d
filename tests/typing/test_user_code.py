"""The public types as users' type checkers see them: mypy and pyright report the marked lines of user_code.py, and no others."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)  # mypy reads the whole package when its cache is empty

ROOT = Path(__file__).resolve().parents[2]
USER_CODE = Path(__file__).with_name("user_code.py")


def marked_lines() -> set[int]:
    return {number for number, line in enumerate(USER_CODE.read_text().splitlines(), 1) if line.endswith("  # error")}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments, str(USER_CODE)], cwd=ROOT, capture_output=True, text=True)


def test_mypy_reports_the_marked_lines_and_no_others() -> None:
    """A call that mypy takes for right and that fails, or the reverse, makes the shipped annotations worthless."""
    done = run("mypy", "--strict", "--follow-imports=silent", "--no-error-summary", "--hide-error-context")
    found: dict[int, str] = {}
    for line in done.stdout.splitlines():
        reported = re.match(r"(?P<file>.+?):(?P<line>\d+): error: (?P<text>.*)", line)
        if reported:
            assert Path(reported["file"]).name == USER_CODE.name, line
            found[int(reported["line"])] = reported["text"]
    assert done.returncode == 1, f"mypy did not run: {done.stdout}{done.stderr}"
    assert_equal(found)


@pytest.mark.slow
def test_pyright_reports_the_marked_lines_and_no_others() -> None:
    """Editors show what pyright says."""
    done = run("pyright", "--outputjson", "--pythonpath", sys.executable)
    assert done.returncode == 1, f"pyright did not run: {done.stdout}{done.stderr}"
    found: dict[int, str] = {}
    for reported in json.loads(done.stdout)["generalDiagnostics"]:
        assert Path(reported["file"]).name == USER_CODE.name, reported
        found[reported["range"]["start"]["line"] + 1] = reported["message"]
    assert_equal(found)


def assert_equal(found: dict[int, str]) -> None:
    marked = marked_lines()
    unmarked = {line: text for line, text in found.items() if line not in marked}
    assert not unmarked, f"reported, but not marked: {unmarked}"
    assert not marked - set(found), f"marked, but not reported: lines {sorted(marked - set(found))}"
