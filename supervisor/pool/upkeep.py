"""What the supervisor does whenever something has changed: replace, recycle, prove idle, end. Pure.

`settle` is a list of rules; each looks at the whole state and brings it one step nearer to what it should be. None
knows which event came before, so a rule cannot be forgotten on some path.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from streamline_pool.supervisor.ipc.messages import CheckDue, Close, Drain, IdleCheck, Stop, SubscribersServed
from streamline_pool.supervisor.pool.state import Action, Burst, Exit, Kill, Log, Member, Send, Shutdown, Spawn, State, Vacancy

__all__ = ["CANCEL_GRACE_S", "KILL_AFTER_S", "Decision", "ask_idle", "begin_ending", "dismiss", "put", "settle"]

Decision = tuple[State, list[Action]]

KILL_AFTER_S = 2.0  # from SIGABRT, or the steward's last order, to SIGKILL: time to write stacks
RELEASE_MARGIN_S = 3.5  # from the end of a grace to SIGKILL; derived: a worker gives up releasing after 3 s
RELEASE_GRACE_S = 1.0  # after the drain deadline: for signals to fire and leases to be released, not for more work
CANCEL_GRACE_S = 5.0  # what the contract gives handlers after a second INT
SETTLE_S = 3.0  # a guess: ten retries of one update; what is not released by then expires by itself
BURST_RETRY_S = 0.2  # a guess: between looks for work that nobody has claimed yet


def settle(state: State, now: float) -> Decision:
    """Apply every rule once."""
    rules: tuple[Callable[[State, float], Decision], ...]
    if state.shutdown is None:
        rules = (_overdue, _announce, _recycle, _roll, _fill, _confirm_publishing, _prove_idle)
    else:
        rules = (_overdue, _fill, _confirm_publishing, _end)
    actions: list[Action] = []
    for rule in rules:
        state, more = rule(state, now)
        actions += more
    return state, actions


def put(state: State, *members: Member) -> State:
    return replace(state, members={**state.members, **{m.pid: m for m in members}})


def dismiss(state: State, member: Member, reason: str, now: float, *, refill: bool) -> Decision:
    """Drain one worker; `refill`: its successor starts at once, so that the pool never shrinks to nothing."""
    deadline = now + state.limits.drain_timeout_s
    state = put(state, replace(member, phase="draining", leaving=reason, deadline=deadline))
    if refill:
        vacancy = Vacancy(role="worker", index=member.index, due_at=now)
        state = replace(state, vacancies=(*state.vacancies, vacancy), recycled=state.recycled + 1)
    log = Log(level=logging.INFO, event="worker_leaves", fields={"pid": member.pid, "index": member.index, "reason": reason})
    return state, [log, Send(pid=member.pid, message=Drain())]


def begin_ending(state: State, now: float, code: int, reason: str, *, grace_s: float | None = None) -> Decision:
    """Start to end the pool, or end it harder. `grace_s`: workers give their steps up after so long; None: they finish them."""
    if state.shutdown is not None and code == 4:
        code = state.shutdown.code or code  # a worse reason to end stays the reason
    actions: list[Action] = [
        Log(level=logging.INFO, event="pool_ends", fields={"reason": reason, "exit_code": code, **_left(state, grace_s)})
    ]
    for member in state.workers:
        if member.phase == "dying" or (grace_s is None and member.phase == "stopping"):
            continue
        leaving = member.leaving or reason
        if grace_s is None:
            deadline = now + state.limits.drain_timeout_s
            state = put(state, replace(member, phase="draining", leaving=leaving, deadline=deadline))
            actions.append(Send(pid=member.pid, message=Drain()))
        else:
            # One that has not even started holds nothing, and may be waiting for a database that is not there.
            deadline = now + grace_s + (0.0 if member.phase == "starting" else RELEASE_MARGIN_S)
            state = put(state, replace(member, phase="stopping", leaving=leaving, deadline=deadline))
            actions.append(Send(pid=member.pid, message=Stop(grace_s=grace_s)))
    kept = tuple(v for v in state.vacancies if v.role == "steward")
    shutdown = Shutdown(stage="workers", code=code, reason=reason)
    return replace(state, shutdown=shutdown, vacancies=kept, rolling=frozenset(), burst=None), actions


def _left(state: State, grace_s: float | None) -> dict[str, Any]:
    """What an ending pool waits for, as far as it knows, so that whoever pressed Ctrl-C knows why it goes on."""
    runs = sum(member.beat.in_flight for member in state.workers if member.beat is not None)
    if not runs or grace_s is not None:
        return {}
    return {"finishing_runs": runs, "at_most_s": state.limits.drain_timeout_s, "advice": "a second Ctrl-C gives them back unfinished"}


# ---- rules ---------------------------------------------------------------------------------------------------------


def _overdue(state: State, now: float) -> Decision:
    """Who was told to go and is still there meets the next harder measure."""
    actions: list[Action] = []
    for member in [m for m in state.members.values() if m.deadline is not None and m.deadline <= now]:
        fields = {"pid": member.pid, "role": member.role, "reason": member.leaving}
        if member.phase == "draining":
            deadline = now + RELEASE_GRACE_S + RELEASE_MARGIN_S
            state = put(state, replace(member, phase="stopping", deadline=deadline))
            actions.append(Log(level=logging.WARNING, event="drain_timeout", fields=fields))
            actions.append(Send(pid=member.pid, message=Stop(grace_s=RELEASE_GRACE_S)))
        else:
            # Repeated until it is gone: a process in an uninterruptible system call takes its time to die.
            state = put(state, replace(member, phase="dying", deadline=now + KILL_AFTER_S))
            actions.append(Log(level=logging.WARNING, event="child_killed", fields=fields))
            actions.append(Kill(pid=member.pid, signum=signal.SIGKILL))
        if state.shutdown is not None and member.role == "worker":
            state = replace(state, shutdown=_unfinished(state.shutdown))
    return state, actions


def _unfinished(shutdown: Shutdown) -> Shutdown:
    """Work had to be given up: exit 4, unless the pool ends for a worse reason."""
    return shutdown if shutdown.code else replace(shutdown, code=4)


def _announce(state: State, now: float) -> Decision:
    """Say, once, that every process is ready."""
    if state.ready or state.vacancies or not state.members or any(m.phase != "ready" for m in state.members.values()):
        return state, []
    fields = {"workers": len(state.staying), "pids": [m.pid for m in state.staying]}
    # At least INFO, and shown whatever the log level: this line is part of the contract.
    return replace(state, ready=True), [Log(level=logging.INFO, event="ready", fields=fields)]


def _recycle(state: State, now: float) -> Decision:
    """Replace workers that are too big, too old or say so; at most a quarter of the pool at once."""
    room = max(1, state.target // 4) - sum(m.leaving is not None for m in state.workers)
    actions: list[Action] = []
    for member in state.staying:
        reason = _recycle_reason(state, member)
        if reason is None or member.phase != "ready":
            continue
        if room <= 0:
            break
        room -= 1
        state, more = dismiss(state, member, reason, now, refill=True)
        actions += more
    return state, actions


def _recycle_reason(state: State, member: Member) -> str | None:
    limits = state.limits
    if limits.max_rss_bytes is not None and (member.rss_bytes or 0) > limits.max_rss_bytes:
        return f"rss of {member.rss_bytes} bytes above {limits.max_rss_bytes}"
    if member.beat is None:
        return None
    if limits.max_runs_per_worker is not None and member.beat.runs_total >= limits.max_runs_per_worker:
        return f"{member.beat.runs_total} runs, at most {limits.max_runs_per_worker}"
    return member.beat.recycle


def _roll(state: State, now: float) -> Decision:
    """After HUP: the next worker goes when the one before is gone and its successor ready."""
    left = state.rolling & {m.pid for m in state.staying}
    state = replace(state, rolling=left) if left != state.rolling else state
    if not left or state.vacancies or any(m.leaving is not None or m.phase != "ready" for m in state.workers):
        return state, []
    first = next(m for m in state.staying if m.pid in left)
    return dismiss(state, first, "hup", now, refill=True)


def _fill(state: State, now: float) -> Decision:
    """Fork what is missing, once its back-off is over."""
    if state.shutdown is not None and not (state.workers or state.unacknowledged):
        return state, []  # nobody is left for whom a steward would be needed
    due = [v for v in state.vacancies if v.due_at <= now]
    if not due:
        return state, []
    later = tuple(v for v in state.vacancies if v.due_at > now)
    first = not state.ready
    spawns: list[Action] = [Spawn(role=v.role, index=v.index, total=state.target, first=first) for v in due]
    return replace(state, vacancies=later), spawns


def _confirm_publishing(state: State, now: float) -> Decision:
    """Tell the steward once every worker publishes for those who stream; they wait for it."""
    attended, steward = state.attended, state.steward
    if attended is None or attended.confirmed or steward is None:
        return state, []
    if any(m.beat is None or m.beat.publish < attended.seq for m in state.workers if m.phase != "dying"):
        return state, []
    state = replace(state, attended=replace(attended, confirmed=True))
    return state, [Send(pid=steward.pid, message=SubscribersServed(subscribers=tuple(attended.until)))]


def _prove_idle(state: State, now: float) -> Decision:
    """`--burst`: see `Burst` for the proof. Any sign of work starts it again."""
    if not state.limits.burst or not state.ready:
        return state, []
    if not _looks_idle(state):
        return (replace(state, burst=None), []) if state.burst is not None else (state, [])
    burst = state.burst
    if burst is None:
        return ask_idle(state, "asking", {}) if now >= state.burst_again_at else (state, [])
    beats = {m.pid: m.beat for m in state.workers if m.beat is not None}
    if burst.stage == "checking" or any(beat.idle_check < burst.seq for beat in beats.values()):
        return state, []
    runs = {pid: beat.runs_total for pid, beat in beats.items()}
    if burst.stage == "asking":
        steward, seq = state.steward, state.pokes + 1
        assert steward is not None, "an idle pool has a steward"
        state = replace(state, pokes=seq, burst=Burst(stage="checking", seq=seq, runs=runs))
        return state, [Send(pid=steward.pid, message=CheckDue(seq=seq))]
    if runs != burst.runs:
        return replace(state, burst=None), []
    return begin_ending(state, now, 0, "burst: nothing left to do")


def ask_idle(state: State, stage: Literal["asking", "confirming"], runs: Mapping[int, int]) -> Decision:
    """Have every worker say whether it is idle, in an answer that is certainly newer than this question."""
    seq = state.pokes + 1
    burst = Burst(stage=stage, seq=seq, runs=runs)
    return replace(state, pokes=seq, burst=burst), [Send(pid=m.pid, message=IdleCheck(seq=seq)) for m in state.workers]


def _looks_idle(state: State) -> bool:
    if state.vacancies or state.unacknowledged or state.unserved or state.breaker.state != "closed":
        return False
    idle = all(m.beat is not None and m.beat.idle and m.beat.in_flight == 0 for m in state.workers)
    return idle and state.steward is not None and all(m.phase == "ready" for m in state.members.values())


def _end(state: State, now: float) -> Decision:
    """Workers first, then what the dead ones held, then the steward, then ourselves."""
    shutdown, steward = state.shutdown, state.steward
    assert shutdown is not None, "the caller looked"
    if shutdown.stage == "workers" and not state.workers:
        shutdown = replace(shutdown, stage="settle", deadline=now + SETTLE_S)
    if shutdown.stage == "settle":
        assert shutdown.deadline is not None, "set above"
        if state.unacknowledged and now < shutdown.deadline and (steward is not None or state.vacancies):
            return replace(state, shutdown=shutdown), []
        shutdown = replace(shutdown, stage="close")
        if steward is not None:
            state = put(state, replace(steward, phase="stopping", leaving=shutdown.reason, deadline=now + KILL_AFTER_S))
            return replace(state, shutdown=shutdown, vacancies=()), [Send(pid=steward.pid, message=Close())]
    state = replace(state, shutdown=shutdown)
    return (state, [Exit(code=shutdown.code)]) if shutdown.stage == "close" and not state.members else (state, [])
