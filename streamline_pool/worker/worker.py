"""One worker: claims runs for an engine, as many as it has room for, and reports its status.

Owns the tasks that claim, and the status. What to claim is decided by demand.py; claiming.py performs the
claims. Pipes, processes and signals are left to the supervisor: here are plain methods, called in the worker's event
loop, so a worker runs in a test as well as under a supervisor.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime

from streamline_pool.client.app import Streamline
from streamline_pool.config.env import Env
from streamline_pool.config.settings import Settings
from streamline_pool.domain.backoff import Backoff
from streamline_pool.domain.errors import StoreUnavailableError, WorkflowError
from streamline_pool.engine.engine import Engine
from streamline_pool.storage.store import AsyncStore

from .claiming import Claimer, Terms
from .demand import Claim, ClaimDue, ClaimFired, ClaimNamed, Demand
from .ended_runs import EndedRuns
from .gate import GateState
from .poller import Poller
from .status import WorkerStatus

__all__ = ["Worker", "WorkerStatus"]

log = logging.getLogger("streamline_pool")

_TIMER_CLAIMS = 3  # claims of runs with fired timers under way at once, so that one does not wait for another; a guess
_RETRY = Backoff(base_s=0.1, ceiling_s=1.0)  # claiming resumes within a second of the database's return
_STOP_MARGIN_S = 3.0  # beyond the handlers' grace, for releasing the runs
_RUNNING_SHOWN = 5  # active runs in a status


class Worker:
    """Claims and drives runs in the running event loop, until `drain` or `stop` is called."""

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
        self._notify = notify  # the status has changed, so a beat should be sent soon
        self._lanes = app.lanes(settings.queues)
        self._poller = Poller(self._lanes, index, total, self._env)
        self._demand = Demand(concurrency=settings.concurrency, max_crashes=settings.max_crashes)
        self._claims_wanted = asyncio.Event()
        self._timer_claims_wanted = asyncio.Event()
        self._engine: Engine | None = None
        self._stopped = False
        self._stop_grace_s: float | None = None
        self._parked: list[tuple[datetime, str]] = []
        self._ended_runs = EndedRuns()
        self._reported_idle = False
        self._runs_total = 0
        self._ops_ok = 0
        self._ops_failed = 0
        self._consecutive_failures = 0
        self._recycle: str | None = None

    # --- life ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until `drain` or `stop`, then release all runs and return."""
        store = self._app.store_async()
        engine = self._engine = self._app.make_engine(store, self, self._demand.suspect_from)
        terms = Terms(owner=self._owner, lanes=self._lanes, lease_s=self._settings.lease_s)
        claimer = Claimer(engine, self._poller, terms, self._env, store_answered=self.store_answered, retry_pause_s=self._retry_pause_s)
        engine.start()
        timer_claims = asyncio.gather(*(self._claim_fired_timers(engine, claimer) for _ in range(_TIMER_CLAIMS)))
        timer_claims.add_done_callback(self._timer_claims_ended)
        try:
            await self._connect(store)
            await engine.event_publisher.poll()  # a stream that was opened before this worker gets the events of its first run, too
            self._demand.start()
            self._notify()
            self._claims_wanted.set()
            while not self._draining and not timer_claims.done():
                await self._claims_wanted.wait()
                self._claims_wanted.clear()
                if not self._draining:
                    await self._claim_round(engine, claimer)
                    self._timer_claims_wanted.set()  # places that the round has not filled are free for them
                    self._report_idle()
            await timer_claims
            await self._release_runs(engine)
            await self._ended_runs.publish(store)
        finally:
            self._stopped = True
            timer_claims.cancel()
            await engine.close()

    def _timer_claims_ended(self, claims: asyncio.Future[list[None]]) -> None:
        self._claims_wanted.set()
        if not claims.cancelled():
            claims.exception()  # retrieved, because nothing awaits it when `run` is cancelled; else `run` raises it

    async def _connect(self, store: AsyncStore) -> None:
        failures = 0
        while not self._draining:
            try:
                await store.sync_clock()  # the indexes exist: the steward, or the client that started the runs, has made them
                return
            except StoreUnavailableError as exc:
                failures += 1
                self.store_answered(False)
                log.warning("store_unavailable", extra={"error": str(exc)})
                await self._env.async_sleep(_RETRY.delay_s(failures, self._env.random()))

    async def _release_runs(self, engine: Engine) -> None:
        if self._stop_grace_s is None:
            await engine.emptied()
            return
        try:
            await asyncio.wait_for(engine.emptied(), self._stop_grace_s + _STOP_MARGIN_S)
        except TimeoutError:
            log.warning("runs_left_to_expiry", extra={"runs": len(engine.active_runs)})

    # --- what the supervisor calls ---------------------------------------------------------------------------------

    def wake_up(self, run_id: str | None = None, *, overdue: bool = False) -> None:
        """There may be work: this run, or any run. `overdue`: a run that has been due for long."""
        if overdue:
            self._poller.forget()  # runs were released or recovered, and keep their old places in the queue
        self._demand.wake_up(run_id)
        self._claim_soon()

    def timers_fired(self, run_ids: Sequence[str]) -> None:
        """The timers of these runs have fired: they are claimed ahead of the backlog, even by a full worker."""
        self._demand.timers_fired(run_ids)
        self._timer_claims_wanted.set()
        self._claim_soon()

    def check_run(self, run_id: str) -> None:
        """This run may have been cancelled, paused or claimed by another worker: read it, and act on what is stored."""
        if self._engine is not None:
            self._engine.check(run_id)

    def set_gate(self, gate: GateState) -> None:
        """The circuit breaker allows this from now on. Active runs go on."""
        self._demand.set_gate(gate)
        self._claim_soon()

    def hold(self, held: bool) -> None:
        """Stop claiming (True), or claim again (False). Active runs go on."""
        self._demand.hold(held)
        self._claim_soon()
        self._notify()

    def serve_subscribers(self, subscribers: Iterable[tuple[str, float]]) -> None:
        """Publish events for these subscribers: (id, seconds for which it is served unless it is named again)."""
        if self._engine is not None:
            self._engine.event_publisher.serve_subscribers(subscribers)

    def reslot(self, index: int, total: int) -> None:
        """From now on this is worker `index` of the `total` workers of its host."""
        self._poller.reslot(index, total)

    def drain(self) -> None:
        """Finish the steps that are running, release the runs, return from `run`."""
        self._demand.drain()
        if self._engine is not None:
            self._engine.drain()
        self._claims_wanted.set()
        self._timer_claims_wanted.set()
        self._notify()

    def stop(self, grace_s: float) -> None:
        """Drain at once: abort signals fire, handlers have `grace_s` seconds, then their runs are released."""
        self._stop_grace_s = grace_s
        self.drain()
        if self._engine is not None:
            self._engine.stop(grace_s)

    # --- claiming --------------------------------------------------------------------------------------------------

    @property
    def _draining(self) -> bool:
        return self._demand.state == "draining"

    def _active_count(self) -> int:
        return 0 if self._engine is None else len(self._engine.active_runs)

    def _claim_soon(self) -> None:
        """Start a round of claims if one is wanted. Every input to the demand is followed by this."""
        if self._demand.wants_claim(self._active_count()):
            self._claims_wanted.set()

    async def _claim_round(self, engine: Engine, claimer: Claimer) -> None:
        """Claim as long as something is wanted and there is room."""
        try:
            if engine.store.clock.stale:
                await engine.store.sync_clock()
            while (claim := self._demand.next_claim(len(engine.active_runs))) is not None:
                await self._perform(claim, engine, claimer)
            self._demand.claims_succeeded()
        except WorkflowError as exc:
            self._claims_failed(engine, exc)

    async def _perform(self, claim: Claim, engine: Engine, claimer: Claimer) -> None:
        failed = True
        try:
            match claim:
                case ClaimNamed(run_ids=run_ids, crashes_below=crashes_below):
                    absent = await claimer.claim_named(run_ids, crashes_below)
                    self._announce_again(engine, self._demand.named_tried(run_ids, absent), self._announce)
                case ClaimDue():
                    await self._poll_and_claim(engine, claimer, claim)
            failed = False
        finally:
            self._demand.claim_ended(claim, engine.active_runs, suspect=engine.suspect, failed=failed)

    async def _poll_and_claim(self, engine: Engine, claimer: Claimer, claim: ClaimDue) -> None:
        if claim.from_start:
            self._poller.forget()
        rows, more = await self._poller.poll(engine.store, claim.limit, claim.crashes_below)
        self.store_answered(True)
        chosen = self._demand.choose(rows)
        if len(chosen.run_ids) < len(rows):
            self._poller.keep_in_sight(rows)  # a suspect is chosen alone
        try:
            won = await claimer.claim_runs(chosen.run_ids, crashes_below=chosen.crashes_below) if chosen.run_ids else 0
        except WorkflowError:
            self._poller.keep_in_sight(rows)
            raise
        tried = sum(not self._poller.skips(run_id) for run_id in chosen.run_ids)  # the next poll shows others in place of the skipped
        pause_s = self._demand.polled(more=more, tried=tried, won=won)
        if pause_s:
            engine.loop.call_later(pause_s, self._poll_again)
            await engine.store.sync_clock()  # a new primary's clock may be far behind what this host takes for the server's time

    def _poll_again(self) -> None:
        self._demand.poll_pause_over()
        self._claim_soon()

    async def _claim_fired_timers(self, engine: Engine, claimer: Claimer) -> None:
        """Claim runs whose timers have fired, beside the other claims, so that they do not wait for these."""
        while not self._draining:
            await self._timer_claims_wanted.wait()
            self._timer_claims_wanted.clear()
            while (claim := self._demand.next_timer_claim(engine.active_runs)) is not None:
                self._claim_soon()  # what has found no place is left to a poll
                await self._perform_fired(claim, engine, claimer)
                self._report_idle()
            self._claim_soon()
        self._timer_claims_wanted.set()  # ends the other tasks of this kind, too

    async def _perform_fired(self, claim: ClaimFired, engine: Engine, claimer: Claimer) -> None:
        run_ids = claim.batch.run_ids
        try:
            absent = await claimer.claim_named(run_ids, claim.crashes_below)
            self._announce_again(engine, self._demand.named_tried(run_ids, absent), lambda run_id: self.timers_fired([run_id]))
        except WorkflowError as exc:
            self._claims_failed(engine, exc)
        finally:
            self._demand.claim_ended(claim, engine.active_runs)
        self._claim_soon()  # announced runs may have found no place while places were promised to this claim

    def _announce_again(self, engine: Engine, pauses: Mapping[str, float], announce: Callable[[str], None]) -> None:
        for run_id, pause_s in pauses.items():
            engine.loop.call_later(pause_s, announce, run_id)

    def _announce(self, run_id: str) -> None:
        self._demand.wake_up(run_id)
        self._claim_soon()

    def _claims_failed(self, engine: Engine, exc: WorkflowError) -> None:
        # A claim of unknown outcome is forgotten: its leases are never renewed, and its runs are recovered when they expire.
        self.store_answered(False)
        log.warning("claim_failed", extra={"error": str(exc)})
        if self._demand.claims_failed():  # subscribers get one event for each outage
            engine.events.publish_error("scheduler:error", {"error": exc.message})
        engine.loop.call_later(self._retry_pause_s(), self._resume_claiming)

    def _resume_claiming(self) -> None:
        self._demand.pause_over()
        self._claim_soon()

    def _retry_pause_s(self) -> float:
        return _RETRY.delay_s(self._consecutive_failures, self._env.random())

    # --- what the engine calls (engine.ports.Observer) --------------------------------------------------------

    def on_parked(self, lane: str, wake_at: datetime, run_id: str) -> None:  # noqa: ARG002 (the steward knows all lanes of the pool)
        """See Observer."""
        self._parked.append((wake_at, run_id))
        self._notify()

    def on_finished(self, run_id: str, status: str) -> None:
        """See Observer."""
        self._runs_total += 1
        if status in ("done", "failed") and self._engine is not None:
            self._ended_runs.publish_soon(run_id, self._engine.store)
        if self._engine is None or run_id not in self._engine.active_runs.held:  # else it has been claimed again
            self._demand.run_finished(run_id)
        self._claim_soon()
        if self._demand.wants_timer_claim():
            self._timer_claims_wanted.set()
        if not self._active_count():
            self._notify()
        self._report_idle()

    def store_answered(self, ok: bool) -> None:
        """See Observer."""
        if ok:
            self._ops_ok += 1
            self._consecutive_failures = 0
        else:
            self._ops_failed += 1
            self._consecutive_failures += 1
            self._notify()

    def on_stuck(self, what: str) -> None:
        """See Observer. Threads cannot be stopped, so the whole worker is to be replaced."""
        log.error("handler_stuck", extra={"what": what})
        self._recycle = what
        self._notify()

    # --- reporting -------------------------------------------------------------------------------------------------

    def status(self) -> WorkerStatus:
        """The status now."""
        engine = self._engine
        active_runs = engine.active_runs.all() if engine is not None else []
        return WorkerStatus(
            state="stopped" if self._stopped else self._demand.state,
            idle=self._demand.is_idle(len(active_runs)),
            in_flight=len(active_runs),
            runs_total=self._runs_total,
            steps_total=engine.steps_total if engine is not None else 0,
            ops_ok=self._ops_ok,
            ops_failed=self._ops_failed,
            consecutive_failures=self._consecutive_failures,
            recycle=self._recycle,
            running=tuple((active.run_id, str(active.document["currentStepId"])) for active in active_runs[:_RUNNING_SHOWN]),
            kept=self._demand.is_kept,
            lru=engine.cache.counters() if engine is not None else {},
        )

    def take_parked(self) -> list[tuple[datetime, str]]:
        """Newly stored `wakeAt` times, as (wakeAt, run id). Each is returned once."""
        parked, self._parked = self._parked, []
        return parked

    def _report_idle(self) -> None:
        """Report a change between idle and not idle at once, because the supervisor wakes up idle workers."""
        idle = self._demand.is_idle(self._active_count())
        if idle != self._reported_idle:
            self._reported_idle = idle
            self._notify()
