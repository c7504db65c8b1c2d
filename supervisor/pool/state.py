"""What the supervisor knows (State), what can happen to it (Event) and what it can do about it (Action): records only.

decide.py maps (State, Event, now) to (State, actions); supervisor.py collects events and performs actions.
Instants are monotonic seconds.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from streamline_pool.supervisor.ipc.messages import Beat, Died, FromSteward, FromWorker, ToSteward, ToWorker
from streamline_pool.supervisor.pool.circuit_breaker import Breaker

__all__ = [
    "Action",
    "Burst",
    "Decision",
    "Dump",
    "Event",
    "Exit",
    "Exited",
    "ForkFailed",
    "Forked",
    "InvalidMessage",
    "Kill",
    "KnownSubscribers",
    "Limits",
    "Log",
    "Measured",
    "Member",
    "Phase",
    "Received",
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
"""starting: forked, and not ready yet | ready | draining: it was ordered to finish its steps | stopping: it was ordered to
abort its steps | dying: the supervisor sent SIGABRT or SIGKILL. A child only ever moves to the right."""


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
    last_message_at: float  # of its last message; of its start before the first
    beat: Beat | None = None  # a worker's last; None before the first
    woken_at: float = 0.0  # when it last got a wake-up
    exit_reason: str | None = None  # why it was ordered to end; its death is then no crash and its place is already refilled
    deadline: float | None = None  # when the supervisor takes the next harder measure; None: never in this phase
    cannot_start: bool = False  # it reported why it cannot start: its exit is no crash either
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
    """The one worker that may claim while the breaker is half-open. Its results count from the heartbeat that answers `idle_check`."""

    pid: int
    idle_check: int
    started: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """How far `--burst` is in proving that nothing is left to do.

    asking: every worker must answer that it is idle. checking: then the steward must find nothing due. confirming: then
    every worker must answer again that it is idle, and that it has touched no run since. All three together mean that at
    the moment of the check no run was due and no run was in flight.
    """

    stage: Literal["asking", "checking", "confirming"]
    seq: int
    runs: Mapping[int, int] = field(default_factory=dict)  # pid -> runs_total, as answered to `asking`


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownSubscribers:
    """The subscribers to events, and whether every worker is known to publish for them."""

    seq: int  # of the `ServeSubscribers` that the workers got
    until: Mapping[str, float]  # id of each -> when it ceases to be served, unless the steward extends it
    confirmed: bool = False  # the steward got `SubscribersServed`

    def remaining(self, now: float) -> tuple[tuple[str, float], ...]:
        """Each subscriber that is still served, with its remaining seconds."""
        return tuple((subscriber, until - now) for subscriber, until in self.until.items() if until > now)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    """The pool is going to exit with `code`.

    workers: they were ordered to end, each with deadlines of its own. release: no worker is left; the steward releases what
    dead workers held. close: the steward was ordered to end too; once no child is left, the supervisor exits.
    """

    stage: Literal["workers", "release", "close"]
    code: int
    reason: str
    grace_s: float | None = None  # seconds until workers abort their steps; None: they finish them
    deadline: float | None = None  # of stage `release`: leases that are not released by then are left to expire


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All that the supervisor knows of its pool."""

    limits: Limits
    target: int  # wanted number of workers
    members: Mapping[int, Member] = field(default_factory=dict)  # by pid; never changed in place
    vacancies: tuple[Vacancy, ...] = ()
    unacknowledged: Mapping[str, Died] = field(default_factory=dict)  # by owner: dead workers whose leases are not released yet
    breaker: Breaker = field(default_factory=Breaker)
    trial: Trial | None = None
    held: bool = False
    ready: bool = False  # every child was ready at one time
    owed_wake_ups: int = 0  # wake-ups that found no idle worker, at most one for each worker; the next idle worker gets one
    owed_overdue: bool = False  # some of these wake-ups were for runs that have been due for long
    rolling: frozenset[int] = frozenset()  # pids that a HUP still has to recycle
    burst: Burst | None = None
    burst_again_at: float = 0.0
    last_seq: int = 0  # the last number used in an `IdleCheck`, `CheckDue` or `ServeSubscribers`
    subscribers: KnownSubscribers | None = None  # None: no client has subscribed
    interrupts: int = 0  # SIGINTs so far
    shutdown: Shutdown | None = None
    crashes: tuple[float, ...] = ()  # instants of the crashes of the last minute
    restarts: int = 0
    recycled: int = 0
    past_runs: int = 0  # runs_total and steps_total of workers that have ended
    past_steps: int = 0
    ticked_at: float = 0.0
    facts_at: float = 0.0  # when the steward was last sent facts

    @property
    def steward(self) -> Member | None:
        return next((m for m in self.members.values() if m.role == "steward"), None)

    @property
    def workers(self) -> list[Member]:
        """All worker processes, those that are ending included, by place."""
        return sorted((m for m in self.members.values() if m.role == "worker"), key=lambda m: (m.index, m.started_at))

    @property
    def active_workers(self) -> list[Member]:
        """The workers that hold a place in the pool."""
        return [m for m in self.workers if m.exit_reason is None]

    def with_members(self, *members: Member) -> State:
        """The state in which these children are as given."""
        return replace(self, members={**self.members, **{m.pid: m for m in members}})

    def with_vacancy(self, role: Role, index: int, due_at: float) -> State:
        """The state in which one more child is to be forked."""
        return replace(self, vacancies=(*self.vacancies, Vacancy(role=role, index=index, due_at=due_at)))


# ---- events --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Forked:
    """A `Spawn` was performed."""

    pid: int
    owner: str
    role: Role
    index: int
    total: int  # the number of workers that it was told


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A child sent a message."""

    pid: int
    message: FromWorker | FromSteward


@dataclass(frozen=True, slots=True, kw_only=True)
class InvalidMessage:
    """A child sent bytes that are no message."""

    pid: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Exited:
    """A child has ended. What it had sent was received before."""

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
    """This process got a signal."""

    signum: signal.Signals


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed."""


Event = Forked | ForkFailed | Received | InvalidMessage | Exited | Measured | Signalled | Tick


# ---- actions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawn:
    """Fork a child. Answered by `Forked` or `ForkFailed` at once."""

    role: Role
    index: int
    total: int
    first: bool  # the pool has not been ready yet: a missing database is then an error, not an outage


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Send a message to a child."""

    pid: int
    message: ToWorker | ToSteward


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """Send a signal to a child."""

    pid: int
    signum: signal.Signals


@dataclass(frozen=True, slots=True, kw_only=True)
class Dump:
    """Have every process write its stacks to standard error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """Write a log line."""

    level: int  # of the logging module
    event: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """No child is left: the supervisor exits with this code."""

    code: int


Action = Spawn | Send | Kill | Dump | Log | Exit

Decision = tuple[State, list[Action]]
"""The next state, and what the supervisor does now."""
