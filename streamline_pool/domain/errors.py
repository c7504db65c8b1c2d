"""Every error this package raises. Owns codes and HTTP statuses; knows nothing else.

WorkflowError                     whose fault             try again?   what to do
├─ ValidationError                the caller              no           correct the argument that the message names
│  └─ PayloadTooLargeError        the caller              no           store the bulk elsewhere, pass a reference
├─ WorkflowNotFoundError          the caller              no           look the run id up; it may have been cleaned up
├─ StepNotFoundError              the caller              no           use one of the step ids the message lists
├─ InvalidStateError              the caller, or a race   after a read read the run, decide again
├─ WorkflowCancelledError         a cancel                no           stop; the run is final
├─ HookTokenError                 the token's bearer      no           ask for a new token
├─ StepTimeoutError               the handler             by policy    raise the timeout or split the step
├─ MaxRetriesExceededError        the handler             by rewind    correct the cause, `rewind_to` the step
├─ LeaseLostError                 no fault; a takeover    no           stop the step, write nothing
├─ VersionMismatchError           a deployment            no           deploy the version the run was started with
├─ NonDeterminismError            a deployment            no           name new calls anew, or give the code a new version
├─ DataCorruptionError            another program         no           correct the document by hand, `rewind_to`
└─ StoreUnavailableError          the database, network   yes          wait; the message says what was tried
NonRetriableError                 raised by handlers      no           fails the step at once, whatever `retries` says
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, ClassVar

__all__ = [
    "DataCorruptionError",
    "ErrorCode",
    "HookTokenError",
    "InvalidStateError",
    "LeaseLostError",
    "MaxRetriesExceededError",
    "NonDeterminismError",
    "NonRetriableError",
    "PayloadTooLargeError",
    "StepNotFoundError",
    "StepTimeoutError",
    "StoreUnavailableError",
    "ValidationError",
    "VersionMismatchError",
    "WorkflowCancelledError",
    "WorkflowError",
    "WorkflowNotFoundError",
]


class ErrorCode(StrEnum):
    """The closed set of codes; stored in `error.code` and first in every `str(error)`."""

    WORKFLOW_NOT_FOUND = "WORKFLOW_NOT_FOUND"
    WORKFLOW_CANCELLED = "WORKFLOW_CANCELLED"
    STEP_NOT_FOUND = "STEP_NOT_FOUND"
    STEP_TIMEOUT = "STEP_TIMEOUT"
    STEP_FAILED = "STEP_FAILED"
    INVALID_STATE = "INVALID_STATE"
    DATA_CORRUPTION = "DATA_CORRUPTION"
    MAX_RETRIES_EXCEEDED = "MAX_RETRIES_EXCEEDED"
    VALIDATION_ERROR = "VALIDATION_ERROR"
    HOOK_TOKEN_INVALID = "HOOK_TOKEN_INVALID"  # noqa: S105 -- a code, not a secret
    LEASE_LOST = "LEASE_LOST"
    PAYLOAD_TOO_LARGE = "PAYLOAD_TOO_LARGE"
    VERSION_MISMATCH = "VERSION_MISMATCH"
    WORKER_CRASHED = "WORKER_CRASHED"
    NON_DETERMINISM = "NON_DETERMINISM"
    STORE_UNAVAILABLE = "STORE_UNAVAILABLE"


_HTTP_STATUS: dict[ErrorCode, int] = {
    ErrorCode.WORKFLOW_NOT_FOUND: 404,
    ErrorCode.STEP_NOT_FOUND: 404,
    ErrorCode.INVALID_STATE: 409,
    ErrorCode.LEASE_LOST: 409,
    ErrorCode.VERSION_MISMATCH: 409,
    ErrorCode.NON_DETERMINISM: 409,
    ErrorCode.WORKFLOW_CANCELLED: 409,
    ErrorCode.STEP_TIMEOUT: 408,
    ErrorCode.VALIDATION_ERROR: 400,
    ErrorCode.HOOK_TOKEN_INVALID: 401,
    ErrorCode.PAYLOAD_TOO_LARGE: 413,
    ErrorCode.STORE_UNAVAILABLE: 503,
}


class WorkflowError(Exception):
    """Base of all errors of this package.

    `code` says what happened, `context` holds the ids and values to branch on or to log. Callers
    branch on the type or on `code`, never on the text.
    """

    def __init__(self, code: ErrorCode | str, message: str, context: Mapping[str, Any] | None = None) -> None:
        self.code = ErrorCode(code)
        self.message = message
        self.context: dict[str, Any] = dict(context or {})
        super().__init__(f"{self.code}: {message}")

    @property
    def http_status(self) -> int:
        """The HTTP status a web application would answer with; 500 where no other fits."""
        return _HTTP_STATUS.get(self.code, 500)

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle by `args`, which here is the rendered text: rebuild from the parts instead.
        return _rebuild, (type(self), self.code, self.message, self.context)


def _rebuild(cls: type[WorkflowError], code: ErrorCode, message: str, context: dict[str, Any]) -> WorkflowError:
    return cls(code, message, context) if cls is WorkflowError else cls(message, **context)


class _CodedError(WorkflowError):
    """An error whose type fixes its code: `Type(message, **context)`."""

    fixed_code: ClassVar[ErrorCode]

    def __init__(self, message: str, **context: Any) -> None:
        super().__init__(self.fixed_code, message, context)


class ValidationError(_CodedError):
    """An argument, definition, setting or payload is not acceptable; nothing was stored."""

    fixed_code = ErrorCode.VALIDATION_ERROR


class PayloadTooLargeError(ValidationError):
    """A payload, or the run it would go into, is above the limit that the message names."""

    fixed_code = ErrorCode.PAYLOAD_TOO_LARGE


class WorkflowNotFoundError(_CodedError):
    """No run with that id in this workflow, or no workflow with that id in this application."""

    fixed_code = ErrorCode.WORKFLOW_NOT_FOUND


class StepNotFoundError(_CodedError):
    """The workflow or run has no step with that id."""

    fixed_code = ErrorCode.STEP_NOT_FOUND


class InvalidStateError(_CodedError):
    """The run is not in a state in which this can be done; the message names the state found."""

    fixed_code = ErrorCode.INVALID_STATE


class WorkflowCancelledError(_CodedError):
    """The run was cancelled, which is final."""

    fixed_code = ErrorCode.WORKFLOW_CANCELLED


class HookTokenError(_CodedError):
    """The hook token is wrong, used, expired, or of an earlier wait. Nothing was changed."""

    fixed_code = ErrorCode.HOOK_TOKEN_INVALID


class StepTimeoutError(_CodedError):
    """A handler ran longer than its `timeout`."""

    fixed_code = ErrorCode.STEP_TIMEOUT


class MaxRetriesExceededError(_CodedError):
    """A step used all its `retries`; the last cause ends the message."""

    fixed_code = ErrorCode.MAX_RETRIES_EXCEEDED


class LeaseLostError(_CodedError):
    """This worker no longer holds the run. Stop the step and write nothing; a retry cannot help."""

    fixed_code = ErrorCode.LEASE_LOST


class VersionMismatchError(_CodedError):
    """The stored steps of a run do not fit the code of the version it names."""

    fixed_code = ErrorCode.VERSION_MISMATCH


class NonDeterminismError(_CodedError):
    """A durable function makes a call under a name that its run has stored for a call of another kind."""

    fixed_code = ErrorCode.NON_DETERMINISM


class DataCorruptionError(_CodedError):
    """A stored document does not have the shape this package writes; another program changed it."""

    fixed_code = ErrorCode.DATA_CORRUPTION


class StoreUnavailableError(_CodedError):
    """MongoDB could not be reached, refused us, or did not answer in time; the message says which and what to do."""

    fixed_code = ErrorCode.STORE_UNAVAILABLE


class NonRetriableError(Exception):
    """Raise it (or a subclass) in a handler to fail the step at once, without using up its `retries`."""
