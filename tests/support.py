"""Small functions that every suite uses. Owns waiting for a condition; leaves processes and workers to the modules beside it."""

from __future__ import annotations

import os
import re
import reprlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["REPOSITORY", "environ_without_settings", "eventually", "present", "shown"]

T = TypeVar("T")

REPOSITORY = Path(__file__).resolve().parents[1]
POLL_S = 0.01


def eventually(predicate: Callable[[], T], *, timeout: float = 10.0) -> T:
    """Call `predicate` every 10 ms and return its first truthy value; AssertionError with the last value after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {getattr(predicate, '__name__', predicate)}, last value {value!r}")
        time.sleep(POLL_S)
    return value


def present(value: T | None) -> T:
    """`value`, which must not be None: for what an API returns only if it exists, such as `Workflow.get` and `Run.error`."""
    assert value is not None
    return value


def shown(value: object) -> str:
    """A value as part of a test's name: short, and without addresses, because every process must compute the same name."""
    return re.sub(r" at 0x[0-9a-f]+|[.]{3}x?[0-9a-f]+", "", reprlib.repr(value))[:50]


def environ_without_settings(**more: str) -> dict[str, str]:
    """The test's environment for a child process: without STREAMLINE_ variables, which would change its settings; with `more`."""
    return {name: value for name, value in os.environ.items() if not name.startswith("STREAMLINE_")} | more
