"""Parallel tasks in steps on the real server: in handlers of both kinds, ended by a cancel from another process; the example."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pool_process import running
from programs import run_python
from workers import Pool, check_invariants, run_until_idle

from streamline_pool import Streamline, execute_parallel, execute_parallel_sync
from streamline_pool.supervisor.cli.app_loader import import_app
from support import REPOSITORY, eventually, present

POOL_APP = """
import asyncio, os
from pathlib import Path
from streamline_pool import Streamline, execute_parallel, execute_parallel_sync

app = Streamline()
folder = Path(os.environ["MARKS"])

def task(kind, place):
    async def work():
        mark = folder / f"{kind}-{place}"
        (folder / f"{kind}-{place}-entered").touch()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            (folder / f"{kind}-{place}-stopped").touch()
    return work

async def in_the_loop(ctx):
    await execute_parallel([task("async", 0), task("async", 1)], mode="all_settled")

def on_a_thread(ctx):
    execute_parallel_sync([task("def", 0), task("def", 1)], mode="all_settled")

app.workflow("async", steps={"a": in_the_loop})
app.workflow("def", steps={"a": on_a_thread})
"""


def handler_of(kind: str, tasks: Callable[[Any], list[Any]], **options: Any) -> Callable[[Any], Any]:
    """A handler of that kind that runs `tasks(ctx)` in parallel."""

    async def work(ctx: Any) -> Any:
        return await execute_parallel(tasks(ctx), **options)

    return work if kind == "async def" else lambda ctx: execute_parallel_sync(tasks(ctx), **options)


@pytest.mark.parametrize("kind", ["async def", "def"])
def test_handlers_run_several_tasks_at_once(app: Streamline, kind: str) -> None:
    async def double(ctx: Any) -> int:
        ctx.set("seen", True)
        return int(ctx.input) * 2

    def tasks(ctx: Any) -> list[Any]:
        return [lambda: ctx.input, lambda: double(ctx), lambda: ctx.idempotency_key]

    workflow = app.workflow("w", steps={"a": handler_of(kind, tasks), "b": lambda ctx: [*ctx.get_output("a"), ctx.context["seen"]]})
    runs = workflow.start_many(range(20))
    run_until_idle(app, workers=2)
    for number, stored in enumerate(workflow.get(one.id) for one in runs):
        assert (present(stored).status, present(stored).output) == ("done", [number, 2 * number, f"{present(stored).id}:a", True])
        assert [step.attempts for step in present(stored).steps] == [1, 1]
        check_invariants([present(stored).to_dict()])


@pytest.mark.parametrize("kind", ["async def", "def"])
def test_a_failed_task_fails_the_attempt_and_a_timeout_says_which(app: Streamline, kind: str) -> None:
    async def refuse() -> None:
        raise ValueError("no such source")

    async def quick() -> None:
        return

    def tasks(ctx: Any) -> list[Any]:
        return [lambda: asyncio.sleep(30), refuse] if ctx.input == "refuse" else [quick, lambda: asyncio.sleep(30)]

    workflow = app.workflow("w", steps={"a": (handler_of(kind, tasks, timeout=0.3), {"retries": 1})})
    refused, late = (workflow.execute(workflow.start(what).id) for what in ("refuse", "wait"))
    assert (refused.status, present(refused.error)["type"], present(refused.error)["message"]) == ("failed", "ValueError", "no such source")
    assert (late.status, present(late.error)["type"]) == ("failed", "TimeoutError")
    assert present(late.error)["message"] == "tasks[1] took longer than its timeout of 0.3 s"


@pytest.mark.parametrize("mode", ["all", "all_settled", "race", "any"])
@pytest.mark.parametrize("kind", ["async def", "def"])
def test_a_sleep_in_a_task_ends_the_handler_and_stops_the_others(app: Streamline, kind: str, mode: str) -> None:
    """If the sleep were taken for a failed task, the step would be retried and the run would not sleep."""
    stopped: list[int] = []

    async def other() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            stopped.append(1)

    async def leave(ctx: Any) -> None:
        await asyncio.sleep(0)
        ctx.sleep(3600)

    workflow = app.workflow("w", steps={"a": handler_of(kind, lambda ctx: [other, lambda: leave(ctx), other], mode=mode)})
    stored = workflow.execute(workflow.start().id)
    assert (stored.status, stored.step("a").status, present(stored.step("a").waiting_for)["type"]) == ("waiting", "waiting", "timer")
    assert stopped == [1, 1]


@pytest.mark.parametrize("kind", ["async def", "def"])
def test_a_step_that_runs_out_of_time_stops_its_tasks(app: Streamline, kind: str) -> None:
    """Otherwise the tasks would still work during the next attempt."""
    stopped: list[int] = []

    async def work() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            stopped.append(1)

    handler = handler_of(kind, lambda ctx: [work, work])
    workflow = app.workflow("w", steps={"a": (handler, {"timeout": 0.2, "retries": 1})})
    started = workflow.start()

    async def play() -> None:
        async with Pool(app) as pool:
            await pool.until(lambda: present(workflow.get(started.id)).is_terminal and len(stopped) == 2)

    asyncio.run(play())
    assert present(present(workflow.get(started.id)).error)["code"] == "STEP_TIMEOUT"


def test_a_stubborn_task_of_a_cancelled_run_does_not_end_its_worker(app: Streamline, caplog: pytest.LogCaptureFixture) -> None:
    """The task must be abandoned before its handler counts as stuck, because a stuck handler replaces the whole worker."""
    entered, released = asyncio.Event(), asyncio.Event()

    async def stubborn() -> None:
        entered.set()
        while not released.is_set():
            try:
                await released.wait()
            except asyncio.CancelledError:
                continue

    workflow = app.workflow("w", steps={"a": handler_of("async def", lambda ctx: [stubborn])})
    started = workflow.start()

    async def play() -> None:
        async with Pool(app) as pool:
            await pool.until(entered.is_set)
            await asyncio.to_thread(workflow.cancel, started.id)
            pool.workers[0].check_run(started.id)
            await pool.until(lambda: not pool.statuses()[0].in_flight)
            assert pool.statuses()[0].recycle is None
            released.set()

    with caplog.at_level(logging.WARNING, "streamline_pool"):
        asyncio.run(play())
    assert [record.getMessage() for record in caplog.records if record.name.startswith("streamline_pool")] == ["parallel_task_left_behind"]


def test_a_cancel_from_another_process_stops_the_tasks_of_handlers_of_both_kinds(
    make_app: Callable[..., Streamline], mongodb_uri: str, database: str, tmp_path: Path
) -> None:
    """A cancelled run must not continue to spend money in the background."""
    marks = tmp_path / "marks"
    marks.mkdir()
    app = make_app()
    workflows = [app.workflow(kind, steps={"a": lambda ctx: None}) for kind in ("async", "def")]

    def marked(what: str) -> set[str]:
        return {path.name.removesuffix(f"-{what}") for path in marks.glob(f"*-{what}")}

    all_tasks = {"async-0", "async-1", "def-0", "def-1"}
    environ = {"MARKS": str(marks)}
    with running(tmp_path, POOL_APP, mongodb_uri, "--workers", "2", database=database, environ=environ) as pool:
        pool.ready()
        runs = [workflow.start() for workflow in workflows]
        eventually(lambda: marked("entered") == all_tasks)
        for workflow, started in zip(workflows, runs, strict=True):
            workflow.cancel(started.id)
        eventually(lambda: marked("stopped") == all_tasks)
        assert pool.logged("parallel_task_left_behind") == pool.logged("handler_stuck") == []
    assert [present(workflow.get(started.id)).status for workflow, started in zip(workflows, runs, strict=True)] == ["cancelled"] * 2


# --- the example -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_example_runs_alone(tmp_path: Path) -> None:
    said = run_python(str(REPOSITORY / "examples" / "parallel.py"), folder=tmp_path)
    assert re.search(r"^asked 6 suppliers in \d\.\d s; 4 made an offer$", said, re.MULTILINE)
    assert "  dogwood: ConnectionError('dogwood does not answer')\n" in said
    assert "  elm: TimeoutError('tasks[4] took longer than its timeout of 0.5 s')\n" in said
    assert "is done: {'supplier': 'birch', 'price': 29.5, 'carrier': 'by air'}" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_example_is_an_application_of_the_pool(
    monkeypatch: pytest.MonkeyPatch, make_app: Callable[..., Streamline], mongodb_uri: str, database: str, tmp_path: Path
) -> None:
    monkeypatch.chdir(REPOSITORY)
    example, threads = import_app("examples.parallel:app")
    assert (list(example.workflows), threads) == (["purchase"], [])
    app = make_app()
    runs = app.workflow("purchase", steps={"ask": lambda ctx: None, "ship": lambda ctx: None}).start_many([None] * 10)
    options = ["--workers", "2", "--burst"]
    with running(tmp_path, "from examples.parallel import app", mongodb_uri, *options, database=database) as pool:
        assert pool.exit_code(timeout=40) == 0, pool.log_text
    outputs = [document["output"] for document in app.runs.find()]
    assert outputs == [{"supplier": "birch", "price": 29.5, "carrier": "by air"}] * len(runs)
