"""What a durable function sees as `ctx`: calls whose results are stored. Owns the check of their arguments; calls.py makes them.

`DurableContext` is for an `async def`, `BlockingDurableContext` for a `def`: the same calls, which return their results directly.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
from collections.abc import Callable, Coroutine, Iterable
from datetime import timedelta
from functools import lru_cache
from typing import Any, Literal, NoReturn, TypeVar, overload

from streamline_pool.domain.definition import MAIN, retry_policy
from streamline_pool.domain.document import RunDocument, WaitDocument
from streamline_pool.domain.errors import InvalidStateError, ValidationError
from streamline_pool.domain.model import seconds
from streamline_pool.engine.abort_signal import AbortSignal
from streamline_pool.engine.intents import ContinueSuspension, Intents, ReleaseSuspension
from streamline_pool.engine.run_context import Port, RunContext, bounded, check_event_name, check_reason
from streamline_pool.protocol.codec import as_payload

from .attempts import CallOptions
from .calls import Calls

__all__ = ["BlockingDurableContext", "DurableContext"]

T = TypeVar("T")
I = TypeVar("I")  # noqa: E741 -- an item

_Seconds = float | timedelta
_Backoff = Literal["exponential", "linear", "fixed"] | float


class _Base(RunContext):
    """What both contexts have: the arguments of calls, checked."""

    __slots__ = ("_calls",)

    def __init__(self, document: RunDocument, signal: AbortSignal, port: Port, intents: Intents, outputs: Any, calls: Calls) -> None:
        super().__init__(document, 0, signal, port, intents, outputs)
        self._calls = calls

    @property
    def generation(self) -> int:
        """How often the run has continued as new: 0, 1, …"""
        return self._document.get("generation", 0)

    def get_output(self, step_id: str) -> Any:
        """The output of a call that this function has made before, by the name under which it is stored; None if it has none."""
        return super().get_output(step_id) if self._calls.names.has_made(step_id) else None

    def continue_as_new(self, input: Any = None) -> NoReturn:
        """End here, and begin the same run again with this input and without stored calls. Needs no `await`.

        For long loops: a generation makes 5 000 calls at most. `generation` grows by 1. What has arrived for the run stays.
        """
        self._check_open()
        self._calls.names.check_caller("continue_as_new")
        self._intents.suspension = self._intents.suspension or ContinueSuspension(*as_payload(input, "ctx.continue_as_new: input"))
        raise self._intents.suspension

    def _patch(self, name: str) -> str:
        self._calls.names.check_alone(name)
        return self._calls.names.call(name, "patch", "ctx.patched: name")

    def _step(self, name: str, fn: Callable[..., Any], args: tuple[Any, ...], options: CallOptions) -> Coroutine[Any, Any, Any]:
        _check_function("ctx.step", fn)
        name = self._calls.names.call(name, "step", "ctx.step: name")
        return self._calls.watched(name, self._calls.step(name, fn, args, options))

    def _map(
        self, name: str, fn: Callable[..., Any], items: Iterable[Any], concurrency: int | None, options: CallOptions
    ) -> Coroutine[Any, Any, list[Any]]:
        _check_function("ctx.map", fn)
        if isinstance(items, (str, bytes)) or not isinstance(items, Iterable):
            raise ValidationError(f"ctx.map: items is a list, or another iterable, of what each call gets, not {type(items).__name__}")
        if concurrency is not None and (isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1):
            raise ValidationError(f"ctx.map: concurrency is a whole number of at least 1, or None for no limit, not {concurrency!r}")
        each = list(items)
        names = self._calls.names.group(name, len(each), "ctx.map: name")
        return self._calls.watched(f"{name}[…]", self._calls.map(names, fn, each, concurrency, options))

    def _sleep(self, delay: _Seconds, name: str | None) -> Coroutine[Any, Any, None]:
        delay_s = bounded(delay, "ctx.sleep", zero_ok=True)
        name = self._calls.names.call("sleep" if name is None else name, "sleep", "ctx.sleep: name")
        return self._calls.watched(name, self._calls.sleep(name, delay_s))

    def _wait(self, reason: str, data: Any, timeout: _Seconds | None, name: str | None) -> Coroutine[Any, Any, Any]:
        wanted: WaitDocument = {"type": "human", "reason": check_reason(reason, "ctx.wait: reason")}
        if data is not None:
            wanted["data"], size = as_payload(data, "wait.data")
            self._intents.sets_bytes += size
        timeout_s = None if timeout is None else bounded(timeout, "ctx.wait: timeout")
        name = self._calls.names.call("wait" if name is None else name, "wait", "ctx.wait: name")
        return self._calls.watched(name, self._calls.wait(name, "wait", wanted, timeout_s))

    def _wait_for(self, event_name: str, timeout: _Seconds | None, name: str | None) -> Coroutine[Any, Any, Any]:
        event_name = check_event_name(event_name, "ctx.wait_for")
        wanted: WaitDocument = {"type": "event", "reason": f"event {event_name}", "eventName": event_name}
        timeout_s = None if timeout is None else bounded(timeout, "ctx.wait_for: timeout")
        name = self._calls.names.event(event_name) if name is None else self._calls.names.call(name, "event", "ctx.wait_for: name")
        return self._calls.watched(name, self._calls.wait(name, "event", wanted, timeout_s))


class DurableContext(_Base):
    """One entry into a durable function that is an `async def`. `await` its calls."""

    __slots__ = ()

    @overload
    def step(
        self,
        name: str,
        fn: Callable[..., Coroutine[Any, Any, T]],
        *args: Any,
        retries: int = 3,
        timeout: _Seconds | None = None,
        retry_delay: _Seconds = 1.0,
        retry_backoff: _Backoff = "exponential",
    ) -> Coroutine[Any, Any, T]: ...
    @overload
    def step(
        self,
        name: str,
        fn: Callable[..., T],
        *args: Any,
        retries: int = 3,
        timeout: _Seconds | None = None,
        retry_delay: _Seconds = 1.0,
        retry_backoff: _Backoff = "exponential",
    ) -> Coroutine[Any, Any, T]: ...
    def step(
        self,
        name: str,
        fn: Callable[..., Any],
        *args: Any,
        retries: int = 3,
        timeout: _Seconds | None = None,
        retry_delay: _Seconds = 1.0,
        retry_backoff: _Backoff = "exponential",
    ) -> Coroutine[Any, Any, Any]:
        """Call `fn(*args)`, unless a result of this call is stored; return the result once it is durable.

        name: text of 1 to 200 characters. The second use of a name is stored as `name#2`, and so on.
        fn: a `def`, which runs on a thread, or an `async def`.
        retries, timeout, retry_delay, retry_backoff: as for a declared step. `timeout` is of one attempt.

        A lost worker's call is made again, with the same `current_step().idempotency_key`. Raises MaxRetriesExceededError when no
        attempt is left, also when the function is called again; `error` in its context is the last cause.
        """
        return self._step(name, fn, args, _options(retries, timeout, retry_delay, retry_backoff))

    def map(
        self,
        name: str,
        fn: Callable[[I], Any],
        items: Iterable[I],
        *,
        concurrency: int | None = None,
        retries: int = 3,
        timeout: _Seconds | None = None,
        retry_delay: _Seconds = 1.0,
        retry_backoff: _Backoff = "exponential",
    ) -> Coroutine[Any, Any, list[Any]]:
        """`step` for each item, as `fn(item)` under the names `name[0]`, `name[1]`, …; the results in the order of the items.

        concurrency: how many calls are under way at once; None: all. After a call that failed no other one begins; the error of the
        first such item is raised when those under way have ended.
        """
        return self._map(name, fn, items, concurrency, _options(retries, timeout, retry_delay, retry_backoff))

    def sleep(self, delay: _Seconds, *, name: str | None = None) -> Coroutine[Any, Any, None]:
        """Return `delay` seconds after the run first came here. Outlives every restart; no worker is held meanwhile."""
        return self._sleep(delay, name)

    def wait(self, reason: str, data: Any = None, *, timeout: _Seconds | None = None, name: str | None = None) -> Coroutine[Any, Any, Any]:
        """Return the answer that a person gives by `Workflow.resume`. `reason` and `data` are for that person.

        After `timeout` seconds without an answer, a value for which `streamline_pool.is_timeout` is true. The wait begins when the
        calls under way have ended. Raises InvalidStateError for a second wait at the same time.
        """
        return self._wait(reason, data, timeout, name)

    def wait_for(self, event_name: str, *, timeout: _Seconds | None = None, name: str | None = None) -> Coroutine[Any, Any, Any]:
        """Return the data of an event of that name, sent by `app.send_event`, which may have come already. `timeout`: as for `wait`."""
        return self._wait_for(event_name, timeout, name)

    def patched(self, name: str) -> bool:
        """False in a run that had passed this point before the code had this call, True in others. The answer is stored.

        So `if ctx.patched("v2"):` guards new code in a function whose runs are under way.
        """
        return self._calls.patched(self._patch(name))


class BlockingDurableContext(_Base):
    """One entry into a durable function that is a `def`. Its calls return their results; each is described in `DurableContext`."""

    __slots__ = ()

    @overload
    def step(
        self,
        name: str,
        fn: Callable[..., Coroutine[Any, Any, T]],
        *args: Any,
        retries: int = 3,
        timeout: _Seconds | None = None,
        retry_delay: _Seconds = 1.0,
        retry_backoff: _Backoff = "exponential",
    ) -> T: ...
    @overload
    def step(
        self,
        name: str,
        fn: Callable[..., T],
        *args: Any,
        retries: int = 3,
        timeout: _Seconds | None = None,
        retry_delay: _Seconds = 1.0,
        retry_backoff: _Backoff = "exponential",
    ) -> T: ...
    def step(
        self,
        name: str,
        fn: Callable[..., Any],
        *args: Any,
        retries: int = 3,
        timeout: _Seconds | None = None,
        retry_delay: _Seconds = 1.0,
        retry_backoff: _Backoff = "exponential",
    ) -> Any:
        """See `DurableContext.step`."""
        return self._result(self._step(name, fn, args, _options(retries, timeout, retry_delay, retry_backoff)))

    def map(
        self,
        name: str,
        fn: Callable[[I], Any],
        items: Iterable[I],
        *,
        concurrency: int | None = None,
        retries: int = 3,
        timeout: _Seconds | None = None,
        retry_delay: _Seconds = 1.0,
        retry_backoff: _Backoff = "exponential",
    ) -> list[Any]:
        """See `DurableContext.map`."""
        return self._result(self._map(name, fn, items, concurrency, _options(retries, timeout, retry_delay, retry_backoff)))

    def sleep(self, delay: _Seconds, *, name: str | None = None) -> None:
        """See `DurableContext.sleep`."""
        return self._result(self._sleep(delay, name))

    def wait(self, reason: str, data: Any = None, *, timeout: _Seconds | None = None, name: str | None = None) -> Any:
        """See `DurableContext.wait`."""
        return self._result(self._wait(reason, data, timeout, name))

    def wait_for(self, event_name: str, *, timeout: _Seconds | None = None, name: str | None = None) -> Any:
        """See `DurableContext.wait_for`."""
        return self._result(self._wait_for(event_name, timeout, name))

    def patched(self, name: str) -> bool:
        """See `DurableContext.patched`."""
        name = self._patch(name)

        async def ask() -> bool:
            return self._calls.patched(name)

        return self._result(ask())

    def _result(self, call: Coroutine[Any, Any, T]) -> T:
        """Make the call in the event loop, and wait for it on this thread."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            call.close()
            raise InvalidStateError(f"run {self.run_id}: this ctx blocks, so it must not be used in an event loop", step_id=MAIN)
        done: concurrent.futures.Future[T] = concurrent.futures.Future()
        asyncio.run_coroutine_threadsafe(_make(self._calls, call, done), self._calls.loop)
        try:
            return done.result()
        finally:
            del done  # it knows an exception, whose traceback knows this frame: a circle would keep the run in memory


