"""Leases: fencing, renewal, self-fencing, recovery, and how lost workers are counted."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from workers import Pool, check_invariants, run_until_idle

from streamline_pool import Streamline, embedded
from streamline_pool.config.env import system_env
from streamline_pool.domain import transitions
from streamline_pool.domain.change import apply
from streamline_pool.domain.document import RunDocument
from streamline_pool.protocol import claims, commits, recovery
from streamline_pool.protocol.operations import Fence, Op
from streamline_pool.storage.store import AsyncStore
from support import present


def take_over(app: Streamline, run_id: str) -> None:
    """As if the run's worker had stopped: let the lease expire, and let a sweep recover it."""
    held = app.runs.find_one_and_update({"_id": run_id}, [{"$set": {"lease.expiresAt": {"$subtract": ["$$NOW", 1]}}}])
    app.store().run(recovery.recover_expired(app.settings.max_crashes))  # unless a sweep of the test's pool was faster
    assert app.runs.find_one({"_id": run_id})["token"] > held["token"]


def run_alone(app: Streamline, document: RunDocument) -> None:
    """As a worker does before it enters the handler of a suspect."""
    fence = Fence(document["_id"], document["lease"]["id"], document["rev"], document["token"])
    assert app.store().run(commits.write_statements([commits.mark_alone(fence, app.store().now(), 0)]))["n"] == 1


def test_a_fenced_worker_changes_nothing(app: Streamline) -> None:
    """A worker that continues after its lease was removed must not overwrite the new lease holder's results."""
    entered, go = threading.Event(), threading.Event()

    def work(ctx: Any) -> str:
        if ctx.attempt == 1:
            entered.set()
            go.wait(10)
            ctx.set("from", "the first")
            return "the first"
        return "the second"

    workflow = app.workflow("w", steps={"work": work, "next": lambda ctx: ctx.get_output("work")})
    run = workflow.start({})

    async def play() -> None:
        async with Pool(app) as pool:
            await pool.until(entered.is_set)
            take_over(app, run.id)
            go.set()
            await pool.until(lambda: present(workflow.get(run.id)).status == "done")

    asyncio.run(play())
    stored = present(workflow.get(run.id))
    check_invariants([stored.to_dict()])
    assert (stored.output, stored.context, stored.step("work").output) == ("the second", {}, "the second")


def test_one_fenced_run_among_a_hundred_does_not_affect_the_others(app: Streamline) -> None:
    entered, go = threading.Event(), threading.Event()

    async def work(ctx: Any) -> int:
        if ctx.input == 0:
            entered.set()
        while not go.is_set():
            await asyncio.sleep(0.005)
        return int(ctx.input)

    workflow = app.workflow("w", steps={"work": work})
    runs = workflow.start_many(range(30))

    async def play() -> None:
        async with Pool(app) as pool:
            await pool.until(entered.is_set)
            await asyncio.to_thread(take_over, app, runs[0].id)
            go.set()
            await pool.until_idle()

    asyncio.run(play())
    assert [present(workflow.get(run.id)).output for run in runs] == list(range(30))
    assert [present(workflow.get(run.id)).step("work").attempts for run in runs] == [2] + [1] * 29


def test_a_step_may_take_longer_than_the_lease(make_app: Callable[..., Streamline]) -> None:
    app = make_app(lease_s=0.5)
    workflow = app.workflow("w", steps={"slow": lambda ctx: time.sleep(1.2), "next": lambda ctx: ctx.signal.aborted})
    run = workflow.start()
    run_until_idle(app, recover_every_s=0.05)
    run = present(workflow.get(run.id))
    assert (run.status, run.step("slow").attempts, run.document["crashes"]) == ("done", 1, 0)


def test_a_heartbeat_renews_the_lease_soon(make_app: Callable[..., Streamline]) -> None:
    app = make_app(lease_s=30)
    ends: list[Any] = []

    def beat(ctx: Any) -> None:
        before = app.runs.find_one({"_id": ctx.run_id})["lease"]["expiresAt"]
        ctx.heartbeat()
        deadline = time.monotonic() + 5
        while app.runs.find_one({"_id": ctx.run_id})["lease"]["expiresAt"] == before:
            assert time.monotonic() < deadline
        ends.append(True)

    workflow = app.workflow("w", steps={"beat": beat})
    assert workflow.execute(workflow.start().id).status == "done"
    assert ends == [True]


