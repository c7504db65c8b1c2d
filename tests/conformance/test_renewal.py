"""Renewal and self-fencing under a clock that jumps: whose leases are extended, for how long, and what a lost or unanswered one means."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from stored_runs import stored
from workers import Pool

from streamline_pool import Streamline
from streamline_pool.config.env import Env, system_env
from streamline_pool.domain.errors import StoreUnavailableError
from streamline_pool.protocol import claims, recovery
from streamline_pool.protocol.operations import Op
from streamline_pool.storage.store import AsyncStore

LEASE_S = 30.0
DUE_S = 11.0  # from then on a lease is renewed
FENCED_S = 27.0  # then its handler must have been stopped
HANDLER_S = 4.0  # real time that a handler waits for its abort


@dataclass
class Jumps:
    """A monotonic clock that a test moves ahead, in an environment whose periodic tasks never wait."""

    total_s: float = 0.0
    env: Env = field(init=False)

    def __post_init__(self) -> None:
        system = system_env()
        jumps = self

        class Clock:
            now = staticmethod(system.clock.now)

            @staticmethod
            def monotonic() -> float:
                return system.clock.monotonic() + jumps.total_s

        self.env = replace(system, clock=Clock(), async_sleep=lambda _: asyncio.sleep(0))


class Handlers:
    """A workflow whose handlers wait for their abort, and record its reason. `entered` holds the inputs of those that are at work."""

    def __init__(self, app: Streamline) -> None:
        self.entered: set[Any] = set()
        self.reasons: dict[Any, str | None] = {}
        self.go = asyncio.Event()
        self.workflow = app.workflow("waiting", steps={"work": (self.work, {"retries": 1})})

    async def work(self, ctx: Any) -> str:
        if ctx.attempt > 1:
            return "again"
        self.entered.add(ctx.input)
        try:
            await asyncio.wait_for(self.go.wait(), HANDLER_S)
        except TimeoutError:
            return "never aborted"
        finally:
            self.reasons[ctx.input] = ctx.signal.reason
        return "worked"


class WatchedStore(AsyncStore):
    """A store that has a test act on each renewal: before it is sent, or after its answer."""

    silent = False  # renewals and the reads beside them get no answer
    failing = False  # renewals fail at once
    answered: Callable[[], None] = staticmethod(lambda: None)

    async def run(self, op: Op, session: Any = None) -> Any:
        if self.silent and op.name in ("renew", "read_fences"):
            await asyncio.Event().wait()
        if self.failing and op.name == "renew":
            raise StoreUnavailableError("renew: a fault of this test", transient=True)
        result = await super().run(op, session)
        if op.name == "renew":
            self.answered()
        return result


def expiry(app: Streamline, run_id: str) -> Any:
    return stored(app, run_id)["lease"]["expiresAt"]


async def renewed(pool: Pool, app: Streamline, run_id: str, jumps: Jumps) -> None:
    """Have the leases renewed: those of `run_id` are known to be when this returns."""
    before = expiry(app, run_id)
    jumps.total_s += DUE_S
    await pool.until(lambda: expiry(app, run_id) > before)


def test_only_leases_of_runs_that_are_driven_are_renewed(make_app: Callable[..., Streamline]) -> None:
    """A claim of unknown outcome is forgotten by its worker; if its lease were renewed, the run would never be recovered."""
    jumps = Jumps()
    app = make_app(env=jumps.env, lease_s=LEASE_S)

    async def play() -> None:
        handlers = Handlers(app)
        async with Pool(app) as pool:
            run = await handlers.workflow.start_async("held")
            await pool.until(lambda: handlers.entered)
            pool.stop_waking_up()
            forgotten = await handlers.workflow.start_async("forgotten")
            lease = claims.claim_runs([forgotten.id], None, "forgotten", pool.workers[0]._owner, LEASE_S)
            assert app.store().run(lease) == 1
            before = expiry(app, forgotten.id)
            await renewed(pool, app, run.id, jumps)
            assert expiry(app, forgotten.id) == before
            handlers.go.set()

    asyncio.run(play())


def test_a_renewal_shows_which_of_several_runs_is_lost(make_app: Callable[..., Streamline]) -> None:
    """Its signal may be lost. The handler of a recovered run must end, and those of the others go on."""
    jumps = Jumps()
    app = make_app(env=jumps.env, lease_s=LEASE_S)

    async def play() -> Handlers:
        handlers = Handlers(app)
        async with Pool(app) as pool:
            runs = {name: await handlers.workflow.start_async(name) for name in ("lost", "kept")}
            await pool.until(lambda: len(handlers.entered) == 2)
            pool.stop_waking_up()
            app.runs.update_one({"_id": runs["lost"].id}, [{"$set": {"lease.expiresAt": {"$subtract": ["$$NOW", 1]}}}])
            assert app.store().run(recovery.recover_expired(3)) == 1
            await renewed(pool, app, runs["kept"].id, jumps)
            await pool.until(lambda: "lost" in handlers.reasons)
            handlers.go.set()
        return handlers

    assert asyncio.run(play()).reasons == {"lost": "lease-lost", "kept": None}


@pytest.mark.parametrize("way", ["silent", "failing"])
def test_a_handler_is_stopped_in_time_whatever_becomes_of_the_renewals(make_app: Callable[..., Streamline], way: str) -> None:
    """After the expiry another worker may run the same step. Only the clock shows the holder that it is near."""
    jumps = Jumps()
    app = make_app(env=jumps.env, lease_s=LEASE_S)

    async def play() -> Handlers:
        store = app.connections.use(WatchedStore(app.where, app.env))
        handlers = Handlers(app)
        async with Pool(app) as pool:
            await handlers.workflow.start_async("work")
            await pool.until(lambda: handlers.entered)
            setattr(store, way, True)
            jumps.total_s += DUE_S  # a renewal is due, and does not succeed
            await asyncio.sleep(0.05)
            jumps.total_s += FENCED_S - DUE_S
            await pool.until(lambda: handlers.reasons)
            setattr(store, way, False)
        return handlers

    assert asyncio.run(play()).reasons == {"work": "lease-lost"}


def test_a_condition_is_stopped_before_its_lease_is_over(make_app: Callable[..., Streamline]) -> None:
    """After the expiry another worker asks the same condition."""
    jumps = Jumps()
    app = make_app(env=jumps.env, lease_s=LEASE_S)
    asked: list[str] = []

    async def asking(ctx: Any) -> bool:
        asked.append("asked")
        if len(asked) > 1:
            return True
        try:
            await asyncio.sleep(HANDLER_S)
        finally:
            asked.append(ctx.signal.reason)
        return True

    async def play() -> Any:
        store = app.connections.use(WatchedStore(app.where, app.env))
        workflow = app.workflow("asking", steps={"work": (lambda ctx: "worked", {"run_if": asking})})
        async with Pool(app) as pool:
            run = await workflow.start_async()
            await pool.until(lambda: asked)
            store.silent = True
            jumps.total_s += FENCED_S
            await pool.until(lambda: len(asked) > 1)
            store.silent = False
            return await workflow.wait_for_async(run.id, timeout=20)

    assert asyncio.run(play()).output == "worked"
    assert asked == ["asked", "lease-lost", "asked"]


def test_a_lease_counts_from_before_the_request_that_renewed_it(make_app: Callable[..., Streamline]) -> None:
    """The server grants it while the request is under way. Counted from the answer, a handler would go on after its end."""
    jumps = Jumps()
    app = make_app(env=jumps.env, lease_s=LEASE_S)
    slow_s = 20.0

    async def play() -> Handlers:
        store = app.connections.use(WatchedStore(app.where, app.env))
        handlers = Handlers(app)

        def answered() -> None:
            jumps.total_s += slow_s  # so long did the answer take
            store.silent = True

        async with Pool(app) as pool:
            await handlers.workflow.start_async("work")
            await pool.until(lambda: handlers.entered)
            store.answered = answered
            jumps.total_s += DUE_S
            await pool.until(lambda: store.silent)
            jumps.total_s += FENCED_S - slow_s
            await pool.until(lambda: handlers.reasons)
            store.silent = False
        return handlers

    assert asyncio.run(play()).reasons == {"work": "lease-lost"}


@pytest.mark.parametrize("named", [True, False], ids=["by name", "by a poll"])
def test_a_lease_counts_from_before_the_claim_that_granted_it(make_app: Callable[..., Streamline], named: bool) -> None:
    """As above: after a slow claim the lease may have ended, and then no handler may be entered."""
    jumps = Jumps()
    claimed: list[str] = []

    def slow(point: str) -> None:
        if point == "claim.after" and not claimed:
            claimed.append(point)
            jumps.total_s += FENCED_S + 1

    app = make_app(env=replace(jumps.env, probe=slow), lease_s=LEASE_S)

    async def play() -> dict[str, Any]:
        workflow = app.workflow("flow", steps={"work": lambda ctx: ctx.attempt})
        async with Pool(app) as pool:
            if named:
                await pool.until(lambda: pool.statuses()[0].idle)
                pool.stop_waking_up()
            run = await workflow.start_async()
            pool.workers[0].wake_up(run.id if named else None)
            await pool.until(lambda: stored(app, run)["token"] >= 1 and "lease" not in stored(app, run))
            pool.workers[0].wake_up(overdue=True)
            await pool.until(lambda: stored(app, run)["status"] == "done")
        return stored(app, run)

    document = asyncio.run(play())
    assert (document["token"], document["output"], document["crashes"]) == (2, 1, 0), "released uncounted, and claimed again"
