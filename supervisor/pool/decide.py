"""The supervisor's decisions: (state, event, now) -> (state, actions). Pure; supervisor.py performs the actions.

One function branches over the events. The handlers of children's messages and of time are here; restarts.py,
work_sharing.py, gates.py, burst.py and operator_signals.py hold the others, upkeep.py what follows from any change.
"""

from __future__ import annotations

import logging
import signal
from dataclasses import replace
from typing import assert_never

from streamline_pool.supervisor.ipc.messages import (
    Beat,
    BootFailed,
    CheckRun,
    DueCount,
    Parked,
    Probe,
    Released,
    RunChanged,
    ServeSubscribers,
    StewardBeat,
    Subscribers,
    TimersFired,
    WorkDue,
)
from streamline_pool.supervisor.pool.burst import on_due_count
from streamline_pool.supervisor.pool.circuit_breaker import after_probe
from streamline_pool.supervisor.pool.facts import pool_facts
from streamline_pool.supervisor.pool.gates import apply_breaker, on_operations
from streamline_pool.supervisor.pool.operator_signals import on_signal
from streamline_pool.supervisor.pool.restarts import on_boot_failed, on_exited, on_fork_failed, on_forked, on_invalid_message
from streamline_pool.supervisor.pool.shutdown import KILL_AFTER_S
from streamline_pool.supervisor.pool.state import (
    Action,
    Decision,
    Event,
    Exited,
    Forked,
    ForkFailed,
    InvalidMessage,
    Kill,
    KnownSubscribers,
    Limits,
    Log,
    Measured,
    Member,
    Received,
    Send,
    Signalled,
    State,
    Tick,
    Vacancy,
)
from streamline_pool.supervisor.pool.upkeep import apply_rules
from streamline_pool.supervisor.pool.work_sharing import send_owed_wake_up, share_timers, wake_up_idle

__all__ = ["decide", "initial", "pause_s"]

TICK_S = 1.0
FROZEN_S = 2.0 * TICK_S  # without a tick for so long, the supervisor was stopped, not the children
FACTS_INTERVAL_S = 1.0
_PENDING_S = 0.02


def initial(target: int, limits: Limits, now: float) -> State:
    """A pool of `target` workers of which no process runs yet; the first `Tick` starts it."""
    workers = tuple(Vacancy(role="worker", index=index, due_at=now) for index in range(target))
    return State(limits=limits, target=target, vacancies=(Vacancy(role="steward", index=-1, due_at=now), *workers), ticked_at=now)


def pause_s(state: State, now: float) -> float:
    """How long the loop may sleep when nothing happens: until the next child would be stalled, at most until the next tick.

    Short while a deadline or a back-off is near.
    """
    pending = state.vacancies or state.shutdown or state.burst or any(m.deadline is not None for m in state.members.values())
    if pending:
        return _PENDING_S
    silent_since = min((m.last_message_at for m in state.members.values() if m.phase != "dying"), default=now)
    stalled_in_s = silent_since + state.limits.stall_timeout_s - now
    return min(TICK_S, max(_PENDING_S, stalled_in_s))


def decide(state: State, event: Event, now: float) -> Decision:
    """The decision for one event: what the event itself leads to, then what the rules of upkeep.py lead to."""
    state, actions = _on_event(state, event, now)
    if isinstance(event, Received) and isinstance(event.message, WorkDue | TimersFired | RunChanged):
        return state, actions  # by far the most frequent: a wake-up changes nothing that the rules read
    state, more = apply_rules(state, now)
    return state, actions + more


def _on_event(state: State, event: Event, now: float) -> Decision:
    match event:
        case Received():
            member = state.members.get(event.pid)
            return _on_message(state, member, event, now) if member is not None else (state, [])
        case Tick():
            return _on_tick(state, now)
        case Measured():
            known = [replace(m, rss_bytes=event.rss_bytes[m.pid]) for m in state.members.values() if m.pid in event.rss_bytes]
            return state.with_members(*known), []
        case Forked():
            return on_forked(state, event, now)
        case ForkFailed():
            return on_fork_failed(state, event, now)
        case Exited():
            return on_exited(state, event, now)
        case InvalidMessage():
            return on_invalid_message(state, event, now)
        case Signalled():
            return on_signal(state, event.signum, now)
        case _:
            assert_never(event)


