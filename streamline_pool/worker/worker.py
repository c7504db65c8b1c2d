"""One worker: claims runs for an engine, as many as it has room for, and says how it fares.

Owns when and what is claimed. Pipes, processes and signals are the supervisor's business: here are plain methods,
called in the worker's event loop, so a worker runs as well inside a test as under a supervisor.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from streamline_pool.client.app import Streamline
from streamline_pool.config.env import Env
from streamline_pool.config.settings import Settings
from streamline_pool.domain.errors import StoreUnavailableError, ValidationError, WorkflowError
from streamline_pool.engine.engine import Engine
from streamline_pool.protocol import claims, signals
from streamline_pool.storage.bulk_update import update_many
from streamline_pool.storage.store import AsyncStore

from .gate import GateState
from .poller import Poller
from .timer_claims import TimerClaims

__all__ = ["Worker", "WorkerStatus"]

log = logging.getLogger("streamline_pool")

_CLAIM_MAX = 200  # runs in one claim; measured: larger ones only make the first of them wait
_TIMER_CLAIMS = 3  # claims of such runs under way at once, so that one does not wait for another to be answered; a guess
_NAMED_MAX = 1_000  # names of runs kept while a claim is under way; beyond it a plain look finds them
_EXPECT_FIRST_S, _EXPECT_TRIES = 0.001, 9  # doubling: half a second in all; an insert that takes longer is announced again
_RETRY_MAX_S = 1.0  # so that claiming resumes within moments of the database's return
_STOP_MARGIN_S = 3.0  # beyond the handlers' grace, for giving the runs back


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """How a worker fares; counters are cumulative."""

    state: str  # "starting" | "ready" | "holding" | "draining" | "stopped"
    idle: bool  # it has room, and found nothing when it last looked
    in_flight: int
    runs_total: int  # runs that are through with this worker
    steps_total: int  # handlers entered
    ops_ok: int  # commands answered by the database
    ops_failed: int
    consecutive_failures: int  # since the last answer
    recycle: str | None  # why this worker should be replaced; None: no reason
    running: tuple[tuple[str, str], ...]  # up to five (run id, step id) in flight
    lru: Mapping[str, int] = field(default_factory=dict)  # counters of the run cache


class Worker:
    """Claims and drives runs in the running event loop until told to leave."""

    def __init__(
        self,
        app: Streamline,
        settings: Settings,
        *,
        owner: str,
        index: int,
        total: int,
        env: Env | None = None,
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        self._app = app
        self._settings = settings
        self._env = env or app.env
        self._owner = owner
        self._notify = notify  # "my status has changed": a beat should go out soon
        self._lanes = app.lanes(settings.queues)
        self._lane_set = frozenset(self._lanes)
        self._suspect_from = max(1, settings.max_crashes - 1)  # crashes after which the next lost worker convicts
        self._state = "starting"
        self._gate: GateState = "open"
        self._held = False
        self._leaving = False
        self._backlog = True  # there may be due runs that this worker has not seen
        self._claims_fail = False  # since the last one that did not
        self._claims_under_way = 0  # claims under way: what they bring is neither in flight yet nor due any more
        self._suspects_left = False  # a look has passed some over, because one was in flight
        self._named: deque[str] = deque(maxlen=_NAMED_MAX)
        self._expected: dict[str, int] = {}  # runs that were announced and are not there yet -> tries so far
        self._wanted = asyncio.Event()
        self._timer_claims = TimerClaims(settings.concurrency)
        self._parked: list[tuple[str, datetime, str]] = []
        self._ended: list[str] = []
        self._publishing: asyncio.Task[None] | None = None
        self._runs_total = 0
        self._ops_ok = 0
        self._ops_failed = 0
        self._consecutive_failures = 0
        self._recycle: str | None = None
        self._was_idle = False
        self._engine: Engine | None = None
        self._stop_grace_s: float | None = None
        self._poller = Poller(self._lanes, index, total, self._env)

    # --- life ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until `drain` or `stop`, then give everything back and return."""
        store = self._app.store_async()
        engine = self._engine = self._app.make_engine(store, self)
        engine.start()
        timer_claims = asyncio.gather(*(self._serve_timers(store, engine) for _ in range(_TIMER_CLAIMS)))
        timer_claims.add_done_callback(lambda done: self._wanted.set())
        try:
            await self._connect(store)
            await engine.broadcast.poll()  # a stream that was opened before this worker is to see its first run, too
            self._state = "ready"
            self._notify()
            self._wanted.set()
            while not self._leaving and not timer_claims.done():
                await self._wanted.wait()
                self._wanted.clear()
                if not self._leaving:
                    self._claims_under_way += 1
                    await self._claim_round(store, engine)
                    self._claims_under_way -= 1
                    self._timer_claims.wanted.set()
                    self._report_idle()
            await timer_claims
            await self._release_runs(engine)
            await self._publish_ended(store)
        finally:
            self._state = "stopped"
            timer_claims.cancel()
            await engine.close()

    async def _connect(self, store: AsyncStore) -> None:
        failures = 0
        while not self._leaving:
            try:
                await store.sync_clock()  # the steward, or whoever starts runs, has made the indexes
                return
            except StoreUnavailableError as exc:
                failures += 1
                self.store_answered(False)
                log.warning("store_unavailable", extra={"error": str(exc)})
                await self._env.async_sleep(min(0.1 * 2.0 ** min(failures, 10), _RETRY_MAX_S) * (0.5 + self._env.random() / 2))

    async def _release_runs(self, engine: Engine) -> None:
        if self._stop_grace_s is None:
            await engine.emptied()
            return
        try:
            await asyncio.wait_for(engine.emptied(), self._stop_grace_s + _STOP_MARGIN_S)
        except TimeoutError:
            log.warning("runs_left_to_expiry", extra={"runs": len(engine.active_runs)})

    # --- orders ----------------------------------------------------------------------------------------------------

    def wake_up(self, lane: str | None = None, run_id: str | None = None) -> None:
        """There may be work: this run, or something in this lane, or anything at all."""
        if lane is not None and lane not in self._lane_set:
            return
        note = None if run_id is None or self._engine is None else self._engine.cache.get(run_id)
        if note is not None and note.in_flight:
            return
        if lane is None:
            self._poller.forget()  # runs were given back or recovered, and keep their old places in the queue
        if run_id is None or len(self._named) >= _NAMED_MAX:
            self._backlog = True
        else:
            self._named.append(run_id)
        self._wanted.set()

    def timers_fired(self, run_ids: Sequence[str]) -> None:
        """The instants of these runs have come: they are claimed ahead of what is due since longer, even by a full worker."""
        if not self._timer_claims.add(run_ids):
            self._leave_to_poll()

    def check_run(self, run_id: str, reason: str) -> None:
        """Somebody says that this run was cancelled (or paused): look at the database, and act on what it says."""
        if self._engine is not None:
            self._engine.check(run_id)

    def set_gate(self, gate: GateState) -> None:
        """The circuit breaker's word on claiming; runs in flight go on."""
        self._gate = gate
        if gate != "closed":
            self._backlog = True
            self._wanted.set()

    def hold(self, held: bool) -> None:
        """Stop claiming (True), or claim again (False)."""
        self._held = held
        if self._state in ("ready", "holding"):
            self._state = "holding" if held else "ready"
        self._backlog = True
        self._wanted.set()
        self._notify()

    def serve_subscribers(self, subscribers: Iterable[tuple[str, float]]) -> None:
        """Publish events for those who stream: their ids, each with the seconds for which it is served unless said again."""
        if self._engine is not None:
            self._engine.broadcast.serve_subscribers(subscribers)

    def reslot(self, index: int, total: int) -> None:
        """This worker's place among the workers of its host has changed."""
        self._poller.reslot(index, total)

    def drain(self) -> None:
        """Finish the steps in flight, give the runs back, return from `run`."""
        self._leaving = True
        self._state = "draining"
        if self._engine is not None:
            self._engine.drain()
        self._wanted.set()
        self._timer_claims.wanted.set()
        self._notify()

    def stop(self, grace_s: float) -> None:
        """Drain at once: signals fire, handlers have `grace_s` seconds, then their runs are given back."""
        self._stop_grace_s = grace_s
        self.drain()
        if self._engine is not None:
            self._engine.stop(grace_s)

    # --- claiming --------------------------------------------------------------------------------------------------

    def _room(self) -> int:
        """How many runs may be claimed now."""
        if self._engine is None or self._leaving or self._held or self._gate == "closed":
            return 0
        return max(0, self._settings.concurrency - self._timer_claims.places_taken(len(self._engine.active_runs)))

    async def _claim_round(self, store: AsyncStore, engine: Engine) -> None:
        """Claim what there is room for: runs that were named first, then whatever is due."""
        try:
            if store.clock.stale:
                await store.sync_clock()
            if self._named and self._room():
                await self._claim_named(store, engine)
            while self._backlog and (room := self._room()):
                await self._claim_due(store, engine, min(room, _CLAIM_MAX))
                if self._gate == "one":
                    self._gate = "closed"  # one batch was let through; the breaker says what comes next
            self._claims_fail = False
        except WorkflowError as exc:
            self._claim_failed(engine, exc)

    def _claim_failed(self, engine: Engine, exc: WorkflowError) -> None:
        # A claim of unknown outcome is forgotten: it is never renewed, and recovered when it expires.
        self.store_answered(False)
        log.warning("claim_failed", extra={"error": str(exc)})
        if not self._claims_fail:  # once for each outage, as far as subscribers are concerned
            engine.publish_error("scheduler:error", {"error": exc.message})
        self._claims_fail = self._backlog = True
        engine.loop.call_later(self._retry_pause_s(), self._wanted.set)

    def _retry_pause_s(self) -> float:
        ceiling = min(0.1 * 2.0 ** min(self._consecutive_failures, 10), _RETRY_MAX_S)  # 2**1100, after hours, is no float
        return ceiling * (0.5 + self._env.random() / 2)

    async def _claim_named(self, store: AsyncStore, engine: Engine) -> None:
        room = self._room()
        run_ids = [self._named.popleft() for _ in range(min(room, _CLAIM_MAX, len(self._named)))]
        if self._named:
            self._wanted.set()
        crashes_below = self._suspect_from if self._holds_suspect(engine) else None
        await self._claim_by_name(store, engine, run_ids, crashes_below, self._add_named)

    async def _claim_by_name(
        self, store: AsyncStore, engine: Engine, run_ids: Sequence[str], crashes_below: int | None, again: Callable[[str], None]
    ) -> None:
        if len(run_ids) > 1:
            # Suspects are left to the look for what is due, which sees them: they are claimed one at a time.
            if await self._claim(store, engine, run_ids, self._lanes, self._suspect_from) < len(run_ids):
                await self._expect(store, engine, run_ids, again)
            return
        lease_id, deadline = self._env.new_id(), engine.leases.deadline()
        self._env.probe("claim.before")
        claim = claims.claim_run(run_ids[0], self._lanes, lease_id, self._owner, self._settings.lease_s, crashes_below)
        try:
            document = await store.run(claim)
        except ValidationError:  # the server refuses to update it: claimed among others, it is dealt with
            await self._claim(store, engine, run_ids, self._lanes, crashes_below)
            return
        self._env.probe("claim.after")
        self.store_answered(True)
        if document is None:
            await self._expect(store, engine, run_ids, again)
        else:
            engine.admit(document, deadline)

    async def _expect(self, store: AsyncStore, engine: Engine, run_ids: Sequence[str], again: Callable[[str], None]) -> None:
        """A ring may come before the insert that it announces: a run that is not there yet, or was not, is tried again in a moment."""
        taken = {row["_id"] for row in await store.run(claims.taken_runs(run_ids))}
        if len(run_ids) > 1 and len(taken) < len(run_ids):
            self._leave_to_poll()  # suspects among them
        for run_id in run_ids:
            tries = self._expected.pop(run_id, 0)
            if run_id not in taken and tries >= _EXPECT_TRIES:
                self._leave_to_poll()
            elif run_id not in taken:
                self._expected[run_id] = tries + 1
                engine.loop.call_later(_EXPECT_FIRST_S * 2.0**tries, again, run_id)

    def _add_named(self, run_id: str) -> None:
        self._named.append(run_id)
        self._wanted.set()

    # --- runs whose timers have ended ------------------------------------------------------------------------------

    async def _serve_timers(self, store: AsyncStore, engine: Engine) -> None:
        """Claim runs whose instants have come, beside the other claims, so that they wait for none of these."""
        while not self._leaving:
            await self._timer_claims.wanted.wait()
            self._timer_claims.wanted.clear()
            while self._timer_claims and not self._leaving and await self._claim_fired(store, engine):
                pass
        self._timer_claims.wanted.set()  # the other servers are to leave, too

    async def _claim_fired(self, store: AsyncStore, engine: Engine) -> bool:
        """One claim; False if there is no place for any. What finds none stays, and may be found by a look as well."""
        if self._state != "ready" or self._gate != "open":
            self._timer_claims.clear()  # when claiming is allowed again, a look comes first
            self._leave_to_poll()
            return False
        # What is free belongs to the backlog, if there is one, or to the claim that is under way.
        batch = self._timer_claims.take(0 if self._backlog or self._claims_under_way else self._room(), engine.active_runs)
        if self._timer_claims:
            self._leave_to_poll()
        if not batch.run_ids:
            return False
        self._claims_under_way += 1
        try:
            # Never a suspect: claims beside this one may bring another, and neither sees what the other is about to have.
            await self._claim_by_name(store, engine, batch.run_ids, self._suspect_from, lambda run_id: self.timers_fired([run_id]))
        except WorkflowError as exc:
            self._claim_failed(engine, exc)
        self._claims_under_way -= 1
        self._timer_claims.claimed(batch, engine.active_runs)
        if self._backlog or self._named:
            self._wanted.set()  # they may have found no place, while those were promised to this claim
        self._report_idle()
        return True

    def _leave_to_poll(self) -> None:
        if not self._backlog:  # else a look will follow anyway: when there is room, or when the pause after a failure is over
            self._backlog = True
            self._wanted.set()

    async def _claim_due(self, store: AsyncStore, engine: Engine, limit: int) -> None:
        """One look; claims what it finds."""
        self._backlog = False  # before the look: a ring that comes during it may be for a run that it has just missed
        crashes_below = self._suspect_from if self._holds_suspect(engine) else None
        rows, more = await self._poller.poll(store, limit, crashes_below)
        found = self._one_suspect_at_most(rows)
        self._suspects_left = self._suspects_left or crashes_below is not None or len(found) < len(rows)
        self.store_answered(True)
        if more:
            self._backlog = True
        if found:
            await self._claim(store, engine, found)

    def _holds_suspect(self, engine: Engine) -> bool:
        return any(active.document["crashes"] >= self._suspect_from for active in engine.active_runs.values())

    def _one_suspect_at_most(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Runs that lost workers before share a worker with none of their like, so that the last death convicts one run."""
        chosen: list[str] = []
        suspects = 0
        for row in rows:
            crashes = row.get("crashes")
            suspects += isinstance(crashes, int) and crashes >= self._suspect_from
            if suspects <= 1 or not (isinstance(crashes, int) and crashes >= self._suspect_from):
                chosen.append(row["_id"])
        return chosen

    async def _claim(
        self,
        store: AsyncStore,
        engine: Engine,
        run_ids: Sequence[str],
        lanes: Sequence[str] | None = None,
        crashes_below: int | None = None,
    ) -> int:
        lease_id, deadline = self._env.new_id(), engine.leases.deadline()
        self._env.probe("claim.before")
        claim = claims.claim_runs(run_ids, lanes, lease_id, self._owner, self._settings.lease_s, crashes_below)
        won, refused = await update_many(store.run, claim, store.now)
        self._poller.skip_for_now(refused)
        self._env.probe("claim.after")
        documents = await self._read_back(store, run_ids, lease_id, deadline) if won else []
        for document in documents:
            engine.admit(document, deadline)
        return len(documents)

    async def _read_back(self, store: AsyncStore, run_ids: Sequence[str], lease_id: str, deadline: float) -> list[dict[str, Any]]:
        """What was won. Repeated while the leases last: given up, these runs would wait for their end, as if a worker had died."""
        while True:
            try:
                documents: list[dict[str, Any]] = await store.run(claims.read_claimed(run_ids, lease_id))
            except StoreUnavailableError:
                if self._env.clock.monotonic() > deadline:
                    raise
                self.store_answered(False)
                await self._env.async_sleep(self._retry_pause_s())
                continue
            self.store_answered(True)
            return documents

    def _report_idle(self) -> None:
        idle = self._is_idle()
        if idle != self._was_idle:
            self._was_idle = idle
            self._notify()

    def _is_idle(self) -> bool:
        return not self._claims_under_way and not self._backlog and not self._named and not self._timer_claims and self._room() > 0

    # --- what the engine tells (engine.Observer) -------------------------------------------------------------------

    def on_parked(self, lane: str, wake_at: datetime, run_id: str) -> None:
        """See engine.Observer."""
        self._parked.append((lane, wake_at, run_id))
        self._notify()

    def on_finished(self, run_id: str, status: str) -> None:
        """See engine.Observer."""
        self._runs_total += 1
        self._timer_claims.finished(run_id)
        if status in ("done", "failed"):
            self._ended.append(run_id)
            if self._publishing is None and self._engine is not None:
                self._publishing = self._engine.loop.create_task(self._publish_ended(self._engine.store))
        if self._suspects_left:
            self._backlog, self._suspects_left = True, False  # the one in flight may have been this
            self._poller.forget()
        if self._backlog or self._named:
            self._wanted.set()
        if self._engine is not None and not self._engine.active_runs:
            self._notify()
        self._report_idle()

    async def _publish_ended(self, store: AsyncStore) -> None:
        """Wake those who wait for runs to end; everything that ends meanwhile goes into the next signal."""
        try:
            while self._ended:
                run_ids, self._ended = self._ended, []
                try:
                    await store.run(signals.send_signal("ended", store.now(), runs=run_ids))
                except WorkflowError:
                    return  # a hint; those who wait look by themselves
        finally:
            self._publishing = None

    def store_answered(self, ok: bool) -> None:
        """See engine.Observer."""
        if ok:
            self._ops_ok += 1
            self._consecutive_failures = 0
        else:
            self._ops_failed += 1
            self._consecutive_failures += 1
            self._notify()

    def on_stuck(self, what: str) -> None:
        """See engine.Observer. Threads cannot be stopped, so the whole worker is to be replaced."""
        log.error("handler_stuck", extra={"what": what})
        self._recycle = what
        self._notify()

    # --- reporting -------------------------------------------------------------------------------------------------

    def status(self) -> WorkerStatus:
        """How this worker fares now."""
        engine = self._engine
        active_runs = list(engine.active_runs.values()) if engine is not None else []
        return WorkerStatus(
            state=self._state,
            idle=self._is_idle(),
            in_flight=len(active_runs),
            runs_total=self._runs_total,
            steps_total=engine.steps_total if engine is not None else 0,
            ops_ok=self._ops_ok,
            ops_failed=self._ops_failed,
            consecutive_failures=self._consecutive_failures,
            recycle=self._recycle,
            running=tuple((active.run_id, str(active.document["currentStepId"])) for active in active_runs[:5]),
            lru=engine.cache.counters() if engine is not None else {},
        )

    def take_parked(self) -> list[tuple[str, datetime, str]]:
        """Instants newly stored as `wakeAt`, with lane and run id; each is told once."""
        on_parked, self._parked = self._parked, []
        return on_parked
