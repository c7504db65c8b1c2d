"""The storm of the load tests in short: every capability at once, clean-ups under fire, killed processes and a killed primary."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.chaos

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(420)
def test_a_short_storm_loses_nothing_and_leaves_nothing_stuck(tmp_path: Path) -> None:
    """Each capability has its own tests; what two of them do to each other while processes die shows only here."""
    command = [sys.executable, "-m", "loadtests", "storm", "--json", "--minutes", "0.7", "--evidence", str(tmp_path / "evidence")]
    storm = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)

    for story in sorted((tmp_path / "evidence").glob("*.txt")):  # pytest shows them if the test has failed
        print(story.read_text())
    assert storm.returncode == 0, storm.stdout + storm.stderr
    report = json.loads(storm.stdout)
    assert {budget["key"]: budget["figure"] for budget in report["budgets"]} == {"lost": 0, "wedged": 0, "doubled": 0, "early": 0}
    assert {"workers killed", "workers frozen", "stewards killed", "pools restarted", "primaries killed"} <= set(report["faults"])
    calls = ("acknowledged starts", "answers", "runs with an event", "cancels", "rewinds", "pauses")
    for checked in (*calls, "idempotency keys", "results seen"):
        assert report["checked"][checked] > 0, checked
    for clean_up in ("expired", "archived", "deleted", "by_ttl"):
        assert report["load"]["cleaned"][clean_up] > 0, clean_up
