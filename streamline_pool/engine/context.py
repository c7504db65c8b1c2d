"""What a handler sees: `ctx`, its abort signal, and the ways a handler may end other than by returning.

Calls on `ctx` record intents and write nothing, except `checkpoint` and `heartbeat`; the engine stores what was
recorded together with the step's result. Safe to use from the handler's own thread, task, or threads it starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
from collections.abc import Generator, Mapping
from datetime import timedelta
from typing import Any, NoReturn, Protocol

from streamline_pool.domain.errors import InvalidStateError, LeaseLostError, ValidationError, WorkflowCancelledError
from streamline_pool.domain.model import seconds
from streamline_pool.events.bus import ENGINE_EVENTS
from streamline_pool.protocol.codec import as_payload, check_payload
from streamline_pool.protocol.payloads import EXTERNAL_KEY, is_external

__all__ = ["WAIT_MAX_S", "AbortSignal", "Context", "SleepSuspension", "Suspension", "WaitSuspension", "check_event_name", "current_signal"]

log = logging.getLogger("streamline_pool.handler")

WAIT_MAX_S = 100 * 365 * 86400.0  # a century; BSON dates go further, `datetime` arithmetic is what ends


class Suspension(BaseException):
    """Raised by `ctx.sleep` and its kin to leave the handler. Not an `Exception`, so `except Exception` lets it pass."""


class SleepSuspension(Suspension):
    """The handler is through; its step is done `seconds` from now."""

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s


class WaitSuspension(Suspension):
    """The handler is through; its step is done when somebody answers, or when `timeout_s` seconds have passed."""

    def __init__(self, waiting_for: Mapping[str, Any], timeout_s: float | None) -> None:
        self.waiting_for = waiting_for  # as stored, but for `expiresAt`
        self.timeout_s = timeout_s  # None: waits for ever


class AbortSignal:
    """Tells a handler that its work is no longer wanted. Fires once, never resets.

    `reason` is one of "cancelled", "timeout", "lease-lost", "shutdown". In `async def` handlers it can be awaited;
    they are cancelled as well, so most never need to look.
    """

    __slots__ = ("_event", "_futures", "_reason")

    _lazy_lock = threading.Lock()

    def __init__(self) -> None:
        self._reason: str | None = None
        self._event: threading.Event | None = None  # made when somebody waits: most attempts never do
        self._futures: list[asyncio.Future[str]] = []

    @property
    def aborted(self) -> bool:
        """True once the signal has fired."""
        return self._reason is not None

    @property
    def reason(self) -> str | None:
        """Why it fired, or None."""
        return self._reason

    def wait(self, timeout: float | timedelta | None = None) -> bool:
        """Block until it fires, at most `timeout` seconds; True if it has fired. For `def` handlers."""
        with self._lazy_lock:
            if self._event is None:
                self._event = threading.Event()
                if self._reason is not None:
                    self._event.set()
        return self._event.wait(None if timeout is None else seconds(timeout, "signal.wait: timeout", zero_ok=True))

    def raise_if_aborted(self) -> None:
        """Raise WorkflowCancelledError if the run was cancelled, LeaseLostError for any other reason."""
        if self._reason == "cancelled":
            raise WorkflowCancelledError("the run was cancelled")
        if self._reason is not None:
            raise LeaseLostError(f"this attempt is over: {self._reason}", reason=self._reason)

    def __await__(self) -> Generator[Any, None, str]:
        """Wait until it fires; the reason. For `async def` handlers."""
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._futures.append(future)
        if self._reason is not None:  # looked at after listing the future: one of us two sees the other
            _set_once(future, self._reason)
        try:
            return (yield from future)
        finally:
            self._futures.remove(future)  # a handler may wait often

    def _fire(self, reason: str) -> None:
        """Fire, from the loop's thread. Only the first reason counts."""
        with self._lazy_lock:
            if self._reason is not None:
                return
            self._reason = reason
            if self._event is not None:
                self._event.set()
        for future in list(self._futures):
            # A `def` handler may have awaited it in a loop of its own, and have left or closed that loop.
            with contextlib.suppress(RuntimeError):
                future.get_loop().call_soon_threadsafe(_set_once, future, reason)


def _set_once(future: asyncio.Future[str], reason: str) -> None:
    if not future.done():
        future.set_result(reason)


current_signal: contextvars.ContextVar[AbortSignal | None] = contextvars.ContextVar("current_signal", default=None)
"""The signal of the `def` handler that this thread is in: what blocks on its behalf must end when it fires."""


