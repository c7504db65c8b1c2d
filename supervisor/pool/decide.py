"""What the supervisor makes of what happens: (state, event, now) -> (state, actions). Pure; pool.py performs.

One function branches over the events; a handler per event below it; upkeep.py holds what follows from any change.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from dataclasses import replace
from typing import assert_never

from streamline_pool.supervisor.ipc.messages import (
    STORE_UNREACHABLE_EXIT,
    Beat,
    BootFailed,
    CheckRun,
    Circuit,
    Died,
    DueCount,
    Evidence,
    Gate,
    Hold,
    IdleCheck,
    Parked,
    PoolFacts,
    Probe,
    Released,
    Reslot,
    RunChanged,
    ServeSubscribers,
    StewardBeat,
    Subscribers,
    TimersFired,
    WakeUp,
    WorkDue,
    WorkerFacts,
)
from streamline_pool.supervisor.pool.circuit_breaker import Breaker, Tally, after_probe, after_tally, trial_lost
from streamline_pool.supervisor.pool.state import (
    Action,
    Attended,
    Dump,
    Event,
    Exited,
    Forked,
    ForkFailed,
    Garbled,
    Heard,
    Kill,
    Limits,
    Log,
    Measured,
    Member,
    Role,
    Send,
    Shutdown,
    Signalled,
    State,
    Tick,
    Trial,
    Vacancy,
)
from streamline_pool.supervisor.pool.upkeep import (
    BURST_RETRY_S,
    CANCEL_GRACE_S,
    KILL_AFTER_S,
    Decision,
    ask_idle,
    begin_ending,
    dismiss,
    put,
    settle,
)

__all__ = ["decide", "initial", "pause_s", "pool_facts"]

CRASH_WINDOW_S = 60.0  # `restart_budget` is crashes per minute
RESTART_FIRST_S, RESTART_MAX_S = 0.05, 5.0  # back-off doubles between them: a lone crash costs nothing, a loop no CPU
RESTART_STORE_AWAY_S = 0.5  # a guess: work must resume within 3 s of the database's return
FROZEN_S = 2.0  # no tick for so long (they come each 0.5 s): it was we who were stopped, not the children
FACTS_INTERVAL_S = 1.0
BOOT_GRACE_S = 0.2  # when the pool cannot start, nothing is in flight that a grace could save


def initial(target: int, limits: Limits, now: float) -> State:
    """A pool of `target` workers of which nothing runs yet; the first `Tick` starts it."""
    workers = tuple(Vacancy(role="worker", index=index, due_at=now) for index in range(target))
    return State(limits=limits, target=target, vacancies=(Vacancy(role="steward", index=-1, due_at=now), *workers), ticked_at=now)


def pause_s(state: State) -> float:
    """How long the loop may sleep when nothing happens. Short while some deadline or back-off is near."""
    pending = state.vacancies or state.shutdown or state.burst or any(m.deadline is not None for m in state.members.values())
    return 0.02 if pending else 0.5


def decide(state: State, event: Event, now: float) -> Decision:
    """The one place where the supervisor branches on what happened."""
    state, actions = _react(state, event, now)
    if isinstance(event, Heard) and isinstance(event.message, WorkDue | TimersFired | RunChanged):
        return state, actions  # the hot path: a ring changes nothing that the rules look at
    state, more = settle(state, now)
    return state, actions + more


def _react(state: State, event: Event, now: float) -> Decision:
    match event:
        case Heard():
            member = state.members.get(event.pid)
            return _on_message(state, member, event, now) if member is not None else (state, [])
        case Tick():
            return _on_tick(state, now)
        case Measured():
            known = [replace(m, rss_bytes=event.rss_bytes[m.pid]) for m in state.members.values() if m.pid in event.rss_bytes]
            return put(state, *known), []
        case Forked():
            return _on_forked(state, event, now)
        case ForkFailed(role=role, index=index):
            log = Log(level=logging.ERROR, event="fork_failed", fields={"role": role, "error": event.error})
            state, actions = _replace_crashed(state, role, index, event.jitter, now)
            return state, [log, *actions]
        case Exited():
            return _on_exited(state, event, now)
        case Garbled():
            return _on_garbled(state, event, now)
        case Signalled():
            return _on_signal(state, event.signum, now)
        case _:
            assert_never(event)


# ---- messages ------------------------------------------------------------------------------------------------------


def _on_message(state: State, member: Member, event: Heard, now: float) -> Decision:
    member = replace(member, heard_at=now)
    state = put(state, member)
    match event.message:
        case Beat() as beat:
            return _on_beat(state, member, beat, now)
        case WorkDue(lane=lane, run_id=run_id, count=count):
            return _ring(state, lane, run_id, count, now)
        case TimersFired(run_ids=run_ids):
            return _share_out(state, run_ids, now)
        case RunChanged(run_id=run_id, owner=owner, reason=reason):
            holders = [m for m in state.workers if owner in (None, m.owner)]
            return state, [Send(pid=m.pid, message=CheckRun(run_id=run_id, reason=reason)) for m in holders]
        case Subscribers(subscribers=subscribers):
            seq = state.pokes + 1
            attended = Attended(seq=seq, until={subscriber: now + left_s for subscriber, left_s in subscribers})
            publish = ServeSubscribers(seq=seq, subscribers=subscribers)
            return replace(state, pokes=seq, attended=attended), [Send(pid=m.pid, message=publish) for m in state.workers]
        case StewardBeat(ready=ready):
            starts = ready and member.phase == "starting"
            return (put(state, replace(member, phase="ready")) if starts else state), []
        case Probe(ok=ok, error=error):
            return _circuit(state, after_probe(state.breaker, ok, now), error or "", now)
        case Released(owner=owner, runs=runs):
            left = {name: died for name, died in state.unacknowledged.items() if name != owner}
            log = Log(level=logging.INFO, event="leases_released", fields={"owner": owner, "runs": runs})
            state, actions = _ring(replace(state, unacknowledged=left), None, None, runs, now)
            return state, [log, *actions]
        case DueCount(seq=seq, due=due):
            return _on_checked(state, seq, due, now)
        case BootFailed() as failed:
            return _on_boot_failed(state, member, failed, now)
        case _:
            assert_never(event.message)


def _on_beat(state: State, member: Member, beat: Beat, now: float) -> Decision:
    before = member.beat
    starts = member.phase == "starting" and beat.state in ("ready", "holding")
    member = replace(member, beat=replace(beat, parked=()), phase="ready" if starts else member.phase)
    state = put(state, member)
    actions: list[Action] = []
    if beat.parked and state.steward is not None:
        actions.append(Send(pid=state.steward.pid, message=Parked(instants=beat.parked)))
    tally = Tally(
        ok=beat.ops_ok - (before.ops_ok if before else 0),
        failed=beat.ops_failed - (before.ops_failed if before else 0),
        trailing=beat.consecutive_failures,
    )
    trial = state.trial
    if trial is not None and trial.pid == member.pid and not trial.started and beat.idle_check >= trial.idle_check:
        state = replace(state, trial=replace(trial, started=True))  # what comes after this beat happened after the gate
    on_trial = trial is not None and trial.pid == member.pid and trial.started
    cause = f"{tally.trailing} operations in a row failed"
    state, more = _circuit(state, after_tally(state.breaker, tally, now, trial=on_trial), cause, now)
    actions += more
    if beat.idle and state.unserved:
        state, more = _ring(replace(state, unserved=state.unserved - 1), state.unserved_lane, None, 1, now)
        actions += more
    return state, actions


def _ring(state: State, lane: str | None, run_id: str | None, count: int, now: float) -> Decision:
    """Ring as many hungry workers as there are runs, those first that were rung longest ago.

    With too few hungry the others' rings are kept for those who will be: a worker in the middle of its look may just
    have missed the run, and one that has no room looks again by itself only if its last look left something. One ring
    for all of them would leave the second to get room idle until a sweep. A worker whose gate opens later needs none.
    """
    if count <= 0 or state.held or state.breaker.state != "closed":
        return state, []
    idle = [m for m in state.members.values() if m.beat is not None and m.beat.idle and m.phase == "ready" and m.leaving is None]
    rung = sorted(idle, key=lambda m: m.rung_at)[:count]
    unserved = min(state.unserved + count - len(rung), len(state.staying) - len(rung))
    kept_lane = lane if not state.unserved or state.unserved_lane is not None else None
    state = replace(state, unserved=max(unserved, 0), unserved_lane=kept_lane)
    wake_up = WakeUp(lane=lane, run_id=run_id if count == 1 else None)
    return put(state, *(replace(m, rung_at=now) for m in rung)), [Send(pid=m.pid, message=wake_up) for m in rung]


def _share_out(state: State, run_ids: Sequence[str], now: float) -> Decision:
    """Give the runs whose instants have come to the workers, whether any is hungry or not; none is told to two.

    Those who are hungry get them all, if there are any; the others are busy, and have only a few places for such runs.
    """
    if state.held or state.breaker.state != "closed":
        return state, []  # whoever may claim again looks at all that is due
    able = [m for m in state.staying if m.phase == "ready"]
    idle = [m for m in able if m.beat is not None and m.beat.idle]
    chosen = sorted(idle or able, key=lambda m: m.rung_at)[: len(run_ids)]
    shares = [Send(pid=m.pid, message=TimersFired(run_ids=tuple(run_ids[place :: len(chosen)]))) for place, m in enumerate(chosen)]
    return put(state, *(replace(m, rung_at=now) for m in chosen)), [*shares]


def _on_checked(state: State, seq: int, due: int, now: float) -> Decision:
    burst = state.burst
    if burst is None or burst.stage != "checking" or burst.seq != seq:
        return state, []  # work has shown up since the question was asked
    if due == 0:
        return ask_idle(state, "confirming", burst.runs)
    state = replace(state, burst=None, burst_again_at=now + BURST_RETRY_S)
    return _ring(state, None, None, due, now)


def _on_boot_failed(state: State, member: Member, failed: BootFailed, now: float) -> Decision:
    """A child that cannot start stops the pool, unless all it lacks is a database that had been there."""
    member = replace(member, excused=True)
    if state.ready and failed.exit_code == STORE_UNREACHABLE_EXIT:
        return put(state, member), []
    state = put(state, replace(member, leaving=member.leaving or "boot failed"))
    if state.shutdown is not None:
        return state, []
    fields = {"pid": member.pid, "role": member.role, "error": failed.message}
    state, actions = begin_ending(state, now, failed.exit_code, "boot failed", grace_s=BOOT_GRACE_S)
    return state, [Log(level=logging.ERROR, event="boot_failed", fields=fields), *actions]


# ---- the breaker ---------------------------------------------------------------------------------------------------


def _circuit(state: State, breaker: Breaker, cause: str, now: float) -> Decision:
    """Take over the breaker's new state; where it has changed, tell everyone."""
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
            chosen = next((m for m in state.staying if m.phase == "ready"), None)
            actions.append(Log(level=logging.INFO, event="scheduler:circuit-half-open", fields={"pid": chosen.pid if chosen else None}))
            if chosen is None:
                return state, actions
            seq = state.pokes + 1
            actions += [Send(pid=chosen.pid, message=IdleCheck(seq=seq)), Send(pid=chosen.pid, message=Gate(state="one"))]
            return replace(state, pokes=seq, trial=Trial(pid=chosen.pid, idle_check=seq)), actions
        case "closed":
            actions.append(Log(level=logging.INFO, event="scheduler:circuit-closed"))
            actions += [Send(pid=m.pid, message=Gate(state="open")) for m in state.workers]
            return replace(state, trial=None), actions
        case _:
            assert_never(breaker.state)


