"""`execute`: runs inside the calling program. Covers its end, its forks, and callers that stop waiting."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import pytest
from workers import check_invariants

from streamline_pool import Streamline, WorkflowNotFoundError
from streamline_pool.storage.server_clock import ServerClock
from support import REPOSITORY, present


def test_execute_of_a_run_that_cannot_be_claimed_returns_it_as_stored_at_once(app: Streamline) -> None:
    entered: list[str] = []
    workflow = app.workflow("w", steps={"a": lambda ctx: entered.append(ctx.run_id)})
    draft = workflow.start(start_at=3600)
    paused, leased, cancelled, done = workflow.start_many([1, 2, 3, 4])
    app.runs.update_one({"_id": paused.id}, {"$set": {"paused": True}})
    app.runs.update_one({"_id": leased.id}, {"$set": {"lease": {"id": "x", "expiresAt": leased.created_at}}, "$unset": {"wakeAt": ""}})
    workflow.cancel(cancelled.id)
    workflow.execute(done.id)
    began = time.monotonic()
    statuses = [workflow.execute(run.id).status for run in (draft, paused, leased, cancelled, done)]
    assert (statuses, entered) == (["draft", "running", "running", "cancelled", "done"], [done.id])
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("ahead_ms", [50, 300])
def test_a_run_is_executed_although_this_program_reads_the_servers_clock_ahead(
    app: Streamline, monkeypatch: pytest.MonkeyPatch, ahead_ms: int
) -> None:
    monkeypatch.setattr(ServerClock, "now", ahead_of(ServerClock.now, ahead_ms))
    workflow = app.workflow("w", steps={"a": lambda ctx: 1})
    assert workflow.execute(workflow.start().id).status == "done"


def ahead_of(now: Callable[[ServerClock], datetime], ahead_ms: int) -> Callable[[ServerClock], datetime]:
    return lambda clock: now(clock) + timedelta(milliseconds=ahead_ms)


def test_another_workflows_run_does_not_exist(app: Streamline) -> None:
    mine, other = app.workflow("mine", steps={"a": lambda ctx: 1}), app.workflow("other", steps={"a": lambda ctx: 1})
    run = other.start()
    assert mine.get(run.id) is None
    for call in (mine.execute, mine.cancel, mine.wait_for):
        with pytest.raises(WorkflowNotFoundError, match="WORKFLOW_NOT_FOUND"):
            call(run.id)
    assert present(other.get(run.id)).status == "running"


def test_an_unknown_run_is_not_found(app: Streamline) -> None:
    workflow = app.workflow("w", steps={"a": lambda ctx: 1})
    for call in (workflow.execute, workflow.cancel, workflow.wait_for, app.cancel_run):
        with pytest.raises(WorkflowNotFoundError) as caught:
            call("unknown")
        assert (caught.value.http_status, caught.value.context["run_id"]) == (404, "unknown")


def test_a_run_executed_by_two_at_once_is_driven_by_one(app: Streamline) -> None:
    entered: list[int] = []

    def slow(ctx: Any) -> None:
        entered.append(1)
        time.sleep(0.05)

    workflow = app.workflow("w", steps={"a": slow})
    for _ in range(5):
        run = workflow.start()
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(workflow.execute, [run.id] * 4))
    assert len(entered) == 5


def test_execute_stops_where_the_run_stops(app: Streamline) -> None:
    def fail(ctx: Any) -> None:
        raise ValueError("once")

    workflow = app.workflow("w", steps={"nap": lambda ctx: ctx.sleep(3600)})
    napping = workflow.execute(workflow.start().id)
    assert (napping.status, napping.step("nap").status, present(napping.step("nap").waiting_for)["type"]) == ("waiting", "waiting", "timer")
    backing_off = app.workflow("b", steps={"a": (fail, {"retry_delay": 60})})
    run = backing_off.execute(backing_off.start().id)
    assert (run.status, run.step("a").status, run.step("a").attempts) == ("waiting", "pending", 1)
    assert run.step("a").retry_after is not None


def test_an_execution_whose_caller_is_cancelled_releases_the_run_uncounted(app: Streamline) -> None:
    """A task that was only cancelled with its caller would leave a lease that is renewed for ever."""
    signals: list[Any] = []

    async def hang(ctx: Any) -> None:
        signals.append(ctx.signal)
        if ctx.attempt == 1:
            await asyncio.sleep(60)

    workflow = app.workflow("w", steps={"a": hang})
    run = workflow.start()

    async def work() -> None:
        call = asyncio.create_task(workflow.execute_async(run.id))
        while not signals:  # a cancellation before that may meet the claim, whose run is then recovered after its lease
            await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        while "wakeAt" not in app.runs.find_one({"_id": run.id}):
            await asyncio.sleep(0.01)
        assert (await workflow.execute_async(run.id)).status == "done"
        await app.close_async()

    asyncio.run(work())
    document = app.runs.find_one({"_id": run.id})
    assert (signals[0].reason, document["crashes"], document["failures"], document["steps"][0]["attempts"]) == ("shutdown", 0, 0, 2)


def test_a_program_that_fails_while_it_executes_a_run_ends(app: Streamline) -> None:
    """`asyncio.run` cancels all tasks. The run's driver waited for a sender that was cancelled before it, and the program never ended."""
    program = f"""
import asyncio
from streamline_pool import Streamline
app = Streamline({app.where.uri!r}, database={app.where.database!r})
entered = asyncio.Event()
async def hang(ctx):
    entered.set()
    await asyncio.sleep(60)
workflow = app.workflow("w", steps={{"a": hang}})
async def main():
    call = asyncio.create_task(workflow.execute_async((await workflow.start_async()).id))
    await entered.wait()
    raise SystemExit(7)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    assert done.returncode == 7, done.stderr


def test_closing_the_app_while_it_executes_ends_the_call_and_keeps_the_run(app: Streamline) -> None:
    entered = threading.Event()

    def slow(ctx: Any) -> str:
        entered.set()
        time.sleep(0.2)
        return "slow"

    workflow = app.workflow("w", steps={"slow": slow, "next": lambda ctx: ctx.get_output("slow")})
    run = workflow.start()
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(workflow.execute, run.id)
        entered.wait(5)
        app.close()
        assert call.result(5).step("slow").output == "slow"
    document = app.runs.find_one({"_id": run.id})
    check_invariants([document])
    assert (document["steps"][0]["status"], document["crashes"]) == ("done", 0)
    assert workflow.execute(run.id).output == "slow", "a closed app opens again on its next use"


def test_shutdown_releases_running_executions(app: Streamline) -> None:
    entered = threading.Event()

    async def hang(ctx: Any) -> None:
        entered.set()
        await asyncio.sleep(60)

    workflow = app.workflow("w", steps={"a": hang})
    run = workflow.start()
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(workflow.execute, run.id)
        entered.wait(5)
        workflow.shutdown(timeout=0.05)
        assert call.result(5).status == "running"
    document = app.runs.find_one({"_id": run.id})
    check_invariants([document])
    assert ("wakeAt" in document, document["crashes"]) == (True, 0)


def test_one_app_works_in_successive_event_loops(app: Streamline) -> None:
    workflow = app.workflow("w", steps={"a": lambda ctx: 1})

    async def work() -> str:
        async with app:
            return str((await workflow.execute_async((await workflow.start_async()).id)).status)

    assert [asyncio.run(work()) for _ in range(3)] == ["done"] * 3
    assert workflow.execute(workflow.start().id).status == "done"


def test_an_app_can_be_used_after_a_fork(mongodb_uri: str, database: str) -> None:
    """Connections and threads belong to the parent; a child that uses them would hang or disturb the parent."""
    program = f"""
