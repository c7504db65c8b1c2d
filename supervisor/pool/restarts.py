"""What follows when a child is forked, cannot be forked, cannot start, misbehaves or dies. Pure.

Owns the budget of restarts, their back-off, and the evidence that goes to the steward with a death.
"""

from __future__ import annotations

import logging
import signal
from dataclasses import replace

from streamline_pool.domain.backoff import Backoff, jittered
from streamline_pool.supervisor.ipc.messages import (
    STORE_UNREACHABLE_EXIT,
    BootFailed,
    Circuit,
    Died,
    Evidence,
    Gate,
    Hold,
    Reslot,
    ServeSubscribers,
)
from streamline_pool.supervisor.pool.gates import on_trial_lost
from streamline_pool.supervisor.pool.shutdown import KILL_AFTER_S, begin_shutdown, join_shutdown
from streamline_pool.supervisor.pool.state import (
    Action,
    Decision,
    Exited,
    Forked,
    ForkFailed,
    InvalidMessage,
    Kill,
    Log,
    Member,
    Role,
    Send,
    State,
)

__all__ = ["on_boot_failed", "on_exited", "on_fork_failed", "on_forked", "on_invalid_message"]

CRASH_WINDOW_S = 60.0  # `restart_budget` is crashes per minute
RESTART = Backoff(base_s=0.05, ceiling_s=5.0)  # by crashes in the window: a lone crash costs nothing, a loop no CPU
RESTART_STORE_AWAY_S = 1.0  # a guess: work must resume within 3 s of the database's return
BOOT_GRACE_S = 0.2  # when the pool cannot start, no run is in flight that a longer grace could save


def on_forked(state: State, event: Forked, now: float) -> Decision:
    """A new child gets what the others got before it was forked."""
    member = Member(pid=event.pid, owner=event.owner, role=event.role, index=event.index, started_at=now, last_message_at=now)
    state, orders = join_shutdown(state.with_members(member), member, now)
    log = Log(level=logging.DEBUG, event="child_started", fields={"pid": event.pid, "role": event.role})
    if event.role == "steward":
        return replace(state, facts_at=0.0), [log, *_orders_for_new_steward(state, event.pid), *orders]
    return state, [log, *_orders_for_new_worker(state, event, now), *orders]


def _orders_for_new_steward(state: State, pid: int) -> list[Send]:
    first_orders = [Send(pid=pid, message=died) for died in state.unacknowledged.values()]
    return [*first_orders, Send(pid=pid, message=Circuit(state=state.breaker.state))] if state.breaker.state != "closed" else first_orders


def _orders_for_new_worker(state: State, event: Forked, now: float) -> list[Send]:
    first_orders, pid = [], event.pid
    if event.total != state.target and event.index < state.target:
        first_orders.append(Send(pid=pid, message=Reslot(index=event.index, total=state.target)))
    if state.held:
        first_orders.append(Send(pid=pid, message=Hold(held=True)))
    if state.breaker.state != "closed":
        first_orders.append(Send(pid=pid, message=Gate(state="closed")))
    if state.subscribers is not None:
        serve = ServeSubscribers(seq=state.subscribers.seq, subscribers=state.subscribers.remaining(now))
        first_orders.append(Send(pid=pid, message=serve))
    return first_orders


def on_fork_failed(state: State, event: ForkFailed, now: float) -> Decision:
    """The system has no room for another process: it counts as a crash."""
    log = Log(level=logging.ERROR, event="fork_failed", fields={"role": event.role, "error": event.error})
    state, actions = _replace_crashed(state, event.role, event.index, event.jitter, now)
    return state, [log, *actions]


def on_boot_failed(state: State, member: Member, failed: BootFailed, now: float) -> Decision:
    """A child that cannot start ends the pool, unless it only lacks a database that answered before."""
    member = replace(member, cannot_start=True)
    if state.ready and failed.exit_code == STORE_UNREACHABLE_EXIT:
        return state.with_members(member), []
    state = state.with_members(replace(member, exit_reason=member.exit_reason or "boot failed"))
    if state.shutdown is not None:
        return state, []
    fields = {"pid": member.pid, "role": member.role, "error": failed.message}
    state, actions = begin_shutdown(state, now, failed.exit_code, "boot failed", grace_s=BOOT_GRACE_S)
    return state, [Log(level=logging.ERROR, event="boot_failed", fields=fields), *actions]


