"""MongoDB-native durable workflows, run by a pool of worker processes.

from streamline_pool import Streamline

app = Streamline("mongodb://localhost:27017/myapp")
orders = app.workflow("orders")

@orders.step
def reserve(ctx): ...
"""

from streamline_pool import errors as errors
from streamline_pool import settings as settings
from streamline_pool.client.app import Streamline
from streamline_pool.client.run_control import HookResult
from streamline_pool.client.step_options import Handler, StepDefaults, StepOptions
from streamline_pool.client.workflow import Workflow
from streamline_pool.config.settings import Settings
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
from streamline_pool.domain.model import Run, RunStatus, StepState, StepStatus, is_timeout
from streamline_pool.domain.progress import (
    StepTimeline,
    StepUIState,
    WaitingInfo,
    WorkflowProgress,
    can_rewind_to,
    get_execution_path,
    get_step_timeline,
    get_step_ui_states,
    get_waiting_info,
    get_workflow_progress,
)
from streamline_pool.engine.context import Context
from streamline_pool.engine.durable.context import BlockingDurableContext, DurableContext
from streamline_pool.engine.durable.step_context import current_step
from streamline_pool.engine.hooks import Hook, create_hook
from streamline_pool.engine.parallel import Settled, execute_parallel, execute_parallel_sync
from streamline_pool.events.bus import EventBus, global_event_bus
from streamline_pool.events.event import Event

__version__ = "0.1.0"

__all__ = [
    "BlockingDurableContext",
    "Context",
    "DataCorruptionError",
    "DurableContext",
    "ErrorCode",
    "Event",
    "EventBus",
    "Handler",
    "Hook",
    "HookResult",
    "HookTokenError",
    "InvalidStateError",
    "LeaseLostError",
    "MaxRetriesExceededError",
    "NonDeterminismError",
    "NonRetriableError",
    "PayloadTooLargeError",
    "Run",
    "RunStatus",
    "Settings",
    "Settled",
    "StepDefaults",
    "StepNotFoundError",
    "StepOptions",
    "StepState",
    "StepStatus",
    "StepTimeline",
    "StepTimeoutError",
    "StepUIState",
    "StoreUnavailableError",
    "Streamline",
    "ValidationError",
    "VersionMismatchError",
    "WaitingInfo",
    "Workflow",
    "WorkflowCancelledError",
    "WorkflowError",
    "WorkflowNotFoundError",
    "WorkflowProgress",
    "__version__",
    "can_rewind_to",
    "create_hook",
    "current_step",
    "execute_parallel",
    "execute_parallel_sync",
    "get_execution_path",
    "get_step_timeline",
    "get_step_ui_states",
    "get_waiting_info",
    "get_workflow_progress",
    "global_event_bus",
    "is_timeout",
]