# ---- children come and go ------------------------------------------------------------------------------------------


def _on_forked(state: State, event: Forked, now: float) -> Decision:
    """A child gets to know what the others were told before it was born."""
    member = Member(pid=event.pid, owner=event.owner, role=event.role, index=event.index, started_at=now, heard_at=now)
    state = put(state, member)
    actions: list[Action] = [Log(level=logging.DEBUG, event="child_started", fields={"pid": event.pid, "role": event.role})]
    if event.role == "steward":
        actions += [Send(pid=event.pid, message=died) for died in state.unacknowledged.values()]
        if state.breaker.state != "closed":
            actions.append(Send(pid=event.pid, message=Circuit(state=state.breaker.state)))
        return replace(state, facts_at=0.0), actions
    if state.held:
        actions.append(Send(pid=event.pid, message=Hold(held=True)))
    if state.breaker.state != "closed":
        actions.append(Send(pid=event.pid, message=Gate(state="closed")))
    if state.attended is not None:
        publish = ServeSubscribers(seq=state.attended.seq, subscribers=state.attended.left(now))
        actions.append(Send(pid=event.pid, message=publish))
    return state, actions


def _on_garbled(state: State, event: Garbled, now: float) -> Decision:
    member = state.members.get(event.pid)
    if member is None:
        return state, []
    log = Log(level=logging.ERROR, event="child_garbled", fields={"pid": event.pid, "error": event.error})
    state = put(state, replace(member, phase="dying", deadline=now + KILL_AFTER_S))
    return state, [log, Kill(pid=event.pid, signum=signal.SIGKILL)]


