"""What a fault may act on, and the record of its turn. Owns the affected runs and their recovery times; faults are in `faults/`."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from .audit import Audit, pid_of
from .hosts import Host
from .ledger import real_monotonic
from .overlaps import Circumstances, Strike, Suspension
from .servers import ChaosServer

__all__ = ["Fault", "NoTurn", "RunningFault", "Stage", "Turn", "past_lease", "percentile", "some_seconds"]


class NoTurn(Exception):
    """The fault found nothing to act on; the text says what."""


@dataclass(slots=True)
class Turn:
    """One fault that happened."""

    fault: str
    begun: float = 0.0  # real_monotonic, as the others
    ended: float = 0.0  # of a kill: as `begun`
    affected: set[str] = field(default_factory=set)  # runs that were held by what the fault struck
    pids: frozenset[int] | None = frozenset()  # what it hit; None: the database
    no_turn: str = ""

    def recoveries(self, audit: Audit) -> tuple[list[float], int]:
        """Seconds from the end of the fault until each affected run went on, 0 if it did before; and how many never did."""
        found, never = [], 0
        for run_id in self.affected:
            story = audit.stories[run_id]
            went_on = next((at for at in list(story.went_on) if at > self.begun), None)
            if went_on is not None:
                found.append(max(0.0, went_on - self.ended))
            elif story.live and not story.paused:
                never += 1
        return found, never


def past_lease(lease_s: float) -> float:
    """So long that the lease of a frozen holder has expired and another has claimed its run. Sweeps come five times per lease."""
    return lease_s * 1.4 + 0.8


def some_seconds(_lease_s: float) -> float:
    """Long enough that something is under way when the fault ends."""
    return 3.0


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which that share of the values lies (nearest rank); None without values."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values) - 1e-9) - 1)]


@dataclass(slots=True)
class Stage:
    """The hosts, the database, and the record."""

    hosts: list[Host]
    server: ChaosServer
    audit: Audit
    chance: random.Random
    lease_s: float
    folder: str
    wait: Callable[[float], None]  # for so many seconds; raises what has failed meanwhile
    around: Circumstances = field(default_factory=Circumstances)
    turn: Turn = field(default_factory=lambda: Turn(""))  # the present one

    @staticmethod
    def now() -> float:
        """The clock of the record."""
        return real_monotonic()

    def any_host(self) -> Host:
        """One of the hosts, by chance."""
        return self.chance.choice(self.hosts)

    def any_worker(self, host: Host) -> int:
        """A worker of it that holds a run, if there is one."""
        workers = host.workers()
        holders = {pid_of(story.owner) for story in self.audit.live() if story.owner}
        busy = [pid for pid in workers if pid in holders]
        if not workers:
            raise NoTurn(f"host {host.name} has no worker at the moment")
        return self.chance.choice(busy or workers)

    def strikes(self, pids: Collection[int] | None) -> None:
        """The fault begins now and hits these processes; None: all, because it hits the database."""
        self.turn.begun = real_monotonic()
        self.turn.pids = None if pids is None else frozenset(pids)
        held = [story for story in self.audit.live() if story.owner]
        self.turn.affected = {story.run_id for story in held if pids is None or pid_of(story.owner) in pids}

    @contextlib.contextmanager
    def suspended(self, pids: Collection[int], *, by_signal: bool = True) -> Iterator[None]:
        """SIGSTOP these processes for the length of the block. Without `by_signal` their host is cut off; that is only noted."""
        begun = real_monotonic()
        if by_signal:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                if by_signal:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
                self.around.suspensions.append(Suspension(pid, begun, real_monotonic()))

    def kill(self, pid: int) -> None:
        """SIGKILL a process."""
        self.around.dead.add(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def until(self, holds: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for a condition. False if it does not come true in time."""
        deadline = real_monotonic() + timeout_s
        while not holds():
            if real_monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One kind of fault. `start` gives it a turn; the context manager that `happens` returns ends it."""

    name: str
    what: str  # one line for people
    happens: Callable[[Stage], AbstractContextManager[None]]
    needs: frozenset[str] = frozenset()  # keys of `needs.NEEDS`
    kill: bool = False  # it has no end of its own: recovery counts from its beginning
    hold_min: Callable[[float], float] = lambda _lease_s: 0.0  # seconds that it lasts at least, from the lease
    hold_max: float = 60.0  # and at most, however much time there is

    def hold_s(self, lease_s: float, slot_s: float) -> float:
        """How many seconds it lasts when it has this much of the whole time."""
        return max(self.hold_min(lease_s), min(self.hold_max, 0.5 * slot_s))

    def start(self, stage: Stage) -> RunningFault:
        """Begin. NoTurn if there is nothing to act on."""
        stage.turn = Turn(self.name)
        block = self.happens(stage)
        block.__enter__()
        return RunningFault(self, stage.turn, block, stage.around)


@dataclass(slots=True)
class RunningFault:
    """A fault that has begun."""

    fault: Fault
    turn: Turn
    _block: AbstractContextManager[None]
    _around: Circumstances

    def stop(self) -> None:
        """End it, and note when."""
        self._block.__exit__(None, None, None)
        self._around.strikes.append(Strike(self.turn.pids, self.turn.begun, real_monotonic()))
        if not self.turn.ended:
            self.turn.ended = self.turn.begun if self.fault.kill else real_monotonic()

    def abort(self, exc: BaseException) -> None:
        """Undo what would keep processes from ending, and start nothing again: the nemesis itself ends."""
        with contextlib.suppress(type(exc)):
            self._block.__exit__(type(exc), exc, exc.__traceback__)
