"""Nothing that happens, in any order, leaves the pool incomplete or unable to end."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_script import STEWARD, Script

from streamline_pool.supervisor.ipc.messages import (
    Beat,
    DueCount,
    Probe,
    Released,
    RunChanged,
    StewardBeat,
    TimersFired,
    WorkDue,
)
from streamline_pool.supervisor.pool.state import Exit, Kill, Measured, Send, Tick

pids = st.integers(STEWARD, STEWARD + 8)
counters = {name: st.integers(0, 9) for name in ("in_flight", "runs_total", "steps_total", "ops_ok", "ops_failed", "consecutive_failures")}
beats = st.builds(
    Beat,
    state=st.sampled_from(["starting", "ready", "holding", "draining"]),
    idle=st.booleans(),
    recycle=st.sampled_from([None, None, "stuck"]),
    lru=st.just({}),
    parked=st.just(((1, "r"),)),
    idle_check=st.integers(0, 9),
    **counters,
)
messages = st.one_of(
    st.just(StewardBeat(ready=True)),
    st.builds(WorkDue, overdue=st.booleans(), run_id=st.none(), count=st.integers(0, 3)),
    st.builds(TimersFired, run_ids=st.sampled_from([("a",), ("a", "b", "c")])),
    st.builds(RunChanged, run_id=st.just("r"), owner=st.none()),
    st.builds(Released, owner=st.builds("h:{}:n".format, pids), runs=st.integers(0, 2)),
    st.builds(DueCount, seq=st.integers(0, 9), due=st.integers(0, 1)),
    st.builds(Probe, ok=st.booleans()),
)
SIGNALS = [signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGTSTP, signal.SIGCONT, signal.SIGUSR1]
happenings = st.one_of(
    st.tuples(st.just("beat"), pids, beats),
    st.tuples(st.just("message"), pids, messages),
    st.tuples(st.just("dies"), pids, st.sampled_from([None, 0, 1, 64])),
    st.tuples(st.just("wait"), st.sampled_from([0.1, 1.0, 40.0]), st.none()),
    st.tuples(st.just("signals"), st.lists(st.sampled_from(SIGNALS), min_size=1, max_size=3), st.none()),
    st.tuples(st.just("rss"), pids, st.integers(0, 200)),
)


def play(script: Script, kind: str, what: Any, more: Any) -> None:
    match kind:
        case "beat" if what in script.state.members and script.state.members[what].role == "worker":
            script.on_message(what, more)
        case "message" if script.state.steward is not None:
            script.on_message(script.state.steward.pid, more)
        case "dies" if what in script.alive:
            script.dies(what, exit_code=more)
        case "wait":
            script.wait(what)
        case "signals":
            script.signal(*what)
        case "rss":
            script.send(Measured(rss_bytes={what: more}))


def check_invariants(script: Script) -> None:
    state = script.state
    assert set(state.members) == script.alive
    for action in script.actions:
        if isinstance(action, Send | Kill):
            assert action.pid >= STEWARD, "only children get messages and signals"
    if state.shutdown is None:
        places = sorted([m.index for m in state.active_workers] + [v.index for v in state.vacancies if v.role == "worker"])
        assert places == list(range(state.target)), "every place is occupied, or about to be, once"
        stewards = [m for m in state.members.values() if m.role == "steward"] + [v for v in state.vacancies if v.role == "steward"]
        assert len(stewards) == 1


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(happenings, max_size=30), st.booleans())
def test_in_any_order_of_events_the_pool_stays_complete_and_can_end(story: list[tuple[str, Any, Any]], burst: bool) -> None:
    """No order of deaths, signals and messages may lose a place, start two for one, or leave a pool that cannot end."""
    script = Script(workers=3, burst=burst, max_rss_bytes=100, restart_budget=20)
    script.send(Tick())
    for kind, what, more in story:
        play(script, kind, what, more)
        check_invariants(script)
        if not script.alive and script.state.shutdown is not None:
            return
    script.signal(signal.SIGTERM)
    exits: list[Exit] = []
    for _ in range(100):
        for kill in script.did(Kill):
            if kill.signum == signal.SIGKILL and kill.pid in script.alive:
                script.dies(kill.pid)
                exits += script.did(Exit)
        script.wait(1.0)
        exits += script.did(Exit)
        if exits:
            break
    assert exits, "children that follow no order are killed in the end"
    assert not script.alive
