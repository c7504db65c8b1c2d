"""The load tests, at sizes that measure no real speed: each measures a real pool and prints its report."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from loadtests.__main__ import QUESTIONS, parse
from loadtests.common import Budget, Report, percentile
from support import eventually

ROOT = Path(__file__).resolve().parents[2]
MODULE = [sys.executable, "-m", "loadtests"]

TINY = {
    "throughput": "--rounds 1 --side-rounds 1 --seconds 0.5 --settle 0.5 --find 0",
    "durable": "--rounds 1 --seconds 0.5 --settle 0.5 --find 0 --calls 210 --long-runs 1",
    "latency": "--samples 5",
    "idle": "--workers 1 2 --seconds 0.5 --settle 0.2",
    "scale": "--finished 200 --sleeping 200 --absent 100 --rounds 1 --runs 200 --workers 2 --queue 400 --single-starts 3",
    "lanes": "--workflows 1,12 --runs 40 --turns 1 --bursts 1 --starts 3 --idle 0.5 --settle 0.1 --ended 30 --workers 1",
    "outputs": "--kib 16 --rounds 1 --seconds 0.5 --settle 0.5 --find 0",
    "memory": "--few 1 --many 2 --ready-workers 1 --starts 1 --repeat 1 --settle 0.1",
    "timers": "--sleeps 10 --shortest 0.1 --longest 0.3 --calibrate 0.4 --standing 50 --workers 1",
    "cancel": "--cancels 2",
}
BUDGETS = {
    "throughput": {
        "ratio.of_the_drivers_default_way": (">=", 0.6),
        "ratio.of_the_limit": (">=", 0.45),
        "def_handlers.ratio.of_the_limit": (">=", 0.25),
        "start_many_live.ratio.of_the_limit": (">=", 0.3),
        "workers_cpu_in_raw_updates": ("<=", 0.7),
    },
    "durable": {"ratio.of_declared_steps": (">=", 0.9), "long.last_to_first": ("<=", 1.3), "long.replay_ms": ("<=", 50)},
    "latency": {"first_step.p50_x": ("<=", 3), "first_step.p99_x": ("<=", 10), "done.p50_x": ("<=", 8)},
    "idle": {f"{figure}.{workers}": ("<=", limit) for figure, limit in (("per_minute", 40), ("pool_cpu_percent", 1)) for workers in (1, 2)},
    "scale": {"claim_time_ratio": ("<=", 1.2), "claim_efficiency": (">=", 0.9)},
    "lanes": {
        **{f"to_first.12.{name}": (">=", 0.8) for name in ("spread_steps_s", "last_steps_s")},
        **{f"to_first.12.{name}": ("<=", 1.2) for name in ("start_p95_ms", "idle_mongod_percent", "idle_pool_percent")},
    },
    "outputs": {"ratio.16": (">=", 0.5)},
    "memory": {"pss_per_added_worker_mib": ("<=", 15), "ready_s": ("<=", 1.5)},
    "timers": {f"{situation}.p99_ms": ("<=", 100) for situation in ("idle", "loaded", "backlog", "full")},
    "cancel": {f"{situation}.{kind}.p99_ms": ("<=", 100) for situation in ("idle", "busy") for kind in ("async_def", "def")},
}


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MODULE, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=50)


@pytest.mark.slow
@pytest.mark.parametrize("question", TINY)
def test_each_question_is_answered_in_one_json_document(question: str, mongodb_uri: str) -> None:
    """A figure without its settings, or with a log line that breaks the JSON, would be useless to a script.

    A missed budget shows in the exit status, so that no script needs to read the document for it.
    """
    answer = ask(question, "--json", "--mongodb-uri", mongodb_uri, *TINY[question].split())

    assert answer.returncode in (0, 1), answer.stderr
    document = json.loads(answer.stdout)
    assert document["question"] == question
    assert document["settings"]["mongodb"]
    budgets = {budget["key"]: (budget["wanted"], budget["limit"]) for budget in document["budgets"]}
    assert budgets == BUDGETS[question]
    for budget in document["budgets"]:
        assert budget["figure"] == figure(document, budget["key"])
        assert budget["figure"] >= 0
    assert document["met"] == all(budget["met"] for budget in document["budgets"])
    assert answer.returncode == (0 if document["met"] else 1)


def figure(document: dict[str, Any], key: str) -> Any:
    found: Any = document
    for name in key.split("."):
        found = found[name]
    return found


def test_every_load_test_that_the_documents_name_can_be_asked_and_all_are_named() -> None:
    """An option that was renamed, or a question that no page names, is of no use to a reader."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    named = [words for page in pages for words in re.findall(r"python -m loadtests ([^`\n]+)`", page.read_text("utf-8"))]
    asked = {parse(words.split()).question for words in named}
    assert asked == {*QUESTIONS, "all"}
    assert {*TINY, "storm"} == set(QUESTIONS), "each is run by a test; the storm by tests/chaos/test_storm.py"


@pytest.mark.parametrize("uri", ["mongodb://db.example.org/", "mongodb://127.0.0.1,10.0.0.7/", "mongodb+srv://cluster.example.org/"])
def test_a_server_of_another_machine_is_refused(uri: str) -> None:
    """Load tests fill databases and drop them. They must never do that on a server that is in use."""
    answer = ask("memory", "--json", "--mongodb-uri", uri)

    assert answer.returncode == 2
    assert answer.stdout == ""
    assert "loopback" in answer.stderr or "DNS" in answer.stderr


def test_the_storm_refuses_a_given_server() -> None:
    """It kills the primary. That must never be a server that others use."""
    answer = ask("storm", "--json", "--mongodb-uri", "mongodb://127.0.0.1/")

    assert answer.returncode == 2
    assert answer.stdout == ""
    assert "leave out --mongodb-uri" in answer.stderr


@pytest.mark.slow
@pytest.mark.slow
def test_an_interrupted_load_test_leaves_no_process_behind(mongodb_uri: str) -> None:
    """A pool that goes on by itself would distort the next measurement, and load the machine."""
    process = subprocess.Popen([*MODULE, "memory", "--mongodb-uri", mongodb_uri, "--settle", "60"], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        family = eventually(lambda: family_of(process, at_least=3), timeout=30)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()

    eventually(lambda: not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in family))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux's")
@pytest.mark.slow
@pytest.mark.slow
def test_a_killed_load_test_leaves_no_process_behind() -> None:
    """The process that should end the pool and the server is gone, so they must notice it by themselves."""
    process = subprocess.Popen([*MODULE, "throughput", "--find", "0"], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        # The server's watcher and mongod, the supervisor, the steward, two workers, and the raw writers.
        family = eventually(lambda: family_of(process, at_least=10), timeout=40)
        names = " ".join(" ".join(member.cmdline()) for member in family)
        assert "mongod" in names
        assert "loadtests.pool_process" in names
    finally:
        process.kill()
        process.wait()

    eventually(lambda: not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in family), timeout=20)


def family_of(process: subprocess.Popen[bytes], *, at_least: int) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return children if len(children) >= at_least else []


def test_a_budget_is_a_minimum_or_a_maximum() -> None:
    figures = {"ratio": 0.6, "parts": {"p50": 3.0}}
    assert Budget(key="ratio", limit=0.6, at_least=True).holds(figures)
    assert Budget(key="parts.p50", limit=3).holds(figures)
    assert not Budget(key="parts.p50", limit=2.9).holds(figures)
    missed = Report(question="q", settings={}, figures=figures, budgets=[Budget(key="ratio", limit=0.7, at_least=True)])
    assert not missed.met
    assert "MISSED" in missed.text()


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(value) for value in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (50, 99, 100)
    assert percentile([7.0], 0.5) == 7