def _on_exited(state: State, event: Exited, now: float) -> Decision:
    member = state.members.get(event.pid)
    if member is None:
        return state, []
    state = replace(state, members={pid: m for pid, m in state.members.items() if pid != event.pid})
    if member.beat is not None:
        state = replace(state, gone_runs=state.gone_runs + member.beat.runs_total, gone_steps=state.gone_steps + member.beat.steps_total)
    wanted = member.leaving is not None or state.shutdown is not None
    clean = event.exit_code == 0 and wanted
    died = Died(owner=member.owner, evidence=_evidence(member, event, now))
    # One that we killed before it had anything to do is no crash to look into, such as when there is no database.
    unborn = member.phase == "dying" and state.shutdown is not None and (member.beat is None or member.beat.state == "starting")
    actions: list[Action] = [_farewell(member, died.evidence, expected=clean or member.excused or unborn)]
    if member.role == "worker" and not clean:
        state = replace(state, unacknowledged={**state.unacknowledged, member.owner: died})
        if state.steward is not None:
            actions.append(Send(pid=state.steward.pid, message=died))
    if state.trial is not None and state.trial.pid == member.pid:
        state, more = _circuit(state, trial_lost(state.breaker, now), "its trial worker is gone", now)
        actions += more
    if member.leaving is None and member.excused:
        state = _refill(state, member.role, member.index, now + RESTART_STORE_AWAY_S * (1 + event.jitter))
    elif member.leaving is None and (state.shutdown is None or member.role == "steward"):
        state, more = _replace_crashed(state, member.role, member.index, event.jitter, now)
        actions += more
    return state, actions


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


