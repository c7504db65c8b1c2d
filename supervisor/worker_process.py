"""A worker process. Owns the way of messages between the pipe and `streamline_pool.worker.worker.Worker`, which has no pipes.

Beats come from the event loop that does the work, so a blocked loop is a silent worker. One timer has the next beat; a worker
that is idle and has nothing new to report beats less often. When the supervisor is gone,
the worker drains, then stops, and the process ends within `ORPHAN_EXIT_S` (see `ipc.channel`) whatever it is doing.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import selectors
import socket
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, assert_never

from streamline_pool.config.env import Env
from streamline_pool.config.settings import Settings
from streamline_pool.domain.errors import StoreUnavailableError, ValidationError
from streamline_pool.events.bus import global_event_bus
from streamline_pool.storage.quiet_loop import QuietEventLoop
from streamline_pool.supervisor.ipc.channel import Channel, arm_orphan_exit
from streamline_pool.supervisor.ipc.codec import TO_WORKER
from streamline_pool.supervisor.ipc.messages import (
    BOOT_FAILED_EXIT,
    STORE_UNREACHABLE_EXIT,
    Beat,
    BootFailed,
    CheckRun,
    Drain,
    Gate,
    Hold,
    IdleCheck,
    Reslot,
    ServeSubscribers,
    Stop,
    TimersFired,
    ToWorker,
    WakeUp,
)
from streamline_pool.supervisor.logs import flush_logs
from streamline_pool.worker.worker import Worker

if TYPE_CHECKING:
    from streamline_pool.client.app import Streamline

__all__ = ["WorkerBoot", "run_worker"]

log = logging.getLogger("streamline_pool")

BEAT_PAUSE_S = 0.01  # a guess: one change is sent at once, ten changes in a row are sent as one
PARKED_MAX = 500  # parked runs in one beat, those that are due first; the steward's sweep finds the others
SUBSCRIBERS_S = 1.0  # a guess: the time for subscribers to receive the last events
GC_THRESHOLDS = (50_000, 20, 100)  # measured: with Python's own, the collector takes a sixth of a short step's time
ORPHAN_DRAIN_S, ORPHAN_GRACE_S = 0.7, 0.3  # leaves as much again for the release of runs, see ipc/channel.py, ORPHAN_EXIT_S


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerBoot:
    """What a worker process needs to know at its start."""

    nonce: str  # random; makes "host:pid:nonce" unique even when pids are used again
    host: str
    index: int  # of this worker on its host, from 0
    total: int  # workers on this host


def run_worker(app: Streamline, settings: Settings, env: Env, boot: WorkerBoot, sock: socket.socket) -> int:
    """The main function of a worker process; its exit code."""
    gc.set_threshold(*GC_THRESHOLDS)
    # A handler may fork. Its child must not read from our connections, and it would if both used the same selector.
    selector = selectors.DefaultSelector()
    os.register_at_fork(after_in_child=selector.close)
    # Not `asyncio.run`: its clean-up waits for threads, and a handler may occupy one for ever.
    runner = asyncio.Runner(loop_factory=lambda: QuietEventLoop(selector))
    return runner.run(_WorkerProcess(app, settings, env, boot).run(sock))


class _WorkerProcess:
    """Connects one worker to one pipe."""

    def __init__(self, app: Streamline, settings: Settings, env: Env, boot: WorkerBoot) -> None:
        self._app = app
        self._settings = settings
        self._env = env
        owner = f"{boot.host}:{os.getpid()}:{boot.nonce}"
        self._worker = Worker(app, settings, owner=owner, index=boot.index, total=boot.total, env=env, notify=self._beat_soon)
        self._idle_check = self._subscribers_served = 0  # the highest numbers received
        self._next_beat: asyncio.TimerHandle | None = None
        self._beat_pending = False  # the next beat is one that a change has asked for
        self._beaten_at = 0.0
        self._last_beat: Beat | None = None
        self._booted = False

    async def run(self, sock: socket.socket) -> int:
        self._loop = asyncio.get_running_loop()
        self._channel = Channel(sock, TO_WORKER, self._on_message, self._orphaned)
        self._beat()
        try:
            await self._worker.run()
        except Exception as exc:
            if self._booted:
                raise
            self._channel.send(_boot_failed(exc))
            return BOOT_FAILED_EXIT
        finally:
            self._stop_beating()
        self._beat()  # the final counters
        self._stop_beating()
        self._app.events.close(SUBSCRIBERS_S)
        global_event_bus.close(SUBSCRIBERS_S)
        return 0

    def _on_message(self, message: ToWorker) -> None:
        worker = self._worker
        self._beat_within(self._settings.beat_interval_s)  # an idle worker gets its work by a message
        match message:
            case WakeUp(run_id=run_id, overdue=overdue):
                worker.wake_up(run_id, overdue=overdue)
            case TimersFired(run_ids=run_ids):
                worker.timers_fired(run_ids)
            case CheckRun(run_id=run_id):
                worker.check_run(run_id)
            case Gate(state=state):
                worker.set_gate(state)
            case Hold(held=held):
                worker.hold(held)
            case Reslot(index=index, total=total):
                worker.reslot(index, total)
            case Drain():
                worker.drain()
            case Stop(grace_s=grace_s):
                worker.stop(grace_s)
            case IdleCheck(seq=seq):
                self._idle_check = seq
                self._beat()
            case ServeSubscribers(seq=seq, subscribers=subscribers):
                worker.serve_subscribers(subscribers)
                self._subscribers_served = seq
                self._beat()
            case _:
                assert_never(message)

    def _orphaned(self) -> None:
        log.error("supervisor_gone")
        self._worker.drain()
        self._loop.call_later(ORPHAN_DRAIN_S, self._worker.stop, ORPHAN_GRACE_S)
        arm_orphan_exit(self._loop)

    def _beat_soon(self) -> None:
        """The worker's `notify`: one change is sent at once, many changes are sent together after a few milliseconds."""
        if not self._beat_pending:
            self._beat_in(max(0.0, BEAT_PAUSE_S - (self._env.clock.monotonic() - self._beaten_at)))
            self._beat_pending = True

    def _beat_within(self, pause_s: float) -> None:
        """Have the next beat sent then, if it was planned for later."""
        if self._next_beat is None or self._next_beat.when() > self._loop.time() + pause_s:
            self._beat_in(pause_s)

    def _beat_in(self, pause_s: float) -> None:
        """Have the next beat sent then, and not at the time that was planned before."""
        self._stop_beating()
        self._next_beat = self._loop.call_later(pause_s, self._beat)

    def _stop_beating(self) -> None:
        self._beat_pending = False
        if self._next_beat is not None:
            self._next_beat.cancel()

    def _beat(self) -> None:
        self._beat_in(self._settings.beat_interval_s)
        flush_logs()
        parked = _nearest(self._worker.take_parked())
        if self._channel.unsent_bytes:
            return  # the supervisor is slow or stopped; the next beat is newer than this one
        self._beaten_at = self._env.clock.monotonic()
        beat = self._new_beat(parked)
        self._booted = self._booted or beat.state != "starting"
        self._channel.send(beat)
        # Only an idle worker: what the supervisor knows of it decides who gets a wake-up, and every change that ends it is sent at once.
        if beat == self._last_beat and beat.idle and not beat.in_flight:
            self._beat_in(self._settings.idle_beat_interval_s)
        self._last_beat = beat

    def _new_beat(self, parked: tuple[tuple[int, str], ...]) -> Beat:
        status = self._worker.status()
        return Beat(
            state=status.state,
            idle=status.idle,
            in_flight=status.in_flight,
            runs_total=status.runs_total,
            steps_total=status.steps_total,
            ops_ok=status.ops_ok,
            ops_failed=status.ops_failed,
            consecutive_failures=status.consecutive_failures,
            recycle=status.recycle,
            running=tuple(status.running),
            lru=dict(status.lru),
            parked=parked,
            idle_check=self._idle_check,
            subscribers_served=self._subscribers_served,
            kept=status.kept,
        )


def _nearest(parked: list[tuple[datetime, str]]) -> tuple[tuple[int, str], ...]:
    """The parked runs that are due first, as (wakeAt in epoch milliseconds, run id)."""
    runs = [(round(wake_at.timestamp() * 1000), run_id) for wake_at, run_id in parked]
    return tuple(sorted(runs)[:PARKED_MAX])


def _boot_failed(exc: Exception) -> BootFailed:
    match exc:
        case StoreUnavailableError():
            return BootFailed(exit_code=STORE_UNREACHABLE_EXIT, message=exc.message)
        case ValidationError():
            return BootFailed(exit_code=2, message=exc.message)
        case _:
            log.critical("worker_cannot_start", exc_info=exc)
            return BootFailed(exit_code=1, message=f"{type(exc).__name__}: {exc}")
