"""Where two parts of the engine meet: timers and suspects, answers in files and subscribers, control operations and reads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from cli_shell import Shell
from workers import Pool, run_until_idle

from streamline_pool import Streamline, create_hook
from streamline_pool.config.asyncio_tasks import end_tasks
from streamline_pool.config.env import system_env
from streamline_pool.protocol.payloads import EXTERNAL_BYTES
from support import eventually

LARGE = b"x" * (EXTERNAL_BYTES + 1)


def received(app: Streamline, *names: str) -> list[tuple[str, Any]]:
    """The events that subscribers in this process receive, as (name, data)."""
    events: list[tuple[str, Any]] = []
    for name in names:
        app.events.on(name, lambda event: events.append((event.name, event.data)))
    return events


async def alone(pool: Pool) -> None:
    """Wait until the worker is idle. From then on only the test sends wake-ups."""
    await pool.until(lambda: pool.statuses()[0].idle)
    assert pool._steward is not None
    await end_tasks([pool._steward])


def make_suspects(app: Streamline, run_ids: list[str]) -> None:
    """Make these runs due now, and such that the next lost worker convicts them."""
    sets = {"crashes": 2, "wakeAt": app.store().now(), "status": "running"}
    app.runs.update_many({"_id": {"$in": run_ids}}, {"$set": sets})


def test_subscribers_get_the_value_of_a_large_answer_that_came_before_its_wait(app: Streamline) -> None:
    """The worker that ends the wait never had the value: the run's inbox holds only the name of a file."""

    def ask(ctx: Any) -> None:
        app.resume_hook(create_hook(ctx, "send the file").token, LARGE)
        ctx.wait("send the file")

    flow = app.workflow("flow", steps={"ask": ask, "end": lambda ctx: 1})
    events = received(app, "step:completed")
    flow.execute(flow.start().id)
    assert eventually(lambda: len(events) == 2 and events) == [("step:completed", LARGE), ("step:completed", 1)]


@pytest.mark.parametrize("paused", [False, True])
def test_subscribers_get_the_value_of_a_large_answer_that_is_the_output_of_the_run(app: Streamline, paused: bool) -> None:
    """The run is finished by a worker that has entered no step of it."""
    flow = app.workflow("flow", steps={"ask": lambda ctx: ctx.wait("?")})
    run = flow.execute(flow.start().id)
    flow.resume(run.id, LARGE)
    if paused:
        flow.pause(run.id)
        flow.resume(run.id)
    events = received(app, "workflow:completed")
    run_until_idle(app)
    assert eventually(lambda: events) == [("workflow:completed", LARGE)]
    assert flow.wait_for(run.id, timeout=5).output == LARGE


def test_suspects_whose_timers_fire_together_do_not_share_a_worker(make_app: Callable[..., Streamline]) -> None:
    """Timer claims run beside one another: the one that is under way may bring a suspect that is not active yet."""
    sharing: list[int] = []
    at_once = 0
    second: list[str] = []
    workers: list[Any] = []

    def probe(point: str) -> None:
        if point == "claim.before" and second and workers:
            run_id = second.pop()
            asyncio.get_running_loop().call_soon(workers[0].timers_fired, [run_id])

    app = make_app(env=replace(system_env(), probe=probe), concurrency=16)

    async def handler(ctx: Any) -> None:
        nonlocal at_once
        at_once += 1
        sharing.append(at_once)
        await asyncio.sleep(0.2)
        at_once -= 1

    flow = app.workflow("flow", steps={"work": handler})

    async def work() -> None:
        async with Pool(app) as pool:
            await alone(pool)
            ids = [run.id for run in await flow.start_many_async([1, 2], start_at=timedelta(hours=1))]
            await asyncio.to_thread(make_suspects, app, ids)
            second.append(ids[1])
            workers.append(pool.workers[0])
            pool.workers[0].timers_fired([ids[0]])
            await pool.until(lambda: all(app.runs.find_one({"_id": run_id})["status"] == "done" for run_id in ids))

    asyncio.run(work())
    assert sharing == [1, 1]


