"""What a step's handler sees: `ctx`. Owns the checks of how a handler may leave, and of what it stores while it runs.

The view of the run is in run_context.py. What was recorded is stored by the engine together with the step's result; `checkpoint`,
`heartbeat` and hooks reach the database at once.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NoReturn

from streamline_pool.domain.document import WaitDocument
from streamline_pool.domain.done import DONE, Done
from streamline_pool.domain.errors import InvalidStateError, ValidationError
from streamline_pool.protocol.codec import as_payload

from .intents import SleepSuspension, Suspension, WaitSuspension
from .run_context import WAIT_MAX_S, RunContext, bounded, check_event_name, check_reason, copied

__all__ = ["Context", "register_hook"]


class Context(RunContext):
    """One attempt at one step, as its handler sees it.

    Every call has done its work when it returns. Those without a result return a `Done`, which may be awaited, and counts as None.
    """

    __slots__ = ()

    # --- leaving the handler ---------------------------------------------------------------------------------------

    def sleep(self, delay: float | timedelta) -> NoReturn:
        """End this handler; its step is done after `delay` seconds, and the handler is not called again. Outlives every restart."""
        self._suspend(SleepSuspension(bounded(delay, "ctx.sleep", zero_ok=True)))

    def wait(self, reason: str, data: Any = None, *, timeout: float | timedelta | None = None) -> NoReturn:
        """End this handler; its step is done when an answer comes, by `Workflow.resume` or by the hook made before.

        The answer's payload is the step's output. `reason` and `data` are for the person who is to answer (`waiting_for` of
        the step). After `timeout` seconds without an answer the output is one for which `streamline_pool.is_timeout` is true.
        """
        self._check_open()
        has_hooks = bool(self._document["steps"][self._place].get("hooks"))
        wanted: WaitDocument = {"type": "webhook" if has_hooks else "human", "reason": check_reason(reason, "ctx.wait: reason")}
        if data is not None:
            wanted["data"], size = as_payload(data, "wait.data")
            self._intents.sets_bytes += size
        self._suspend(WaitSuspension(wanted, None if timeout is None else bounded(timeout, "ctx.wait: timeout")))

    def wait_for(self, event_name: str, *, timeout: float | timedelta | None = None) -> NoReturn:
        """End this handler; its step is done when an event of that name comes, by `app.send_event`, or has come already.

        The event's data is the step's output. `timeout`: as for `wait`.
        """
        self._check_open()
        name = check_event_name(event_name, "ctx.wait_for")
        wanted: WaitDocument = {"type": "event", "reason": f"event {name}", "eventName": name}
        self._suspend(WaitSuspension(wanted, None if timeout is None else bounded(timeout, "ctx.wait_for: timeout")))

    def _suspend(self, suspension: Suspension) -> NoReturn:
        self._check_open()
        self._intents.suspension = self._intents.suspension or suspension
        raise self._intents.suspension

    # --- while the handler runs ------------------------------------------------------------------------------------

    def heartbeat(self) -> Done:
        """Renew the lease now. Never needed for a step to live long (renewal is automatic)."""
        self._check_open()
        self._port.heartbeat()
        return DONE

    def checkpoint(self, value: Any) -> Done:
        """Store the progress of this step; durable on return, kept across attempts, dropped when the step ends.

        In `async def` handlers the event loop is blocked for one majority write, or for up to 10 seconds while the database
        does not answer. Raises LeaseLostError when this worker no longer holds the run, StoreUnavailableError after that time,
        InvalidStateError when this handler has blocked the loop for too long by many calls without an `await` between them.
        """
        self._check_open()
        self._port.save_checkpoint(self._intents, *as_payload(value, "checkpoint"))
        return DONE

    def get_checkpoint(self) -> Any:
        """What the last `checkpoint` of this step stored, in this or an earlier attempt; None when there is none."""
        return copied(self._document["steps"][self._place].get("checkpoint"))


def register_hook(context: Context, reason: str, expires_s: float | None) -> str:
    """Store a hook of the context's step; its token. For `hooks.create_hook`, which is the public name."""
    context._check_open()
    check_reason(reason, "create_hook: reason")
    if expires_s is not None and expires_s > WAIT_MAX_S:
        raise ValidationError(f"create_hook: expires_in: {expires_s} seconds is more than a hundred years")
    if context._intents.has_hook:
        raise InvalidStateError(f"run {context.run_id}: step {context.step_id} has an open hook already; a step has one at a time")
    context._intents.has_hook = True
    try:
        return context._port.save_hook(context._intents, reason, expires_s)
    except BaseException:
        context._intents.has_hook = False  # the caller has no token, and may ask for another hook
        raise
