"""Which worker gets a wake-up, and which one gets the runs whose timers fired. Pure.

Owns only this choice. The steward decides when there is a wake-up to share (steward/wake_ups.py). The worker decides what it
does with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from streamline_pool.supervisor.ipc.messages import TimersFired, WakeUp
from streamline_pool.supervisor.pool.state import Decision, Member, Send, State

__all__ = ["send_owed_wake_up", "share_timers", "wake_up_idle"]


def wake_up_idle(state: State, run_id: str | None, count: int, now: float, *, overdue: bool) -> Decision:
    """Wake up as many idle workers as there are runs, in the order of their last wake-up.

    If too few are idle, the other wake-ups are owed to the next workers that become idle. A worker in the middle of a poll
    may have just missed the run, and one without free capacity polls again by itself only if its last poll left
    something. One owed wake-up for all workers would leave the second that becomes idle without work until a sweep. A
    worker whose gate opens later needs none: it polls then.
    """
    if count <= 0 or not _may_claim(state):
        return state, []
    idle = [m for m in state.members.values() if m.phase == "ready" and m.exit_reason is None and _is_idle(m)]
    chosen = sorted(idle, key=lambda m: m.woken_at)[:count]
    owed = min(state.owed_wake_ups + count, len(state.active_workers)) - len(chosen)
    owed_overdue = overdue or (state.owed_wake_ups > 0 and state.owed_overdue)
    state = replace(state, owed_wake_ups=max(owed, 0), owed_overdue=owed_overdue)
    wake_up = WakeUp(run_id=run_id if count == 1 else None, overdue=overdue)
    return _woken(state, chosen, now), [Send(pid=m.pid, message=wake_up) for m in chosen]


def send_owed_wake_up(state: State, now: float) -> Decision:
    """A worker became idle: send one owed wake-up, if there is any."""
    if not state.owed_wake_ups:
        return state, []
    return wake_up_idle(replace(state, owed_wake_ups=state.owed_wake_ups - 1), None, 1, now, overdue=state.owed_overdue)


def share_timers(state: State, run_ids: Sequence[str], now: float) -> Decision:
    """Divide the runs whose timers fired among the workers, idle or not; no run goes to two workers.

    If there are idle workers, they get all of them. The other workers are busy, and have only a few places for such runs. One that
    is kept for a suspect has none.
    """
    if not _may_claim(state):
        return state, []  # a worker that may claim again polls all that is due
    able = [m for m in state.active_workers if m.phase == "ready"]
    idle = [m for m in able if _is_idle(m)]
    busy = [m for m in able if m.beat is None or not m.beat.kept]
    chosen = sorted(idle or busy or able, key=lambda m: m.woken_at)[: len(run_ids)]
    shares = [Send(pid=m.pid, message=TimersFired(run_ids=tuple(run_ids[place :: len(chosen)]))) for place, m in enumerate(chosen)]
    return _woken(state, chosen, now), [*shares]


def _may_claim(state: State) -> bool:
    return not state.held and state.breaker.state == "closed"


def _is_idle(member: Member) -> bool:
    return member.beat is not None and member.beat.idle


def _woken(state: State, members: Sequence[Member], now: float) -> State:
    return state.with_members(*(replace(m, woken_at=now) for m in members))