# ---- messages ------------------------------------------------------------------------------------------------------


def _on_message(state: State, member: Member, event: Received, now: float) -> Decision:
    member = replace(member, last_message_at=now)
    state = state.with_members(member)
    match event.message:
        case Beat() as beat:
            return _on_beat(state, member, beat, now)
        case StewardBeat(ready=ready):
            starts = ready and member.phase == "starting"
            return (state.with_members(replace(member, phase="ready")) if starts else state), []
        case WorkDue(run_id=run_id, count=count, overdue=overdue):
            return wake_up_idle(state, run_id, count, now, overdue=overdue)
        case TimersFired(run_ids=run_ids):
            return share_timers(state, run_ids, now)
        case RunChanged(run_id=run_id, owner=owner):
            holders = [m for m in state.workers if owner in (None, m.owner)]
            return state, [Send(pid=m.pid, message=CheckRun(run_id=run_id)) for m in holders]
        case Subscribers():
            return _on_subscribers(state, event.message, now)
        case Probe(ok=ok, error=error):
            return apply_breaker(state, after_probe(state.breaker, ok, now), error or "")
        case Released():
            return _on_released(state, event.message, now)
        case DueCount(seq=seq, due=due):
            return on_due_count(state, seq, due, now)
        case BootFailed() as failed:
            return on_boot_failed(state, member, failed, now)
        case _:
            assert_never(event.message)


def _on_beat(state: State, member: Member, beat: Beat, now: float) -> Decision:
    before = member.beat
    starts = member.phase == "starting" and beat.state in ("ready", "holding")
    member = replace(member, beat=replace(beat, parked=()), phase="ready" if starts else member.phase)
    state = state.with_members(member)
    actions: list[Action] = []
    if beat.parked and state.steward is not None:
        actions.append(Send(pid=state.steward.pid, message=Parked(instants=beat.parked)))
    state, more = on_operations(state, member, beat, before, now)
    actions += more
    if beat.idle:
        state, more = send_owed_wake_up(state, now)
        actions += more
    return state, actions


def _on_subscribers(state: State, message: Subscribers, now: float) -> Decision:
    seq = state.last_seq + 1
    known = KnownSubscribers(seq=seq, until={subscriber: now + left_s for subscriber, left_s in message.subscribers})
    serve = ServeSubscribers(seq=seq, subscribers=message.subscribers)
    return replace(state, last_seq=seq, subscribers=known), [Send(pid=m.pid, message=serve) for m in state.workers]


def _on_released(state: State, message: Released, now: float) -> Decision:
    """The runs of a dead worker are claimable again: wake up workers for them."""
    pending = {owner: died for owner, died in state.unacknowledged.items() if owner != message.owner}
    log = Log(level=logging.INFO, event="leases_released", fields={"owner": message.owner, "runs": message.runs})
    state, actions = wake_up_idle(replace(state, unacknowledged=pending), None, message.runs, now, overdue=True)
    return state, [log, *actions]


# ---- time ----------------------------------------------------------------------------------------------------------


def _on_tick(state: State, now: float) -> Decision:
    if now - state.ticked_at > FROZEN_S:
        # This process was stopped, or the machine was: messages that the children sent meanwhile may not be read yet.
        state = state.with_members(*(replace(m, last_message_at=now) for m in state.members.values()))
    state, actions = _abort_stalled(replace(state, ticked_at=now), now)
    steward = state.steward
    if steward is not None and now - state.facts_at >= FACTS_INTERVAL_S:
        state = replace(state, facts_at=now)
        actions.append(Send(pid=steward.pid, message=pool_facts(state, now)))
    return state, actions


def _abort_stalled(state: State, now: float) -> Decision:
    """End every child that has sent nothing for too long. SIGABRT makes it write its stacks first."""
    actions: list[Action] = []
    for member in [m for m in state.members.values() if m.phase != "dying" and now - m.last_message_at > state.limits.stall_timeout_s]:
        fields = {"pid": member.pid, "role": member.role, "silent_s": round(now - member.last_message_at, 3)}
        state = state.with_members(replace(member, phase="dying", stalled=True, deadline=now + KILL_AFTER_S))
        actions.append(Log(level=logging.ERROR, event="child_stalled", fields=fields))
        actions.append(Kill(pid=member.pid, signum=signal.SIGABRT))
    return state, actions
