"""One entry into a handler: run it on the loop or on a thread, and bring whatever it does to a closed set of outcomes.

Owns timeouts, aborts and handlers that will not end. Knows nothing of storage: what an outcome means for the run is
decided in engine.py and transitions.py (Oban normalises results in one place, too: `queues/executor.ex`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import traceback
from collections.abc import Callable
from concurrent.futures import Executor, Future
from enum import Enum
from typing import Any, NamedTuple

from streamline_pool.domain.definition import Handler, StepDefinition
from streamline_pool.domain.errors import ErrorCode, NonRetriableError, ValidationError
from streamline_pool.domain.transitions import Failure

from .context import Context, Suspension, current_signal

__all__ = ["Attempt", "Kind", "Outcome", "failure_of", "timeout_failure"]

ABORT_GRACE_S = 2.0
"""How long an `async def` handler may clean up after its cancellation, before it counts as stuck. A guess."""

_TRACEBACK_CHARS_MAX = 8_000
_MESSAGE_CHARS_MAX = 2_000


_forks = 0  # of this process and its ancestors; tells a handler's own child from us without a system call per step


def _count_fork() -> None:
    global _forks  # noqa: PLW0603 -- a property of the process, as its pid is
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class Kind(Enum):
    """How a handler ended."""

    RETURNED = "returned"  # value: its output
    RAISED = "raised"  # value: the exception, of any kind
    SUSPENDED = "ended"  # value: the `Ending` that ctx.sleep or its kin raised
    ABANDONED = "abandoned"  # it was told to stop and has not; value: None


class Outcome(NamedTuple):
    """What came of one entry into a handler."""

    kind: Kind
    value: Any


class Attempt:
    """A handler at work. `abort` may be called at any moment from the loop.

    An `async def` handler runs in its driver's own task (a task apiece would cost a sixth of a short step's time), a
    `def` handler on a thread. Either may refuse to end: then `on_stuck` is told, and the driver goes on without it.
    """

    __slots__ = ("_forks", "_loop", "_on_stuck", "_task", "_timers", "_work", "context", "over", "settled")

    def __init__(self, loop: asyncio.AbstractEventLoop, context: Context, on_stuck: Callable[[Attempt, str], None]) -> None:
        self._loop = loop
        self.context = context
        self._on_stuck = on_stuck
        self._forks = _forks
        self._timers: list[asyncio.TimerHandle] = []
        self._task: asyncio.Task[Any] | None = None  # the driver, while a coroutine handler runs in it
        self._work: Future[Outcome] | None = None  # what a thread is working on
        self.settled: asyncio.Future[Outcome] | None = None  # a thread's outcome
        self.over = False  # the outcome is decided; what the handler does from here on counts for nothing

    async def run(self, step: StepDefinition, threads: Executor) -> Outcome:
        """Enter the handler and bring back what came of it. Raises nothing that the handler raises."""
        if step.timeout_s is not None:
            self._timers.append(self._loop.call_later(step.timeout_s, self.abort, "timeout"))
        if step.is_async:
            outcome = await self._run_async(step.handler)
        else:
            self.settled = self._loop.create_future()
            self._work = threads.submit(_run_sync, step.handler, self.context, self._forks)
            self._work.add_done_callback(self._thread_done)
            outcome = await self.settled
        self._finish()
        return outcome

    async def _run_async(self, handler: Handler) -> Outcome:
        task = self._task = asyncio.current_task(self._loop)
        assert task is not None, "drivers are tasks"
        try:
            outcome = Outcome(Kind.RETURNED, await handler(self.context))
        except Suspension as suspension:
            outcome = Outcome(Kind.SUSPENDED, suspension)
        except BaseException as exc:  # noqa: BLE001 -- whatever a handler raises is its attempt's failure, never the worker's
            outcome = Outcome(Kind.RAISED, exc)
        if _forks != self._forks:
            os._exit(0)  # the handler forked, and this is the child coming back: the run belongs to the parent
        if task.cancelling():
            # A cancellation that was meant for the handler must not hit the driver's next await.
            while task.uncancel():
                pass
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
        return outcome

    def abort(self, reason: str, grace_s: float = ABORT_GRACE_S) -> None:
        """Fire the handler's signal. Its outcome follows soon, whether it obeys or not.

        A coroutine is cancelled, and has `grace_s` to clean up, so that it does not run beside its own retry. A thread
        cannot be stopped: on a shutdown it has `grace_s`; otherwise its attempt is over at once. Either way a handler
        that is still at work after the grace is stuck.
        """
        if self.over:
            return
        self.context.signal._fire(reason)
        if self._task is not None:
            self._task.cancel()
        elif reason != "shutdown" or (self._work is not None and self._work.cancel()):
            self._settle(Outcome(Kind.ABANDONED, None))
        self._timers.append(self._loop.call_later(grace_s, self._out_of_grace))

    def _out_of_grace(self) -> None:
        if self._work is not None and self._work.done():
            return
        self._settle(Outcome(Kind.ABANDONED, None))
        self.over = True
        self._on_stuck(self, f"run {self.context.run_id}: the handler of step {self.context.step_id} goes on after its attempt is over")

    def _finish(self) -> None:
        self.over = True
        if self._work is None or self._work.done():  # else the timer of the grace is still wanted
            for timer in self._timers:
                timer.cancel()

    def _settle(self, outcome: Outcome) -> None:
        if self.settled is not None and not self.settled.done():
            self.settled.set_result(outcome)

    def _thread_done(self, work: Future[Outcome]) -> None:
        outcome = Outcome(Kind.ABANDONED, None) if work.cancelled() else work.result()
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is leaving and has given the run back
            self._loop.call_soon_threadsafe(self._settle, outcome)


def _run_sync(handler: Handler, context: Context, forks: int) -> Outcome:
    if context.signal.aborted:
        return Outcome(Kind.ABANDONED, None)  # it waited for a thread until its attempt was over
    token = current_signal.set(context.signal)
    try:
        value = handler(context)
        outcome = Outcome(Kind.RETURNED, value)
    except Suspension as suspension:
        outcome = Outcome(Kind.SUSPENDED, suspension)
    except BaseException as exc:  # noqa: BLE001 -- as above
        outcome = Outcome(Kind.RAISED, exc)
    finally:
        current_signal.reset(token)  # the thread goes on to other handlers
    if _forks != forks:
        # The handler forked, and this is the child coming back: the run belongs to the parent.
        os._exit(0)
    return outcome


def failure_of(exc: BaseException) -> Failure:
    """A raised exception in words that can be stored."""
    code, retriable = ErrorCode.STEP_FAILED, True
    if isinstance(exc, Suspension):
        return Failure(ErrorCode.VALIDATION_ERROR, "a condition cannot sleep or wait, only its step's handler can", "Suspension", "", False)
    if isinstance(exc, ValidationError):
        code, retriable = exc.code, False
    elif isinstance(exc, NonRetriableError):
        retriable = False
    message = _text_of(exc)
    if isinstance(exc, SystemExit):
        message = f"the handler called {message}; raise an exception or return instead"
    elif isinstance(exc, asyncio.CancelledError):
        message = message or "the handler was cancelled by its own code"
    name = _storable(type(exc).__name__)
    message = message or f"{name} without a message"
    return Failure(code, message[:_MESSAGE_CHARS_MAX], name, _traceback_of(exc), retriable)


def timeout_failure(step: StepDefinition) -> Failure:
    """The attempt ran longer than it may."""
    return Failure(
        ErrorCode.STEP_TIMEOUT, f"step {step.id} ran longer than its timeout of {step.timeout_s} s", "StepTimeoutError", "", True
    )


def _text_of(exc: BaseException) -> str:
    try:
        if isinstance(exc, SystemExit):
            return _storable(f"sys.exit({exc.code!r})")
        return _storable(exc.message if isinstance(exc, ValidationError) else str(exc))
    except BaseException:  # noqa: BLE001 -- user code: it may raise anything, and a SystemExit would end the worker
        return "(the exception's own __str__ failed)"


def _traceback_of(exc: BaseException) -> str:
    try:
        frames = exc.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next  # where we called the handler tells its author nothing
        return _storable("".join(traceback.format_exception(type(exc), exc, frames)))[-_TRACEBACK_CHARS_MAX:]
    except BaseException:  # noqa: BLE001 -- formatting calls user code, too
        return "(the traceback could not be formatted)"


def _storable(text: str) -> str:
    # Lone surrogates come from undecodable bytes; BSON strings are UTF-8.
    return text.encode("utf-8", "backslashreplace").decode()
