"""What every duty of the steward shares: the database with deadlines, repeated tries, and the way to the supervisor.

Owns the skeleton of a duty and the rule for failures: a failed operation raises doubt about the database, which the probe
then examines. What a duty does is in its own file; steward.py assembles them. (Oban's plugins are the model.)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from streamline_pool.config.env import Env
from streamline_pool.config.settings import Settings
from streamline_pool.domain.backoff import Backoff
from streamline_pool.domain.errors import StoreUnavailableError, WorkflowError
from streamline_pool.events.bus import global_event_bus
from streamline_pool.events.event import Event
from streamline_pool.events.publisher import EventPublisher
from streamline_pool.protocol.operations import Op
from streamline_pool.storage.store import AsyncStore
from streamline_pool.supervisor.ipc.messages import FromSteward

if TYPE_CHECKING:
    from streamline_pool.client.app import Streamline

__all__ = ["READ_TIMEOUT_S", "RETRY", "RETRY_MAX_S", "WRITE_TIMEOUT_S", "Duty", "DutyTools", "StewardBoot", "SupervisorLink"]

log = logging.getLogger("streamline_pool")

T = TypeVar("T")

RETRY_MAX_S = 1.0  # between tries while the database is away, so that work resumes within 3 s of its return
RETRY = Backoff(base_s=0.05, ceiling_s=RETRY_MAX_S)
READ_TIMEOUT_S = 5.0  # a guess; in an idle pool, the first of these to pass is how a frozen server is noticed
WRITE_TIMEOUT_S = 15.0  # the release of ten thousand leases takes a while
HINT_BYTES_MAX = 64 * 1024  # a guess, some 500 messages: more than that is unread only if the supervisor is stopped


class Duty(Protocol):
    """One duty of the steward, in a task of its own."""

    async def run(self) -> None:
        """Do the duty until cancelled. An exception that leaves this ends the process; the supervisor starts another."""


class SupervisorLink(Protocol):
    """The channel to the supervisor, as duties use it."""

    @property
    def unsent_bytes(self) -> int:
        """What the supervisor has not read yet."""

    def send(self, message: FromSteward) -> None:
        """Queue a message; never blocks."""

    def send_latest(self, message: FromSteward) -> None:
        """Queue a message that replaces earlier ones of its type: only the newest has to arrive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StewardBoot:
    """What the supervisor passes to a steward at its start."""

    host_id: str  # "host:pid:nonce" of the supervisor
    host: str
    pid: int  # of the supervisor
    first: bool  # the pool is starting: report a missing database instead of waiting for it


class DutyTools:
    """What a duty gets: the database, the settings, and its ways to wait, to try again, to publish and to report."""

    def __init__(self, app: Streamline, settings: Settings, env: Env, boot: StewardBoot, supervisor: SupervisorLink) -> None:
        self.app = app
        self.settings = settings
        self.env = env
        self.boot = boot
        self.lanes: Sequence[str] = app.lanes(settings.queues)
        self.lane_set = frozenset(self.lanes)
        self.store: AsyncStore = app.store_async()
        self.publisher = EventPublisher(self.store, env)
        self.publisher.start()
        self.doubtful = asyncio.Event()  # set: the database may be away, so probe it
        self._supervisor = supervisor
        self._failing = False  # the last `attempt` failed

    # ---- to the supervisor and to subscribers --------------------------------------------------------------------------

    def send(self, message: FromSteward) -> None:
        """Send what must arrive."""
        self._supervisor.send(message)

    def send_latest(self, message: FromSteward) -> None:
        """Send a state of which only the newest must arrive: a stopped supervisor reads nothing, and states may change by the thousand."""
        self._supervisor.send_latest(message)

    def hint(self, message: FromSteward) -> None:
        """Send what may be lost: a stopped supervisor reads nothing, and signals may come by the thousand."""
        if self._supervisor.unsent_bytes < HINT_BYTES_MAX:
            self.send(message)

    def publish(self, name: str, data: Any = None) -> None:
        """Publish an event of the pool. The steward does it, because the supervisor must not have the subscribers' thread."""
        event = Event(name=name, run_id=None, workflow_id=None, step_id=None, data=data, at=self.store.now())
        self.app.events.publish(event)
        global_event_bus.publish(event)
        self.publisher.publish(event)

    # ---- operations with a deadline ------------------------------------------------------------------------------------

    async def run(self, op: Op, timeout_s: float) -> Any:
        """The result of one operation. StoreUnavailableError after `timeout_s` seconds."""
        return await self.within(timeout_s, op.name, self.store.run(op))

    async def within(self, timeout_s: float, name: str, work: Awaitable[T]) -> T:
        """The result of `work`. The deadline is for a frozen server, which keeps connections open and answers nothing."""
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except TimeoutError:
            raise StoreUnavailableError(f"{name}: no answer within {timeout_s:g} s", transient=True) from None

    # ---- repeated tries ------------------------------------------------------------------------------------------------

    async def attempt(self, work: Callable[[], Awaitable[None]]) -> bool:
        """Try once what the duty will do again anyway; whether it succeeded. A failure only raises doubt about the database."""
        try:
            await work()
        except WorkflowError as exc:
            log.debug("steward_retries", extra={"error": exc.message})
            if not self._failing:  # subscribers get one event for each outage
                self.publish("scheduler:error", {"error": exc.message})
            self._failing = True
            self.doubtful.set()
            return False
        self._failing = False
        return True

    async def insist(self, work: Callable[[], Awaitable[T]]) -> T:
        """Repeat `work` until it succeeds; its result."""
        failures = 0
        while True:
            try:
                return await work()
            except WorkflowError as exc:
                failures += 1
                self.doubtful.set()
                if failures == 1:
                    log.warning("steward_retries", extra={"error": exc.message})
                await self.pause(failures)

    async def pause(self, failures: int, backoff: Backoff = RETRY) -> None:
        """Wait after so many failures in a row."""
        await asyncio.sleep(backoff.delay_s(failures, self.env.random()))
