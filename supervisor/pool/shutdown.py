"""How the pool ends, and how a child that was ordered to end and does not is forced to. Pure.

Owns the stages of a shutdown, the deadlines of children, and the exit code. decide.py starts a shutdown; upkeep.py
applies the two rules of this file after every change.
"""

from __future__ import annotations

import logging
import signal
from dataclasses import replace
from typing import Any

from streamline_pool.supervisor.ipc.messages import Close, Drain, Stop
from streamline_pool.supervisor.pool.state import Action, Decision, Exit, Kill, Log, Member, Send, Shutdown, State

__all__ = ["CANCEL_GRACE_S", "KILL_AFTER_S", "advance_shutdown", "begin_shutdown", "enforce_deadlines", "join_shutdown", "kill_all"]

KILL_AFTER_S = 2.0  # from SIGABRT, or the steward's last order, to SIGKILL: time to write stacks
RELEASE_MARGIN_S = 3.5  # from the end of a grace to SIGKILL; derived: a worker stops trying to release after 3 s
RELEASE_GRACE_S = 1.0  # after the drain deadline: for abort signals to fire and leases to be released, not for more work
CANCEL_GRACE_S = 5.0  # what docs/reference/command.md gives handlers after a second SIGINT
RELEASE_WAIT_S = 3.0  # a guess: ten retries of one update; what is not released by then expires by itself


def begin_shutdown(state: State, now: float, code: int, reason: str, *, grace_s: float | None = None) -> Decision:
    """Start to end the pool, or end it harder. `grace_s`: seconds until workers abort their steps; None: they finish them."""
    if state.shutdown is not None and code == 4:
        code = state.shutdown.code or code  # a worse exit code that was set before is kept
    fields = {"reason": reason, "exit_code": code, **_unfinished_work(state, grace_s)}
    actions: list[Action] = [Log(level=logging.INFO, event="pool_ends", fields=fields)]
    for member in state.workers:
        if member.phase == "dying" or (grace_s is None and member.phase == "stopping"):
            continue
        ending, order = _ordered_to_end(state, member, reason, now, grace_s)
        state = state.with_members(ending)
        actions.append(Send(pid=member.pid, message=order))
    kept = tuple(v for v in state.vacancies if v.role == "steward")
    shutdown = Shutdown(stage="workers", code=code, reason=reason, grace_s=grace_s)
    return replace(state, shutdown=shutdown, vacancies=kept, rolling=frozenset(), burst=None), actions


def _ordered_to_end(state: State, member: Member, reason: str, now: float, grace_s: float | None) -> tuple[Member, Drain | Stop]:
    exit_reason = member.exit_reason or reason
    if grace_s is None:
        return replace(member, phase="draining", exit_reason=exit_reason, deadline=now + state.limits.drain_timeout_s), Drain()
    # A worker that is still starting holds no run, and may be waiting for a database that does not answer.
    deadline = now + grace_s + (0.0 if member.phase == "starting" else RELEASE_MARGIN_S)
    return replace(member, phase="stopping", exit_reason=exit_reason, deadline=deadline), Stop(grace_s=grace_s)


def _unfinished_work(state: State, grace_s: float | None) -> dict[str, Any]:
    """What an ending pool waits for, as far as it knows, so that the operator knows why it has not ended yet."""
    runs = sum(member.beat.in_flight for member in state.workers if member.beat is not None)
    if not runs or grace_s is not None:
        return {}
    return {"finishing_runs": runs, "at_most_s": state.limits.drain_timeout_s, "advice": "a second Ctrl-C releases them unfinished"}


def kill_all(state: State, reason: str, now: float) -> Decision:
    """End every child at once; the exit code is that of a killed process."""
    killed = [replace(m, phase="dying", exit_reason=reason, deadline=now + KILL_AFTER_S) for m in state.members.values()]
    shutdown = Shutdown(stage="close", code=137, reason=reason)
    kills = [Kill(pid=m.pid, signum=signal.SIGKILL) for m in killed]
    return replace(state.with_members(*killed), shutdown=shutdown, vacancies=()), [*kills]


def join_shutdown(state: State, member: Member, now: float) -> Decision:
    """Order a child to end that was forked before the shutdown, and that the supervisor gets to know only now.

    The signal that ends the pool may be handled between the fork and its event. Without an order the child would keep the
    pool alive for ever. A steward is still needed, until the stage `close`.
    """
    shutdown = state.shutdown
    if shutdown is None or (member.role == "steward" and shutdown.stage != "close"):
        return state, []
    if shutdown.stage == "close":
        killed = replace(member, phase="dying", exit_reason=shutdown.reason, deadline=now + KILL_AFTER_S)
        return state.with_members(killed), [Kill(pid=member.pid, signum=signal.SIGKILL)]
    ending, order = _ordered_to_end(state, member, shutdown.reason, now, shutdown.grace_s)
    return state.with_members(ending), [Send(pid=member.pid, message=order)]


# ---- rules ---------------------------------------------------------------------------------------------------------


def enforce_deadlines(state: State, now: float) -> Decision:
    """Take the next harder measure against every child that was ordered to end and has not ended by its deadline."""
    actions: list[Action] = []
    for member in [m for m in state.members.values() if m.deadline is not None and m.deadline <= now]:
        fields = {"pid": member.pid, "role": member.role, "reason": member.exit_reason}
        if member.phase == "draining":
            deadline = now + RELEASE_GRACE_S + RELEASE_MARGIN_S
            state = state.with_members(replace(member, phase="stopping", deadline=deadline))
            actions.append(Log(level=logging.WARNING, event="drain_timeout", fields=fields))
            actions.append(Send(pid=member.pid, message=Stop(grace_s=RELEASE_GRACE_S)))
        else:
            # Repeated until it has ended: a process in an uninterruptible system call takes its time to die.
            state = state.with_members(replace(member, phase="dying", deadline=now + KILL_AFTER_S))
            actions.append(Log(level=logging.WARNING, event="child_killed", fields=fields))
            actions.append(Kill(pid=member.pid, signum=signal.SIGKILL))
        if state.shutdown is not None and member.role == "worker":
            state = replace(state, shutdown=_unfinished(state.shutdown))
    return state, actions


def _unfinished(shutdown: Shutdown) -> Shutdown:
    """Work had to be released unfinished: exit 4, unless the pool ends for a worse reason."""
    return shutdown if shutdown.code else replace(shutdown, code=4)


def advance_shutdown(state: State, now: float) -> Decision:
    """Workers end first, then the leases of dead workers are released, then the steward ends, then the supervisor."""
    shutdown, steward = state.shutdown, state.steward
    assert shutdown is not None, "upkeep.py applies this rule during a shutdown only"
    if shutdown.stage == "workers" and not state.workers:
        shutdown = replace(shutdown, stage="release", deadline=now + RELEASE_WAIT_S)
    if shutdown.stage == "release":
        assert shutdown.deadline is not None, "set with the stage"
        if state.unacknowledged and now < shutdown.deadline and (steward is not None or state.vacancies):
            return replace(state, shutdown=shutdown), []
        shutdown = replace(shutdown, stage="close")
        if steward is not None:
            steward = replace(steward, phase="stopping", exit_reason=shutdown.reason, deadline=now + KILL_AFTER_S)
            state = replace(state.with_members(steward), shutdown=shutdown, vacancies=())
            return state, [Send(pid=steward.pid, message=Close())]
    state = replace(state, shutdown=shutdown)
    return (state, [Exit(code=shutdown.code)]) if shutdown.stage == "close" and not state.members else (state, [])
