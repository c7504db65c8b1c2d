"""The command and the database: away, refusing, badly named; what `check`, `doctor` and `init-db` say of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_shell import NOWHERE, Shell, wait_for_line
from pymongo import MongoClient


@pytest.mark.parametrize(
    "words", [("--app", "shop:app"), ("check", "--app", "shop:app"), ("runs", "list"), ("workers",), ("init-db",), ("doctor",)]
)
@pytest.mark.slow
def test_a_database_that_does_not_answer_is_3(offline: Shell, words: tuple[str, ...]) -> None:
    done = offline(*words, STREAMLINE_MONGODB_URI="mongodb://ann:s3cret@127.0.0.1:1/?serverSelectionTimeoutMS=200")
    assert done.returncode == 3, done.stderr
    assert "127.0.0.1:1" in done.stdout + done.stderr
    assert "--embedded" in done.stdout + done.stderr
    assert "s3cret" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_wrong_password_is_3_and_says_so(shell: Shell, mongodb_uri: str) -> None:
    uri = mongodb_uri.replace("mongodb://", "mongodb://ann:s3cret@", 1)
    for words in ((), ("runs", "list")):
        done = shell("--mongodb-uri", uri, *words)
        assert done.returncode == 3
        assert "user name or password" in done.stderr
        assert "s3cret" not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("uri", ["http://x", "mongodb://ann:s3/cret@h", "mongodb://h:99999", "mongodb://h/?tls=perhaps", "mongodb://"])
def test_a_uri_that_is_none_is_2_as_a_flag_and_78_elsewhere(offline: Shell, uri: str) -> None:
    as_flag, in_environ = offline("--mongodb-uri", uri, "runs", "list"), offline("runs", "list", STREAMLINE_MONGODB_URI=uri)
    (offline.folder / "streamline-pool.toml").write_text(f"mongodb-uri = {json.dumps(uri)}")
    in_file = offline("runs", "list", STREAMLINE_MONGODB_URI="")
    assert [as_flag.returncode, in_environ.returncode, in_file.returncode] == [2, 78, 78]
    assert "s3" not in as_flag.stderr + in_environ.stderr + in_file.stderr


@pytest.fixture
def uri_with_password(mongodb_uri: str, database: str) -> Iterator[str]:
    """A user of the test's own database; the server checks the password of whoever gives one."""
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        client[database].command("createUser", "ann", pwd="s3cret", roles=["readWrite"])
        separator = "&" if "?" in mongodb_uri else "?"
        yield mongodb_uri.replace("mongodb://", "mongodb://ann:s3cret@", 1) + f"{separator}authSource={database}"
        client[database].command("dropUser", "ann")


@pytest.mark.slow
def test_no_password_in_the_process_list_or_the_log(shell: Shell, uri_with_password: str) -> None:
    """The argument list of every process can be read by every user of the machine."""
    process = shell.start_pool("--mongodb-uri", uri_with_password, "--log-level", "debug")
    try:
        said = wait_for_line(process, "ready")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        titles = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in (process.pid, *children)]
        process.terminate()
        rest = process.communicate(timeout=30)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert len(titles) == 3, "supervisor, steward and one worker"
    assert all(b"s3cret" not in title and b"mongodb://ann:***@" in title for title in titles)
    assert "s3cret" not in said + rest


def test_init_db_can_be_repeated(shell: Shell, mongodb_uri: str, database: str) -> None:
    first, second = shell.json("init-db"), shell.json("init-db")
    assert first == second
    assert first["database"] == database
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        assert {"workflow_runs", "workflow_hosts", "workflow_signals"} <= set(client[database].list_collection_names())
        assert client[database]["workflow_signals"].options()["capped"] is True


@pytest.mark.slow
def test_check_reports_application_and_database(shell: Shell, database: str) -> None:
    report = shell.json("check")
    assert report["ok"] is True
    assert report["workflows"] == [
        {"id": "orders", "version": "1.0.0", "queue": "default", "steps": ["reserve", "charge"]},
        {"id": "asking", "version": "1.0.0", "queue": "default", "steps": ["ask", "act"]},
        {"id": "slow", "version": "2.0.0", "queue": "mail", "steps": ["nap"]},
    ]
    assert report["queues"] == ["default", "mail"]
    assert report["database"]["database"] == database
    assert report["database"]["topology"].startswith("replica set")
    text = shell("check").stdout
    assert "orders" in text
    assert "reserve → charge" in text
    away = shell.json("check", "--mongodb-uri", NOWHERE, code=3)
    assert (away["ok"], away["database"]["ok"]) == (False, False)


def test_doctor_finds_nothing_broken_here(shell: Shell) -> None:
    shell("init-db")
    findings = {finding["name"]: finding for finding in shell.json("doctor")}
    assert findings["application"]["state"] == "ok"
    assert findings["database"]["state"] == "ok"
    assert findings["indexes"]["state"] == "ok"
    assert findings["clock"]["state"] == "ok"
    assert "database: " in shell("doctor").stdout
    assert "retired indexes" not in findings


def test_doctor_names_an_index_that_only_an_earlier_version_uses(shell: Shell, mongodb_uri: str, database: str) -> None:
    """It costs a write at every claim for ever, and no operator would think of it."""
    shell("init-db")
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        client[database]["workflow_runs"].create_index({"lane": 1, "slot": 1, "priority": -1, "wakeAt": 1}, name="streamline_due")
    (finding,) = [finding for finding in shell.json("doctor") if finding["name"] == "retired indexes"]
    assert finding["state"] == "warn"
    assert 'db.workflow_runs.dropIndex("streamline_due")' in finding["text"]


# --- rights ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_lacking_right_is_3_and_named(offline: Shell, guarded: str) -> None:
    """A server greets everybody; who only looked whether it answers would call this set-up fine."""
    reader = {"STREAMLINE_MONGODB_URI": f"mongodb://reader:s3cret@{guarded}/shop", "STREAMLINE_APP": "shop:app", "STREAMLINE_WORKERS": "1"}
    for words in ((), ("check",), ("doctor",), ("init-db",), ("start", "orders")):
        done = offline(*words, **reader)
        assert done.returncode == 3, (words, done.stderr)
        assert "readWrite" in done.stdout + done.stderr
        assert "'shop'" in done.stdout + done.stderr
        assert "s3cret" not in done.stdout + done.stderr
    assert offline("runs", "list", **reader).returncode == 0
    nobody = offline("runs", "list", STREAMLINE_MONGODB_URI=f"mongodb://{guarded}/shop")
    assert nobody.returncode == 3
    assert "requires authentication" in nobody.stderr


@pytest.mark.slow
def test_a_server_that_is_no_replica_set_works_but_is_told(offline: Shell, guarded: str) -> None:
    writer = {"STREAMLINE_MONGODB_URI": f"mongodb://writer:s3cret@{guarded}/shop", "STREAMLINE_APP": "shop:app"}
    for name in ("check", "doctor"):
        done = offline(name, **writer)
        assert done.returncode == 0, done.stderr
        assert "not a replica set" in done.stdout
    assert offline("start", "orders", "--id", "o-1", **writer).returncode == 0
    assert offline("--burst", **writer).returncode == 0
    assert json.loads(offline("runs", "show", "o-1", "--json", **writer).stdout)["status"] == "done"
