"""What every `ctx` has: the run's input and context, its outputs, events of its own, a log. Owns the view of the run that user code gets.

context.py adds what only a step's handler may do, durable/ what only a durable function may do. Calls record intents (intents.py)
and write nothing. Safe to use from the handler's own thread, task, or threads it starts.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Protocol

from streamline_pool.domain.document import RunDocument
from streamline_pool.domain.done import DONE, Done
from streamline_pool.domain.errors import InvalidStateError, ValidationError
from streamline_pool.domain.model import seconds
from streamline_pool.events.event import is_engine_name
from streamline_pool.protocol.codec import as_payload, check_payload
from streamline_pool.protocol.payloads import EXTERNAL_KEY, is_external

from .abort_signal import AbortSignal
from .context_view import ContextView, put
from .intents import Intents

__all__ = ["WAIT_MAX_S", "Port", "RunContext", "bounded", "check_event_name", "check_reason", "copied"]

log = logging.getLogger("streamline_pool.handler")

WAIT_MAX_S = 100 * 365 * 86400.0  # a century; BSON dates go further, `datetime` arithmetic does not


class Port(Protocol):
    """What `ctx` asks of the engine on behalf of one attempt."""

    def save_checkpoint(self, intents: Intents, value: Any, size: int) -> None:
        """Store the checkpoint; durable on return. Raises LeaseLostError when this worker no longer holds the run.

        `intents`: the record of the attempt that asks. Raises InvalidStateError when that attempt is over.
        """

    def save_hook(self, intents: Intents, reason: str, expires_s: float | None) -> str:
        """Store a hook of the current step; durable on return. The token. Raises as `save_checkpoint` does."""

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


def bounded(value: float | timedelta, where: str, *, zero_ok: bool = False) -> float:
    """The seconds of a sleep or of a wait; a ValidationError for what is no duration, or longer than a century."""
    value_s = seconds(value, where, zero_ok=zero_ok)
    if value_s > WAIT_MAX_S:
        raise ValidationError(f"{where}: {value_s} seconds is more than a hundred years")
    return value_s


def check_reason(value: Any, where: str) -> str:
    """A reason to wait; a ValidationError for anything but short text."""
    if not isinstance(value, str) or not 1 <= len(value) <= 1_000:
        raise ValidationError(f"{where}: a reason is text of 1 to 1000 characters, for the person who is to answer, not {value!r}")
    check_payload(value, where)
    return value


def copied(value: Any) -> Any:
    """A copy that a handler may change. Without it a retry would store a changed checkpoint, and a later step a changed context."""
    kind = type(value)
    if kind is dict:
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if kind is list else value


class RunContext:
    """A run, as the code sees it that one attempt runs: a step's handler, or a durable function.

    Every call has done its work when it returns. Those without a result return a `Done`, which may be awaited, and counts as None.
    """

    __slots__ = (
        "__weakref__",
        "_context",
        "_document",
        "_input",
        "_intents",
        "_outputs",
        "_place",
        "_port",
        "_unknown",
        "attempt",
        "signal",
        "step_id",
    )

    def __init__(
        self,
        document: RunDocument,
        place: int,
        signal: AbortSignal,
        port: Port,
        intents: Intents,
        outputs: Mapping[str, Any] | None = None,
    ) -> None:
        step = document["steps"][place]
        self._document = document
        self._place = place
        self._port = port
        self._intents = intents
        self._outputs = {} if outputs is None else outputs  # by id: what the document only refers to, decoded anew at each look-up
        self.step_id: str = step["stepId"]
        self.attempt: int = step["attempts"]  # 1-based; counts entries into the handler, those of lost workers too
        self.signal = signal
        self._context: ContextView | None = None  # this and the next are made by the first read
        self._input: Any = None
        self._unknown: set[str] | None = None  # names of steps that do not exist and were asked for; None: there were none

    # --- the run ---------------------------------------------------------------------------------------------------

    @property
    def run_id(self) -> str:
        """The run's id."""
        return str(self._document["_id"])

    @property
    def workflow_id(self) -> str:
        """The id of the run's workflow."""
        return str(self._document["workflowId"])

    @property
    def context(self) -> ContextView:
        """The run's context as this attempt sees it: a dict for reading. Change it by `set`; an assignment raises ValidationError.

        Its lists and mappings are copies. A change of one of them whose key the handler does not `set` is lost, and logged.
        """
        if self._context is None:
            self._context = self._intents.view = ContextView(copied(self._document.get("context") or {}))
        return self._context

    @property
    def input(self) -> Any:
        """The run's input."""
        if self._input is None:
            self._input = copied(self._document.get("input"))
        return self._input

    @property
    def idempotency_key(self) -> str:
        """The same in all attempts at this step of this run; another one after a rewind. For payment providers and the like."""
        rewinds = self._document.get("rewinds", 0)
        key = f"{self._document['_id']}:{self.step_id}"
        return f"{key}:{rewinds}" if rewinds else key

    def get_output(self, step_id: str) -> Any:
        """The output of an earlier step, or None when it has none. A warning is logged if the workflow has no such step.

        Each call gives a copy of its own. It is the value itself, so there is nothing to await.
        """
        for step in self._document["steps"]:
            if step["stepId"] == step_id:
                output = step.get("output")
                return self._outputs[output[EXTERNAL_KEY]] if is_external(output) else copied(output)
        self._warn_of_unknown(step_id if isinstance(step_id, str) else str(type(step_id)))
        return None

    def _warn_of_unknown(self, asked: str) -> None:
        """Say once in an attempt that there is no such step."""
        self._unknown = self._unknown or set()
        if asked in self._unknown:
            return
        self._unknown.add(asked)
        near = difflib.get_close_matches(asked, [step["stepId"] for step in self._document["steps"]], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        fields = {"run_id": self.run_id, "workflow_id": self.workflow_id, "step_id": self.step_id}
        # The whole sentence is the message: it is for the handler's author, whose test or program may print nothing else.
        log.warning("unknown_step: ctx.get_output(%r) is None, because this workflow has no such step%s", asked, hint, extra=fields)

    def set(self, key: str, value: Any) -> Done:
        """Set a context key: visible in `ctx.context` at once, stored with this step's result, dropped if the attempt fails.

        Raises ValidationError for a key or a value that cannot be stored.
        """
        self._check_open()
        if not isinstance(key, str) or not key or "\0" in key:
            raise ValidationError(f"ctx.set: a key is non-empty text without NUL, not {key!r}")
        value, size = as_payload(value, f"context.{key}")
        self._intents.sets_bytes += size + len(key)
        self._intents.sets[key] = value
        put(self.context, key, copied(value))
        return DONE

    # --- while the handler runs ------------------------------------------------------------------------------------

    def emit(self, event: str, data: Any = None) -> Done:
        """Publish an event of your own at once, to subscribers of `app.events`. It answers no `wait_for`.

        Names that begin with `workflow:`, `step:`, `engine:` or `scheduler:` are the engine's, and refused.
        """
        self._check_open()
        if not isinstance(event, str) or not event or event == "*" or is_engine_name(event):
            raise ValidationError(f"ctx.emit: {event!r} is not a name for an event of your own; a name such as 'order:paid' is")
        check_payload(data, f"emit({event!r}).data")
        self._port.emit(event, data)
        return DONE

    def log(self, message: str, **data: Any) -> Done:
        """Log a line that names the run, the step and the attempt."""
        fields = {"run_id": self.run_id, "workflow_id": self.workflow_id, "step_id": self.step_id, "attempt": self.attempt}
        log.info("%s", message, extra={"data": data, **fields})
        return DONE

    def _check_open(self) -> None:
        if self._intents.closed:
            if self.signal.reason in ("cancelled", "lease-lost"):
                # The same error as from the call itself: which of the two comes first is a matter of milliseconds.
                self.signal.raise_if_aborted()
            raise InvalidStateError(f"run {self.run_id}: this attempt at step {self.step_id} is over; its ctx can do nothing more")
