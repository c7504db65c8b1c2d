"""The public path of every error: `from streamline_pool.errors import WorkflowError`. Owns nothing; domain/errors.py does."""

from streamline_pool.domain.errors import (
    DataCorruptionError,
    ErrorCode,
    HookTokenError,
    InvalidStateError,
    LeaseLostError,
    MaxRetriesExceededError,
    NonDeterminismError,
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

# Tracebacks and pickles name this path, which is public and stays; that of the module that defines the errors may change.
for _name in __all__:
    globals()[_name].__module__ = __name__
