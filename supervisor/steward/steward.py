"""The steward process: assembles the duties of one host that need the database, and reads the supervisor's messages.

Owns the life of the process: start, heartbeats, end. Each duty is in a file of its own and shares the skeleton in duty.py.
The steward holds no run and decides nothing about workers: it reports to the supervisor, which decides. An idle steward
sends the database some 25 commands a minute, however many workers there are.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, assert_never

from streamline_pool.config.env import Env
from streamline_pool.config.settings import Settings
from streamline_pool.domain.errors import WorkflowError
from streamline_pool.storage.quiet_loop import QuietEventLoop
from streamline_pool.supervisor.ipc.channel import Channel, arm_orphan_exit
from streamline_pool.supervisor.ipc.codec import TO_STEWARD
from streamline_pool.supervisor.ipc.messages import (
    BOOT_FAILED_EXIT,
    BootFailed,
    CheckDue,
    Circuit,
    Close,
    Died,
    Parked,
    PoolFacts,
    StewardBeat,
    SubscribersServed,
    ToSteward,
)
from streamline_pool.supervisor.logs import flush_logs
from streamline_pool.supervisor.steward.due_count import DueCounter
from streamline_pool.supervisor.steward.duty import Duty, DutyTools, StewardBoot
from streamline_pool.supervisor.steward.health import METRICS_ADVICE, load_exposition
from streamline_pool.supervisor.steward.host_record import HOST_TTL_S, HostRecord
from streamline_pool.supervisor.steward.lease_recovery import LeaseRecovery
from streamline_pool.supervisor.steward.probe import Prober
from streamline_pool.supervisor.steward.signal_tail import SignalTail
from streamline_pool.supervisor.steward.start_up import connect
from streamline_pool.supervisor.steward.stream_subscribers import StreamSubscribers
from streamline_pool.supervisor.steward.sweep import Sweep
from streamline_pool.supervisor.steward.wake_ups import WakeUps

if TYPE_CHECKING:
    from streamline_pool.client.app import Streamline

__all__ = ["StewardBoot", "run_steward"]

log = logging.getLogger("streamline_pool")

REMOVE_TIMEOUT_S = 1.0  # the host record expires by itself, so the pool's end is not delayed for it


def run_steward(app: Streamline, settings: Settings, env: Env, boot: StewardBoot, sock: socket.socket) -> int:
    """The main function of the steward process; its exit code."""
    return asyncio.Runner(loop_factory=QuietEventLoop).run(
        _main(app, settings, env, boot, sock)
    )  # not `asyncio.run`, as in worker_process.py


async def _main(app: Streamline, settings: Settings, env: Env, boot: StewardBoot, sock: socket.socket) -> int:
    steward = _Steward(app, settings, env, boot, sock)
    beats, closing = asyncio.create_task(steward.beat_forever()), asyncio.create_task(steward.closing.wait())
    starting = asyncio.create_task(steward.start())
    await asyncio.wait({beats, closing, starting}, return_when=asyncio.FIRST_COMPLETED)
    if starting.done() and (failed := starting.result()) is not None:
        steward.tools.send(failed)
        return BOOT_FAILED_EXIT
    duties: list[asyncio.Task[object]] = [asyncio.create_task(duty.run()) for duty in steward.duties] if starting.done() else [starting]
    done, _ = await asyncio.wait({beats, closing, *duties}, return_when=asyncio.FIRST_COMPLETED)
    for task in (beats, *duties):
        task.cancel()
    await steward.close()
    for task in done:
        task.result()  # a duty that failed ends the process with its traceback; the supervisor starts another
    return 0


class _Steward:
    """The duties of one host, and the messages that reach them."""

    def __init__(self, app: Streamline, settings: Settings, env: Env, boot: StewardBoot, sock: socket.socket) -> None:
        self.closing = asyncio.Event()
        self._settings = settings
        self._first = boot.first
        self._loop = asyncio.get_running_loop()
        self._channel = Channel(sock, TO_STEWARD, self._on_message, self._orphaned)
        self._ready = False
        self.tools = tools = DutyTools(app, settings, env, boot, self._channel)
        self._wake_ups = WakeUps(tools)
        self._subscribers = StreamSubscribers(tools)
        self._leases = LeaseRecovery(tools)
        self._due_counter = DueCounter(tools)
        self._prober = Prober(tools)
        self._host = HostRecord(tools)
        self.duties: Sequence[Duty] = (
            SignalTail(tools, self._wake_ups, self._subscribers),
            Sweep(tools, self._wake_ups, self._subscribers),
            self._leases,
            self._due_counter,
            self._subscribers,
            self._prober,
            self._host,
        )

    async def beat_forever(self) -> None:
        """Send heartbeats, which say nothing new after the start; none while the supervisor has not read the last one."""
        while True:
            if not self._channel.unsent_bytes:
                self.tools.send(StewardBeat(ready=self._ready))
            flush_logs()
            await asyncio.sleep(self._settings.idle_beat_interval_s)

    async def start(self) -> BootFailed | None:
        """Serve the health port and reach the database. A returned `BootFailed` ends the pool."""
        failed = await self._serve_health() or await connect(self.tools)
        if failed is None:
            self._ready = True
            self.tools.send(StewardBeat(ready=True))
        return failed

    async def _serve_health(self) -> BootFailed | None:
        host, port = self._settings.health_host, self._settings.health_port
        if port is None:
            return None
        # Only here: a pool without a health port does not need these modules.
        from streamline_pool.supervisor.steward.health_server import HealthServer, address_text

        exposition = load_exposition()
        if exposition is None:
            log.info("metrics_unavailable", extra={"advice": METRICS_ADVICE})
        try:
            # On a thread, because a name server may take its time; the server ends with the process.
            server = await asyncio.to_thread(HealthServer, host, port, self._host.report, exposition)
        except OSError as exc:
            error = f"health port {address_text(host, port)}: {exc.strerror}; choose others with --health-host and --health-port"
            if self._first:
                return BootFailed(exit_code=78, message=error)
            log.error("health_port_taken", extra={"error": error})
        else:
            log.info("health_port", extra={"url": server.url})
        return None

    async def close(self) -> None:
        """Remove this host from the database, if that takes no longer than `REMOVE_TIMEOUT_S`."""
        try:
            async with asyncio.timeout(REMOVE_TIMEOUT_S):
                await self.tools.publisher.close()
                await self._host.remove()
                await self.tools.store.close()
        except (WorkflowError, TimeoutError) as exc:
            log.warning("host_record_left", extra={"error": str(exc), "expires_s": HOST_TTL_S})

    def _on_message(self, message: ToSteward) -> None:
        match message:
            case Died():
                self._leases.on_died(message)
            case Parked(instants=instants):
                self._wake_ups.plan_parked(instants)
            case CheckDue(seq=seq):
                self._due_counter.on_check(seq)
            case Circuit(state=state):
                self._prober.on_circuit(state)
            case SubscribersServed():
                self._subscribers.on_served(message)
            case PoolFacts():
                self._host.on_facts(message)
            case Close():
                self.closing.set()
            case _:
                assert_never(message)

    def _orphaned(self) -> None:
        log.error("supervisor_gone")
        arm_orphan_exit(self._loop)
        self.closing.set()
