"""The steward process: the database duties of one host that are nobody else's job.

It tails the signals, keeps the timers of runs that become due, sweeps for what neither told, takes leases back from
the dead, probes while the breaker is open, keeps the host record and serves the health port. It holds no run and
decides nothing about workers: it tells the supervisor, who does. An idle steward sends the database some 25 commands
a minute, however many workers there are.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar, assert_never

from streamline_pool.client.event_delivery import finishing_broadcasts
from streamline_pool.config.env import Env
from streamline_pool.config.settings import Settings
from streamline_pool.domain.errors import StoreUnavailableError, WorkflowError
from streamline_pool.protocol import claims, hosts, recovery, run_lifecycle, signals
from streamline_pool.protocol.operations import Command, Op
from streamline_pool.storage.bulk_update import update_many
from streamline_pool.supervisor.ipc.channel import Channel, arm_orphan_exit
from streamline_pool.supervisor.ipc.messages import (
    BOOT_FAILED_EXIT,
    STORE_UNREACHABLE_EXIT,
    TO_STEWARD,
    BootFailed,
    CheckDue,
    Circuit,
    CircuitState,
    Close,
    Died,
    DueCount,
    FromSteward,
    Parked,
    PoolFacts,
    Probe,
    Released,
    RunChanged,
    StewardBeat,
    SubscribersServed,
    TimersFired,
    ToSteward,
    WorkDue,
)
from streamline_pool.supervisor.steward.health import HOST as HEALTH_HOST
from streamline_pool.supervisor.steward.health import start_health_server
from streamline_pool.supervisor.steward.host_record import host_record, shape
from streamline_pool.supervisor.steward.stream_subscribers import LISTENER_SIGNALS, StreamSubscribers
from streamline_pool.supervisor.steward.timers import Timers

if TYPE_CHECKING:
    from streamline_pool.client.app import Streamline

__all__ = ["StewardBoot", "run_steward"]

log = logging.getLogger("streamline_pool")

T = TypeVar("T")

RETRY_MAX_S = 1.0  # between tries while the database is away, so that work resumes within 3 s of its return
TAIL_RETRY_MAX_S = 30.0
PROBE_TIMEOUT_S = 2.0  # a guess: a database that takes longer for a ping is not one to claim from
PROBE_PAUSE_S = 0.5
READ_TIMEOUT_S = 5.0  # a guess; the first of these to pass in an idle pool is how a frozen server is noticed
WRITE_TIMEOUT_S = 15.0  # taking back ten thousand leases takes a while
TIMER_MARGIN_S = 0.002  # `wakeAt` is judged in whole milliseconds by the server; a ring too early finds nothing
ALARM_PAUSE_S = 0.005  # between alarms: runs whose instants come so close together are claimed together
ALARM_MAX = 200  # names in one; a worker claims no more at once
STARTS_NOW = timedelta(
    seconds=0.1
)  # a guess, well above the clock errors of hosts: a start for "now" whose host is ahead of ours is no timer
HOST_INTERVAL_S = 30.0
HOST_TTL_S = 90.0  # three intervals: two writes may fail before a live host is forgotten
HOST_CHANGE_PAUSE_S = 5.0  # a changed pool is shown at most this often
RELEASE_LOOK_BACK = timedelta(seconds=60)  # a dead worker's leases that ended earlier are found by the sweep
OVERDUE = timedelta(seconds=3)  # within what a worker looks back, see lookout.py
FULL_SWEEP_EVERY = 10  # sweeps; in between, only leases that ended since the last ones are looked for
BROADCASTS_EVERY = 5  # sweeps; senders finish what they began, unless they die in between
SWEEP_LIMIT = 1_000  # due runs looked at per sweep; more than the pool can have use for before the next
WAKE_PAUSE_S = 0.002  # rings for one lane are told at once, then together: a flood costs 500 messages a second
FACTS_FRESH_S = 5.0
HINT_BYTES_MAX = 64 * 1024
REMOVE_TIMEOUT_S = 1.0  # the host record expires by itself; leaving is not delayed for it
SIGNAL_KINDS = ("due", "cancel", *LISTENER_SIGNALS)


@dataclass(frozen=True, slots=True, kw_only=True)
class StewardBoot:
    """What the steward is told at birth."""

    host_id: str  # "host:pid:nonce" of the supervisor
    host: str
    pid: int  # of the supervisor
    first: bool  # the pool is starting: report a missing database instead of waiting for it


def run_steward(app: Streamline, settings: Settings, env: Env, boot: StewardBoot, sock: socket.socket) -> int:
    """The main function of the steward process; its exit code."""
    return asyncio.Runner().run(_main(app, settings, env, boot, sock))  # as in worker_main: nothing may delay the exit


async def _main(app: Streamline, settings: Settings, env: Env, boot: StewardBoot, sock: socket.socket) -> int:
    steward = _Steward(app, settings, env, boot, sock)
    beats, closing = asyncio.create_task(steward.beat_forever()), asyncio.create_task(steward.closing.wait())
    starting = asyncio.create_task(steward.start())
    await asyncio.wait({beats, closing, starting}, return_when=asyncio.FIRST_COMPLETED)
    if starting.done() and (failed := starting.result()) is not None:
        steward.send(failed)
        return BOOT_FAILED_EXIT
    duties = [asyncio.create_task(duty()) for duty in steward.duties] if starting.done() else [starting]
    done, _ = await asyncio.wait({beats, closing, *duties}, return_when=asyncio.FIRST_COMPLETED)
    for task in (beats, *duties):
        task.cancel()
    await steward.leave()
    for task in done:
        task.result()  # a duty that failed ends the process with its traceback; the supervisor starts another
    return 0


class _Steward:
    """The duties and what they share. Each duty is a coroutine that never ends by itself."""

    def __init__(self, app: Streamline, settings: Settings, env: Env, boot: StewardBoot, sock: socket.socket) -> None:
        self.closing = asyncio.Event()
        self._store = app.store_async()
        self._listeners = StreamSubscribers(app, self._store, env, boot.host_id, self.send)
        self._listeners.broadcast.start()
        self.duties: Sequence[Callable[[], Coroutine[Any, Any, None]]] = (
            self._tail,
            self._sweep,
            self._release_dead,
            self._answer_checks,
            self._listeners.answer,
            self._probe_when_doubtful,
            self._keep_host_record,
        )
        self._app = app
        self._settings = settings
        self._env = env
        self._boot = boot
        self._loop = asyncio.get_running_loop()
        self._lanes = app.lanes(settings.queues)
        self._channel = Channel(sock, TO_STEWARD, self._on_message, self._orphaned)
        self._ready = False
        self._failing = False  # what is attempted again and again, at the last time
        self._health: asyncio.Server | None = None
        self._dead: asyncio.Queue[Died] = asyncio.Queue()  # bounded by the pool's restart budget
        self._checks: asyncio.Queue[int] = asyncio.Queue()  # one at a time, by the supervisor's rules
        self._facts: PoolFacts | None = None
        self._facts_at = 0.0
        self._pool_changed = asyncio.Event()
        self._circuit: CircuitState = "closed"
        self._doubtful = asyncio.Event()  # set: the database may be away, so probe it
        self._timers = Timers()
        self._sweeps = 0
        self._alarm: asyncio.TimerHandle | None = None
        self._alarmed_at = 0.0
        self._wakes: dict[str | None, tuple[str | None, int]] = {}  # lane -> (the run, if it is one; how many)
        self._woken_at = 0.0

    def send(self, message: FromSteward) -> None:
        self._channel.send(message)

    async def beat_forever(self) -> None:
        while True:
            if not self._channel.unsent_bytes:
                self.send(StewardBeat(ready=self._ready))
            await asyncio.sleep(self._settings.beat_interval_s)

    async def start(self) -> BootFailed | None:
        """Reach the database and make what the engine needs there. What is returned stops the pool."""
        if self._settings.health_port is not None:
            try:
                self._health = await start_health_server(self._settings.health_port, self._fresh_facts)
            except OSError as exc:
                error = f"health port {HEALTH_HOST}:{self._settings.health_port}: {exc.strerror}; choose a free one with --health-port"
                if self._boot.first:
                    return BootFailed(exit_code=78, message=error)
                log.error("health_port_taken", extra={"error": error})
        failures = 0
        while True:
            try:
                await self._store.run(run_lifecycle.server_info())
                facts = await self._store.facts()
                await self._store.ensure()
                # A tail of an empty capped collection ends at once, again and again; one signal prevents that.
                await self._store.run(signals.send_signal("host", self._store.now(), host=self._boot.host_id))
            except StoreUnavailableError as exc:
                if self._boot.first:
                    return BootFailed(exit_code=STORE_UNREACHABLE_EXIT, message=exc.message)
                failures += 1
                await self._pause(failures)
                continue
            except WorkflowError as exc:
                return BootFailed(exit_code=2, message=exc.message)
            self._ready = True
            self.send(StewardBeat(ready=True))
            log.info("server", extra={key: facts[key] for key in ("version", "topology", "database")})
            if facts["topology"] == "standalone":
                log.warning("standalone_server", extra={"advice": "no replica set: a crash of the server can lose acknowledged work"})
            return None

    async def leave(self) -> None:
        """Forget this host in the database, if that is quickly done."""
        try:
            async with asyncio.timeout(REMOVE_TIMEOUT_S):
                await self._listeners.broadcast.close()
                await self._store.run(hosts.remove_host(self._boot.host_id))
                await self._store.close()
        except (WorkflowError, TimeoutError) as exc:
            log.warning("host_record_left", extra={"error": str(exc), "expires_s": HOST_TTL_S})

    # ---- the supervisor speaks -------------------------------------------------------------------------------------

    def _on_message(self, message: ToSteward) -> None:
        match message:
            case Died():
                self._dead.put_nowait(message)
            case Parked(instants=instants):
                for lane, at_ms, run_id in instants:
                    self._timers.add(lane, at_ms, run_id)
                self._set_alarm()
            case CheckDue(seq=seq):
                self._checks.put_nowait(seq)
            case Circuit(state=state):
                self._circuit = state
                if state != "closed":
                    self._doubtful.set()
                if state != "half-open":
                    self._listeners.publish(f"scheduler:circuit-{state}")
            case SubscribersServed():
                self._listeners.confirmed(message)
            case PoolFacts() as facts:
                if self._facts is None or shape(facts) != shape(self._facts):
                    self._pool_changed.set()
                self._facts, self._facts_at = facts, self._env.clock.monotonic()
            case Close():
                self.closing.set()
            case _:
                assert_never(message)

    def _orphaned(self) -> None:
        log.error("supervisor_gone")
        arm_orphan_exit(self._loop)
        self.closing.set()

    def _fresh_facts(self) -> PoolFacts | None:
        return self._facts if self._env.clock.monotonic() - self._facts_at < FACTS_FRESH_S else None

    # ---- waking workers --------------------------------------------------------------------------------------------

    def _wake(self, lane: str | None, run_id: str | None, count: int) -> None:
        """Have workers rung: now, or together with what else comes in the next moments."""
        if lane in self._wakes:
            self._wakes[lane] = (None, self._wakes[lane][1] + count)
            return
        self._wakes[lane] = (run_id if count == 1 else None, count)
        if len(self._wakes) == 1:
            since = self._env.clock.monotonic() - self._woken_at
            if since >= WAKE_PAUSE_S:
                self._flush_wakes()
            else:
                self._loop.call_later(WAKE_PAUSE_S - since, self._flush_wakes)

    def _flush_wakes(self) -> None:
        self._woken_at = self._env.clock.monotonic()
        wakes, self._wakes = self._wakes, {}
        for lane, (run_id, count) in wakes.items():
            self._hint(WorkDue(lane=lane, run_id=run_id, count=count))

    def _hint(self, message: FromSteward) -> None:
        """Say what may be lost. A supervisor that is stopped takes nothing, and signals may come by the thousand."""
        if self._channel.unsent_bytes < HINT_BYTES_MAX:
            self.send(message)

    def _plan(self, lane: str, at: datetime, run_id: str | None, count: int = 1) -> None:
        """Wake somebody for a run (or so many) at its instant, or now if that has come."""
        if at <= self._store.now():
            self._wake(lane, run_id, count)
        else:
            self._timers.add(lane, _epoch_ms(at), run_id)

    def _set_alarm(self) -> None:
        """Have `_ring_due` called at the next instant."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        at_ms = self._timers.next_at_ms()
        if at_ms is not None:
            delay_s = at_ms / 1000 - self._store.now().timestamp() + TIMER_MARGIN_S
            pause_s = self._alarmed_at + ALARM_PAUSE_S - self._env.clock.monotonic()
            self._alarm = self._loop.call_later(max(0.0, delay_s, pause_s), self._ring_due)

    def _ring_due(self) -> None:
        """A run that is known by name is told by name: it is not to queue behind those that have been due for longer."""
        self._alarmed_at = self._env.clock.monotonic()
        due = self._timers.pop_due(_epoch_ms(self._store.now()))
        names = [each.run_id for each in due if each.run_id is not None]
        for start in range(0, len(names), ALARM_MAX):
            self._hint(TimersFired(run_ids=tuple(names[start : start + ALARM_MAX])))
        for each in due:
            if each.run_id is None:
                self._wake(each.lane, None, 1)
        self._set_alarm()

    # ---- duties ----------------------------------------------------------------------------------------------------

    async def _tail(self) -> None:
        """Follow the signals. A broken tail is opened again where it broke; the sweep covers the gap."""
        since = self._store.now()
        failures = 0
        while True:
            try:
                async for signal in self._store.tail(signals.signals_since(since, kind={"$in": list(SIGNAL_KINDS)})):
                    failures = 0
                    if signal is not None:
                        since = max(since, min(signal["at"], self._store.now()))  # one from the future must not hide the present
                        self._on_signal(signal)
            except WorkflowError as exc:
                failures += 1
                passing = bool(exc.context.get("transient"))
                log.log(logging.DEBUG if passing else logging.WARNING, "tail_broken", extra={"error": exc.message})
                if passing:
                    self._doubtful.set()
                if "capped" in exc.message:
                    # It was dropped under us, and made anew by somebody's insert: without an end, and without a tail.
                    await self._attempt(self._cap_signals)
                # A server that cannot do this at all is asked again now and then; until then the sweep does its work.
                await self._pause(failures, RETRY_MAX_S if passing else TAIL_RETRY_MAX_S)

    async def _cap_signals(self) -> None:
        await self._run(signals.cap_signals(), WRITE_TIMEOUT_S)

    def _on_signal(self, signal: dict[str, Any]) -> None:
        lane = signal.get("lane")
        if signal["kind"] == "cancel":
            self._hint(RunChanged(run_id=signal["runId"], owner=signal.get("owner"), reason="cancelled"))
        elif signal["kind"] in LISTENER_SIGNALS:
            self._listeners.on_signal(signal)
        elif isinstance(lane, str) and lane in self._lanes:
            at, run_id = signal.get("wakeAt") or signal["at"], signal.get("runId")
            soon = timedelta(0) < at - self._store.now() < STARTS_NOW
            self._plan(lane, at, None if soon else run_id, signal.get("count", 1))
            self._set_alarm()

    async def _sweep(self) -> None:
        """Now and then: find what is due or will be soon, and take back expired leases."""
        while True:
            ok = await self._attempt(self._look_around)
            if not ok:
                self._sweeps = 0  # leases may have ended longer ago than the others look back: the next sweep looks at all
            interval = self._settings.sweep_interval_s
            await asyncio.sleep(interval * (0.9 + 0.2 * self._env.random()) if ok else RETRY_MAX_S * (0.5 + self._env.random() / 2))

    async def _look_around(self) -> None:
        if self._store.clock.stale:
            await self._store.sync_clock()
        until = self._store.now() + timedelta(seconds=2 * self._settings.sweep_interval_s)
        overdue = self._store.now() - OVERDUE
        rows = await self._find_due(until)
        if len(rows) == SWEEP_LIMIT:
            # A backlog hides what is not due yet, and it is that which needs a timer, then most of all.
            rows += await self._find_due(until, self._store.now())
        for found in rows:
            if found["wakeAt"] <= overdue:
                self._wake(None, found["_id"], 1)  # no lane: it may stand where workers do not look any more
            else:
                self._plan(found["lane"], found["wakeAt"], found["_id"])
        self._set_alarm()
        full = self._sweeps % FULL_SWEEP_EVERY == 0
        since = None if full else self._store.now() - 3 * timedelta(seconds=self._settings.sweep_interval_s)
        self._sweeps += 1
        recovered = await self._recover(recovery.recover_expired(self._settings.max_crashes, since))
        if recovered:
            log.warning("leases_recovered", extra={"runs": recovered})
            self._wake(None, None, recovered)
        if full:
            await self._listeners.look(lambda op: self._run(op, READ_TIMEOUT_S))
        if self._sweeps % BROADCASTS_EVERY == 1:  # last, since it may take long, and runs of dead workers wait for the others
            await self._within(WRITE_TIMEOUT_S, "finish_broadcasts", self._store.drive(finishing_broadcasts(self._app.services)))

    async def _find_due(self, until: datetime, since: datetime | None = None) -> list[dict[str, Any]]:
        try:
            due: list[dict[str, Any]] = await self._run(claims.find_due_before(self._lanes, until, SWEEP_LIMIT, since), READ_TIMEOUT_S)
        except StoreUnavailableError as exc:
            if not exc.context.get("transient"):
                await self._store.ensure_again()  # the collection was dropped under us, or its indexes: no claim succeeds, either
            raise
        return due

    async def _release_dead(self) -> None:
        """Give back what dead workers held. Each is tried until it succeeds: the runs wait for nothing else."""
        while True:
            died = await self._dead.get()
            evidence = {name: value for name, value in asdict(died.evidence).items() if name != "dump"}
            since = self._store.now() - RELEASE_LOOK_BACK
            release = recovery.release_owner(died.owner, self._settings.max_crashes, evidence, since)
            runs = await self._insist(functools.partial(self._recover, release))
            self.send(Released(owner=died.owner, runs=runs))

    async def _answer_checks(self) -> None:
        """For `--burst`: is anything claimable at this moment?"""
        while True:
            seq = await self._checks.get()
            look = claims.find_due_before(self._lanes, self._store.now(), SWEEP_LIMIT)
            found = await self._insist(functools.partial(self._run, look, READ_TIMEOUT_S))
            self.send(DueCount(seq=seq, due=len(found)))

    async def _probe_when_doubtful(self) -> None:
        """After a failed operation, and while the breaker is not closed: try one that costs nothing."""
        while True:
            await self._doubtful.wait()
            self._doubtful.clear()
            while True:
                ok = await self._probe()
                if ok and self._circuit == "closed":
                    break
                await asyncio.sleep(PROBE_PAUSE_S * (0.5 + self._env.random()))

    async def _probe(self) -> bool:
        try:
            await self._run(run_lifecycle.server_info(), PROBE_TIMEOUT_S)
        except WorkflowError as exc:
            self.send(Probe(ok=False, error=exc.message))
            return False
        self.send(Probe(ok=True))
        return True

    async def _keep_host_record(self) -> None:
        """Say in the database what this pool is, on a change and every half minute."""
        while True:
            try:
                async with asyncio.timeout(HOST_INTERVAL_S):
                    await self._pool_changed.wait()
            except TimeoutError:
                pass
            self._pool_changed.clear()
            await self._attempt(self._put_host_record)
            await asyncio.sleep(HOST_CHANGE_PAUSE_S)

    async def _put_host_record(self) -> None:
        if self._facts is not None:
            boot = self._boot
            record = host_record(boot.host_id, boot.host, boot.pid, self._lanes, self._facts)
            await self._run(hosts.put_host(record, HOST_TTL_S), READ_TIMEOUT_S)

    # ---- operations ------------------------------------------------------------------------------------------------

    async def _run(self, op: Op, timeout_s: float) -> Any:
        """One operation with a deadline."""
        return await self._within(timeout_s, op.name, self._store.run(op))

    async def _within(self, timeout_s: float, name: str, work: Awaitable[T]) -> T:
        """A frozen server keeps connections open and answers nothing."""
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except TimeoutError:
            raise StoreUnavailableError(f"{name}: no answer within {timeout_s:g} s", transient=True) from None

    async def _attempt(self, act: Callable[[], Awaitable[None]]) -> bool:
        """Do what will be done again anyway; a failure only raises doubt about the database."""
        try:
            await act()
        except WorkflowError as exc:
            log.debug("steward_retries", extra={"error": exc.message})
            if not self._failing:  # once for each outage, as far as subscribers are concerned
                self._listeners.publish("scheduler:error", {"error": exc.message})
            self._failing = True
            self._doubtful.set()
            return False
        self._failing = False
        return True

    async def _recover(self, op: Command) -> int:
        """Take leases back. One run that the server refuses to update holds up no other."""
        return (await update_many(lambda each: self._run(each, WRITE_TIMEOUT_S), op, self._store.now)).matched

    async def _insist(self, act: Callable[[], Awaitable[T]]) -> T:
        """Do something until it succeeds."""
        failures = 0
        while True:
            try:
                return await act()
            except WorkflowError as exc:
                failures += 1
                self._doubtful.set()
                if failures == 1:
                    log.warning("steward_retries", extra={"error": exc.message})
                await self._pause(failures)

    async def _pause(self, failures: int, longest_s: float = RETRY_MAX_S) -> None:
        """Exponential back-off with jitter."""
        ceiling = min(longest_s, 0.05 * 2.0 ** min(failures, 20))
        await asyncio.sleep(ceiling * (0.5 + self._env.random() / 2))


def _epoch_ms(at: datetime) -> int:
    return round(at.timestamp() * 1000)
