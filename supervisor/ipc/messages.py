"""Everything that crosses a pipe between the supervisor and a child: one closed union per direction, and its bytes.

Owns the records and their wire form (a length, then orjson of `[version, name, fields]`). Does no I/O: child.py and
link.py move the bytes. No pickle: a frame can only become one of the records below, or a `MessageError`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import orjson

__all__ = [
    "BOOT_FAILED_EXIT",
    "FROM_STEWARD",
    "FROM_WORKER",
    "STORE_UNREACHABLE_EXIT",
    "TO_STEWARD",
    "TO_WORKER",
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
    "FrameReader",
    "FromSteward",
    "FromWorker",
    "Gate",
    "GateState",
    "Hold",
    "IdleCheck",
    "MessageError",
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
    "decode",
    "encode",
]  # fmt: skip

VERSION = 1  # raised with every incompatible change; both ends are one fork of one program, so a mismatch is a bug
BOOT_FAILED_EXIT = 64  # a child's own exit code after a `BootFailed`; apart from 0, 1 and those of signals
STORE_UNREACHABLE_EXIT = 3  # the command's, for "database unreachable at start"
FRAME_BYTES_MAX = 8 << 20  # a guess, far above any real message: a larger length means a corrupted stream
_HEADER_BYTES = 4

GateState = Literal["open", "closed", "one"]  # claim freely | claim nothing | claim one batch
CircuitState = Literal["closed", "open", "half-open"]


class MessageError(Exception):
    """The bytes on a pipe are not a message of this version. The stream cannot be trusted any more: end the child."""


# ---- supervisor -> worker ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WakeUp:
    """There may be work; look now."""

    lane: str | None = None  # where; None: anywhere
    run_id: str | None = None  # which run; None: unknown or several


@dataclass(frozen=True, slots=True, kw_only=True)
class TimersFired:
    """The instants of these runs have come: claim them by name, ahead of what is due since longer, and even when full.

    From the steward to the supervisor, who shares the names out, and on to the workers. A hint: lost, these runs are
    found by the looks for what is due, in their turn.
    """

    run_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRun:
    """Somebody cancelled this run; its holder should look at the database at once. A hint: loss costs only time."""

    run_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """How the breaker lets this worker claim."""

    state: GateState


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """The operator's pause (TSTP, CONT): while held, a worker claims nothing."""

    held: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Reslot:
    """The pool has another size: this worker is now number `index` of `total`."""

    index: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Finish the steps in flight, release the runs, exit 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Fire the abort signals, give handlers `grace_s` seconds, release the runs, exit 0."""

    grace_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleCheck:
    """Send a beat that names `seq`. As pipes keep their order, that beat is news from after the poke was sent."""

    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSubscribers:
    """Send events for these listeners, and for nobody else; answered by a beat that names `seq`."""

    seq: int
    subscribers: tuple[tuple[str, float], ...]  # (id, seconds for which it is served unless said again)


# ---- worker -> supervisor ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a worker says of itself, from its own event loop. The counters only grow during one life."""

    state: str  # starting | ready | holding | draining | stopped
    idle: bool  # has free slots, has looked, has found nothing
    in_flight: int
    runs_total: int
    steps_total: int
    ops_ok: int  # database operations that succeeded
    ops_failed: int  # ... that failed for a transient reason
    consecutive_failures: int  # failures since the last success
    recycle: str | None = None  # why this worker wishes to be replaced; None: it does not
    running: tuple[tuple[str, str], ...] = ()  # sample of (run id, step id) in flight
    lru: dict[str, int]  # counters of the run cache
    parked: tuple[tuple[str, int, str], ...] = ()  # (lane, wakeAt in epoch ms, run id) written since the last beat
    idle_check: int = 0  # the highest `Poke.seq` received
    publish: int = 0  # ... and the highest `Publish.seq`


@dataclass(frozen=True, slots=True, kw_only=True)
class BootFailed:
    """This child cannot start, and trying again cannot help: what the whole pool should exit with, and say."""

    exit_code: int  # of the command, as in the contract: 2, 3, 78 or 1
    message: str


# ---- supervisor -> steward -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """How a child died, as far as anybody can tell afterwards."""

    exit_code: int | None  # None: ended by a signal
    signal: str | None  # "SIGKILL"; None: it exited
    stalled: bool  # its loop was silent, so the supervisor ended it
    rss_bytes: int | None  # as last measured; None: it died before the first measurement
    uptime_s: float
    running: tuple[tuple[str, str], ...] = ()  # sample of (run id, step id), as of the last beat
    dump: str | None = None  # its last stack dump, shortened


