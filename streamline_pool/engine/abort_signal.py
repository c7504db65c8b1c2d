"""How a handler learns that its work is no longer wanted. Owns the signal that handlers see, and the way to fire it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Generator
from datetime import timedelta
from typing import Any

from streamline_pool.domain.errors import LeaseLostError, WorkflowCancelledError
from streamline_pool.domain.model import seconds

__all__ = ["AbortSignal", "current_signal", "fire_signal"]


class AbortSignal:
    """Says that a handler's work is no longer wanted. Fires once, never resets.

    `reason` is one of "cancelled", "timeout", "lease-lost", "shutdown". In `async def` handlers it can be awaited;
    they are cancelled as well, so most never need to read it.
    """

    __slots__ = ("_event", "_futures", "_reason")

    _lazy_lock = threading.Lock()

    def __init__(self) -> None:
        self._reason: str | None = None
        self._event: threading.Event | None = None  # made by the first `wait`: most attempts never wait
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
        if self._reason is not None:  # read after listing the future, so that a signal that fires now is not missed
            _set_once(future, self._reason)
        try:
            return (yield from future)
        finally:
            self._futures.remove(future)  # a handler may wait often


def fire_signal(signal: AbortSignal, reason: str) -> None:
    """Fire `signal`, from the loop's thread. Only the first reason counts. For the engine, so it is no method of the signal."""
    with AbortSignal._lazy_lock:
        if signal._reason is not None:
            return
        signal._reason = reason
        if signal._event is not None:
            signal._event.set()
    for future in list(signal._futures):
        # A `def` handler may have awaited it in a loop of its own, and have left or closed that loop.
        with contextlib.suppress(RuntimeError):
            future.get_loop().call_soon_threadsafe(_set_once, future, reason)


def _set_once(future: asyncio.Future[str], reason: str) -> None:
    if not future.done():
        future.set_result(reason)


current_signal: contextvars.ContextVar[AbortSignal | None] = contextvars.ContextVar("current_signal", default=None)
"""The signal of the `def` handler that this thread runs: what blocks on the handler's behalf must end when it fires."""
