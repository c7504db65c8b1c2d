"""A process that has no thread left, or whose clock fails: its runs go on, fenced, and no lost worker is counted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from stored_runs import stored
from workers import Pool, check_invariants, run_until_idle

from streamline_pool import Streamline
from streamline_pool.config.env import SystemClock, system_env
from streamline_pool.protocol.operations import Op
from streamline_pool.storage.store import AsyncStore
from support import eventually, present


class Threads:
    """Lets threads with a name that begins with `prefix` start, or refuses as the system does at its limit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
        self.exhausted = False
        self.refused = 0
        start = threading.Thread.start

        def start_or_refuse(thread: threading.Thread) -> None:
            if self.exhausted and thread.name.startswith(prefix):
                self.refused += 1
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_or_refuse)


def test_a_run_whose_handler_gets_no_thread_is_released_and_entered_once_later(app: Streamline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor keeps the call that it could not start a thread for: a thread that becomes free must not enter it without a lease."""
    threads = Threads(monkeypatch, "streamline-handler")
    first_entered, go = threading.Event(), threading.Event()
    leases: list[Any] = []

    def work(ctx: Any) -> None:
        if ctx.input == "first":
            first_entered.set()
            go.wait(20)
        else:
            leases.append(stored(app, ctx.run_id).get("lease"))

    workflow = app.workflow("w", steps={"work": work})

    async def play() -> None:
        async with Pool(app) as pool:
            first = workflow.start("first")
            await pool.until(first_entered.is_set)
            threads.exhausted = True
            second = workflow.start("second")
            await pool.until(lambda: pool.statuses()[0].recycle)
            await pool.until(lambda: "lease" not in stored(app, second))
            released = stored(app, second)
            assert (released["crashes"], released["failures"], released["steps"][0]["attempts"]) == (0, 0, 0)
            go.set()
            await pool.until(lambda: present(workflow.get(first.id)).status == "done")
            threads.exhausted = False
            await pool.until(lambda: present(workflow.get(second.id)).status == "done")
            check_invariants([stored(app, second)])

    asyncio.run(play())
    assert threads.refused
    assert len(leases) == 1
    assert leases[0] is not None


class BrokenClock(SystemClock):
    """The system's clock with jumps. A read of it fails once in the asyncio task with the name `fails_in`, as a system call may."""

    def __init__(self) -> None:
        self.fails_in: str | None = None
        self.jumped_s = 0.0

    def monotonic(self) -> float:
        if self.fails_in is not None and (task := asyncio.current_task()) is not None and task.get_name() == self.fails_in:
            self.fails_in = None
            raise OSError(22, "Invalid argument")
        return super().monotonic() + self.jumped_s


class SilentStore(AsyncStore):
    """No renewal is ever answered."""

    async def run(self, op: Op, session: Any = None) -> Any:
        if op.name == "renew":
            await asyncio.Event().wait()
        return await super().run(op, session)


def test_handlers_stop_when_self_fencing_fails_and_self_fencing_goes_on(make_app: Callable[..., Streamline]) -> None:
    """A self-fence that ended silently would let every later handler outlive its lease, beside another worker's."""
    clock = BrokenClock()
    app = make_app(env=replace(system_env(), clock=clock, async_sleep=lambda _: asyncio.sleep(0)), lease_s=30)
    reasons: list[Any] = []

    async def work(ctx: Any) -> str:
        match ctx.attempt:
            case 1:
                clock.fails_in = "self-fence"
            case 2:
                clock.jumped_s += 26.5  # of 30 s, of which nine tenths may be used
            case _:
                return "again"
        try:
            await asyncio.wait_for(asyncio.Event().wait(), 5)
        finally:
            reasons.append(ctx.signal.reason)
        return "too late"

    workflow = app.workflow("w", steps={"work": (work, {"retries": 1})})
    run = workflow.start()

    async def play() -> None:
        app.connections.use(SilentStore(app.where, app.env))
        async with Pool(app) as pool:
            await pool.until(lambda: present(workflow.get(run.id)).is_terminal)

    asyncio.run(play())
    done = present(workflow.get(run.id))
    assert reasons == ["lease-lost", "lease-lost"]
    assert (done.output, done.document["failures"], done.document["crashes"]) == ("again", 0, 0)


def test_leases_are_renewed_after_a_renewal_has_failed_for_any_reason(make_app: Callable[..., Streamline]) -> None:
    clock = BrokenClock()
    app = make_app(env=replace(system_env(), clock=clock), lease_s=0.5)

    async def work(ctx: Any) -> Any:
        clock.fails_in = "renew"
        await asyncio.sleep(0.9)
        return clock.fails_in

    workflow = app.workflow("w", steps={"work": work})
    run = workflow.start()
    run_until_idle(app, recover_every_s=0.05)
    done = present(workflow.get(run.id))
    assert (done.status, done.output, done.step("work").attempts, done.document["crashes"]) == ("done", None, 1, 0)


def test_an_event_for_which_no_thread_can_be_started_affects_no_run(app: Streamline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are published after the write. An error there would leave a finished step with a lease that expires as a lost worker's."""
    threads = Threads(monkeypatch, "streamline-events")
    seen: list[str] = []
    app.events.on("step:completed", lambda event: seen.append(str(event.step_id)))
    workflow = app.workflow("w", steps={"first": lambda ctx: 1, "second": lambda ctx: 2})
    threads.exhausted = True
    done = workflow.execute(workflow.start().id)
    assert (done.status, done.document["crashes"], threads.refused > 0) == ("done", 0, True)
    threads.exhausted = False
    workflow.execute(workflow.start().id)
    eventually(lambda: seen == ["first", "second"] * 2)
