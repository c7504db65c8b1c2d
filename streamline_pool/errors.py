"""The public path of every error: `from streamline_pool.errors import WorkflowError`. Owns nothing; domain/errors.py does."""

from streamline_pool.domain.errors import (
    DataCorruptionError,
    ErrorCode,
    HookTokenError,
    InvalidStateError,
    LeaseLostError,
    MaxRetriesExceededError,
    NonRetriableError,
    PayloadTooLargeError,
    StepNotFoundError,
    StepTimeoutError,
    StoreUnavailableError,
    ValidationError,
    VersionMismatchError,
    WorkflowCancelledError,
    WorkflowError,
    WorkflowNotFoundError,
)

__all__ = [
    "DataCorruptionError",
    "ErrorCode",
    "HookTokenError",
    "InvalidStateError",
    "LeaseLostError",
    "MaxRetriesExceededError",
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
