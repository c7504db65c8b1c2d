"""Errors of the driver that are no PyMongoError, and what callers see in their place."""

from __future__ import annotations

import asyncio

import pytest

from streamline_pool.domain.errors import StoreUnavailableError
from streamline_pool.storage.driver_errors import DriverErrors
from streamline_pool.storage.target import DatabaseTarget

WHERE = DatabaseTarget(uri="mongodb://127.0.0.1/", database="d", prefix="workflow_")


async def a_wait_that_loses_its_lock() -> None:
    """What PyMongo 4 does when a wait for a server is cancelled: it leaves the block of a lock that it does not hold any more."""
    try:
        await asyncio.sleep(60)
    finally:
        raise RuntimeError("Lock is not acquired")


async def call(name: str) -> None:
    with DriverErrors(name, WHERE, in_transaction=False):
        await a_wait_that_loses_its_lock()


async def given_up_soon() -> None:
    await asyncio.wait_for(call("ping"), 0.01)


def test_a_call_that_is_given_up_ends_as_a_cancelled_one() -> None:
    """A steward's probe gave up a call during an outage, got a RuntimeError in place of the timeout, and the steward died of it."""
    with pytest.raises(TimeoutError):
        asyncio.run(given_up_soon())


def test_a_runtime_error_that_no_cancel_has_caused_passes_unchanged() -> None:
    with pytest.raises(RuntimeError, match="Lock"), DriverErrors("ping", WHERE, in_transaction=False):
        raise RuntimeError("Lock is not acquired")


def test_a_driver_that_gets_no_thread_is_unavailable() -> None:
    """A client starts threads that watch the server. At the limit of threads every first call failed with an error of no known type."""
    unavailable = pytest.raises(StoreUnavailableError, match=r"ping: MongoDB at .*can't start new thread")
    with unavailable as caught, DriverErrors("ping", WHERE, in_transaction=False):
        raise RuntimeError("can't start new thread")
    assert caught.value.context["transient"] is True