@dataclass(frozen=True, slots=True, kw_only=True)
class Died:
    """This worker is no more: release its leases, then answer `Released`. Repeated to every new steward until answered."""

    owner: str
    evidence: Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Parked:
    """Instants at which runs of this host become due."""

    instants: tuple[tuple[str, int, str], ...]  # (lane, epoch ms, run id)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckDue:
    """Is anything claimable now? Answered by `Checked` with the same number."""

    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Circuit:
    """The breaker's state; unless closed, the steward probes the database."""

    state: CircuitState


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFacts:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolFacts:
    """The pool as the supervisor sees it, each second: for the host record and the health port."""

    ready: bool  # every process has reported ready since the start, and the pool is not ending
    draining: bool
    held: bool
    target: int  # wanted number of workers
    restarts: int  # children replaced after a crash
    recycled: int  # workers replaced on purpose
    runs_total: int  # over all workers, including those gone
    steps_total: int
    circuit: CircuitState
    workers: tuple[WorkerFacts, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscribersServed:
    """Every worker that there is publishes for these listeners."""

    subscribers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """The workers are gone: remove the host record and exit 0."""


# ---- steward -> supervisor -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StewardBeat:
    ready: bool  # it has reached the database once


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkDue:
    """About `count` runs of `lane` are due: ring as many hungry workers."""

    lane: str | None
    run_id: str | None
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunChanged:
    """A cancellation seen on the signal tail. `owner`: the worker that held the run; None: not known, tell all."""

    run_id: str
    owner: str | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscribers:
    """All who stream events, as far as this host knows: workers are to publish for them. Answered by `Publishing`."""

    subscribers: tuple[tuple[str, float], ...]  # (id, seconds for which it is served unless said again)


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """The leases of a dead worker are free again: `runs` of them."""

    owner: str
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DueCount:
    seq: int
    due: int  # runs claimable now, up to some limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The steward's own operation succeeded or failed."""

    ok: bool
    error: str | None = None


ToWorker = WakeUp | TimersFired | CheckRun | Gate | Hold | Reslot | Drain | Stop | IdleCheck | ServeSubscribers
FromWorker = Beat | BootFailed
ToSteward = Died | Parked | CheckDue | Circuit | PoolFacts | SubscribersServed | Close
FromSteward = StewardBeat | WorkDue | TimersFired | RunChanged | Subscribers | Released | DueCount | Probe | BootFailed

M_co = TypeVar("M_co", covariant=True)


# ---- bytes ---------------------------------------------------------------------------------------------------------


class Direction(dict[str, Callable[[dict[str, Any]], M_co]]):
    """The messages that may travel one way: name -> maker of the record from its decoded fields."""


def _direction(union: types.UnionType) -> Direction[Any]:
    return Direction({cls.__name__: _record_maker(cls) for cls in get_args(union)})


def _record_maker(cls: type) -> Callable[[dict[str, Any]], Any]:
    """JSON knows neither tuples nor records: find once, per class, which fields must be turned back."""
    hints = get_type_hints(cls)
    convert = {f.name: made for f in fields(cls) if (made := _converter(hints[f.name])) is not None}

    def make(values: dict[str, Any]) -> Any:
        for name in convert.keys() & values.keys():
            values[name] = convert[name](values[name])
        return cls(**values)

    return make


def _converter(hint: Any) -> Callable[[Any], Any] | None:
    """How to restore a value of type `hint` from JSON; None: it is already right."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is tuple:
        item = _converter(args[0]) if args[-1] is Ellipsis else None
        return tuple if item is None else lambda value: tuple(map(item, value))
    if origin in (Union, types.UnionType):
        assert not any(map(_converter, args)), f"{hint}: no message has an optional record or tuple"
        return None
    return _record_maker(hint) if is_dataclass(hint) and isinstance(hint, type) else None


TO_WORKER: Direction[ToWorker] = _direction(ToWorker)
FROM_WORKER: Direction[FromWorker] = _direction(FromWorker)
TO_STEWARD: Direction[ToSteward] = _direction(ToSteward)
FROM_STEWARD: Direction[FromSteward] = _direction(FromSteward)


def encode(message: ToWorker | FromWorker | ToSteward | FromSteward) -> bytes:
    """One frame: four bytes of length, then the message."""
    body = orjson.dumps((VERSION, type(message).__name__, message))
    return len(body).to_bytes(_HEADER_BYTES, "big") + body


def decode(body: bytes, direction: Direction[M_co]) -> M_co:
    """The message in a frame's body. MessageError: not one that may travel in this direction."""
    try:
        version, name, values = orjson.loads(body)
        if version != VERSION:
            raise MessageError(f"message version {version}, expected {VERSION}")
        return direction[name](values)
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise MessageError(f"not a message: {body[:80]!r} ({type(exc).__name__}: {exc})") from exc


class FrameReader:
    """Cuts a byte stream into frames. Holds at most one unfinished frame."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterable[bytes]:
        """The bodies of the frames that `data` completes."""
        buffer, at, bodies = self._rest + data, 0, []
        while len(buffer) - at >= _HEADER_BYTES:
            size = int.from_bytes(buffer[at : at + _HEADER_BYTES], "big")
            if size > FRAME_BYTES_MAX:
                raise MessageError(f"a frame of {size} bytes, above the {FRAME_BYTES_MAX} allowed")
            end = at + _HEADER_BYTES + size
            if len(buffer) < end:
                break
            bodies.append(buffer[at + _HEADER_BYTES : end])
            at = end
        self._rest = buffer[at:]
        return bodies
