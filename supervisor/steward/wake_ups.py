"""When the steward has workers woken up: at once, a moment later together with others, or when a timer fires.

Owns the coalescing of wake-ups and the one timer handle of the process. Which runs become due, and when, is in timers.py;
which worker gets a wake-up is the supervisor's decision (pool/work_sharing.py). Everything sent from here is a hint.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import datetime

from streamline_pool.supervisor.ipc.messages import TimersFired, WorkDue
from streamline_pool.supervisor.steward.duty import DutyTools
from streamline_pool.supervisor.steward.timers import Timers

__all__ = ["PendingWakeUps", "WakeUps"]

WAKE_PAUSE_S = 0.002  # the first wake-up goes at once, the next ones together: a flood costs at most 1 000 messages a second
TIMER_MARGIN_S = 0.002  # the server compares `wakeAt` in whole milliseconds; a wake-up that comes too early finds nothing
TIMER_PAUSE_S = 0.005  # between firings: runs whose timers fire that close together are claimed together
TIMERS_FIRED_MAX = 200  # run ids in one message; a worker claims no more at once


class PendingWakeUps:
    """The wake-ups that were not sent yet: at most one, and one for overdue runs, in however many workflows they are. Pure."""

    def __init__(self) -> None:
        self._pending: dict[bool, tuple[str | None, int]] = {}  # whether overdue -> (the run, if it is one; how many)

    def __bool__(self) -> bool:
        return bool(self._pending)

    def add(self, run_id: str | None, count: int, *, overdue: bool) -> None:
        """`count` runs are due; `run_id` names the run if it is one."""
        if overdue in self._pending:
            self._pending[overdue] = (None, self._pending[overdue][1] + count)
        else:
            self._pending[overdue] = (run_id if count == 1 else None, count)

    def take(self) -> list[WorkDue]:
        """Remove them all."""
        taken, self._pending = self._pending, {}
        return [WorkDue(run_id=run_id, count=count, overdue=overdue) for overdue, (run_id, count) in taken.items()]


class WakeUps:
    """Wake-ups and timers of one steward. Used by the signal tail, the sweep, and the supervisor's `Parked` messages."""

    def __init__(self, tools: DutyTools) -> None:
        self._tools = tools
        self._clock = tools.env.clock
        self._loop = asyncio.get_running_loop()
        self._pending = PendingWakeUps()
        self._sent_at = 0.0
        self._timers = Timers()
        self._timer_handle: asyncio.TimerHandle | None = None
        self._fired_at = 0.0

    def plan(self, at: datetime, run_id: str | None, count: int = 1) -> None:
        """Have workers woken up for a run (or `count` runs) at `at`, or now if that is past. Then call `set_timer`."""
        if at <= self._tools.store.now():
            self.wake_up(run_id, count)
        else:
            self._timers.add(_epoch_ms(at), run_id)

    def plan_parked(self, instants: Iterable[tuple[int, str]]) -> None:
        """Plan the runs that workers of this host parked: (epoch ms, run id) of each."""
        for at_ms, run_id in instants:
            self._timers.add(at_ms, run_id)
        self.set_timer()

    def wake_up(self, run_id: str | None, count: int, *, overdue: bool = False) -> None:
        """Have `count` workers woken up: now, or together with the other wake-ups of the next moments."""
        waiting = bool(self._pending)
        self._pending.add(run_id, count, overdue=overdue)
        if waiting:
            return
        since = self._clock.monotonic() - self._sent_at
        if since >= WAKE_PAUSE_S:
            self._send_pending()
        else:
            self._loop.call_later(WAKE_PAUSE_S - since, self._send_pending)

    def _send_pending(self) -> None:
        self._sent_at = self._clock.monotonic()
        for message in self._pending.take():
            self._tools.hint(message)

    def set_timer(self) -> None:
        """Have `_fire` called at the next instant."""
        if self._timer_handle is not None:
            self._timer_handle.cancel()
            self._timer_handle = None
        at_ms = self._timers.next_at_ms()
        if at_ms is not None:
            delay_s = at_ms / 1000 - self._tools.store.now().timestamp() + TIMER_MARGIN_S
            pause_s = self._fired_at + TIMER_PAUSE_S - self._clock.monotonic()
            self._timer_handle = self._loop.call_later(max(0.0, delay_s, pause_s), self._fire)

    def _fire(self) -> None:
        """A run whose id is known is named, so that it does not queue behind runs that have been due for longer."""
        self._fired_at = self._clock.monotonic()
        due = self._timers.pop_due(_epoch_ms(self._tools.store.now()))
        run_ids = [run_id for run_id in due if run_id is not None]
        for start in range(0, len(run_ids), TIMERS_FIRED_MAX):
            self._tools.hint(TimersFired(run_ids=tuple(run_ids[start : start + TIMERS_FIRED_MAX])))
        if unnamed := len(due) - len(run_ids):
            self.wake_up(None, unnamed)
        self.set_timer()


def _epoch_ms(at: datetime) -> int:
    return round(at.timestamp() * 1000)
