"""Client code written once, without I/O: generators that yield effects and are sent the results.

Owns which effects a procedure may yield and how often a failed one is repeated. store.py performs the effects by
PyMongo's synchronous or asyncio API (the idea is "sans-IO", as in h11 and hyper-h2).
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Generic, NamedTuple, TypeVar, cast

from streamline_pool.config.env import Env
from streamline_pool.domain.backoff import Backoff
from streamline_pool.domain.errors import StoreUnavailableError, WorkflowError
from streamline_pool.protocol.operations import Op, Signal, Tail

__all__ = ["AwaitSignal", "Effect", "Procedure", "ProcedureRun", "Sleep", "is_hint", "repeating", "until_answered"]

T = TypeVar("T")

_REPEAT_S = 10.0  # a fail-over of a replica set takes some seconds
_BACKOFF = Backoff(0.05, 1.0)


class Sleep(NamedTuple):
    """An effect: wait this long."""

    seconds: float


class AwaitSignal(NamedTuple):
    """An effect: wait for a signal that matches, at most this long. A hint: the signal may never arrive."""

    tail: Tail
    seconds: float


Effect = Op | Sleep | AwaitSignal
Procedure = Generator[Effect, Any, T]
"""Yields effects, is sent their results or thrown their errors, and returns a T."""


def is_hint(effect: Effect) -> bool:
    """True for an operation that no caller relies on: it is sent once, and never within a transaction."""
    return isinstance(effect, Signal)


class ProcedureRun(Generic[T]):
    """A procedure under way: the effect to perform next, and the result at the end. Performs nothing itself."""

    def __init__(self, procedure: Procedure[T]) -> None:
        self._procedure = procedure
        self._result: T | None = None
        self.effect: Effect | None = None  # None: the procedure has returned
        self._advance(lambda: next(procedure))

    def answer(self, result: Any) -> None:
        """Hand in the result of `effect`. Raises what the procedure raises."""
        self._advance(lambda: self._procedure.send(result))

    def fail(self, exc: WorkflowError) -> None:
        """Hand in the error of `effect`. Raises what the procedure raises."""
        self._advance(lambda: self._procedure.throw(exc))

    def _advance(self, step: Callable[[], Effect]) -> None:
        try:
            self.effect = step()
        except StopIteration as stop:
            self.effect, self._result = None, stop.value

    def result(self) -> T:
        """What the procedure returned. Only once `effect` is None."""
        return cast(T, self._result)

    def close(self) -> None:
        """End the procedure, also in the middle."""
        self._procedure.close()


def repeating(procedure: Procedure[T], env: Env, within_s: float | None = None) -> Procedure[T]:
    """The same procedure, but an effect that fails for a passing reason is repeated, for ten seconds from the first failure.

    No longer than `within_s` seconds from now, if that is given.
    Repeating is safe because every operation that a procedure yields either reads, or names the call that made it.
    """
    last = math.inf if within_s is None else env.clock.monotonic() + within_s
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
                    # No caller relies on a signal. The next read of the database shows whether the database answers.
                    yield Sleep(min(effect.seconds, _BACKOFF.ceiling_s))
                    effect = procedure.send(None)
                    continue
                if not failures:
                    until = min(env.clock.monotonic() + _REPEAT_S, last)
                if is_hint(effect) or not exc.context.get("transient") or env.clock.monotonic() > until:
                    effect = procedure.throw(exc)
                    continue
                failures += 1
                yield Sleep(min(_BACKOFF.delay_s(failures, env.random()), max(0.0, last - env.clock.monotonic())))
                continue
            failures = 0
            effect = procedure.send(answer)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        procedure.close()


_READ_AGAIN_S = 0.2  # a guess: work resumes within a moment of the database's return


async def until_answered(act: Callable[[], Awaitable[T]], env: Env) -> T:
    """The result of `act`, which is repeated until the database answers. To stop waiting, cancel the task.

    Only for operations that may be repeated: reads, and writes that name their content. Raises every error of `act` but
    StoreUnavailableError.
    """
    while True:
        try:
            return await act()
        except StoreUnavailableError:
            await env.async_sleep(_READ_AGAIN_S)
