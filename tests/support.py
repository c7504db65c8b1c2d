"""What tests share. `eventually` is the only place where a test waits for time to pass."""

from __future__ import annotations

import re
import reprlib
import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["eventually", "shown"]

T = TypeVar("T")

POLL_S = 0.01


def eventually(predicate: Callable[[], T], *, timeout: float = 10.0) -> T:
    """The first truthy value of `predicate`, asked every 10 ms; AssertionError with the last one after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {getattr(predicate, '__name__', predicate)}, last value {value!r}")
        time.sleep(POLL_S)
    return value


def shown(value: object) -> str:
    """A value as part of a test's name: the same in every process, so without addresses, and not too long."""
    return re.sub(r" at 0x[0-9a-f]+|[.]{3}x?[0-9a-f]+", "", reprlib.repr(value))[:50]