def on_invalid_message(state: State, event: InvalidMessage, now: float) -> Decision:
    """The stream of this child cannot be trusted any more: kill the child."""
    member = state.members.get(event.pid)
    if member is None:
        return state, []
    log = Log(level=logging.ERROR, event="child_garbled", fields={"pid": event.pid, "error": event.error})
    state = state.with_members(replace(member, phase="dying", deadline=now + KILL_AFTER_S))
    return state, [log, Kill(pid=event.pid, signum=signal.SIGKILL)]


def on_exited(state: State, event: Exited, now: float) -> Decision:
    """A child has ended: log it, have a dead worker's leases released, and fill its place again if it was not ordered to end."""
    member = state.members.get(event.pid)
    if member is None:
        return state, []
    state = _without(state, member)
    clean = event.exit_code == 0 and (member.exit_reason is not None or state.shutdown is not None)
    died = Died(owner=member.owner, evidence=_evidence(member, event, now))
    actions: list[Action] = [_exit_log(member, died.evidence, expected=clean or member.cannot_start or _never_started(state, member))]
    if member.role == "worker" and not clean:
        state = replace(state, unacknowledged={**state.unacknowledged, member.owner: died})
        if state.steward is not None:
            actions.append(Send(pid=state.steward.pid, message=died))
    state, more = on_trial_lost(state, member.pid, now)
    actions += more
    if member.exit_reason is None and member.cannot_start:
        state = _restart(state, member.role, member.index, now + jittered(RESTART_STORE_AWAY_S, event.jitter))
    elif member.exit_reason is None and (state.shutdown is None or member.role == "steward"):
        state, more = _replace_crashed(state, member.role, member.index, event.jitter, now)
        actions += more
    return state, actions


def _without(state: State, member: Member) -> State:
    """The state after the child's end; its counters are kept, so that totals never drop."""
    state = replace(state, members={pid: m for pid, m in state.members.items() if pid != member.pid})
    if member.beat is None:
        return state
    return replace(state, past_runs=state.past_runs + member.beat.runs_total, past_steps=state.past_steps + member.beat.steps_total)


def _never_started(state: State, member: Member) -> bool:
    """The supervisor killed it during a shutdown before it had started, such as without a database: no crash to look into."""
    starting = member.beat is None or member.beat.state == "starting"
    return member.phase == "dying" and state.shutdown is not None and starting


def _evidence(member: Member, event: Exited, now: float) -> Evidence:
    return Evidence(
        exit_code=event.exit_code,
        signal=event.signal,
        stalled=member.stalled,
        rss_bytes=member.rss_bytes,
        uptime_s=round(now - member.started_at, 3),
        running=member.beat.running if member.beat is not None else (),
        dump=event.dump,
    )


def _exit_log(member: Member, evidence: Evidence, *, expected: bool) -> Log:
    fields = {
        "pid": member.pid,
        "role": member.role,
        "index": member.index,
        "exit_code": evidence.exit_code,
        "signal": evidence.signal,
        "stalled": evidence.stalled,
        "rss_bytes": evidence.rss_bytes,
        "uptime_s": evidence.uptime_s,
        "running": evidence.running,
    }
    if expected:
        return Log(level=logging.INFO, event="child_left", fields={name: fields[name] for name in ("pid", "role", "index", "exit_code")})
    return Log(level=logging.ERROR, event="child_died", fields={name: value for name, value in fields.items() if value not in (None, ())})


def _replace_crashed(state: State, role: Role, index: int, jitter: float, now: float) -> Decision:
    """Fork a successor after a back-off, or end the pool when its budget of restarts is used up."""
    crashes = (*(at for at in state.crashes if now - at < CRASH_WINDOW_S), now)
    state = replace(state, crashes=crashes)
    if len(crashes) > state.limits.restart_budget and state.shutdown is None:
        fields = {"crashes_per_minute": len(crashes), "budget": state.limits.restart_budget}
        state, actions = begin_shutdown(state, now, 1, "restart budget exceeded")
        return state, [Log(level=logging.CRITICAL, event="restart_budget_exceeded", fields=fields), *actions]
    return _restart(state, role, index, now + RESTART.delay_s(len(crashes), jitter)), []


def _restart(state: State, role: Role, index: int, due_at: float) -> State:
    return replace(state.with_vacancy(role, index, due_at), restarts=state.restarts + 1)
