"""The signals between processes, in memory. A signal may be lost or come twice.

Owns what a tail reads. The capped collection is a hint channel, so nothing is stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .choices import Choices
from .loop import ACTOR

__all__ = ["Signals"]


class Signals:
    """Delivers each signal to every reader whose filter it matches."""

    def __init__(self, choices: Choices, lost: float, now: Callable[[], float]) -> None:
        self._choices = choices
        self._now = now
        self.stewards: dict[str, float] = {}  # the stewards that read, and since when
        self.lost = lost  # chance that a reader misses a signal, and that it reads it twice
        self._readers: list[tuple[Mapping[str, Any], asyncio.Queue[dict[str, Any]]]] = []

    def send(self, signal: dict[str, Any]) -> None:
        """Write one signal."""
        for wanted, queue in self._readers:
            if not _matches(signal, wanted):
                continue
            for _ in range(self.copies()):
                queue.put_nowait(signal)

    def copies(self) -> int:
        """How many times one hint arrives."""
        if not self.lost or not self._choices.happens(self.lost):
            return 1
        return self._choices.one_of((0, 0, 2))

    @contextmanager
    def reader(self, wanted: Mapping[str, Any]) -> Iterator[asyncio.Queue[dict[str, Any]]]:
        """Read from now on."""
        entry = (wanted, asyncio.Queue[dict[str, Any]]())
        self._readers.append(entry)
        owner = ACTOR.get()
        self.stewards[owner] = self._now()
        try:
            yield entry[1]
        finally:
            self._readers.remove(entry)
            self.stewards.pop(owner, None)


def _matches(signal: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(_has(signal.get(name), condition) for name, condition in wanted.items())


def _has(value: Any, condition: Any) -> bool:
    if isinstance(condition, Mapping):
        return all(_compares(value, operator, operand) for operator, operand in condition.items())
    return bool(value == condition or (isinstance(value, list) and condition in value))


def _compares(value: Any, operator: str, operand: Any) -> bool:
    match operator:
        case "$gte":
            return value is not None and bool(value >= operand)
        case "$in":
            return value in operand or (isinstance(value, list) and any(item in operand for item in value))
        case _:
            raise AssertionError(f"the explorer's signals know no {operator}")
