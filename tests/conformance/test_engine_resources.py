"""A process that has no thread left, or whose clock fails: its runs go on, fenced, and no lost worker is counted."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from stored_runs import stored
from workers import Pool, check_invariants

from streamline_pool import Streamline
from support import present


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