class Port(Protocol):
    """What `ctx` asks of the engine on behalf of one attempt."""

    def save_checkpoint(self, value: Any, size: int) -> None:
        """Store the checkpoint; durable on return. Raises LeaseLostError when the run is no longer ours."""

    def save_hook(self, reason: str, expires_s: float | None) -> str:
        """Store a hook of the step at hand; durable on return. The token. Raises as `save_checkpoint` does."""

    def heartbeat(self) -> None:
        """Renew the lease soon."""

    def emit(self, name: str, data: Any) -> None:
        """Publish an event now."""


def check_event_name(name: Any, where: str) -> str:
    """A name by which events are sent and waited for; a ValidationError otherwise."""
    if not isinstance(name, str) or not 1 <= len(name) <= 200 or "\0" in name:
        raise ValidationError(f"{where}: the name of an event is text of 1 to 200 characters, not {name!r}")
    check_payload(name, where)
    return name


def _bounded(value: float | timedelta, where: str, *, zero_ok: bool = False) -> float:
    value_s = seconds(value, where, zero_ok=zero_ok)
    if value_s > WAIT_MAX_S:
        raise ValidationError(f"{where}: {value_s} seconds is more than a hundred years")
    return value_s


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= 1_000:
        raise ValidationError(f"{where}: a reason is text of 1 to 1000 characters, for whoever is to answer, not {value!r}")
    check_payload(value, where)
    return value


class _Stored:
    """What `checkpoint` returns: nothing to see, but `await` works, for handlers that are `async def`."""

    def __await__(self) -> Generator[Any, None, None]:
        return
        yield


_STORED = _Stored()


def _copy(value: Any) -> Any:
    """What a handler may change without changing the run: a retry stores its checkpoint again, a later step its context."""
    kind = type(value)
    if kind is dict:
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if kind is list else value