@pytest.mark.parametrize("paused", [False, True])
def test_an_expired_lease_is_recovered_and_counted_once_by_any_number_of_sweeps(app: Streamline, paused: bool) -> None:
    workflow = app.workflow("w", steps={"a": lambda ctx: ctx.attempt})
    run = workflow.start()
    store = app.store()
    store.run(claims.claim_run(run.id, None, "lease", "dead:1:x", 30))
    assert store.run(recovery.recover_expired(3)) == 0, "not before its time"
    app.runs.update_one({"_id": run.id}, [{"$set": {"lease.expiresAt": "$$NOW", "paused": paused}}])
    counts = [store.run(recovery.recover_expired(3)) for _ in range(3)]
    document = app.runs.find_one({"_id": run.id})
    check_invariants([document])
    assert (counts, document["crashes"], document["token"], document["steps"][0]["status"]) == ([1, 0, 0], 1, 2, "pending")
    assert ("wakeAt" in document, "pausedWakeAt" in document) == (not paused, paused)


def test_only_the_leases_of_the_dead_worker_are_released(app: Streamline) -> None:
    workflow = app.workflow("w", steps={"a": lambda ctx: ctx.attempt})
    runs = workflow.start_many(range(4))
    store = app.store()
    for number, run in enumerate(runs):
        store.run(claims.claim_run(run.id, None, f"lease{number}", f"host:{number % 2}:x", 30))
    assert store.run(recovery.release_owner("host:0:x", 3, {"signal": "SIGKILL"})) == 2
    assert app.runs.count_documents({"lease.owner": "host:1:x"}) == 2
    assert app.runs.count_documents({"wakeAt": {"$exists": True}, "crashes": 1}) == 2


def test_lost_workers_use_up_no_retries_and_the_third_fails_the_run(app: Streamline) -> None:
    entered: list[int] = []
    workflow = app.workflow("w", steps={"a": (lambda ctx: entered.append(ctx.attempt), {"retries": 1})})
    survivor, victim = workflow.start(), workflow.start()
    store = app.store()
    for death in range(3):
        for run in (survivor, victim) if death < 2 else (victim,):
            document = store.run(claims.claim_run(run.id, None, f"{run.id}{death}", f"host:{death}:x", 30))
            if death == 2:
                run_alone(app, document)
            assert store.run(recovery.release_owner(f"host:{death}:x", 3, {"signal": "SIGSEGV", "rss_bytes": 5})) == 1
    run = present(workflow.get(victim.id))
    check_invariants([run.to_dict()])
    assert (run.status, present(run.error)["code"], present(run.error)["stepId"]) == ("failed", "WORKER_CRASHED", "a")
    assert "3 workers were lost while they ran step a; the last one, host:2:x: signal SIGSEGV" in present(run.error)["message"]
    assert run.step("a").status == "failed"
    assert workflow.execute(survivor.id).status == "done"
    assert entered == [3], "attempts of lost workers are counted as attempts and use up no retry"


def test_a_result_ends_the_count_of_lost_workers_and_a_failed_attempt_does_not(app: Streamline) -> None:
    def flaky(ctx: Any) -> None:
        if ctx.attempt < 4:
            raise ValueError

    workflow = app.workflow("w", steps={"a": (flaky, {"retries": 5, "retry_delay": 0}), "b": lambda ctx: ctx.sleep(3600)})
    run = workflow.start()
    store = app.store()

    def lose_a_worker() -> int:
        store.run(claims.claim_run(run.id, None, app.env.new_id(), "host:9:x", 30))
        store.run(recovery.release_owner("host:9:x", 3, {}))
        return int(app.runs.find_one({"_id": run.id})["crashes"])

    assert lose_a_worker() == 1
    workflow.execute(run.id)
    assert app.runs.find_one({"_id": run.id})["failures"] == 1
    assert lose_a_worker() == 2
    run_until_idle(app)
    document = app.runs.find_one({"_id": run.id})
    assert (document["status"], document["crashes"], document["failures"]) == ("waiting", 0, 0)


