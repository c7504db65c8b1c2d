"""Fixtures of the command's tests."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_shell import NOWHERE, Shell, wait_for_line


@pytest.fixture
def offline(tmp_path: Path) -> Shell:
    """For what must be told without a database: its address is one where nothing listens."""
    return Shell(tmp_path, {"STREAMLINE_MONGODB_URI": NOWHERE})


@pytest.fixture
def shell(tmp_path: Path, mongodb_uri: str, database: str) -> Shell:
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