class Context:
    """One attempt at one step, as its handler sees it."""

    __slots__ = (
        "__weakref__",
        "_closed",
        "_context",
        "_document",
        "_has_hook",
        "_input",
        "_outputs",
        "_place",
        "_port",
        "_sets",
        "_sets_bytes",
        "_suspension",
        "attempt",
        "signal",
        "step_id",
    )

    def __init__(
        self, document: Mapping[str, Any], place: int, signal: AbortSignal, port: Port, outputs: Mapping[str, Any] | None = None
    ) -> None:
        step = document["steps"][place]
        self._document = document
        self._outputs = {} if outputs is None else outputs  # by file id: what the document only refers to
        self._place = place
        self._port = port
        self._sets: dict[str, Any] = {}
        self._sets_bytes = 0  # an upper bound: a key set twice counts twice
        self._suspension: Suspension | None = None
        self._has_hook = False  # made by this attempt
        self._closed = False
        self.step_id: str = step["stepId"]
        self.attempt: int = step["attempts"]  # 1-based; counts entries into the handler, those of lost workers too
        self.signal = signal
        self._context: dict[str, Any] | None = None  # this and the next are made when asked for
        self._input: Any = None

    @property
    def run_id(self) -> str:
        """The run's id."""
        return str(self._document["_id"])

    @property
    def workflow_id(self) -> str:
        """The id of the run's workflow."""
        return str(self._document["workflowId"])

    @property
    def context(self) -> dict[str, Any]:
        """This attempt's view of the run's context; change it by `set`."""
        if self._context is None:
            self._context = _copy(self._document.get("context") or {})
        return self._context

    @property
    def input(self) -> Any:
        """What the run was started with."""
        if self._input is None:
            self._input = _copy(self._document.get("input"))
        return self._input

    @property
    def idempotency_key(self) -> str:
        """The same in all attempts at this step of this run; another one after a rewind. For payment providers and the like."""
        rewinds = self._document.get("rewinds", 0)
        key = f"{self._document['_id']}:{self.step_id}"
        return f"{key}:{rewinds}" if rewinds else key

    def set(self, key: str, value: Any) -> None:
        """Set a context key: seen in `ctx.context` at once, stored with this step's result, dropped if the attempt fails."""
        self._check_open()
        if not isinstance(key, str) or not key or "\0" in key:
            raise ValidationError(f"ctx.set: a key is non-empty text without NUL, not {key!r}")
        value, size = as_payload(value, f"context.{key}")
        self._sets_bytes += size + len(key)
        self._sets[key] = value
        self.context[key] = _copy(value)

    def get_output(self, step_id: str) -> Any:
        """The output of an earlier step, or None when it has none."""
        for step in self._document["steps"]:
            if step["stepId"] == step_id:
                output = step.get("output")
                return _copy(self._outputs[output[EXTERNAL_KEY]] if is_external(output) else output)
        return None

    def sleep(self, delay: float | timedelta) -> NoReturn:
        """End this handler; its step is done after that time, and the handler is not called again. Outlives every restart."""
        self._end(SleepSuspension(_bounded(delay, "ctx.sleep", zero_ok=True)))

    def wait(self, reason: str, data: Any = None, *, timeout: float | timedelta | None = None) -> NoReturn:
        """End this handler; its step is done when somebody answers, by `Workflow.resume` or by the hook made before.

        The answer's payload is the step's output. `reason` and `data` are for whoever is to answer (`waiting_for` of the
        step). After `timeout` seconds without an answer the output is one for which `streamline_pool.is_timeout` is true.
        """
        self._check_open()
        wanted = {"type": "webhook" if self._hooks() else "human", "reason": _text(reason, "ctx.wait: reason")}
        if data is not None:
            wanted["data"], size = as_payload(data, "wait.data")
            self._sets_bytes += size
        self._end(WaitSuspension(wanted, None if timeout is None else _bounded(timeout, "ctx.wait: timeout")))

    def wait_for(self, event_name: str, *, timeout: float | timedelta | None = None) -> NoReturn:
        """End this handler; its step is done when an event of that name comes, by `app.send_event`, or has come already.

        The event's data is the step's output. `timeout`: as for `wait`.
        """
        self._check_open()
        name = check_event_name(event_name, "ctx.wait_for")
        wanted = {"type": "event", "reason": f"event {name}", "eventName": name}
        self._end(WaitSuspension(wanted, None if timeout is None else _bounded(timeout, "ctx.wait_for: timeout")))

    def _add_hook(self, reason: str, expires_s: float | None) -> str:
        """Store a hook; see hooks.create_hook."""
        self._check_open()
        _text(reason, "create_hook: reason")
        if expires_s is not None and expires_s > WAIT_MAX_S:
            raise ValidationError(f"create_hook: expires_in: {expires_s} seconds is more than a hundred years")
        if self._has_hook:
            raise InvalidStateError(f"run {self.run_id}: step {self.step_id} has an open hook already; a step has one at a time")
        self._has_hook = True
        return self._port.save_hook(reason, expires_s)

    def _hooks(self) -> Any:
        return self._document["steps"][self._place].get("hooks")

    def _end(self, suspension: Suspension) -> NoReturn:
        self._check_open()
        self._suspension = self._suspension or suspension
        raise self._suspension

    def heartbeat(self) -> None:
        """Renew the lease now. Never needed for a step to live long (renewal is automatic); a sign of life for `runs show`."""
        self._check_open()
        self._port.heartbeat()

    def emit(self, event: str, data: Any = None) -> None:
        """Publish an event of your own at once, to subscribers of `app.events`. It answers no `wait_for`."""
        self._check_open()
        if not isinstance(event, str) or not event or event == "*" or event in ENGINE_EVENTS:
            raise ValidationError(f"ctx.emit: {event!r} is not a name for an event of your own")
        check_payload(data, f"emit({event!r}).data")
        self._port.emit(event, data)

    def log(self, message: str, **data: Any) -> None:
        """Log a line that names the run, the step and the attempt."""
        fields = {"run_id": self.run_id, "workflow_id": self.workflow_id, "step_id": self.step_id, "attempt": self.attempt}
        log.info("%s", message, extra={"data": data, **fields})

    def checkpoint(self, value: Any) -> _Stored:
        """Store how far this step has come; durable on return, kept across attempts, dropped when the step ends.

        In `async def` handlers it may be awaited or not; the event loop stands still for one majority write.
        """
        self._check_open()
        self._port.save_checkpoint(*as_payload(value, "checkpoint"))
        return _STORED

    def get_checkpoint(self) -> Any:
        """What the last `checkpoint` of this step stored, in this or an earlier attempt; None when there is none."""
        return _copy(self._document["steps"][self._place].get("checkpoint"))

    def _check_open(self) -> None:
        if self._closed:
            if self.signal.reason in ("cancelled", "lease-lost"):
                # As if the call itself had found out: whether it or the signal is first is a matter of milliseconds.
                self.signal.raise_if_aborted()
            raise InvalidStateError(f"run {self.run_id}: this attempt at step {self.step_id} is over; its ctx can do nothing more")

    def _close(self) -> None:
        """No call has any effect from here on: the attempt's outcome is decided."""
        self._closed = True