@pytest.mark.slow
def test_a_worker_that_cannot_renew_stops_its_handlers_before_the_lease_runs_out(
    make_app: Callable[..., Streamline], mongod: embedded.EmbeddedServer
) -> None:
    """After its expiry another worker may hold the lease. A frozen server answers nothing, so only the worker's clock shows the expiry."""
    app = make_app(lease_s=1.5)
    entered: list[float] = []
    stopped: list[tuple[float, Any]] = []

    async def hang(ctx: Any) -> str:
        if ctx.attempt > 1:
            return "again"
        entered.append(time.monotonic())
        try:
            await asyncio.sleep(30)
        finally:
            stopped.append((time.monotonic(), ctx.signal.reason))
        return "never"

    workflow = app.workflow("w", steps={"hang": hang})
    run = workflow.start()

    async def play() -> None:
        async with Pool(app, recover_every_s=0.1) as pool:
            while not entered:
                await asyncio.sleep(0.005)
            mongod.suspend()
            try:
                while not stopped:
                    await asyncio.sleep(0.005)
            finally:
                mongod.resume()
            await pool.until(lambda: present(workflow.get(run.id)).status == "done", timeout=30)

    asyncio.run(play())
    assert stopped[0][0] - entered[0] < 1.5
    assert stopped[0][1] == "lease-lost"
    assert (present(workflow.get(run.id)).output, present(workflow.get(run.id)).document["failures"]) == ("again", 0)


def test_a_drain_finishes_the_step_in_progress_and_releases_the_run(app: Streamline) -> None:
    entered: list[str] = []

    def work(ctx: Any) -> str:
        entered.append(ctx.step_id)
        time.sleep(0.15)
        return str(ctx.step_id)

    workflow = app.workflow("w", steps={"a": work, "b": work})
    run = workflow.start()

    async def play() -> None:
        async with Pool(app) as pool:
            await pool.until(lambda: entered)
            pool.workers[0].drain()

    asyncio.run(play())
    document = app.runs.find_one({"_id": run.id})
    check_invariants([document])
    assert (entered, [step["status"] for step in document["steps"]]) == (["a"], ["done", "pending"])
    assert ("wakeAt" in document, document["crashes"], document["steps"][1]["attempts"]) == (True, 0, 0)
    assert workflow.execute(run.id).step("b").attempts == 1


def test_a_stop_fires_the_signals_and_releases_the_runs_uncounted(app: Streamline) -> None:
    reasons: list[Any] = []
    entered: list[str] = []

    def polite(ctx: Any) -> None:
        entered.append("def")
        ctx.signal.wait(10)
        reasons.append(ctx.signal.reason)
        ctx.signal.raise_if_aborted()

    async def polite_async(ctx: Any) -> None:
        entered.append("async")
        try:
            await asyncio.sleep(10)
        finally:
            reasons.append(ctx.signal.reason)

    for name, handler in (("v", polite), ("w", polite_async)):
        app.workflow(name, steps={"a": (handler, {"retries": 1})}).start()

    async def play() -> None:
        async with Pool(app) as pool:
            await pool.until(lambda: len(entered) == 2)
            pool.workers[0].stop(2.0)

    began = time.monotonic()
    asyncio.run(play())
    documents = list(app.runs.find())
    check_invariants(documents)
    assert reasons == ["shutdown"] * 2
    assert [(d["status"], d["crashes"], d["failures"], d["steps"][0]["status"]) for d in documents] == [("running", 0, 0, "pending")] * 2
    assert time.monotonic() - began < 5


def test_a_claim_of_unknown_outcome_is_recovered_when_its_lease_runs_out(make_app: Callable[..., Streamline]) -> None:
    app = make_app(lease_s=0.3)
    workflow = app.workflow("w", steps={"a": lambda ctx: ctx.attempt})
    run = workflow.start()
    app.store().run(claims.claim_runs([run.id], None, "forgotten", "host:1:x", 0.3))

    async def play() -> None:
        async with Pool(app, recover_every_s=0.05) as pool:
            await pool.until(lambda: present(workflow.get(run.id)).status == "done")

    asyncio.run(play())
    assert (present(workflow.get(run.id)).output, present(workflow.get(run.id)).document["crashes"]) == (2, 0)


def test_a_late_copy_of_a_write_changes_nothing(app: Streamline) -> None:
    """A network may deliver a write that its sender has repeated, after all the later writes."""
    workflow = app.workflow("w", steps={name: lambda ctx: 1 for name in ("a", "b", "c")})
    run = workflow.start()
    store = app.store()
    document = store.run(claims.claim_run(run.id, None, "lease", "host:1:x", 30))
    copies = []
    for place in range(2):
        fence = Fence(run.id, "lease", document["rev"], document["token"])
        change = transitions.advance(document, place, place, {}, store.now())
        copies.append(commits.commit(fence, change, store.now(), 0))
        assert store.run(commits.write_statements([copies[-1]]))["n"] == 1
        apply(document, change)
    before = app.runs.find_one({"_id": run.id})
    assert store.run(commits.write_statements(copies))["n"] == 0
    assert app.runs.find_one({"_id": run.id}) == before
    assert before["currentStepId"] == "c"


