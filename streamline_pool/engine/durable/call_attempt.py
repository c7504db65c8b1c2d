"""One attempt at a call of a durable function: `fn` on the loop or on a thread, brought to the outcomes of attempt.py.

Owns what differs from a step's attempt: `fn` runs within the task of its caller, so only `fn` may be cancelled by its timeout, and a
cancellation by the caller must reach the caller.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from streamline_pool.domain.definition import Handler, StepDefinition, is_coroutine_function
from streamline_pool.engine.attempt import Attempt, Kind, Outcome, enter_async
from streamline_pool.engine.context import Context
from streamline_pool.engine.handler_threads import HandlerThreads

__all__ = ["CallAttempt", "current_context", "handler_of"]

current_context: contextvars.ContextVar[Context | None] = contextvars.ContextVar("streamline_pool_current_step", default=None)


def handler_of(fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Handler, bool]:
    """`fn(*args)` as a step's handler, and whether that is a coroutine function."""
    if is_coroutine_function(fn):

        async def call_async(context: Context) -> Any:
            token = current_context.set(context)
            try:
                return await fn(*args)
            finally:
                current_context.reset(token)

        return call_async, True
    variables = contextvars.copy_context()  # as `asyncio.to_thread` does

    def call(context: Context) -> Any:
        return variables.run(_call, context, fn, args)

    return call, False


def _call(context: Context, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    token = current_context.set(context)
    try:
        return fn(*args)
    finally:
        current_context.reset(token)  # else the copy of the variables keeps the run


class CallAttempt(Attempt):
    """As `Attempt`, within the task that awaits the call. The time of a `def` counts from its entry: it may have waited for a thread."""

    __slots__ = ("_scope",)

    _scope: asyncio.Timeout

    async def run(self, step: StepDefinition, threads: HandlerThreads) -> Outcome:
        """See `Attempt.run`."""
        if step.is_async or step.timeout_s is None:
            return await super().run(step, threads)
        may_enter, timeout_s = self._may_enter, step.timeout_s

        def enters() -> bool:
            if not may_enter():
                return False
            self._call_soon(self._start_timer, timeout_s)
            return True

        self._may_enter = enters
        return await super().run(replace(step, timeout_s=None), threads)

    def _start_timer(self, timeout_s: float) -> None:
        if not self.over:
            self._timers.append(self._loop.call_later(timeout_s, self.abort, "timeout"))

    async def _run_async(self, handler: Handler) -> Outcome:
        self._scope = asyncio.timeout(None)
        self._task = asyncio.current_task(self._loop)
        try:
            async with self._scope:
                return await enter_async(handler, self.context)
        finally:
            self._task = None

    async def _run_on_thread(self, handler: Handler, threads: HandlerThreads) -> Outcome:
        outcome = await super()._run_on_thread(handler, threads)
        if outcome.kind is not Kind.RETURNED or not inspect.isawaitable(outcome.value):
            return outcome
        return await self._await(outcome.value)

    async def _await(self, made: Awaitable[Any]) -> Outcome:
        """`fn` is a `def` or a lambda that makes an awaitable: the same attempt goes on in the loop."""
        if self.context.signal.aborted:
            if inspect.iscoroutine(made):
                made.close()
            return Outcome(Kind.ABANDONED, None)
        self.result = self._work = None  # from here on it is as a coroutine handler

        async def wait(context: Any) -> Any:
            token = current_context.set(context)
            try:
                return await made
            finally:
                current_context.reset(token)

        return await self._run_async(wait)

    def _cancel_task(self) -> None:
        self._scope.reschedule(self._loop.time())
