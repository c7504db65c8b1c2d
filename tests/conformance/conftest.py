"""Fixtures of the command's tests, runs that wait, the client of a pool, and a server with access control."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_shell import NOWHERE, Shell, wait_for_line
from parked_runs import Waiting
from pymongo import MongoClient
from pymongo.errors import PyMongoError
from waiting_app import waiting_app

from streamline_pool import Streamline, embedded
from streamline_pool.testing import TestKit
from support import eventually


@pytest.fixture
def waiting(app: Streamline) -> Waiting:
    """A workflow whose runs wait in the way that their input names."""
    return Waiting(app)


@pytest.fixture
def client(mongodb_uri: str, database: str) -> Iterator[Streamline]:
    """The application of waiting_app.py in the test's own process, as a client of its pools."""
    with waiting_app(mongodb_uri, database) as app:
        yield app


@pytest.fixture
def kit(mongodb_uri: str) -> Iterator[TestKit]:
    """The kit for users' tests."""
    with TestKit(mongodb_uri) as kit:
        yield kit


@pytest.fixture
def offline(tmp_path: Path) -> Shell:
    """A shell for commands that must not need a database: no server listens at its address."""
    return Shell(tmp_path, {"STREAMLINE_MONGODB_URI": NOWHERE})


@pytest.fixture
def shell(tmp_path: Path, mongodb_uri: str, database: str) -> Shell:
    """A shell whose commands use the test's database and the application of cli_shell.py."""
    environ = {
        "STREAMLINE_MONGODB_URI": mongodb_uri,
        "STREAMLINE_DATABASE": database,
        "STREAMLINE_APP": "shop:app",
        "STREAMLINE_WORKERS": "1",
    }
    return Shell(tmp_path, environ)


@pytest.fixture
def pool(shell: Shell) -> Iterator[subprocess.Popen[str]]:
    """A pool that is ready."""
    process = shell.start_pool()
    try:
        assert process.stderr is not None
        wait_for_line(process, "ready")
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a standalone server with access control. Its users: `writer` and `reader` of the database `shop`."""
    folder = tmp_path_factory.mktemp("guarded")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [str(embedded.find_mongod()), "--auth", "--dbpath", str(folder), "--port", port, "--bind_ip", "127.0.0.1"]
    server = subprocess.Popen([*command, "--nounixsocket", "--wiredTigerCacheSizeGB", "0.25"], stdout=subprocess.DEVNULL)
    address = f"127.0.0.1:{port}"
    try:
        eventually(lambda: _is_up(address), timeout=30)
        with MongoClient[dict[str, Any]](f"mongodb://{address}") as client:
            client["admin"].command("createUser", "root", pwd="s3cret", roles=["root"])
        with MongoClient[dict[str, Any]](f"mongodb://root:s3cret@{address}") as client:
            client["shop"].command("createUser", "reader", pwd="s3cret", roles=["read"])
            client["shop"].command("createUser", "writer", pwd="s3cret", roles=["readWrite"])
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)


def _is_up(address: str) -> bool:
    try:
        with MongoClient[dict[str, Any]](f"mongodb://{address}", serverSelectionTimeoutMS=200) as client:
            return bool(client["admin"].command("ping")["ok"])
    except PyMongoError:
        return False
