"""For tests of the supervisor's decisions: a system without processes, in which every fork succeeds at once."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import Any, TypeVar

from streamline_pool.supervisor.ipc.messages import Beat, StewardBeat
from streamline_pool.supervisor.pool.decide import decide, initial
from streamline_pool.supervisor.pool.state import Action, Event, Exited, Forked, Limits, Log, Received, Send, Signalled, Spawn, State, Tick

__all__ = ["LIMITS", "STEWARD", "Script", "beat"]

LIMITS = Limits(drain_timeout_s=30.0, stall_timeout_s=10.0, restart_budget=3, max_rss_bytes=None, max_runs_per_worker=None, burst=False)
STEWARD = 100  # its pid; workers have 101, 102, …
A = TypeVar("A")


class Script:
    """Passes events to `decide`, and performs its forks; each method returns the actions that followed."""

    def __init__(self, workers: int = 2, **limits: Any) -> None:
        self.now = 1000.0
        self.state: State = initial(workers, replace(LIMITS, **limits), self.now)
        self.actions: list[Action] = []  # of the last call
        self.alive: set[int] = set()
        self._next_pid = STEWARD

    def send(self, *events: Event) -> list[Action]:
        """These events, and the forks that follow from them."""
        self.actions, queue = [], list(events)
        while queue:
            self.state, actions = decide(self.state, queue.pop(0), self.now)
            self.actions += actions
            for spawn in (action for action in actions if isinstance(action, Spawn)):
                owner = f"h:{self._next_pid}:n"
                queue.append(Forked(pid=self._next_pid, owner=owner, role=spawn.role, index=spawn.index, total=spawn.total))
                self.alive.add(self._next_pid)
                self._next_pid += 1
        return self.actions

    def wait(self, seconds: float) -> list[Action]:
        """Time passes in which every living child sends heartbeats and nothing else happens."""
        actions = []
        for _ in range(round(seconds / 0.5) or 1):
            self.now += seconds if seconds < 0.5 else 0.5
            members = {pid: m if m.phase == "dying" else replace(m, last_message_at=self.now) for pid, m in self.state.members.items()}
            self.state = replace(self.state, members=members)
            actions += self.send(Tick())
        self.actions = actions
        return actions

    def on_message(self, pid: int, message: Any) -> list[Action]:
        """A child sends a message."""
        return self.send(Received(pid=pid, message=message))

    def beat(self, pid: int, **fields: Any) -> list[Action]:
        """A worker sends a heartbeat."""
        return self.on_message(pid, beat(**fields))

    def dies(self, pid: int, exit_code: int | None = None, signal: str | None = "SIGKILL") -> list[Action]:
        """A child ends, by `signal` unless it has an exit code."""
        self.alive.discard(pid)
        return self.send(Exited(pid=pid, exit_code=exit_code, signal=None if exit_code is not None else signal, dump=None, jitter=0.5))

    def signal(self, *signums: signal.Signals) -> list[Action]:
        """The operator sends signals to the supervisor. If several, it handles all of them before it learns of the forks they cause."""
        return self.send(*(Signalled(signum=signum) for signum in signums))

    def started(self) -> Script:
        """The pool, ready."""
        self.send(Tick())
        self.on_message(STEWARD, StewardBeat(ready=True))
        for pid in self.workers:
            self.beat(pid)
        assert self.state.ready
        return self

    @property
    def workers(self) -> list[int]:
        return [m.pid for m in self.state.workers]

    def sent(self, kind: type[A]) -> list[tuple[int, A]]:
        """(pid, message) of each message of that kind that the last call sent."""
        return [(a.pid, a.message) for a in self.actions if isinstance(a, Send) and isinstance(a.message, kind)]

    def did(self, kind: type[A]) -> list[A]:
        """The actions of that kind that followed from the last call."""
        return [action for action in self.actions if isinstance(action, kind)]

    def logged(self) -> list[str]:
        return [action.event for action in self.did(Log)]


def beat(**fields: Any) -> Beat:
    """A heartbeat of an idle worker, but for `fields`."""
    usual: dict[str, Any] = {
        "state": "ready", "idle": True, "in_flight": 0, "runs_total": 0, "steps_total": 0, "ops_ok": 0, "ops_failed": 0,
        "consecutive_failures": 0, "lru": {},
    }  # fmt: skip
    return Beat(**{**usual, **fields})