def _farewell(member: Member, evidence: Evidence, *, expected: bool) -> Log:
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
        state, actions = begin_ending(state, now, 1, "restart budget exceeded")
        return state, [Log(level=logging.CRITICAL, event="restart_budget_exceeded", fields=fields), *actions]
    delay = min(RESTART_FIRST_S * 2.0 ** min(len(crashes) - 1, 10), RESTART_MAX_S) * (0.5 + jitter)
    return _refill(state, role, index, now + delay), []


def _refill(state: State, role: Role, index: int, due_at: float) -> State:
    vacancy = Vacancy(role=role, index=index, due_at=due_at)
    return replace(state, vacancies=(*state.vacancies, vacancy), restarts=state.restarts + 1)


# ---- time ----------------------------------------------------------------------------------------------------------


def _on_tick(state: State, now: float) -> Decision:
    if now - state.ticked_at > FROZEN_S:
        # We were stopped, or the machine was: what the children said meanwhile may still be on its way.
        state = put(state, *(replace(m, heard_at=now) for m in state.members.values()))
    state = replace(state, ticked_at=now)
    actions: list[Action] = []
    for member in [m for m in state.members.values() if m.phase != "dying" and now - m.heard_at > state.limits.stall_timeout_s]:
        fields = {"pid": member.pid, "role": member.role, "silent_s": round(now - member.heard_at, 3)}
        state = put(state, replace(member, phase="dying", stalled=True, deadline=now + KILL_AFTER_S))
        actions.append(Log(level=logging.ERROR, event="child_stalled", fields=fields))
        actions.append(Kill(pid=member.pid, signum=signal.SIGABRT))
    steward = state.steward
    if steward is not None and now - state.facts_at >= FACTS_INTERVAL_S:
        state = replace(state, facts_at=now)
        actions.append(Send(pid=steward.pid, message=pool_facts(state, now)))
    return state, actions


