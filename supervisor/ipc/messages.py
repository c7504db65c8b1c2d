"""Every message that crosses a pipe between the supervisor and a child: one closed union of records per direction.

Owns what is said, and nothing of how: codec.py turns a record into bytes and back, channel.py moves the bytes. A record's
fields are exactly its wire form, so a field may only be a number, a text, a truth value, a mapping of these, a tuple, or
another record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar, dataclass_transform

from streamline_pool.worker.gate import GateState

__all__ = [
    "BOOT_FAILED_EXIT",
    "STORE_UNREACHABLE_EXIT",
    "Beat",
    "BootFailed",
    "CheckDue",
    "CheckRun",
    "Circuit",
    "CircuitState",
    "Close",
    "Died",
    "Drain",
    "DueCount",
    "Evidence",
    "FromSteward",
    "FromWorker",
    "Gate",
    "Hold",
    "IdleCheck",
    "Parked",
    "PoolFacts",
    "Probe",
    "Released",
    "Reslot",
    "RunChanged",
    "ServeSubscribers",
    "StewardBeat",
    "Stop",
    "Subscribers",
    "SubscribersServed",
    "TimersFired",
    "ToSteward",
    "ToWorker",
    "WakeUp",
    "WorkDue",
    "WorkerFacts",
]  # fmt: skip

BOOT_FAILED_EXIT = 64  # a child's own exit code after a `BootFailed`; apart from 0, 1 and those of signals
STORE_UNREACHABLE_EXIT = 3  # the command's, for "database unreachable at start"

CircuitState = Literal["closed", "open", "half-open"]

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def message(cls: type[T]) -> type[T]:
    """The form of every record here: immutable, and every field named where the record is made."""
    return dataclass(frozen=True, slots=True, kw_only=True)(cls)


# ---- supervisor -> worker ------------------------------------------------------------------------------------------


@message
class WakeUp:
    """There may be work: claim that run, or poll."""

    run_id: str | None = None  # which run; None: unknown, or several
    overdue: bool = False  # it has been due for long, so a poll must start at the beginning of the queue


@message
class TimersFired:
    """The timers of these runs fired: claim the runs by id, before older due runs, and even when the worker is full.

    The steward sends it to the supervisor, the supervisor divides the ids among the workers. It is a hint: if it is
    lost, a poll finds these runs in their turn.
    """

    run_ids: tuple[str, ...]


@message
class CheckRun:
    """A control operation changed this run; its lease holder should read the run at once. A hint: its loss costs only time."""

    run_id: str


@message
class Gate:
    """How the circuit breaker lets this worker claim."""

    state: GateState


@message
class Hold:
    """The operator's pause (SIGTSTP, SIGCONT): while held, a worker claims nothing."""

    held: bool


@message
class Reslot:
    """The pool has another size: this worker is now number `index` of `total`."""

    index: int
    total: int


@message
class Drain:
    """Finish the steps that are running, release the runs, exit 0."""


@message
class Stop:
    """Fire the abort signals, give handlers `grace_s` seconds, release the runs, exit 0."""

    grace_s: float


@message
class IdleCheck:
    """Send a heartbeat that names `seq`. Pipes keep their order, so that heartbeat was made after this question."""

    seq: int


@message
class ServeSubscribers:
    """Publish events for these subscribers, and for no others. The worker answers by a heartbeat that names `seq`."""

    seq: int
    subscribers: tuple[tuple[str, float], ...]  # (id, seconds for which it is served unless it is named again)


# ---- worker -> supervisor ------------------------------------------------------------------------------------------


@message
class Beat:
    """A worker's heartbeat: its state, from its own event loop. The counters only grow during one life."""

    state: str  # starting | ready | holding | draining | stopped
    idle: bool  # it has free capacity, and its last poll found nothing
    in_flight: int
    runs_total: int
    steps_total: int
    ops_ok: int  # database operations that succeeded
    ops_failed: int  # database operations that failed for a transient reason
    consecutive_failures: int  # failures since the last success
    recycle: str | None = None  # why this worker asks to be replaced; None: it does not
    running: tuple[tuple[str, str], ...] = ()  # sample of (run id, step id) that are running
    lru: dict[str, int]  # counters of the run cache
    parked: tuple[tuple[int, str], ...] = ()  # (wakeAt in epoch ms, run id) written since the last heartbeat
    idle_check: int = 0  # the highest `IdleCheck.seq` received
    subscribers_served: int = 0  # the highest `ServeSubscribers.seq` received
    kept: bool = False  # it claims nothing until a suspect has run alone


