"""When handlers of one run were inside, compared with each other and with what was durable. Owns these two rules; judge.py the others.

All times are those of the ledger (`ledger.real_monotonic`), one clock for all processes, so they can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from .audit import Story
from .ledger import Note

__all__ = [
    "Circumstances",
    "Strike",
    "Suspension",
    "Visit",
    "blocked_loops",
    "entered_after_durable",
    "generation",
    "overlapping",
    "visits",
]

_MARGIN_S = 0.05  # between a note and the instant that it stands for, on a busy machine; a guess
_SWEEP_S = 3.0  # an expired lease is found by the next sweep, on a busy machine; a guess
_BLOCKED_S = 0.1  # a majority write takes some milliseconds; a guess
_BLOCKED_ENDS = ("CancelledError", "StoreUnavailableError")  # of handlers on an event loop that a call of the engine has blocked
_AWAKE_S = 0.05  # a process that is suspended between its last check and the entry enters within this time of its SIGCONT


@dataclass(frozen=True, slots=True)
class Suspension:
    """A process that was stopped by a signal, or whose host was cut off, from `begun` to `ended`."""

    pid: int
    begun: float
    ended: float


@dataclass(frozen=True, slots=True)
class Strike:
    """A fault that hit these processes; None: the database, and so all."""

    pids: frozenset[int] | None
    begun: float
    ended: float


@dataclass(slots=True)
class Circumstances:
    """What the nemesis did to processes, as far as it excuses them."""

    suspensions: list[Suspension] = field(default_factory=list)
    dead: set[int] = field(default_factory=set)  # pids of processes that were killed or died
    blocked: list[Suspension] = field(default_factory=list)  # of event loops; see `blocked_loops`
    strikes: list[Strike] = field(default_factory=list)
    lease_s: float = 30.0
    crashes_max: int = 3  # a run may fail after it was held by so many of the dead
    clock_margin_s: float = 0.05  # the engine corrects a host's clock by a measured offset, half a round trip wrong at most

    def excuse(self, pid: int, at: float) -> bool:
        """True if the process may have lost a lease then: it died, or a fault hit it (or the database) no longer than two leases ago."""
        return pid in self.dead or any(
            one.begun <= at <= one.ended + 2 * self.lease_s + _SWEEP_S and (one.pids is None or pid in one.pids) for one in self.strikes
        )


@dataclass(frozen=True, slots=True)
class Visit:
    """One entry of a handler, and its exit."""

    entry: Note
    left: float | None  # None: the process died inside, or is still there
    end: str = ""  # "returned", or the class of what it raised


def visits(notes: Iterable[Note]) -> list[Visit]:
    """The entries of one run in the order of time, each with its exit."""
    ordered = sorted(notes, key=lambda note: float(note["at"]))
    exits = [note for note in ordered if note["kind"] == "exit"]
    found = []
    for entry in (note for note in ordered if note["kind"] == "entry"):
        left = next(
            (note for note in exits if note["at"] >= entry["at"] and (note["pid"], note["key"]) == (entry["pid"], entry["key"])), None
        )
        if left is not None:
            exits.remove(left)
        found.append(Visit(entry, None) if left is None else Visit(entry, left["at"], left["end"]))
    return found


def blocked_loops(notes: Iterable[Note]) -> list[Suspension]:
    """The times during which a call of the engine blocked the event loop of a worker for long, from the notes around the call."""
    begun: dict[tuple[int, str], float] = {}
    found = []
    for note in sorted(notes, key=lambda note: float(note["at"])):
        place = (note["pid"], str(note.get("key")))
        since = begun.pop(place, None)
        if since is not None and note["at"] - since > _BLOCKED_S:
            found.append(Suspension(note["pid"], since, note["at"] + _BLOCKED_S))
        if note["kind"] == "blocks":
            begun[place] = note["at"]
    return found


def generation(entry: Note) -> int:
    """How often the run had been rewound; see `ctx.idempotency_key`."""
    parts = entry["key"].split(":")
    return int(parts[2]) if len(parts) > 2 else 0


def entered_after_durable(story: Story, of_run: Sequence[Visit], around: Circumstances) -> Iterator[str]:
    """A handler that was entered though the result of its step was durable, and its process could have known it."""
    for visit in of_run:
        entry = visit.entry
        durable_at = story.done_at.get((generation(entry), str(entry["place"])))
        if durable_at is None or entry["at"] <= durable_at + _MARGIN_S:
            continue
        just_awake = any(
            one.pid == entry["pid"] and one.begun < durable_at and one.ended <= entry["at"] < one.ended + _AWAKE_S
            for one in around.suspensions
        )
        if not just_awake:
            yield f"{entry['step']} was entered {entry['at'] - durable_at:.3f} s after its result was durable"


def overlapping(of_run: Sequence[Visit], around: Circumstances) -> Iterator[str]:
    """Two handlers of one generation that were inside at once, though the first one's worker could have stopped it.

    It could not while it was suspended, nor while the handler was in a call of the engine that waits for the database, such as
    `ctx.checkpoint`: that call then refuses (LeaseLostError), or gives up (StoreUnavailableError). In an `async def` handler such a
    call blocks the event loop, and so all other `async def` handlers of the worker, which neither go on nor can be cancelled
    (CancelledError) meanwhile. The handler of an earlier generation lost its lease by a rewind, of which its worker may learn late.
    """
    for number, later in enumerate(of_run):
        at = later.entry["at"]
        for earlier in of_run[:number]:
            entry = earlier.entry
            if earlier.left is None or earlier.left <= at + _MARGIN_S or earlier.end == "LeaseLostError":
                continue
            excuses = [*around.suspensions, *(around.blocked if earlier.end in _BLOCKED_ENDS else ())]
            suspended = any(one.pid == entry["pid"] and one.begun < at and one.ended > entry["at"] for one in excuses)
            if not suspended and generation(entry) == generation(later.entry):
                yield f"{entry['step']} of pid {entry['pid']} was inside when pid {later.entry['pid']} entered {later.entry['step']}"
