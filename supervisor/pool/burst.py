"""How `--burst` proves that no work is left, and then ends the pool. Pure. The proof is described at `state.Burst`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from streamline_pool.supervisor.ipc.messages import CheckDue, IdleCheck
from streamline_pool.supervisor.pool.shutdown import begin_shutdown
from streamline_pool.supervisor.pool.state import Burst, Decision, Send, State
from streamline_pool.supervisor.pool.work_sharing import wake_up_idle

__all__ = ["on_due_count", "prove_idle"]

BURST_RETRY_S = 0.2  # a guess: between two proofs, while due work is not claimed yet


def prove_idle(state: State, now: float) -> Decision:
    """The rule: take the next step of the proof. Any sign of work starts it again."""
    if not state.limits.burst or not state.ready:
        return state, []
    if not _seems_idle(state):
        return (replace(state, burst=None), []) if state.burst is not None else (state, [])
    burst = state.burst
    if burst is None:
        return _ask_idle(state, "asking", {}) if now >= state.burst_again_at else (state, [])
    beats = {m.pid: m.beat for m in state.workers if m.beat is not None}
    if burst.stage == "checking" or any(beat.idle_check < burst.seq for beat in beats.values()):
        return state, []
    runs = {pid: beat.runs_total for pid, beat in beats.items()}
    if burst.stage == "asking":
        steward, seq = state.steward, state.last_seq + 1
        assert steward is not None, "an idle pool has a steward"
        state = replace(state, last_seq=seq, burst=Burst(stage="checking", seq=seq, runs=runs))
        return state, [Send(pid=steward.pid, message=CheckDue(seq=seq))]
    if runs != burst.runs:
        return replace(state, burst=None), []
    return begin_shutdown(state, now, 0, "burst: nothing left to do")


def on_due_count(state: State, seq: int, due: int, now: float) -> Decision:
    """The steward counted the runs that are due."""
    burst = state.burst
    if burst is None or burst.stage != "checking" or burst.seq != seq:
        return state, []  # work has appeared since the question was asked
    if due == 0:
        return _ask_idle(state, "confirming", burst.runs)
    state = replace(state, burst=None, burst_again_at=now + BURST_RETRY_S)
    return wake_up_idle(state, None, due, now, overdue=True)


def _ask_idle(state: State, stage: Literal["asking", "confirming"], runs: Mapping[int, int]) -> Decision:
    """Ask every worker whether it is idle; the number makes sure that an answer is newer than this question."""
    seq = state.last_seq + 1
    burst = Burst(stage=stage, seq=seq, runs=runs)
    return replace(state, last_seq=seq, burst=burst), [Send(pid=m.pid, message=IdleCheck(seq=seq)) for m in state.workers]


def _seems_idle(state: State) -> bool:
    if state.vacancies or state.unacknowledged or state.owed_wake_ups or state.breaker.state != "closed":
        return False
    idle = all(m.beat is not None and m.beat.idle and m.beat.in_flight == 0 for m in state.workers)
    return idle and state.steward is not None and all(m.phase == "ready" for m in state.members.values())
