"""What the workers and the steward get to know when the circuit breaker changes. Pure; circuit_breaker.py decides the change.

Owns the gates of the workers and the trial: one worker that may claim one batch while the breaker is half-open.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import assert_never

from streamline_pool.supervisor.ipc.messages import Beat, Circuit, Gate, IdleCheck
from streamline_pool.supervisor.pool.circuit_breaker import Breaker, Tally, after_tally, trial_lost
from streamline_pool.supervisor.pool.state import Action, Decision, Log, Member, Send, State, Trial

__all__ = ["apply_breaker", "on_operations", "on_trial_lost"]


def on_operations(state: State, member: Member, beat: Beat, before: Beat | None, now: float) -> Decision:
    """A worker reports its database operations; `before` is its heartbeat before this one."""
    tally = Tally(
        ok=beat.ops_ok - (before.ops_ok if before else 0),
        failed=beat.ops_failed - (before.ops_failed if before else 0),
        trailing=beat.consecutive_failures,
    )
    trial = state.trial
    if trial is not None and trial.pid == member.pid and not trial.started and beat.idle_check >= trial.idle_check:
        state = replace(state, trial=replace(trial, started=True))  # what comes after this heartbeat happened after the gate opened
    on_trial = trial is not None and trial.pid == member.pid and trial.started
    cause = f"{tally.trailing} operations in a row failed"
    return apply_breaker(state, after_tally(state.breaker, tally, now, trial=on_trial), cause)


def on_trial_lost(state: State, pid: int, now: float) -> Decision:
    """A worker died. If it was on trial, the breaker opens again."""
    if state.trial is None or state.trial.pid != pid:
        return state, []
    return apply_breaker(state, trial_lost(state.breaker, now), "its trial worker died")


def apply_breaker(state: State, breaker: Breaker, cause: str) -> Decision:
    """Take over the breaker's new state; if it changed, send it to the steward and set the gates of the workers."""
    old, state = state.breaker.state, replace(state, breaker=breaker)
    if breaker.state == old:
        return state, []
    actions: list[Action] = []
    if state.steward is not None:
        actions.append(Send(pid=state.steward.pid, message=Circuit(state=breaker.state)))
    match breaker.state:
        case "open":
            fields = {"cause": cause, "was": old}
            actions.append(Log(level=logging.WARNING, event="scheduler:circuit-open", fields=fields))
            actions += [Send(pid=m.pid, message=Gate(state="closed")) for m in state.workers]
            return replace(state, trial=None), actions
        case "half-open":
            state, more = _begin_trial(state)
            return state, actions + more
        case "closed":
            actions.append(Log(level=logging.INFO, event="scheduler:circuit-closed"))
            actions += [Send(pid=m.pid, message=Gate(state="open")) for m in state.workers]
            return replace(state, trial=None), actions
        case _:
            assert_never(breaker.state)


def _begin_trial(state: State) -> Decision:
    chosen = next((m for m in state.active_workers if m.phase == "ready"), None)
    log = Log(level=logging.INFO, event="scheduler:circuit-half-open", fields={"pid": chosen.pid if chosen else None})
    if chosen is None:
        return state, [log]
    seq = state.last_seq + 1
    orders = [Send(pid=chosen.pid, message=IdleCheck(seq=seq)), Send(pid=chosen.pid, message=Gate(state="one"))]
    return replace(state, last_seq=seq, trial=Trial(pid=chosen.pid, idle_check=seq)), [log, *orders]