async def _make(calls: Calls, call: Coroutine[Any, Any, T], done: concurrent.futures.Future[T]) -> None:
    calls.waiting_threads.add(done)
    try:
        result = await call
    except BaseException as exc:  # noqa: BLE001 -- also a Suspension: the thread leaves the function by it
        if not done.done():
            done.set_exception(ReleaseSuspension() if isinstance(exc, asyncio.CancelledError) else exc)
    else:
        if not done.done():
            done.set_result(result)
    finally:
        calls.waiting_threads.discard(done)
        del done  # as above


def _check_function(where: str, fn: object) -> None:
    if callable(fn):
        return
    hint = ""
    if inspect.isawaitable(fn):
        hint = "; pass the function and its arguments, as in ctx.step('load', load, 7)"
        if inspect.iscoroutine(fn):
            fn.close()
    raise ValidationError(f"{where}: fn is a function, not {fn!r:.100}{hint}")


def _options(retries: int, timeout: _Seconds | None, retry_delay: _Seconds, retry_backoff: _Backoff) -> CallOptions:
    try:
        return _checked_options(retries, timeout, retry_delay, retry_backoff)
    except TypeError:  # a value that is not hashable, and so none that is allowed
        return _checked_options.__wrapped__(retries, timeout, retry_delay, retry_backoff)


@lru_cache(maxsize=256, typed=True)  # a program has few combinations, and every call checks one
def _checked_options(retries: Any, timeout: Any, retry_delay: Any, retry_backoff: Any) -> CallOptions:
    options = {"retries": retries, "retry_delay": retry_delay, "retry_backoff": retry_backoff}
    return CallOptions(retry_policy("ctx.step", options), None if timeout is None else seconds(timeout, "ctx.step: timeout"))
