"""The proxy of the nemesis: clients reach a replica set only through it, and what it does to them is what its modes say."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from pymongo import MongoClient
from pymongo.errors import AutoReconnect, NetworkTimeout

from streamline_pool.chaos.link import Link
from streamline_pool.chaos.wire import is_commit


@pytest.fixture
def client(link: Link) -> Iterator[MongoClient[dict[str, Any]]]:
    uri = f"mongodb://{link.addresses[0]}/?replicaSet=rs0&socketTimeoutMS=300&serverSelectionTimeoutMS=3000&retryReads=false&retryWrites=false"
    with MongoClient[dict[str, Any]](uri) as client:
        client.admin.command("ping")
        yield client


def test_a_client_of_the_set_sees_the_addresses_of_the_proxy_only(client: MongoClient[dict[str, Any]], link: Link) -> None:
    """A driver connects to the members that the server names, so it would otherwise go past the proxy."""
    host, _, port = link.addresses[0].rpartition(":")
    assert client.nodes == {(host, int(port))}


def test_a_delay_makes_a_round_trip_longer_by_twice_its_length(client: MongoClient[dict[str, Any]], link: Link) -> None:
    link.order("delay", s=0.1)
    begun = time.monotonic()
    client.admin.command("ping")
    assert 0.2 <= time.monotonic() - begun < 0.3


@pytest.mark.parametrize("mode", ["partition", "swallow", "deaf"])
def test_a_client_gets_no_answer_until_the_fault_is_over(client: MongoClient[dict[str, Any]], link: Link, mode: str) -> None:
    link.order(mode)
    with pytest.raises(NetworkTimeout):
        client.admin.command("ping")
    link.order("pass")
    client.admin.command("ping")


@pytest.mark.slow
def test_refused_connections_are_errors_at_once(client: MongoClient[dict[str, Any]], link: Link) -> None:
    link.order("refuse")
    with pytest.raises(AutoReconnect):
        client.admin.command("ping")
    link.order("pass")
    client.admin.command("ping")


def test_a_commit_is_held_until_it_is_released(client: MongoClient[dict[str, Any]], link: Link, database: str) -> None:
    """The nemesis freezes the sender meanwhile, so it must know who that is, and nothing else may be held."""
    runs = client[database]["workflow_runs"]
    link.order("hold")
    runs.update_one({"_id": "r"}, [{"$set": {"rev": 1, "steps.0": 1}}], upsert=True)  # a pipeline: no commit
    assert not link.wait_held(0.0)
    with pytest.raises(NetworkTimeout):
        runs.update_one({"_id": "r"}, {"$set": {"rev": 2, "steps.0": {"status": "done"}}})
    assert link.wait_held(1.0)
    assert link.held_port
    link.order("release")
    client.admin.command("ping")


def test_what_is_no_update_of_runs_is_no_commit() -> None:
    assert not is_commit(b"\x00" * 16)
