"""`streamline-pool cleanup`: what it says, what it does, and what it refuses."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cli_shell import Shell
from pymongo import MongoClient

from support import shown


@pytest.fixture
def stored(mongodb_uri: str, database: str) -> Any:
    """The collection of runs, with two old ones of tenant a, one of tenant b, one expired, one young and one that sleeps."""
    now = datetime.now(UTC)
    runs = [("a-1", 50, "done", "a"), ("a-2", 40, "failed", "a"), ("b-1", 40, "cancelled", "b"), ("young", 1, "done", "a")]
    documents: list[dict[str, Any]] = [
        {"_id": run_id, "status": status, "endedAt": now - timedelta(days=days), "createdAt": now, "context": {"tenantId": tenant}}
        for run_id, days, status, tenant in runs
    ]
    documents.append({"_id": "gone", "status": "done", "endedAt": now, "createdAt": now, "context": {"expireAt": now}})
    documents.append({"_id": "sleeps", "status": "waiting", "endedAt": None, "createdAt": now - timedelta(days=900), "context": {}})
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        client[database]["workflow_runs"].insert_many(documents)
        yield client[database]["workflow_runs"]


def left(stored: Any) -> set[str]:
    return {run["_id"] for run in stored.find({}, {"_id": 1})}


@pytest.mark.slow
def test_it_deletes_what_is_old_and_says_how_many(shell: Shell, stored: Any) -> None:
    everything = left(stored)
    told = shell("cleanup", "--days", "30", "--dry-run")
    assert (told.returncode, told.stdout) == (0, "3 runs would be deleted\n")
    assert shell.json("cleanup", "--days", "30", "--tenant", "a", "--dry-run") == {"deleted": 2, "dry_run": True}
    assert left(stored) == everything
    assert shell.json("cleanup", "--days", "30", "--tenant", "b") == {"deleted": 1, "dry_run": False}
    assert shell("cleanup", "--days", "45.5").stdout == "1 run deleted\n"
    assert left(stored) == {"a-2", "young", "gone", "sleeps"}


@pytest.mark.slow
def test_it_archives_and_expires(shell: Shell, stored: Any) -> None:
    words = ("cleanup", "--days", "30", "--archive", "--expired")
    assert shell.json(*words, "--dry-run") == {"expired": 1, "archived": 3, "dry_run": True}
    assert shell(*words).stdout == "1 run deleted because the date in context.expireAt has passed\n3 runs archived\n"
    assert left(stored) == {"young", "sleeps"}
    assert left(stored.database["workflow_runs_archive"]) == {"a-1", "a-2", "b-1"}
    assert shell.json("cleanup", "--expired") == {"expired": 0, "dry_run": False}
    assert shell.json("cleanup", "--days", "0") == {"deleted": 1, "dry_run": False}
    assert left(stored) == {"sleeps"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "--days N for old runs, --expired"),
        (("--archive",), "--archive needs --days"),
        (("--tenant", "a", "--expired"), "--tenant needs --days"),
        (("--days", "1", "--archive", "--tenant", "a"), "leave --tenant out"),
        (("--days", "-1"), "-1"),
        (("--days", "soon"), "soon"),
        (("--days", "nan"), "days"),
        (("--days", "inf"), "days"),
    ],
    ids=shown,
)
def test_what_makes_no_sense_is_2_and_deletes_nothing(shell: Shell, stored: Any, words: tuple[str, ...], told: str) -> None:
    """A typing error must not cost data."""
    everything = left(stored)
    done = shell("cleanup", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert left(stored) == everything


@pytest.mark.slow
def test_it_needs_no_application_and_says_when_the_database_is_away(shell: Shell, offline: Shell, stored: Any) -> None:
    assert shell("cleanup", "--days", "30", STREAMLINE_APP="").returncode == 0
    assert offline("cleanup", "--days", "30").returncode == 3
    text = shell("cleanup", "--help").stdout
    for word in ("--days", "--tenant", "--archive", "--expired", "--dry-run", "--json", "no other run is touched"):
        assert word in " ".join(text.split())