def pool_facts(state: State, now: float) -> PoolFacts:
    """The pool in figures, for the host record and the health port."""
    workers = tuple(_worker_facts(m, now) for m in state.workers)
    return PoolFacts(
        ready=state.ready and state.shutdown is None,
        draining=state.shutdown is not None,
        held=state.held,
        target=state.target,
        restarts=state.restarts,
        recycled=state.recycled,
        runs_total=state.gone_runs + sum(w.runs_total for w in workers),
        steps_total=state.gone_steps + sum(w.steps_total for w in workers),
        circuit=state.breaker.state,
        workers=workers,
    )


def _worker_facts(member: Member, now: float) -> WorkerFacts:
    beat = member.beat
    return WorkerFacts(
        pid=member.pid,
        owner=member.owner,
        index=member.index,
        state=beat.state if beat is not None and member.phase == "ready" else member.phase,
        in_flight=beat.in_flight if beat is not None else 0,
        runs_total=beat.runs_total if beat is not None else 0,
        steps_total=beat.steps_total if beat is not None else 0,
        rss_bytes=member.rss_bytes,
        uptime_s=round(now - member.started_at, 1),
        lru=beat.lru if beat is not None else {},
    )


# ---- signals -------------------------------------------------------------------------------------------------------


def _on_signal(state: State, signum: signal.Signals, now: float) -> Decision:
    match signum:
        case signal.SIGTERM:
            return begin_ending(state, now, 0, "SIGTERM") if state.shutdown is None else (state, [])
        case signal.SIGINT:
            return _on_interrupt(state, now)
        case signal.SIGHUP:
            return replace(state, rolling=frozenset(m.pid for m in state.staying)), [Log(level=logging.INFO, event="pool_rolls")]
        case signal.SIGTTIN | signal.SIGTTOU if state.shutdown is None:
            return _resize(state, 1 if signum == signal.SIGTTIN else -1, now)
        case signal.SIGTSTP | signal.SIGCONT:
            return _hold(state, signum == signal.SIGTSTP)
        case signal.SIGUSR1:
            return state, [Dump()]
        case _:
            return state, []


def _on_interrupt(state: State, now: float) -> Decision:
    """First: drain. Second: cancel. Third: kill."""
    ints = state.ints + 1
    state = replace(state, ints=ints)
    if ints == 1:
        return begin_ending(state, now, 0, "SIGINT") if state.shutdown is None else (state, [])
    if ints == 2:
        return begin_ending(state, now, 4, "second SIGINT", grace_s=CANCEL_GRACE_S)
    state, actions = begin_ending(state, now, 137, "third SIGINT", grace_s=0.0)
    doomed = [replace(m, phase="dying", leaving="third SIGINT", deadline=now + KILL_AFTER_S) for m in state.members.values()]
    shutdown = Shutdown(stage="close", code=137, reason="third SIGINT")
    kills = [Kill(pid=m.pid, signum=signal.SIGKILL) for m in doomed]
    return replace(put(state, *doomed), shutdown=shutdown, vacancies=()), [*actions, *kills]


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
    actions: list[Action] = [log]
    if by > 0:
        vacancy = Vacancy(role="worker", index=target - 1, due_at=now)
        state = replace(state, vacancies=(*state.vacancies, vacancy))
    else:
        # Places are numbered 0..target-1 without gaps: the last one goes, taken or vacant.
        state = replace(state, vacancies=tuple(v for v in state.vacancies if v.index < target))
        for member in [m for m in state.staying if m.index >= target]:
            state, more = dismiss(state, member, "SIGTTOU", now, refill=False)
            actions += more
    actions += [Send(pid=m.pid, message=Reslot(index=m.index, total=target)) for m in state.staying]
    return state, actions
