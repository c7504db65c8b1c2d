"""`streamline-pool chaos`: what it refuses, what it says about this machine, and that it works in a database that the user names."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cli_shell import Shell
from pymongo import MongoClient


@pytest.mark.slow
def test_a_database_with_something_else_in_it_is_refused_and_left_as_it_was(shell: Shell, mongodb_uri: str, new_database: str) -> None:
    """Everything in the database is deleted, so a mistyped name must not be enough for that."""
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        client[new_database]["orders"].insert_one({"_id": 1})
        refused = shell("chaos", "--mongodb-uri", mongodb_uri, "--database", new_database, "--seconds", "1")
        assert refused.returncode == 2
        assert "(orders)" in refused.stderr
        assert client[new_database].list_collection_names() == ["orders"]
        assert client[new_database]["orders"].count_documents({}) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ((), "say where"),
        (("--embedded", "--mongodb-uri", "mongodb://127.0.0.1/", "--database", "d"), "say where"),
        (("--mongodb-uri", "mongodb://127.0.0.1/"), "say where"),
        (("--embedded", "--faults", "kill-all"), "there is no fault 'kill-all'"),
        (("--embedded", "--json", "/no/such/folder/report.json"), "cannot write /no/such/folder/report.json"),
        (("--embedded", "--evidence", "/proc/evidence"), "cannot write /proc/evidence"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_started(shell: Shell, words: tuple[str, ...], advice: str) -> None:
    """The settings of the environment must not name the database either: they may be those of a production pool."""
    refused = shell("chaos", *words)
    assert refused.returncode == 2
    assert advice in refused.stderr


@pytest.mark.slow
def test_faults_that_cannot_happen_here_are_no_clean_result(shell: Shell) -> None:
    refused = shell("chaos", "--embedded", "--members", "1", "--faults", "step-down")
    assert refused.returncode == 2
    assert "none of these faults can happen here: step-down:" in refused.stderr


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_database_that_the_user_names_is_used_and_dropped(shell: Shell, mongodb_uri: str, new_database: str) -> None:
    options = ("--seconds", "4", "--lease", "2", "--faults", "kill-worker,latency,stop-database", "--json", "-")
    done = shell("chaos", "--mongodb-uri", mongodb_uri, "--database", new_database, *options)
    report = json.loads(done.stdout)

    assert done.returncode == 0, done.stdout + done.stderr
    assert list(report["left_out"]) == ["stop-database"]
    assert "--embedded" in report["left_out"]["stop-database"]
    assert report["runs"] > 0
    assert report["faults"]["kill-worker"]["turns"] > 0
    assert (report["lost"], report["wedged"], report["duplicates"]) == (0, 0, 0)
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        assert new_database not in client.list_database_names()