@pytest.mark.slow
def test_a_run_that_its_worker_claims_again_is_kept_by_the_new_claim(make_app: Callable[..., Streamline]) -> None:
    """The task of the old claim still cleans up; it must not stop the renewal of the new claim."""
    app = make_app(lease_s=0.8)
    entered = threading.Event()

    async def work(ctx: Any) -> int:
        if ctx.attempt == 1:
            entered.set()
            try:
                await asyncio.sleep(30)
            finally:
                await asyncio.sleep(0.3)
        await asyncio.sleep(1.6)
        return int(ctx.attempt)

    workflow = app.workflow("w", steps={"work": work})
    run = workflow.start()

    async def play() -> None:
        async with Pool(app, recover_every_s=0.05) as pool:
            await pool.until(entered.is_set)
            await asyncio.to_thread(take_over, app, run.id)
            pool.workers[0].check_run(run.id)
            await pool.until(lambda: present(workflow.get(run.id)).status == "done")

    asyncio.run(play())
    assert present(workflow.get(run.id)).output == 2


@pytest.mark.parametrize("where", ["behind the claim", "before the thread"])
def test_no_handler_is_entered_past_the_deadline_of_its_lease(make_app: Callable[..., Streamline], where: str) -> None:
    """A worker that was suspended between its claim and the handler may have lost the lease meanwhile."""
    system = system_env()
    stood_still: list[float] = []

    class Clock:
        now = staticmethod(system.clock.now)

        @staticmethod
        def monotonic() -> float:
            if where == "before the thread" and threading.current_thread().name.startswith("streamline-handler") and not stood_still:
                stood_still.append(60.0)
            return system.clock.monotonic() + sum(stood_still)

    def probe(point: str) -> None:
        if where == "behind the claim" and point == "claim.after" and not stood_still:
            stood_still.append(60.0)

    app = make_app(env=replace(system, clock=Clock(), probe=probe), lease_s=30)
    entered: list[int] = []
    workflow = app.workflow("w", steps={"a": lambda ctx: entered.append(ctx.attempt)})
    run = workflow.start()
    run_until_idle(app)
    document = app.runs.find_one({"_id": run.id})
    assert (document["status"], entered, document["token"], document["crashes"]) == ("done", [1], 2, 0), (
        "released uncounted, and claimed again"
    )


def test_a_handler_is_stopped_before_its_lease_can_run_out_though_no_renewal_is_answered(make_app: Callable[..., Streamline]) -> None:
    """After the expiry another worker may run the same step. Only the clock shows the holder that it is near."""
    system = system_env()
    jumps: list[float] = []

    class Clock:
        now = staticmethod(system.clock.now)

        @staticmethod
        def monotonic() -> float:
            return system.clock.monotonic() + sum(jumps)

    class SilentStore(AsyncStore):
        async def run(self, op: Op, session: Any = None) -> Any:
            if op.name == "renew":
                await asyncio.Event().wait()
            return await super().run(op, session)

    # Each tick of the lease keeper comes at once.
    app = make_app(env=replace(system, clock=Clock(), async_sleep=lambda _: asyncio.sleep(0)), lease_s=30)
    reasons: list[Any] = []

    async def work(ctx: Any) -> str:
        if ctx.attempt == 1:
            jumps.append(26.5)  # of 30 s, of which nine tenths may be used
            try:
                await asyncio.wait_for(asyncio.Event().wait(), 3)
            finally:
                reasons.append(ctx.signal.reason)
        return "again"

    workflow = app.workflow("w", steps={"work": (work, {"retries": 1})})
    run = workflow.start()

    async def play() -> None:
        app.connections.use(SilentStore(app.where, app.env))
        async with Pool(app) as pool:
            await pool.until(lambda: present(workflow.get(run.id)).status in ("done", "failed"))

    asyncio.run(play())
    stored = present(workflow.get(run.id))
    assert reasons == ["lease-lost"]
    assert (stored.output, stored.document["failures"], stored.document["crashes"]) == ("again", 0, 0)