@message
class BootFailed:
    """This child cannot start, and another try cannot help: the exit code and the error of the whole pool."""

    exit_code: int  # of the command, as in docs/reference/command.md: 2, 3, 78 or 1
    message: str


# ---- supervisor -> steward -----------------------------------------------------------------------------------------


@message
class Evidence:
    """How a child died, as far as the supervisor can find out afterwards."""

    exit_code: int | None  # None: ended by a signal
    signal: str | None  # "SIGKILL"; None: it exited
    stalled: bool  # its event loop sent nothing, so the supervisor ended it
    rss_bytes: int | None  # as last measured; None: it died before the first measurement
    uptime_s: float
    running: tuple[tuple[str, str], ...] = ()  # sample of (run id, step id), as of the last heartbeat
    dump: str | None = None  # its last stack dump, shortened


@message
class Died:
    """This worker is dead: release its leases, then answer `Released`. Repeated to every new steward until answered."""

    owner: str
    evidence: Evidence


@message
class Parked:
    """Instants at which runs of this host become due."""

    instants: tuple[tuple[int, str], ...]  # (epoch ms, run id)


@message
class CheckDue:
    """Is any run claimable now? The steward answers by `DueCount` with the same number."""

    seq: int


@message
class Circuit:
    """The breaker's state; unless it is closed, the steward probes the database."""

    state: CircuitState


@message
class WorkerFacts:
    """One worker in figures; a part of `PoolFacts`."""

    pid: int
    owner: str
    index: int
    state: str
    in_flight: int
    runs_total: int
    steps_total: int
    rss_bytes: int | None
    uptime_s: float
    lru: dict[str, int]


@message
class PoolFacts:
    """The pool as the supervisor sees it, each second: for the host record and the health port."""

    ready: bool  # every process has reported ready since the start, and the pool is not ending
    draining: bool
    held: bool
    target: int  # wanted number of workers
    restarts: int  # children replaced after a crash
    recycled: int  # workers replaced on purpose
    runs_total: int  # of all workers, those that have ended included
    steps_total: int
    circuit: CircuitState
    workers: tuple[WorkerFacts, ...]


@message
class SubscribersServed:
    """Every live worker publishes for these subscribers."""

    subscribers: tuple[str, ...]


@message
class Close:
    """All workers have ended: remove the host record and exit 0."""


# ---- steward -> supervisor -----------------------------------------------------------------------------------------


@message
class StewardBeat:
    """The steward's heartbeat."""

    ready: bool  # it has reached the database once


@message
class WorkDue:
    """About `count` runs are due: wake up as many idle workers."""

    run_id: str | None  # the run, if it is one and known
    count: int
    overdue: bool = False  # see WakeUp


@message
class RunChanged:
    """The signal tail delivered a control operation. `owner`: the worker that held the run; None: unknown, so ask all workers."""

    run_id: str
    owner: str | None


@message
class Subscribers:
    """Every subscriber to events that this host knows: workers shall publish for them. Answered by `SubscribersServed`."""

    subscribers: tuple[tuple[str, float], ...]  # (id, seconds for which it is served unless it is named again)


@message
class Released:
    """The steward released the leases of a dead worker: `runs` of them."""

    owner: str
    runs: int


@message
class DueCount:
    """The answer to `CheckDue`."""

    seq: int
    due: int  # runs claimable now, up to a limit


@message
class Probe:
    """The steward's own operation succeeded or failed."""

    ok: bool
    error: str | None = None


ToWorker = WakeUp | TimersFired | CheckRun | Gate | Hold | Reslot | Drain | Stop | IdleCheck | ServeSubscribers
FromWorker = Beat | BootFailed
ToSteward = Died | Parked | CheckDue | Circuit | PoolFacts | SubscribersServed | Close
FromSteward = StewardBeat | WorkDue | TimersFired | RunChanged | Subscribers | Released | DueCount | Probe | BootFailed
