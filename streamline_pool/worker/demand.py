"""What a worker wants to claim next. Owns every rule about that; the worker performs the claims.

A small state machine without event loop, clock or I/O. Each input says what happened. `next_claim` and
`next_timer_claim` answer what is to be claimed now. The number of active runs is passed in, because the engine owns it.

A run is claimed in one of three ways:
- by name, because a wake-up has announced it;
- by a poll, because there may be due runs that this worker has not seen (the backlog);
- by name and ahead of the backlog, because its timer has fired (`TimerClaims`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from .gate import GateState
from .timer_claims import Batch, TimerClaims

__all__ = ["Chosen", "Claim", "ClaimDue", "ClaimFired", "ClaimNamed", "Demand"]

_CLAIM_MAX = 200  # runs in one claim; measured: larger claims only make their first run wait
_NAMED_MAX = 1_000  # run ids kept while they cannot be claimed; beyond it a poll finds the others
_EXPECT_FIRST_S, _EXPECT_TRIES = 0.001, 9  # doubling: half a second in all; an insert that takes longer is announced again
_FRUITLESS_MAX = 2  # polls in a row whose runs could not be claimed: other workers may have been faster
_FRUITLESS_FIRST_S, _FRUITLESS_CEILING_S = 0.01, 1.0  # the pause after the next such poll, doubling; guesses


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimNamed:
    """Claim these announced runs."""

    run_ids: tuple[str, ...]
    crashes_below: int  # claim no run that has lost as many workers


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimDue:
    """Poll for due runs and claim what the poll finds."""

    limit: int  # runs
    crashes_below: int | None  # poll for no run that has lost as many workers; None: no limit
    from_start: bool  # poll from the beginning of the queue: the last poll has left out suspects


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimFired:
    """Claim these runs, whose timers have fired."""

    batch: Batch
    crashes_below: int  # claim no run that has lost as many workers


Claim = ClaimNamed | ClaimDue


class Chosen(NamedTuple):
    """Which of the runs that a poll has found are to be claimed."""

    run_ids: Sequence[str]
    crashes_below: int | None  # claim no run that has lost as many workers; None: no limit


class Demand:
    """What one worker wants to claim. Every claim that it gives out must be followed by `claim_ended`."""

    def __init__(self, *, concurrency: int, max_crashes: int) -> None:
        self.suspect_from = max(1, max_crashes - 1)
        """A run that has lost as many workers is a suspect: the next lost worker convicts it."""
        self._concurrency = concurrency
        self._phase: Literal["starting", "ready", "draining"] = "starting"
        self._held = False
        self._gate: GateState = "open"
        self._backlog = True  # there may be due runs that this worker has not seen
        self._named: deque[str] = deque()  # announced runs
        self._expected: dict[str, int] = {}  # announced runs that were not in the database yet -> tries so far
        self._timers = TimerClaims(concurrency)
        self._timers_left_to_poll = True  # a poll was asked for since the last timers fired, for those that find no place
        self._suspect: str | None = None  # the suspect that is being claimed, or is active: nothing else is claimed beside it
        self._others_turn = False  # a suspect has been active here, so the next poll is for other runs
        self._suspects_left_out = False  # a poll has left out suspects, and may have moved on beyond their places in the queue
        self._fruitless = 0  # polls in a row that found runs of which none could be claimed
        self._poll_pausing = False  # the pause after such polls is not over
        self._claims_under_way = 0  # what they bring is neither active yet nor due any more
        self._failing = False  # a claim has failed since the last round of claims that succeeded
        self._pausing = False  # the pause after a failed claim is not over
        self._polls_turn = False  # a round of claims has begun, so the backlog comes before further announced runs

    # --- what is to be claimed -------------------------------------------------------------------------------------

    def next_claim(self, active_runs: int) -> Claim | None:
        """The next claim, or None."""
        room = min(self.room(active_runs), _CLAIM_MAX)
        claim: Claim | None = None
        if room and self._named and not (self._may_poll and self._polls_turn):
            claim = self._claim_named(room)
        elif room and self._may_poll:
            claim = self._claim_due(room)
        # Within a round of claims, announced runs come first. Then polls go on until the backlog or the room ends.
        self._polls_turn = claim is not None
        self._claims_under_way += claim is not None
        return claim

    @property
    def _may_poll(self) -> bool:
        return self._backlog and not self._poll_pausing

    def _claim_named(self, room: int) -> ClaimNamed:
        run_ids = tuple(self._named.popleft() for _ in range(min(room, len(self._named))))
        # Suspects are left to the poll, which sees how many workers a run has lost before it is claimed.
        return ClaimNamed(run_ids=run_ids, crashes_below=self.suspect_from)

    def _claim_due(self, room: int) -> ClaimDue:
        # Before the poll: a wake-up that comes during it may announce a run that it has just missed.
        self._backlog = self._others_turn  # the turn of the suspects comes with the next poll
        if self._others_turn:
            self._others_turn, self._suspects_left_out = False, True
            return ClaimDue(limit=room, crashes_below=self.suspect_from, from_start=False)
        from_start, self._suspects_left_out = self._suspects_left_out, False
        return ClaimDue(limit=room, crashes_below=None, from_start=from_start)

    def choose(self, rows: Sequence[Mapping[str, Any]]) -> Chosen:
        """Which of the found runs `{_id, crashes}` are to be claimed: all of them, or the first suspect alone."""
        counts = [(row["_id"], row.get("crashes")) for row in rows]
        suspects = [run_id for run_id, crashes in counts if isinstance(crashes, int) and crashes >= self.suspect_from]
        if suspects:
            self._suspect = suspects[0]
            self._backlog = True  # for the others, once the suspect has ended or another worker has claimed it
            return Chosen(suspects[:1], None)
        # Another program may have written something else than a number, which no limit matches.
        countable = all(isinstance(crashes, int) and not isinstance(crashes, bool) for _, crashes in counts)
        return Chosen([run_id for run_id, _ in counts], self.suspect_from if countable else None)

    def next_timer_claim(self, active_runs: Collection[str]) -> ClaimFired | None:
        """The next claim of runs whose timers have fired, or None if no place is free for them. `active_runs`: their ids.

        Runs that find no place stay here. A poll may find them as well.
        """
        if not self._timers or self._phase == "draining" or self._suspect is not None:
            return None
        if self.state != "ready" or self._gate != "open" or self._pausing:
            self._timers.clear()  # once claims are allowed again, or the pause after a failure is over, a poll comes first
            self._backlog = True
            return None
        # Places that are free to all belong to the backlog, if there is one, or to the claim that is under way.
        spare = 0 if self._backlog or self._claims_under_way else self.room(len(active_runs))
        batch = self._timers.take(spare, active_runs)
        if self._timers and not self._timers_left_to_poll:
            # Once: while a claim of other timers got no answer, this was asked after every poll, and the worker polled without a pause.
            self._timers_left_to_poll = self._backlog = True
        if not batch.run_ids:
            return None
        self._claims_under_way += 1
        # Never a suspect: a claim beside this one may bring another suspect, and neither claim sees what the other brings.
        return ClaimFired(batch=batch, crashes_below=self.suspect_from)

    def wants_claim(self, active_runs: int) -> bool:
        """Whether `next_claim` should be asked now. False during the pause after a failed claim."""
        return bool(self._may_poll or self._named) and not self._pausing and self.room(active_runs) > 0

    def wants_timer_claim(self) -> bool:
        """Whether `next_timer_claim` should be asked now."""
        return bool(self._timers)

    def room(self, active_runs: int) -> int:
        """How many runs may be claimed now, in places that are free to all."""
        if self.state != "ready" or self._gate == "closed" or self._suspect is not None:
            return 0
        return max(0, self._concurrency - self._timers.places_taken(active_runs))

    def is_idle(self, active_runs: int) -> bool:
        """Whether there is room, and nothing that this worker knows of to fill it with."""
        return not (self._claims_under_way or self._backlog or self._named or self._timers) and self.room(active_runs) > 0

    @property
    def is_kept(self) -> bool:
        """Whether nothing is claimed until a suspect has run alone."""
        return self._suspect is not None

    @property
    def state(self) -> Literal["starting", "ready", "holding", "draining"]:
        """Whether this worker claims; `holding`: the operator has stopped it."""
        return "holding" if self._held and self._phase == "ready" else self._phase

    # --- what happened: work was announced -------------------------------------------------------------------------

    def wake_up(self, run_id: str | None) -> None:
        """There may be work: this run, or any run (None)."""
        if run_id is None or len(self._named) >= _NAMED_MAX:
            self._backlog = True
        else:
            self._named.append(run_id)
        self._pausing = False

    def timers_fired(self, run_ids: Sequence[str]) -> None:
        """The timers of these runs have fired."""
        self._timers_left_to_poll = False
        if not self._timers.add(run_ids):
            self._backlog = True

    # --- what happened: a claim was performed ----------------------------------------------------------------------

    def polled(self, *, more: bool, tried: int, won: int) -> float:
        """The poll of a `ClaimDue` was answered, and the claim of what was chosen. `more`: it may have missed due runs.

        Yields the seconds after which the caller must call `poll_pause_over`: the host may take runs for due that the server
        does not, and would find them again at once. 0: no pause.
        """
        self._backlog = self._backlog or more
        self._fruitless = self._fruitless + 1 if tried and not won else 0
        if not self._backlog or self._fruitless <= _FRUITLESS_MAX:
            return 0.0
        self._poll_pausing = True
        return min(_FRUITLESS_FIRST_S * 2.0 ** min(self._fruitless - _FRUITLESS_MAX - 1, 10), _FRUITLESS_CEILING_S)

    def poll_pause_over(self) -> None:
        """The pause after polls whose runs could not be claimed is over."""
        self._poll_pausing = False

    def named_tried(self, run_ids: Iterable[str], absent: Collection[str]) -> dict[str, float]:
        """A claim by name was answered. `absent`: those of its runs that were not claimed, are not held, and have not ended.

        Yields the runs that are to be announced here again, each after so many seconds: a wake-up may arrive before the
        insert that it announces.
        """
        distinct = dict.fromkeys(run_ids)
        if absent and len(distinct) > 1:
            self._backlog = True  # there may be suspects among them, which only a poll may claim
        pauses: dict[str, float] = {}
        for run_id in distinct:
            tries = self._expected.pop(run_id, 0)
            if run_id not in absent:
                continue
            if tries >= _EXPECT_TRIES:
                self._backlog = True
            else:
                self._expected[run_id] = tries + 1
                pauses[run_id] = _EXPECT_FIRST_S * 2.0**tries
        while len(self._expected) > _NAMED_MAX:  # their announcements were dropped for lack of space, or for a hold
            del self._expected[next(iter(self._expected))]
        return pauses

    def claim_ended(
        self, claim: Claim | ClaimFired, active_runs: Collection[str], *, suspect: str | None = None, failed: bool = False
    ) -> None:
        """A claim is over, and what it has brought is active. `active_runs`: the ids of all active runs.

        `suspect`: the one that has to run alone. It may be another one than the poll has found: that one may have been rewound
        before its claim, and an earlier execution of the claimed run may have ended meanwhile.
        """
        self._claims_under_way -= 1
        if isinstance(claim, ClaimDue):
            self._suspect = suspect
        if isinstance(claim, ClaimDue) and failed:
            self._suspects_left_out = self._suspects_left_out or claim.from_start
        if isinstance(claim, ClaimFired):
            self._timers.claimed(claim.batch, active_runs)
        elif isinstance(claim, ClaimDue) and self._gate == "one" and not failed:
            self._gate = "closed"  # the one batch is over; the circuit breaker decides what comes next

    def claims_failed(self) -> bool:
        """The database did not answer. True: this is the first failure since the last success. The worker pauses next.

        Claims of unknown outcome are forgotten, so that a poll must find what could not be claimed.
        """
        first = not self._failing
        self._failing = self._backlog = self._pausing = True
        self._polls_turn = False
        self._expected.clear()
        return first

    def claims_succeeded(self) -> None:
        """A round of claims ended without a failure."""
        self._failing = self._pausing = False

    def pause_over(self) -> None:
        """The pause after a failed claim is over."""
        self._pausing = False

    def run_finished(self, run_id: str) -> None:
        """A run is not active any more."""
        self._timers.finished(run_id)
        self._pausing = False
        if run_id == self._suspect:
            self._suspect = None
            self._backlog = self._others_turn = True  # runs wait since the suspect was claimed; they and suspects take turns

    # --- what happened: claiming was allowed or forbidden ----------------------------------------------------------

    def start(self) -> None:
        """The worker has reached the database, and may claim."""
        if self._phase == "starting":
            self._phase = "ready"

    def set_gate(self, gate: GateState) -> None:
        """The circuit breaker allows this from now on."""
        self._gate = gate
        if gate != "closed":
            self._backlog = True
            self._pausing = False

    def hold(self, held: bool) -> None:
        """The operator stops claiming (True), or allows it again (False)."""
        self._held = held
        self._backlog = True
        self._pausing = False

    def drain(self) -> None:
        """Nothing is claimed any more."""
        self._phase = "draining"
