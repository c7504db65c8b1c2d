"""Tasks for the tests of parallel calls: they return, fail, or run until they are stopped."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

__all__ = ["FOREVER_S", "Sleeper", "abandoned_in_log", "fail", "failing", "value_of"]

FOREVER_S = 30.0  # far more than any of these tests may take, and too short to block the suite


def abandoned_in_log(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    entries = [record.__dict__ for record in caplog.records if record.getMessage() == "parallel_task_left_behind"]
    return [(entry["place"], entry["kind"]) for entry in entries]


async def value_of(value: Any) -> Any:
    await asyncio.sleep(0)
    return value


async def failing(error: BaseException) -> Any:
    await asyncio.sleep(0)
    raise error


def fail(error: BaseException) -> Any:
    raise error


class Sleeper:
    """An `async def` task that runs until it is stopped, and takes a moment to clean up."""

    def __init__(self) -> None:
        self.entered = 0
        self.stopped = 0  # clean-ups that were completed

    async def __call__(self) -> None:
        self.entered += 1
        try:
            await asyncio.sleep(FOREVER_S)
        finally:
            await asyncio.sleep(0.01)
            self.stopped += 1