import os
from streamline_pool import Streamline
app = Streamline({mongodb_uri!r}, database={database!r})
workflow = app.workflow("w", steps={{"a": lambda ctx: os.getpid()}})
assert workflow.execute(workflow.start().id).output == os.getpid()
pid = os.fork()
run = workflow.execute(workflow.start().id)
assert run.output == os.getpid(), run
app.close()
app.close()
if pid:
    assert os.waitpid(pid, 0)[1] == 0
pid = os.fork()
if not pid:
    app.close()  # nothing of the parent's
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("way", ["sleep", "retry", "wait"])
def test_a_run_that_is_parked_until_an_instant_is_announced_to_the_pools(app: Streamline, way: str) -> None:
    """Without the signal no steward sets a timer, and a short sleep ends with the next sweep, seconds later."""

    def park(ctx: Any) -> None:
        if way == "retry":
            raise ValueError
        ctx.sleep(0.5) if way == "sleep" else ctx.wait("?", timeout=0.5)

    workflow = app.workflow("w", steps={"park": (park, {"retry_delay": 0.5})})
    run = workflow.execute(workflow.start().id)
    document = app.runs.find_one({"_id": run.id})
    sent = app.runs.database["workflow_signals"].find({"kind": "due", "runId": run.id, "wakeAt": document["wakeAt"]})
    assert [(signal["lane"], signal["count"]) for signal in sent] == [(workflow.definition.lane, 1)]
