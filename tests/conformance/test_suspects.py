"""Suspects: runs that fail if they lose one more worker. Each runs alone in its worker, so that no other run convicts it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from workers import Pool, check_invariants, run_until_idle

from streamline_pool import Run, StepOptions, Streamline
from streamline_pool.protocol import recovery
from support import present

SUSPECT = 2  # lost workers of a run that the next one convicts


class Company:
    """Which handlers of one process are at work at the same time. After its first step a suspect is none any more."""

    def __init__(self) -> None:
        self.now: dict[str, str] = {}  # run id -> step id
        self.beside: dict[str, set[str]] = {}  # run id -> the others that were in a handler while it was in its first

    def enter(self, ctx: Any) -> None:
        for other, step_id in self.now.items():
            if step_id == "one":
                self.beside[other].add(ctx.run_id)
        if ctx.step_id == "one":
            self.beside[ctx.run_id] = set(self.now)
        self.now[ctx.run_id] = ctx.step_id

    def leave(self, ctx: Any) -> None:
        del self.now[ctx.run_id]


def accuse(app: Streamline, runs: Iterable[Run]) -> set[str]:
    """As if these runs had lost workers. Yields their ids."""
    run_ids = {run.id for run in runs}
    app.runs.update_many({"_id": {"$in": list(run_ids)}}, {"$set": {"crashes": SUSPECT}})
    return run_ids


@pytest.mark.parametrize("kind", ["def", "async"])
def test_a_suspect_runs_beside_no_other_run(make_app: Callable[..., Streamline], kind: str) -> None:
    """A run beside it that has never been seen before may kill the worker, and the suspect would be convicted for it."""
    app, company = make_app(concurrency=20), Company()

    async def work_async(ctx: Any) -> None:
        company.enter(ctx)
        await asyncio.sleep(0.01)
        company.leave(ctx)

    def work(ctx: Any) -> None:
        company.enter(ctx)
        ctx.signal.wait(0.01)
        company.leave(ctx)

    handler: Any = work_async if kind == "async" else work
    workflow = app.workflow("w", steps={"one": handler, "two": handler})
    first, accused, last = workflow.start_many(range(10)), workflow.start_many(range(4)), workflow.start_many(range(10))
    suspects = accuse(app, accused)
    run_until_idle(app)
    documents = list(app.runs.find())
    check_invariants(documents)
    assert {(document["status"], document["crashes"]) for document in documents} == {("done", 0)}
    assert {step["attempts"] for document in documents for step in document["steps"]} == {1}
    assert {run_id: company.beside[run_id] for run_id in suspects} == {run_id: set() for run_id in suspects}
    assert all(company.beside[run.id] for run in [*first, *last]), "the others do run beside each other"


def test_a_suspect_is_innocent_of_a_death_that_it_did_not_cause_alone(app: Streamline) -> None:
    """Its worker dies while the suspect waits for the other runs of this worker to end their steps."""
    entered: list[str] = []

    async def work(ctx: Any) -> None:
        entered.append(ctx.run_id)
        await asyncio.sleep(30)

    workflow = app.workflow("w", steps={"work": work})
    fresh = workflow.start()

    async def play() -> str:
        async with Pool(app) as pool:
            await pool.until(lambda: entered)
            suspect = await workflow.start_async()
            await asyncio.to_thread(accuse, app, [suspect])
            await pool.until(lambda: "lease" in app.runs.find_one({"_id": suspect.id}))
            assert entered == [fresh.id]
            owner = app.runs.find_one({"_id": suspect.id})["lease"]["owner"]
            assert await app.store_async().run(recovery.release_owner(owner, 3, {"signal": "SIGKILL"})) == 2
            found = app.runs.find_one({"_id": suspect.id})
            assert (found["status"], found["crashes"]) == ("running", 3), "it stays a suspect"
            pool.workers[0].stop(0.1)
            return suspect.id

    asyncio.run(play())


def test_a_suspect_that_kills_its_worker_alone_is_convicted(app: Streamline) -> None:
    entered: list[str] = []

    async def work(ctx: Any) -> None:
        entered.append(ctx.run_id)
        await asyncio.sleep(30)

    workflow = app.workflow("w", steps={"work": work})
    suspect = workflow.start()
    accuse(app, [suspect])

    async def play() -> None:
        async with Pool(app) as pool:
            await pool.until(lambda: entered)
            owner = app.runs.find_one({})["lease"]["owner"]
            await app.store_async().run(recovery.release_owner(owner, 3, {"signal": "SIGKILL"}))
            pool.workers[0].stop(0.1)

    asyncio.run(play())
    run = present(workflow.get(suspect.id))
    check_invariants([run.to_dict()])
    assert present(run.error)["code"] == "WORKER_CRASHED"
    assert "3 workers were lost" in present(run.error)["message"]


def test_suspects_end_though_new_runs_never_stop_coming_and_these_go_on_meanwhile(make_app: Callable[..., Streamline]) -> None:
    """A suspect that waits for an empty worker would wait for ever under a steady load; suspects that follow each other would stop it."""
    app = make_app(concurrency=4)
    ended: list[str] = []

    async def work(ctx: Any) -> None:
        await asyncio.sleep(0.01)
        ended.append(ctx.run_id)
        if ctx.input == "again" and not suspects <= set(ended):
            await workflow.start_async("again")

    workflow = app.workflow("w", steps={"work": work})
    workflow.start_many(["again"] * 20)
    suspects = accuse(app, workflow.start_many(range(4)))
    run_until_idle(app, workers=2, timeout=60)
    assert {document["status"] for document in app.runs.find()} == {"done"}
    places = [place for place, run_id in enumerate(ended) if run_id in suspects]
    assert places[-1] - places[0] > 4, "between suspects, other runs have their turn"


def test_only_the_worker_of_a_suspect_stops_claiming(make_app: Callable[..., Streamline]) -> None:
    """The other workers of the pool go on with everything else."""
    app = make_app(concurrency=4)
    holds, go = asyncio.Event(), asyncio.Event()

    async def work(ctx: Any) -> None:
        if ctx.input == "suspect":
            holds.set()
            await go.wait()

    workflow = app.workflow("w", steps={"work": work})
    suspects = accuse(app, [workflow.start("suspect")])

    async def play() -> None:
        async with Pool(app, workers=2) as pool:
            await pool.until(holds.is_set)
            others = await asyncio.to_thread(workflow.start_many, range(30))
            await pool.until(lambda: app.runs.count_documents({"status": "done"}) == len(others))

            def busy() -> list[tuple[int, bool, bool]]:
                active = [status for status in pool.statuses() if status.in_flight]
                return [(status.in_flight, status.idle, status.running[0][0] in suspects) for status in active]

            await pool.until(lambda: busy() == [(1, False, True)])  # a worker detaches its last run a moment after the write
            go.set()
            await pool.until_idle()

    asyncio.run(play())


def test_a_suspect_that_waits_holds_no_worker(app: Streamline) -> None:
    """A worker that is kept free for a suspect that sleeps for days would be of no use to the pool."""
    workflow = app.workflow("w", steps={"sleep": lambda ctx: ctx.sleep(3600), "end": lambda ctx: None})
    suspect = workflow.start()
    accuse(app, [suspect])
    others = workflow.start_many(range(3))
    (status,) = run_until_idle(app)
    assert present(workflow.get(suspect.id)).status == "waiting"
    assert {present(workflow.get(run.id)).status for run in others} == {"waiting"}
    assert status.in_flight == 0


def test_a_drain_releases_a_suspect_that_waits_to_be_alone(app: Streamline) -> None:
    entered: list[str] = []

    async def work(ctx: Any) -> None:
        entered.append(ctx.run_id)
        await asyncio.sleep(0.3)

    workflow = app.workflow("w", steps={"work": work})
    fresh = workflow.start()

    async def play() -> str:
        async with Pool(app) as pool:
            await pool.until(lambda: entered)
            suspect = await workflow.start_async()
            await asyncio.to_thread(accuse, app, [suspect])
            await pool.until(lambda: "lease" in app.runs.find_one({"_id": suspect.id}))
            pool.workers[0].drain()
            return suspect.id

    suspect_id = asyncio.run(play())
    assert entered == [fresh.id]
    document = app.runs.find_one({"_id": suspect_id})
    check_invariants([document])
    assert (document["crashes"], document["steps"][0]["attempts"], "wakeAt" in document) == (SUSPECT, 0, True)


def test_a_cancelled_suspect_that_waits_to_be_alone_is_let_go(app: Streamline) -> None:
    entered: list[str] = []
    go = asyncio.Event()

    async def work(ctx: Any) -> None:
        entered.append(ctx.run_id)
        await go.wait()

    workflow = app.workflow("w", steps={"work": work})
    fresh = workflow.start()

    async def play() -> None:
        async with Pool(app) as pool:
            await pool.until(lambda: entered)
            suspect = await workflow.start_async()
            await asyncio.to_thread(accuse, app, [suspect])
            await pool.until(lambda: pool.statuses()[0].in_flight == 2)
            await workflow.cancel_async(suspect.id)
            pool.workers[0].check_run(suspect.id)
            await pool.until(lambda: pool.statuses()[0].in_flight == 1)
            go.set()
            await pool.until_idle()

    asyncio.run(play())
    assert entered == [fresh.id]


@pytest.mark.parametrize("kind", ["def", pytest.param("async", marks=pytest.mark.slow)])
def test_a_suspect_is_not_alone_beside_a_handler_that_goes_on_after_its_timeout(app: Streamline, kind: str) -> None:
    """The handler's run has failed, and counts no more. If the handler kills the worker, the suspect would be convicted for it."""
    go = threading.Event()
    at_work: list[str] = []
    beside: list[list[str]] = []

    def hang(ctx: Any) -> None:
        at_work.append(ctx.run_id)
        go.wait(20)
        at_work.clear()

    async def hang_async(ctx: Any) -> None:
        at_work.append(ctx.run_id)
        while not go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
        at_work.clear()

    handler: Any = hang if kind == "def" else hang_async
    options: StepOptions = {"timeout": 0.2, "retries": 1}
    hanging = app.workflow("hanging", steps={"hang": (handler, options)})
    workflow = app.workflow("w", steps={"work": lambda ctx: beside.append(list(at_work))})
    hung = hanging.start()

    async def play() -> None:
        async with Pool(app) as pool:
            try:
                await pool.until(lambda: at_work)
                suspect = await workflow.start_async()
                await asyncio.to_thread(accuse, app, [suspect])
                await pool.until(lambda: present(hanging.get(hung.id)).status == "failed")
                await pool.until(lambda: pool.statuses()[0].recycle)  # the handler counts as stuck
                await asyncio.sleep(0.2)  # a wrong step would be entered within a few milliseconds
                assert beside == []
            finally:
                go.set()
            await pool.until(lambda: beside == [[]])
            await pool.until_idle()

    asyncio.run(play())


def test_a_worker_reports_that_it_is_kept_for_a_suspect(app: Streamline) -> None:
    """Otherwise it gets the runs whose timers fire as well, which wait there for the suspect."""
    go = asyncio.Event()

    async def work(ctx: Any) -> None:
        await go.wait()

    accuse(app, [app.workflow("w", steps={"work": work}).start()])

    async def play() -> None:
        async with Pool(app) as pool:
            await pool.until(lambda: pool.statuses()[0].in_flight)
            assert pool.statuses()[0].kept
            go.set()
            await pool.until_idle()
            assert not pool.statuses()[0].kept

    asyncio.run(play())
