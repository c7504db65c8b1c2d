"""Fixtures every suite may use: one real mongod for the session, one database for each test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from uuid import uuid4

import pytest
from pymongo import MongoClient

from streamline_pool import embedded

SERVER_VARIABLE = "STREAMLINE_TEST_MONGODB_URI"


@pytest.fixture(scope="session")
def mongod() -> Iterator[embedded.EmbeddedServer]:
    """A private mongod that the test may halt, kill and restart, if it leaves it running. Each xdist worker has its own."""
    if SERVER_VARIABLE in os.environ:
        pytest.skip(f"needs a server of its own to command; {SERVER_VARIABLE} names one that is not ours")
    with embedded.start(None) as server:
        yield server


@pytest.fixture(scope="session")
def mongodb_uri(request: pytest.FixtureRequest) -> str:
    """Where the tests' server is, without a database: that of STREAMLINE_TEST_MONGODB_URI, or the fixture `mongod`."""
    given = os.environ.get(SERVER_VARIABLE)
    return given or request.getfixturevalue("mongod").uri


@pytest.fixture
def database(mongodb_uri: str) -> Iterator[str]:
    """The name of a database that is this test's alone, and is dropped after it."""
    name = f"streamline_test_{uuid4().hex[:12]}"
    yield name
    with MongoClient(mongodb_uri) as client:
        client.drop_database(name)
