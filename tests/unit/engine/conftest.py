"""Fixtures of the tests of parallel calls."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from streamline_pool import execute_parallel, execute_parallel_sync
from streamline_pool.engine.parallel_group import abandoned_tasks
from support import eventually


@pytest.fixture(params=["async", "sync"])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """One of the two functions, called from synchronous code."""
    if request.param == "sync":
        return execute_parallel_sync

    def call(*args: Any, **options: Any) -> Any:
        async def main() -> Any:
            try:
                return await execute_parallel(*args, **options)
            finally:
                others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
                assert all("streamline" not in task.get_name() for task in others if task not in abandoned_tasks), others

        return asyncio.run(main())

    return call


@pytest.fixture(scope="module")
def quick_collections() -> Iterator[None]:
    """Keeps the objects made before these tests out of the garbage collections that follow each of them."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def nothing_is_left(quick_collections: None, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Afterwards there is no thread, no task, and no warning of asyncio about an error or a task that was not awaited."""
    yield
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("streamline-parallel")])
    gc.collect()
    assert not abandoned_tasks
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio" and record.levelno >= logging.WARNING] == []
