"""One entry into a handler: run it on the loop or on a thread, and bring whatever it does to a closed set of outcomes.

Owns timeouts, aborts and handlers that do not end. Knows nothing of storage: what an outcome means for the run is
decided in outcomes.py (Oban normalises results in one place, too: `queues/executor.ex`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Future
from enum import Enum
from typing import Any, NamedTuple

from streamline_pool.domain.definition import Handler, StepDefinition

from .abort_signal import current_signal, fire_signal
from .handler_threads import HandlerThreads
from .intents import Intents, Suspension
from .run_context import RunContext

__all__ = ["ABORT_GRACE_S", "Attempt", "Kind", "Outcome", "enter_async"]

ABORT_GRACE_S = 2.0
"""Seconds that an `async def` handler may clean up after its cancellation, before it counts as stuck. A guess."""

_forks = 0  # of this process and its ancestors; shows a handler's own child process, without a system call per step


def _count_fork() -> None:
    global _forks  # noqa: PLW0603 -- a property of the process, as its pid is
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class Kind(Enum):
    """How an attempt ended."""

    RETURNED = "returned"  # value: its output
    RAISED = "raised"  # value: the exception, of any kind
    SUSPENDED = "suspended"  # value: the `Suspension` that ctx.sleep, ctx.wait or ctx.wait_for raised
    ABANDONED = "abandoned"  # the engine asked it to stop, and it has not; value: None
    NOT_ENTERED = "not entered"  # this process could not start a thread for it; value: None
    TOO_LATE = "too late"  # not entered: the lease was over before a thread began with it; value: None


class Outcome(NamedTuple):
    """What came of one entry into a handler."""

    kind: Kind
    value: Any


class Attempt:
    """One run of a handler. `abort` may be called at any moment from the loop.

    An `async def` handler runs in its driver's own task (a task of its own would cost a sixth of a short step's time), a
    `def` handler on a thread. Either may refuse to end: then `on_stuck` is called, and the driver goes on without it.
    """

    __slots__ = (
        "_forks",
        "_loop",
        "_may_enter",
        "_on_returned",
        "_on_stuck",
        "_stuck",
        "_task",
        "_thread_over",
        "_timers",
        "_work",
        "context",
        "intents",
        "over",
        "result",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: RunContext,
        intents: Intents,
        on_stuck: Callable[[Attempt, str], None],
        may_enter: Callable[[], bool],
    ) -> None:
        self._loop = loop
        self.context = context
        self.intents = intents  # what the handler asks for; closed with the attempt
        self._on_stuck = on_stuck
        self._may_enter = may_enter  # asked by the thread, immediately before the handler: the process may have been suspended since
        self._forks = _forks
        self._timers: list[asyncio.TimerHandle] = []
        self._task: asyncio.Task[Any] | None = None  # the driver, while a coroutine handler runs in it
        self._work: Future[Outcome] | None = None  # what a thread is working on
        self.result: asyncio.Future[Outcome] | None = None  # of a thread
        self._thread_over: asyncio.Future[None] | None = None  # made by the first `handler_over`
        self._on_returned: Callable[[], None] | None = None  # of a coroutine
        self._stuck = False
        self.over = False  # the outcome is decided; what the handler does from here on has no effect

    @property
    def on_thread(self) -> bool:
        """True for a `def` handler."""
        return self.result is not None

    @property
    def is_stuck(self) -> bool:
        """True for a handler that has not ended within its grace."""
        return self._stuck

    @property
    def goes_on(self) -> bool:
        """True while a thread works on the handler and does not count as stuck, also after the outcome."""
        return self._work is not None and not self._work.done() and not self._stuck

    def call_when_returned(self, callback: Callable[[], None]) -> bool:
        """Have `callback` called in the loop when the handler returns. False: it has returned. A stuck handler may never do so."""
        if self._work is not None and not self._work.done():
            self._work.add_done_callback(lambda _: self._call_soon(callback))
            return True
        if self._task is not None:
            self._on_returned = callback
            return True
        return False

    async def handler_over(self) -> None:
        """After an abort: return once `goes_on` is false. This takes no longer than the grace."""
        if self.goes_on:
            self._thread_over = self._thread_over or self._loop.create_future()
            await self._thread_over

    async def run(self, step: StepDefinition, threads: HandlerThreads) -> Outcome:
        """Enter the handler and return its outcome. Raises nothing that the handler raises."""
        if step.timeout_s is not None:
            self._timers.append(self._loop.call_later(step.timeout_s, self.abort, "timeout"))
        if step.is_async:
            outcome = await self._run_async(step.handler)
        else:
            outcome = await self._run_on_thread(step.handler, threads)
        self._finish()
        return outcome

    async def _run_on_thread(self, handler: Handler, threads: HandlerThreads) -> Outcome:
        self.result = self._loop.create_future()
        try:
            self._work = threads.submit(_run_sync, handler, self.context, self._forks, self._may_enter)
        except RuntimeError as exc:
            # The executor has queued the call before it tried to start a thread: one that becomes free must not enter the handler.
            fire_signal(self.context.signal, "shutdown")
            self._on_stuck(self, f"run {self.context.run_id}: no thread for the handler of step {self.context.step_id}: {exc}")
            return Outcome(Kind.NOT_ENTERED, None)
        self._work.add_done_callback(self._thread_done)
        return await self.result

    async def _run_async(self, handler: Handler) -> Outcome:
        task = self._task = asyncio.current_task(self._loop)
        assert task is not None, "drivers are tasks"
        outcome = await enter_async(handler, self.context)
        if _forks != self._forks:
            os._exit(0)  # the handler forked, and this is the child process: the run belongs to the parent
        self._task = None
        if self._on_returned is not None:
            self._on_returned()
        if task.cancelling():
            # A cancellation that was meant for the handler must not hit the driver's next await.
            while task.uncancel():
                pass
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
        return outcome

    def abort(self, reason: str, grace_s: float = ABORT_GRACE_S) -> None:
        """Fire the handler's signal. The outcome follows soon, also when the handler ignores the signal.

        A coroutine is cancelled, and has `grace_s` to clean up, so that it does not run beside its own retry. A thread
        cannot be stopped: on a shutdown it has `grace_s`; otherwise its attempt is over at once. A handler that still
        runs after the grace is stuck.
        """
        if self.over:
            return
        is_first = not self.context.signal.aborted
        fire_signal(self.context.signal, reason)
        if self._task is not None:
            if is_first:  # a second cancellation would end the handler's clean-up
                self._cancel_task()
        elif reason != "shutdown" or (self._work is not None and self._work.cancel()):
            self._resolve(Outcome(Kind.ABANDONED, None))
        self._timers.append(self._loop.call_later(grace_s, self._out_of_grace))

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _out_of_grace(self) -> None:
        if self.on_thread and (self._work is None or self._work.done()):
            return
        self._resolve(Outcome(Kind.ABANDONED, None))
        self.over = self._stuck = True
        self._end_thread()
        self._on_stuck(self, f"run {self.context.run_id}: the handler of step {self.context.step_id} goes on after its attempt is over")

    def _finish(self) -> None:
        self.over = True
        if self._work is None or self._work.done():  # else the timer of the grace is still needed
            for timer in self._timers:
                timer.cancel()

    def _resolve(self, outcome: Outcome) -> None:
        if self.result is not None and not self.result.done():
            self.result.set_result(outcome)

    def _thread_done(self, work: Future[Outcome]) -> None:
        outcome = Outcome(Kind.ABANDONED, None) if work.cancelled() else work.result()
        self._call_soon(self._resolve, outcome)
        self._call_soon(self._end_thread)

    def _call_soon(self, callback: Callable[..., object], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending, and has released the run
            self._loop.call_soon_threadsafe(callback, *args)

    def _end_thread(self) -> None:
        if self._work is not None and self._work.done():
            self._work = None  # it keeps its callbacks, which keep this attempt: a circle
        if self._thread_over is not None and not self._thread_over.done():
            self._thread_over.set_result(None)


def _run_sync(handler: Handler, context: RunContext, forks: int, may_enter: Callable[[], bool]) -> Outcome:
    if context.signal.aborted:
        return Outcome(Kind.ABANDONED, None)  # it waited for a thread until its attempt was over
    if not may_enter():
        return Outcome(Kind.TOO_LATE, None)
    token = current_signal.set(context.signal)
    outcome = _enter(handler, context)
    current_signal.reset(token)  # the thread goes on to other handlers
    if _forks != forks:
        # The handler forked, and this is the child process: the run belongs to the parent.
        os._exit(0)
    return outcome


# Both functions return an outcome that no variable of theirs has held. An exception knows the frame that caught it, so a frame that also
# knows the exception would be a circle: it, the handler's variables and the whole run would stay in memory until a full garbage collection.


async def enter_async(handler: Handler, context: RunContext) -> Outcome:
    """Await a coroutine handler. Its outcome; raises nothing."""
    try:
        return Outcome(Kind.RETURNED, await handler(context))
    except Suspension as suspension:
        return Outcome(Kind.SUSPENDED, suspension)
    except BaseException as exc:  # noqa: BLE001 -- whatever a handler raises is its attempt's failure, never the worker's
        return Outcome(Kind.RAISED, exc)


def _enter(handler: Handler, context: RunContext) -> Outcome:
    try:
        return Outcome(Kind.RETURNED, handler(context))
    except Suspension as suspension:
        return Outcome(Kind.SUSPENDED, suspension)
    except BaseException as exc:  # noqa: BLE001 -- as above
        return Outcome(Kind.RAISED, exc)
