"""Fixtures of every suite: one real mongod per session, one database per test, and applications on it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from databases import Databases
from loop_watch import LoopWatchPlugin

from streamline_pool import Settings, Streamline, embedded
from streamline_pool.chaos.link import Link
from streamline_pool.config.env import Env

SERVER_VARIABLE = "STREAMLINE_TEST_MONGODB_URI"


def pytest_configure(config: pytest.Config) -> None:
    """Watch event loops, and give the hundreds of programs that tests start one cache of compiled modules.

    Where the environment forbids writing it beside the sources, each of them would compile the whole package again.
    """
    config.pluginmanager.register(LoopWatchPlugin(), "loop_watch")
    if not hasattr(config, "workerinput"):  # xdist's workers inherit the environment of this process
        folder = tempfile.mkdtemp(prefix="streamline-tests-pycache-")
        os.environ["PYTHONPYCACHEPREFIX"] = folder
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(scope="session")
def mongod() -> Iterator[embedded.EmbeddedServer]:
    """A private mongod. A test may halt, kill and restart it, and must leave it running. Each xdist worker has its own."""
    if SERVER_VARIABLE in os.environ:
        pytest.skip(f"needs a private server that it may stop; {SERVER_VARIABLE} names a server that others may use")
    with embedded.start(None) as server:
        yield server


@pytest.fixture(scope="session")
def mongodb_uri(request: pytest.FixtureRequest) -> str:
    """The URI of the tests' server, without a database: STREAMLINE_TEST_MONGODB_URI, or else the fixture `mongod`."""
    given = os.environ.get(SERVER_VARIABLE)
    return given or request.getfixturevalue("mongod").uri


@pytest.fixture(scope="session")
def databases(mongodb_uri: str) -> Iterator[Databases]:
    """The databases of the tests."""
    databases = Databases(mongodb_uri)
    yield databases
    databases.close()


@pytest.fixture
def link(mongod: embedded.EmbeddedServer) -> Iterator[Link]:
    """A proxy in front of the private mongod, which loses, delays or refuses what passes."""
    link = Link([f"127.0.0.1:{mongod.port}"])
    yield link
    link.close()


@pytest.fixture
def database(databases: Databases) -> Iterator[str]:
    """The name of an empty database that only this test uses. It may have the engine's collections and indexes."""
    name = databases.take()
    yield name
    databases.give_back(name)


@pytest.fixture
def new_database(databases: Databases) -> Iterator[str]:
    """The name of a database that does not exist. It is removed afterwards."""
    name = databases.new()
    yield name
    databases.drop(name)


@pytest.fixture
def make_app(mongodb_uri: str, database: str) -> Iterator[Callable[..., Streamline]]:
    """Makes `Streamline` applications on the test's database. Keywords: settings, `env`, `collection_prefix`. All are closed afterwards."""
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
    """A `Streamline` application on the test's database."""
    return make_app()
