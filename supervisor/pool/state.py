"""What the supervisor knows (State), what can happen to it (Event) and what it can do about it (Action): records only.

decide.py maps (State, Event, now) to (State, actions); pool.py finds out events and performs actions.
Instants are monotonic seconds.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from streamline_pool.supervisor.ipc.messages import Beat, Died, FromSteward, FromWorker, ToSteward, ToWorker
from streamline_pool.supervisor.pool.circuit_breaker import Breaker

__all__ = [
    "Action",
    "Attended",
    "Burst",
    "Dump",
    "Event",
    "Exit",
    "Exited",
    "ForkFailed",
    "Forked",
    "Garbled",
    "Heard",
    "Kill",
    "Limits",
    "Log",
    "Measured",
    "Member",
    "Phase",
    "Role",
    "Send",
    "Shutdown",
    "Signalled",
    "Spawn",
    "State",
    "Tick",
    "Trial",
    "Vacancy",
]  # fmt: skip

Role = Literal["steward", "worker"]
Phase = Literal["starting", "ready", "draining", "stopping", "dying"]
"""starting: forked, not yet heard to be ready | ready | draining: told to finish its steps | stopping: told to give up
its steps | dying: sent SIGABRT or SIGKILL. A child only ever moves to the right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The settings that decisions depend on."""

    drain_timeout_s: float
    stall_timeout_s: float
    restart_budget: int  # crash restarts per minute
    max_rss_bytes: int | None
    max_runs_per_worker: int | None
    burst: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One live child process."""

    pid: int
    owner: str  # "host:pid:nonce"
    role: Role
    index: int  # a worker's place in the pool; -1 for the steward
    phase: Phase = "starting"
    started_at: float
    heard_at: float  # of its last message; of its start before the first
    beat: Beat | None = None  # a worker's last; None before the first
    rung_at: float = 0.0  # when it was last rung
    leaving: str | None = None  # why it was told to go; its death is then no crash and its place is already refilled
    deadline: float | None = None  # when the next harder measure is due; None: never in this phase
    excused: bool = False  # it has said why it cannot start: its exit is no crash either
    stalled: bool = False
    rss_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Vacancy:
    """A child to be forked, not before `due_at`."""

    role: Role
    index: int
    due_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The half-open breaker's one worker. Its tallies count from the beat that answers `poke`."""

    pid: int
    idle_check: int
    started: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """How far `--burst` is in proving that nothing is left to do.

    asking: every worker is to say, after being asked, that it is idle. checking: then the steward is to find nothing due.
    confirming: then every worker is to say again that it is idle and has touched no run since. All three together
    mean that at the moment of the check nothing was due and nothing in flight.
    """

    stage: Literal["asking", "checking", "confirming"]
    seq: int
    runs: Mapping[int, int] = field(default_factory=dict)  # pid -> runs_total, as answered to `asking`


@dataclass(frozen=True, slots=True, kw_only=True)
class Attended:
    """Those who stream events, and whether every worker is known to publish for them."""

    seq: int  # of the `Publish` that told them
    until: Mapping[str, float]  # id of each -> when it ceases to be served, unless the steward says otherwise
    confirmed: bool = False  # the steward has been told so

    def left(self, now: float) -> tuple[tuple[str, float], ...]:
        """Each with the seconds that it has left."""
        return tuple((subscriber, until - now) for subscriber, until in self.until.items() if until > now)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    """The pool is going to exit with `code`.

    workers: told to go, each with deadlines of its own. settle: none is left; the steward releases what the dead ones
    held. close: the steward was told to go too; once nothing is left, exit.
    """

    stage: Literal["workers", "settle", "close"]
    code: int
    reason: str
    deadline: float | None = None  # of `settle`: the leases that are not released by then are left to expire


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    limits: Limits
    target: int  # wanted number of workers
    members: Mapping[int, Member] = field(default_factory=dict)  # by pid; never changed in place
    vacancies: tuple[Vacancy, ...] = ()
    unacknowledged: Mapping[str, Died] = field(default_factory=dict)  # by owner: leases that may still be held by the dead
    breaker: Breaker = field(default_factory=Breaker)
    trial: Trial | None = None
    held: bool = False
    ready: bool = False  # every child has been ready at one time
    unserved: int = 0  # rings that found no hungry worker, at most one for each worker; whoever gets hungry next gets one
    unserved_lane: str | None = None  # of these rings; None: some were for any lane, from the start of the queue
    rolling: frozenset[int] = frozenset()  # pids that a HUP still has to recycle
    burst: Burst | None = None
    burst_again_at: float = 0.0
    pokes: int = 0  # the last poke, check or publish number used
    attended: Attended | None = None  # None: nobody streams
    ints: int = 0  # SIGINTs so far
    shutdown: Shutdown | None = None
    crashes: tuple[float, ...] = ()  # instants of the crashes of the last minute
    restarts: int = 0
    recycled: int = 0
    gone_runs: int = 0  # runs_total and steps_total of workers that are no more
    gone_steps: int = 0
    ticked_at: float = 0.0
    facts_at: float = 0.0  # when the steward was last sent facts

    @property
    def steward(self) -> Member | None:
        return next((m for m in self.members.values() if m.role == "steward"), None)

    @property
    def workers(self) -> list[Member]:
        """All worker processes, those on their way out too, by place."""
        return sorted((m for m in self.members.values() if m.role == "worker"), key=lambda m: (m.index, m.started_at))

    @property
    def staying(self) -> list[Member]:
        """The workers that hold a place in the pool."""
        return [m for m in self.workers if m.leaving is None]


# ---- events --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Forked:
    """A `Spawn` was performed."""

    pid: int
    owner: str
    role: Role
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    pid: int
    message: FromWorker | FromSteward


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbled:
    """A child's bytes were not messages."""

    pid: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Exited:
    """A child has been reaped; all it had sent has been heard before."""

    pid: int
    exit_code: int | None  # None: ended by `signal`
    signal: str | None
    dump: str | None  # the tail of its last stack dump
    jitter: float  # uniform in [0, 1), for the delay of its successor


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkFailed:
    """A `Spawn` could not be performed: the system has no room for another process."""

    role: Role
    index: int
    error: str
    jitter: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Resident memory in bytes, by pid."""

    rss_bytes: Mapping[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signalled:
    signum: signal.Signals


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed."""


Event = Forked | ForkFailed | Heard | Garbled | Exited | Measured | Signalled | Tick


# ---- actions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawn:
    """Fork a child. Answered by `Forked` or `ForkFailed` at once."""

    role: Role
    index: int
    total: int
    first: bool  # the pool has not been ready yet: a database that is not there is an error, not an outage


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    pid: int
    message: ToWorker | ToSteward


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    pid: int
    signum: signal.Signals


@dataclass(frozen=True, slots=True, kw_only=True)
class Dump:
    """Have every process write its stacks to standard error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    level: int  # of the logging module
    event: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """Every child is gone: the supervisor's exit code."""

    code: int


Action = Spawn | Send | Kill | Dump | Log | Exit
