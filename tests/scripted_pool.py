"""A pool whose children follow a script: `python scripted_pool.py SCRIPT`. For misbehaviour that real children do not show.

The supervisor, the forks, the pipes and the signals are the real ones; only what a child sends and does is made up.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from streamline_pool.config.env import system_env
from streamline_pool.supervisor.ipc.channel import Channel
from streamline_pool.supervisor.ipc.codec import TO_STEWARD, TO_WORKER
from streamline_pool.supervisor.ipc.messages import (
    Beat,
    BootFailed,
    Close,
    Died,
    Drain,
    Released,
    StewardBeat,
    Stop,
    WakeUp,
    WorkDue,
)
from streamline_pool.supervisor.logs import setup_logging
from streamline_pool.supervisor.pool.state import Limits
from streamline_pool.supervisor.pool.supervisor import ChildSpec, Supervisor

LIMITS = Limits(drain_timeout_s=2.0, stall_timeout_s=1.5, restart_budget=3, max_rss_bytes=None, max_runs_per_worker=None, burst=False)
FLOOD = 20_000  # messages; their bytes are several times what a socket buffer holds
IDLE = Beat(state="ready", idle=True, in_flight=0, runs_total=0, steps_total=0, ops_ok=0, ops_failed=0, consecutive_failures=0, lru={})

log = logging.getLogger("streamline_pool")


class Actor:
    """A child that does what is expected of it: it sends heartbeats, answers, and exits when ordered."""

    def __init__(self, spec: ChildSpec, sock: socket.socket) -> None:
        self.spec = spec
        self.sock = sock
        self.wake_ups = 0
        self.done = asyncio.get_running_loop().create_future()
        self.channel: Channel[Any] = Channel(
            sock, TO_STEWARD if spec.role == "steward" else TO_WORKER, self.on_message, lambda: self.end(0)
        )

    def end(self, code: int) -> None:
        if not self.done.done():
            self.done.set_result(code)

    def on_message(self, message: Any) -> None:
        match message:
            case Drain() | Stop() | Close():
                self.end(0)
            case Died(owner=owner):
                self.channel.send(Released(owner=owner, runs=0))
            case WakeUp():
                self.wake_ups += 1
                if self.wake_ups == FLOOD // 4:
                    log.info("woken_often", extra={"wake_ups": self.wake_ups})

    async def run(self) -> int:
        """Send heartbeats until the end; the exit code."""
        while not self.done.done():
            self.channel.send(StewardBeat(ready=True) if self.spec.role == "steward" else IDLE)
            await asyncio.wait([self.done], timeout=0.1)
        return int(self.done.result())


async def well_behaved(actor: Actor) -> int:
    return await actor.run()


async def does_not_read(actor: Actor) -> int:
    """Worker 0 stops reading after its first heartbeat; the steward causes more wake-ups than fit into a pipe."""
    if actor.spec.role == "steward":

        def flood() -> None:
            for _ in range(FLOOD):
                actor.channel.send(WorkDue(run_id="r", count=1))

        asyncio.get_running_loop().call_later(0.3, flood)
    elif actor.spec.index == 0 and actor.spec.first:
        actor.channel.send(IDLE)
        os.kill(os.getpid(), signal.SIGSTOP)
    return await actor.run()


async def sends_nonsense(actor: Actor) -> int:
    if actor.spec.role == "worker" and actor.spec.first:
        actor.channel.send(IDLE)
        await asyncio.sleep(0.3)
        actor.sock.send(b"\0\0\0\5hello")
    return await actor.run()


async def cannot_start(actor: Actor) -> int:
    if actor.spec.role == "worker":
        actor.channel.send(BootFailed(exit_code=78, message="this cannot work"))
        return 64
    return await actor.run()


async def crash_loop(actor: Actor) -> int:
    if actor.spec.role == "worker":
        return 1
    return await actor.run()


async def never_ready(actor: Actor) -> int:
    if actor.spec.role == "worker" and actor.spec.index == 0:
        await asyncio.Event().wait()
    return await actor.run()


SCRIPTS: dict[str, Callable[[Actor], Coroutine[Any, Any, int]]] = {
    script.__name__: script for script in (well_behaved, does_not_read, sends_nonsense, cannot_start, crash_loop, never_ready)
}


def main(script: str) -> int:
    def main_of(spec: ChildSpec) -> Callable[[socket.socket], int]:
        async def run(sock: socket.socket) -> int:
            return await SCRIPTS[script](Actor(spec, sock))

        return lambda sock: asyncio.run(run(sock))

    setup_logging("json", "debug")
    # The flood takes seconds on a slow machine, and the child that does not read must live meanwhile.
    limits = replace(LIMITS, stall_timeout_s=8.0) if script == does_not_read.__name__ else LIMITS
    return Supervisor(main_of, limits, 2, system_env(), json_log=True).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
