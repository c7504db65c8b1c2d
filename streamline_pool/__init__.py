"""MongoDB-native durable workflows, run by a pool of worker processes.

from streamline_pool import Streamline

app = Streamline("mongodb://localhost:27017/myapp")
orders = app.workflow("orders")

@orders.step
def reserve(ctx): ...
"""

from .bus import Event, EventBus, global_event_bus
from .client import Streamline
from .context import Context
from .errors import (
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
from .model import Run, RunStatus, StepState, StepStatus
from .parallel import Settled, execute_parallel, execute_parallel_sync
from .settings import Settings
from .workflow import Workflow

__version__ = "0.1.0"

__all__ = [
    "Context",
    "DataCorruptionError",
    "ErrorCode",
    "Event",
    "EventBus",
    "HookTokenError",
    "InvalidStateError",
    "LeaseLostError",
    "MaxRetriesExceededError",
    "NonRetriableError",
    "PayloadTooLargeError",
    "Run",
    "RunStatus",
    "Settings",
    "Settled",
    "StepNotFoundError",
    "StepState",
    "StepStatus",
    "StepTimeoutError",
    "StoreUnavailableError",
    "Streamline",
    "ValidationError",
    "VersionMismatchError",
    "Workflow",
    "WorkflowCancelledError",
    "WorkflowError",
    "WorkflowNotFoundError",
    "__version__",
    "execute_parallel",
    "execute_parallel_sync",
    "global_event_bus",
]
