"""The rules that the supervisor applies whenever something has changed: replace, drop, recycle, prove idle, end. Pure.

Each rule reads the whole state and brings it one step nearer to what it should be. No rule knows which event came before,
so a rule cannot be forgotten on some path. The rules of a shutdown are in shutdown.py, the proof for `--burst` in burst.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from streamline_pool.supervisor.ipc.messages import Drain, SubscribersServed
from streamline_pool.supervisor.pool.burst import prove_idle
from streamline_pool.supervisor.pool.facts import pool_facts
from streamline_pool.supervisor.pool.shutdown import advance_shutdown, enforce_deadlines
from streamline_pool.supervisor.pool.state import Action, Decision, Log, Member, Send, Spawn, State

__all__ = ["apply_rules", "drain_worker"]

Rule = Callable[[State, float], Decision]


def apply_rules(state: State, now: float) -> Decision:
    """Apply every rule once."""
    rules = _WORKING if state.shutdown is None else _ENDING
    actions: list[Action] = []
    for rule in rules:
        state, more = rule(state, now)
        actions += more
    return state, actions


def drain_worker(state: State, member: Member, reason: str, now: float, *, refill: bool) -> Decision:
    """Order one worker to drain; `refill`: its successor starts at once, so that the pool never shrinks to nothing."""
    deadline = now + state.limits.drain_timeout_s
    state = state.with_members(replace(member, phase="draining", exit_reason=reason, deadline=deadline))
    if refill:
        state = replace(state.with_vacancy("worker", member.index, now), recycled=state.recycled + 1)
    log = Log(level=logging.INFO, event="worker_leaves", fields={"pid": member.pid, "index": member.index, "reason": reason})
    return state, [log, Send(pid=member.pid, message=Drain())]


# ---- rules ---------------------------------------------------------------------------------------------------------


def _announce_ready(state: State, now: float) -> Decision:
    """Log, once, that every process is ready, and let the steward store it: a client that looks must find the pool at once."""
    if state.ready or state.vacancies or not state.members or any(m.phase != "ready" for m in state.members.values()):
        return state, []
    fields = {"workers": len(state.active_workers), "pids": [m.pid for m in state.active_workers]}
    # At least INFO, and shown whatever the log level: this line is a promise of docs/reference/command.md.
    state = replace(state, ready=True, facts_at=now)
    report = [Send(pid=state.steward.pid, message=pool_facts(state, now))] if state.steward is not None else []
    return state, [Log(level=logging.INFO, event="ready", fields=fields), *report]


def _drop_surplus(state: State, now: float) -> Decision:
    """Drain workers that have no place in the pool: it has become smaller, or another worker has the same place.

    A rule, because a worker becomes known by an event that may come after the signal that made the pool smaller.
    """
    places: set[int] = set()
    actions: list[Action] = []
    for member in state.active_workers:
        if member.index < state.target and member.index not in places:
            places.add(member.index)
        else:
            state, more = drain_worker(state, member, "SIGTTOU", now, refill=False)
            actions += more
    vacancies = tuple(v for v in state.vacancies if v.role == "steward" or (v.index < state.target and v.index not in places))
    return (replace(state, vacancies=vacancies) if vacancies != state.vacancies else state), actions


def _recycle(state: State, now: float) -> Decision:
    """Replace workers that are too big, have driven enough runs, or ask for it; at most a quarter of the pool at once."""
    room = max(1, state.target // 4) - sum(m.exit_reason is not None for m in state.workers)
    actions: list[Action] = []
    for member in state.active_workers:
        reason = _recycle_reason(state, member)
        if reason is None or member.phase != "ready":
            continue
        if room <= 0:
            break
        room -= 1
        state, more = drain_worker(state, member, reason, now, refill=True)
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
    """After SIGHUP: the next worker drains when the one before has ended and its successor is ready."""
    remaining = state.rolling & {m.pid for m in state.active_workers}
    state = replace(state, rolling=remaining) if remaining != state.rolling else state
    if not remaining or state.vacancies or any(m.exit_reason is not None or m.phase != "ready" for m in state.workers):
        return state, []
    first = next(m for m in state.active_workers if m.pid in remaining)
    return drain_worker(state, first, "hup", now, refill=True)


def _fork_missing(state: State, now: float) -> Decision:
    """Fork what is missing, once its back-off is over."""
    if state.shutdown is not None and not (state.workers or state.unacknowledged):
        return state, []  # no work is left that needs a steward
    due = [v for v in state.vacancies if v.due_at <= now]
    if not due:
        return state, []
    later = tuple(v for v in state.vacancies if v.due_at > now)
    first = not state.ready
    spawns: list[Action] = [Spawn(role=v.role, index=v.index, total=state.target, first=first) for v in due]
    return replace(state, vacancies=later), spawns


def _confirm_subscribers(state: State, _now: float) -> Decision:
    """Answer the steward once every worker publishes for the subscribers, which wait for that answer."""
    subscribers, steward = state.subscribers, state.steward
    if subscribers is None or subscribers.confirmed or steward is None:
        return state, []
    if any(m.beat is None or m.beat.subscribers_served < subscribers.seq for m in state.workers if m.phase != "dying"):
        return state, []
    state = replace(state, subscribers=replace(subscribers, confirmed=True))
    return state, [Send(pid=steward.pid, message=SubscribersServed(subscribers=tuple(subscribers.until)))]


_WORKING: tuple[Rule, ...] = (
    enforce_deadlines,
    _drop_surplus,
    _announce_ready,
    _recycle,
    _roll,
    _fork_missing,
    _confirm_subscribers,
    prove_idle,
)
_ENDING: tuple[Rule, ...] = (enforce_deadlines, _fork_missing, _confirm_subscribers, advance_shutdown)
