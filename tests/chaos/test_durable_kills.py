"""Durable functions while workers are killed at random: every effect explained, no run lost or wedged, each result as without faults."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos_app import acceptances, assert_nothing_is_wedged, log_line
from pool_client import loaded_app
from pool_process import running

from streamline_pool import Streamline
from support import eventually

pytestmark = pytest.mark.chaos

RUNS = 500
KILLS = 40
APP = '''
import asyncio, os, time
from streamline_pool import Streamline, current_step

app = Streamline()


def note(value):
    """The effect of a call: one document per entry, and the key by which another system would know a repetition."""
    step = current_step()
    app.store().collection("effects").insert_one({"key": step.idempotency_key, "pid": os.getpid()})
    time.sleep(0.05)
    return value


async def note_async(value):
    return await asyncio.to_thread(note, value)


order = app.workflow("order")


@order.main
async def run_order(ctx):
    number = ctx.input
    total = 0
    for part in range(4):
        total += await ctx.step(f"part-{part}", note if part % 2 else note_async, number + part)
    first = await ctx.wait("first")
    total += sum(await ctx.map("each", note_async, [number] * 4, concurrency=2))
    await ctx.sleep(2.5)
    second = await ctx.wait("second")
    both = await asyncio.gather(ctx.step("left", note_async, 1), ctx.step("right", note, 2))
    return [total, first, second, both]
'''
CALLS = 10  # of a run, with an effect


@pytest.fixture
def app(mongodb_uri: str, database: str) -> Iterator[Streamline]:
    """The application of the pool in the test's own process, as a client."""
    with loaded_app(APP, mongodb_uri, database) as app:
        yield app


@pytest.mark.timeout(400)
def test_killed_workers_lose_no_call_of_a_durable_function(app: Streamline, mongodb_uri: str, database: str, tmp_path: Path) -> None:
    options = ("--workers", "4", "--lease", "5", "--restart-budget", "1000", "--max-crashes", "100")
    flow = app.workflows["order"]
    with running(tmp_path, APP, mongodb_uri, *options, database=database) as pool:
        pool.ready()
        with acceptances(app) as accepted:
            runs = flow.start_many(list(range(RUNS)))
            kills = play(app)
            eventually(lambda: app.runs.count_documents({"status": "done"}) == RUNS, timeout=120)
        pool.signal(signal.SIGTERM)
        assert pool.exit_code() == 0
    for number, run in enumerate(runs):
        output = present_output(app, run.id)
        assert output == [4 * number + 6 + 4 * number, "first", "second", [1, 2]], run.id
    effects = Counter(effect["key"] for effect in app.store().collection("effects").find({}))
    log_line(f"{kills} kills, {len(effects)} calls, {sum(effects.values())} entries, {max(effects.values())} of one call at most")
    assert kills >= 5, "the runs were over before much was killed"
    assert len(effects) == RUNS * CALLS
    assert {key: n for key, n in accepted.items() if n != 1} == {}, "a call's result was accepted twice"
    assert_nothing_is_wedged(app)


def present_output(app: Streamline, run_id: str) -> Any:
    document = app.runs.find_one({"_id": run_id})
    assert document is not None
    return document["output"]


def play(app: Streamline) -> int:
    """Answer the waits, and kill a worker every now and then. Returns the number of kills when every wait is answered."""
    kills, next_kill = 0, time.monotonic()
    answered = 0
    while answered < 2 * RUNS:
        for document in app.runs.find({"status": "waiting", "currentStepId": {"$in": ["wait", "wait#2"]}}, {"currentStepId": 1}):
            app.resume_run(document["_id"], "first" if document["currentStepId"] == "wait" else "second")
            answered += 1
        if kills < KILLS and time.monotonic() >= next_kill:
            kills += kill_one(app)
            next_kill = time.monotonic() + random.uniform(0.2, 0.6)
        time.sleep(0.02)
    return kills


def kill_one(app: Streamline) -> int:
    held = list(app.runs.find({"lease.expiresAt": {"$exists": True}}, {"lease.owner": 1}))
    if not held:
        return 0
    os.kill(int(random.choice(held)["lease"]["owner"].split(":")[1]), signal.SIGKILL)
    return 1
