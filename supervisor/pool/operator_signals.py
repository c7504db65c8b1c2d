"""What the operator's signals do to the pool: end it, roll it, change its size, hold it, dump its stacks. Pure."""

from __future__ import annotations

import logging
import signal
from dataclasses import replace

from streamline_pool.supervisor.ipc.messages import Hold, Reslot
from streamline_pool.supervisor.pool.shutdown import CANCEL_GRACE_S, begin_shutdown, kill_all
from streamline_pool.supervisor.pool.state import Decision, Dump, Log, Send, State

__all__ = ["on_signal"]


def on_signal(state: State, signum: signal.Signals, now: float) -> Decision:
    """Apply one signal. docs/reference/command.md lists what each means."""
    match signum:
        case signal.SIGTERM:
            return begin_shutdown(state, now, 0, "SIGTERM") if state.shutdown is None else (state, [])
        case signal.SIGINT:
            return _on_interrupt(state, now)
        case signal.SIGHUP:
            rolling = frozenset(m.pid for m in state.active_workers)
            return replace(state, rolling=rolling), [Log(level=logging.INFO, event="pool_rolls")]
        case signal.SIGTTIN | signal.SIGTTOU if state.shutdown is None:
            return _resize(state, 1 if signum == signal.SIGTTIN else -1, now)
        case signal.SIGTSTP | signal.SIGCONT:
            return _hold(state, signum == signal.SIGTSTP)
        case signal.SIGUSR1:
            return state, [Dump()]
        case _:
            return state, []


def _on_interrupt(state: State, now: float) -> Decision:
    """The first SIGINT drains, the second cancels, the third kills."""
    interrupts = state.interrupts + 1
    state = replace(state, interrupts=interrupts)
    if interrupts == 1:
        return begin_shutdown(state, now, 0, "SIGINT") if state.shutdown is None else (state, [])
    if interrupts == 2:
        return begin_shutdown(state, now, 4, "second SIGINT", grace_s=CANCEL_GRACE_S)
    state, actions = begin_shutdown(state, now, 137, "third SIGINT", grace_s=0.0)
    state, kills = kill_all(state, "third SIGINT", now)
    return state, actions + kills


def _hold(state: State, held: bool) -> Decision:
    if held == state.held:
        return state, []
    log = Log(level=logging.INFO, event="pool_holds" if held else "pool_resumes")
    return replace(state, held=held), [log, *(Send(pid=m.pid, message=Hold(held=held)) for m in state.workers)]


def _resize(state: State, by: int, now: float) -> Decision:
    target = max(1, state.target + by)
    log = Log(level=logging.INFO, event="pool_resized", fields={"workers": target, "were": state.target})
    if target == state.target:
        return state, [log]
    state = replace(state, target=target)
    if by > 0:
        state = state.with_vacancy("worker", target - 1, now)
    # Places are numbered 0..target-1 without gaps. The rules of upkeep.py remove the last one, occupied or vacant.
    reslots = [Send(pid=m.pid, message=Reslot(index=m.index, total=target)) for m in state.active_workers if m.index < target]
    return state, [log, *reslots]
