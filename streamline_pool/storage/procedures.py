"""Client code written once, without I/O: generators that yield operations and are sent their results.

Owns what such a procedure may ask for and how often it is repeated; store.py performs it by PyMongo's synchronous or
its asyncio API (the idea is "sans-IO", as in h11 and hyper-h2).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import Any, NamedTuple, TypeVar

from streamline_pool.config.env import Env
from streamline_pool.domain.errors import StoreUnavailableError, WorkflowError
from streamline_pool.protocol.operations import Op, Signal, Tail

__all__ = ["AwaitSignal", "Effect", "Procedure", "Sleep", "is_hint", "repeating", "until_answered"]

T = TypeVar("T")

_REPEAT_S = 10.0  # a fail-over of a replica set takes some seconds
_PAUSE_MAX_S = 1.0


class Sleep(NamedTuple):
    """An effect: wait this long."""

    seconds: float


class AwaitSignal(NamedTuple):
    """An effect: wait for a signal that matches, at most this long. A hint, never a promise."""

    tail: Tail
    seconds: float


Effect = Op | Sleep | AwaitSignal
Procedure = Generator[Effect, Any, T]
"""Yields effects, is sent their results or thrown their errors, and returns a T."""


def is_hint(effect: Effect) -> bool:
    """True for an operation that nobody relies on: sent once, outside of any transaction."""
    return isinstance(effect, Signal)


def repeating(procedure: Procedure[T], env: Env) -> Procedure[T]:
    """The same procedure, in which what fails for a passing reason is tried again, for ten seconds from the first failure.

    Repeating is safe because every operation that a procedure yields either reads, or names the call that made it.
    """
    until = 0.0
    failures = 0
    answer: Any = None
    try:
        effect = next(procedure)
        while True:
            try:
                answer = yield effect
            except WorkflowError as exc:
                if isinstance(effect, AwaitSignal):
                    # Nobody relies on hearing anything: whether the database is there, the next look tells.
                    yield Sleep(min(effect.seconds, _PAUSE_MAX_S))
                    effect = procedure.send(None)
                    continue
                if not failures:
                    until = env.clock.monotonic() + _REPEAT_S
                if is_hint(effect) or not exc.context.get("transient") or env.clock.monotonic() > until:
                    effect = procedure.throw(exc)
                    continue
                failures += 1
                yield Sleep(min(0.05 * 2.0 ** min(failures, 10), _PAUSE_MAX_S) * (0.5 + env.random() / 2))
                continue
            failures = 0
            effect = procedure.send(answer)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        procedure.close()


_READ_AGAIN_S = 0.2  # while the database does not answer; a guess


async def until_answered(act: Callable[[], Awaitable[T]], env: Env) -> T:
    """Repeat `act` until the database answers. Only for what may be repeated: reads, and writes that name their content."""
    while True:
        try:
            return await act()
        except StoreUnavailableError:
            await env.async_sleep(_READ_AGAIN_S)