@pytest.mark.parametrize("concurrency", [1, 16])
def test_a_worker_whose_wake_ups_named_only_suspects_becomes_idle_afterwards(make_app: Callable[..., Streamline], concurrency: int) -> None:
    """It kept a backlog and did not poll, so it was never idle again and got no wake-ups: new runs waited for ever."""
    app = make_app(concurrency=concurrency)
    flow = app.workflow("flow", steps={"work": lambda ctx: 1})

    async def work() -> None:
        async with Pool(app) as pool:
            await alone(pool)
            ids = [run.id for run in await flow.start_many_async([1, 2], start_at=timedelta(hours=1))]
            await asyncio.to_thread(make_suspects, app, ids)
            pool.workers[0].timers_fired(ids)
            await pool.until(lambda: app.runs.count_documents({"status": "done"}) == 2)
            await pool.until(lambda: pool.statuses()[0].idle)

    asyncio.run(work())


def test_a_wake_up_during_a_timer_claim_that_brings_nothing_is_not_lost(make_app: Callable[..., Streamline]) -> None:
    """The only place was promised to that claim. When the place was free again, the announced run was not claimed."""
    announced: list[tuple[Any, str]] = []

    def probe(point: str) -> None:
        if point == "claim.before" and announced:
            worker, run_id = announced.pop()
            asyncio.get_running_loop().call_soon(worker.wake_up, run_id)

    app = make_app(env=replace(system_env(), probe=probe), concurrency=1)
    flow = app.workflow("flow", steps={"work": lambda ctx: 1})

    async def work() -> None:
        async with Pool(app) as pool:
            await alone(pool)
            gone, run = await flow.start_many_async([1, 2])
            await flow.pause_async(gone.id)
            announced.append((pool.workers[0], run.id))
            pool.workers[0].timers_fired([gone.id])
            await pool.until(lambda: app.runs.find_one({"_id": run.id})["status"] == "done")

    asyncio.run(work())


def test_a_client_that_sees_a_state_through_app_runs_can_act_on_it_at_once(app: Streamline) -> None:
    """Queries saw what the API did not see yet: an answer right after `waiting` failed, because no step seemed to wait."""
    flow = app.workflow("flow", steps={"ask": lambda ctx: ctx.wait("?"), "end": lambda ctx: ctx.get_output("ask")})

    def answer_all() -> int:
        runs = [flow.start() for _ in range(40)]
        for number, run in enumerate(runs):
            while app.runs.find_one({"_id": run.id, "steps.status": "waiting"}) is None:
                pass
            flow.resume(run.id, number)
        return len(runs)

    async def work() -> None:
        async with Pool(app) as pool:
            assert await asyncio.to_thread(answer_all) == 40
            await pool.until_idle()

    asyncio.run(work())
    assert app.runs.count_documents({"status": "done"}) == 40
    assert app.runs.read_concern.level == "majority"


def test_app_runs_is_read_within_transactions_and_snapshots(app: Streamline) -> None:
    """There the session's own read concern applies, and another one is an error."""
    flow = app.workflow("flow", steps={"work": lambda ctx: 1})
    run = flow.execute(flow.start().id)
    with app.client.start_session() as session, session.start_transaction():
        flow.start(session=session)
        assert app.runs.count_documents({}, session=session) == 2
        assert app.runs.distinct("_id", {"status": "done"}, session=session) == [run.id]
        session.abort_transaction()
    with app.client.start_session(snapshot=True) as session:
        assert len(list(app.runs.find({}, session=session))) == 1
    assert app.runs.estimated_document_count() == 1


def test_a_cancelled_run_is_not_paused_any_more(app: Streamline) -> None:
    """It can never be resumed. Lists showed it as `cancelled (paused)`."""
    flow = app.workflow("flow", steps={"ask": lambda ctx: ctx.wait("?")})
    run = flow.execute(flow.start().id)
    flow.pause(run.id, reason="lunch")
    cancelled = flow.cancel(run.id, reason="enough")
    assert (cancelled.status, cancelled.paused) == ("cancelled", False)
    assert "pauseReason" not in cancelled.to_dict()


@pytest.mark.parametrize(
    "damage",
    [
        {"status": "failed", "error": "boom"},
        {"lease": "mine"},
        {"status": "waiting", "steps.0.status": "waiting", "steps.0.waitingFor": "x"},
        {"steps.0.error": "boom"},
    ],
)
def test_the_command_shows_a_run_that_another_program_has_damaged(shell: Shell, app: Streamline, damage: dict[str, Any]) -> None:
    """One such run made the whole list fail."""
    run = app.workflow("asking", steps={"ask": lambda ctx: ctx.wait("?")}).start()
    app.runs.update_one({"_id": run.id}, {"$set": damage})
    for words in (("list",), ("show", run.id)):
        shown = shell("runs", *words)
        assert (shown.returncode, run.id in shown.stdout) == (0, True), shown.stderr
