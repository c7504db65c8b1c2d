"""A failed attempt in words that can be stored: from whatever a handler raised to a `Failure`.

Owns what is done about exceptions whose own code fails. What the failure means for the run is in domain/transitions.py.
"""

from __future__ import annotations

import asyncio
import traceback
from typing import Any

from streamline_pool.domain.definition import StepDefinition
from streamline_pool.domain.errors import (
    ErrorCode,
    InvalidStateError,
    MaxRetriesExceededError,
    NonDeterminismError,
    NonRetriableError,
    ValidationError,
)
from streamline_pool.domain.transitions import Failure

from . import attempt
from .intents import Suspension

__all__ = ["conditions_timeout_failure", "failure_of", "forget_frames", "timeout_failure"]

_OF_A_CALL = (MaxRetriesExceededError, NonDeterminismError, InvalidStateError)
_WITH_CODE = (ValidationError, *_OF_A_CALL)  # their text repeats the code, which is stored beside it
_TRACEBACK_CHARS_MAX = 8_000
_MESSAGE_CHARS_MAX = 2_000


def failure_of(exc: BaseException) -> Failure:
    """A raised exception in words that can be stored."""
    code, retriable = ErrorCode.STEP_FAILED, True
    if isinstance(exc, Suspension):
        return Failure(ErrorCode.VALIDATION_ERROR, "a condition cannot sleep or wait, only its step's handler can", "Suspension", "", False)
    if isinstance(exc, ValidationError):
        code, retriable = exc.code, False
    elif isinstance(exc, NonRetriableError):
        retriable = False
    elif isinstance(exc, _OF_A_CALL) and "step_id" in exc.context:
        code, retriable = exc.code, False  # of a durable function: to call the function again finds the same
    message = _text_of(exc)
    if isinstance(exc, SystemExit):
        message = f"the handler called {message}; raise an exception or return instead"
    elif isinstance(exc, asyncio.CancelledError):
        message = message or "the handler was cancelled by its own code"
    name = _storable(type(exc).__name__)
    message = message or f"{name} without a message"
    return Failure(code, message[:_MESSAGE_CHARS_MAX], name, _traceback_of(exc), retriable)


def forget_frames(raised: Any) -> None:
    """Drop the traceback of what a handler raised, once its text is taken.

    Its frames know the thread's work, which knows the outcome, which knows the exception: a circle would keep the run in memory until a
    full garbage collection.
    """
    while isinstance(raised, BaseException) and raised.__traceback__ is not None:
        raised.__traceback__ = None
        raised = raised.__cause__ or raised.__context__


def timeout_failure(step: StepDefinition) -> Failure:
    """The attempt ran longer than it may."""
    return Failure(
        ErrorCode.STEP_TIMEOUT, f"step {step.id} ran longer than its timeout of {step.timeout_s} s", "StepTimeoutError", "", True
    )


def conditions_timeout_failure(step: StepDefinition, limit_s: float) -> Failure:
    """The conditions of a step were not all answered in time."""
    return Failure(ErrorCode.STEP_TIMEOUT, f"the conditions of step {step.id} took longer than {limit_s:g} s", "StepTimeoutError", "", True)


def _text_of(exc: BaseException) -> str:
    try:
        if isinstance(exc, SystemExit):
            return _storable(f"sys.exit({exc.code!r})")
        return _storable(exc.message if isinstance(exc, _WITH_CODE) else str(exc))
    except BaseException:  # noqa: BLE001 -- user code: it may raise anything, and a SystemExit would end the worker
        return "(the exception's own __str__ failed)"


def _traceback_of(exc: BaseException) -> str:
    try:
        frames = exc.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename == attempt.__file__:
            frames = frames.tb_next  # our own frames do not help the handler's author
        return _storable("".join(traceback.format_exception(type(exc), exc, frames)))[-_TRACEBACK_CHARS_MAX:]
    except BaseException:  # noqa: BLE001 -- formatting calls user code, too
        return "(the traceback could not be formatted)"


def _storable(text: str) -> str:
    # Lone surrogates come from undecodable bytes; BSON strings are UTF-8.
    return text.encode("utf-8", "backslashreplace").decode()
