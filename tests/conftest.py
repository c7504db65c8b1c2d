"""Fixtures every suite may use: one real mongod for the session, one database for each test, an application on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
from pymongo import MongoClient

from streamline_pool import Settings, Streamline, embedded
from streamline_pool.config.env import Env

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


@pytest.fixture
def make_app(mongodb_uri: str, database: str) -> Iterator[Callable[..., Streamline]]:
    """Makes `Streamline`s on the test's own database; keywords are settings, `env` and `collection_prefix`. All are closed at the end."""
    made: list[Streamline] = []

    def make(*, env: Env | None = None, collection_prefix: str = "workflow_", **settings: Any) -> Streamline:
        app = Streamline(mongodb_uri, database=database, env=env, collection_prefix=collection_prefix, settings=Settings(**settings))
        made.append(app)
        return app

    yield make
    for app in made:
        app.close()


@pytest.fixture
def app(make_app: Callable[..., Streamline]) -> Streamline:
    """A `Streamline` on the test's own database."""
    return make_app()
