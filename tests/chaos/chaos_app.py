"""The application of the chaos tests, whose handlers record their entries, and an audit of what the database accepted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from pymongo import MongoClient

from streamline_pool import Streamline

__all__ = ["APP", "acceptances", "assert_nothing_is_wedged", "entries_overlap"]

APP = '''
import asyncio, os, time
from streamline_pool import Streamline

app = Streamline()


def evidence():
    return app.store().collection("evidence")


def enter(ctx):
    """One document per entry into a handler, with the times of its begin and of its end, if it has ended."""
    key = f"{ctx.run_id}/{ctx.step_id}/{ctx.attempt}/{os.getpid()}"
    evidence().insert_one({"_id": key, "run": ctx.run_id, "step": ctx.step_id, "pid": os.getpid(), "entered": time.monotonic()})
    return key


def leave(key):
    evidence().update_one({"_id": key}, {"$set": {"left": time.monotonic()}})


busy = app.workflow("busy", defaults={"retries": 1})


@busy.step
async def first(ctx):
    await asyncio.sleep(ctx.input["seconds"])
    return ctx.idempotency_key


@busy.step
def second(ctx):
    time.sleep(ctx.input["seconds"])
    return ctx.idempotency_key


@busy.step
async def third(ctx):
    await asyncio.sleep(ctx.input["seconds"])
    return ctx.idempotency_key


witness = app.workflow("witness", defaults={"retries": 1})


@witness.step
def alone(ctx):
    key = enter(ctx)
    ctx.signal.wait(ctx.input["seconds"])
    leave(key)
    return os.getpid()


@witness.step
def after(ctx):
    key = enter(ctx)
    leave(key)
    return os.getpid()


napper = app.workflow("napper")


@napper.step
async def nap(ctx):
    ctx.sleep(ctx.input["seconds"])


@napper.step
async def woken(ctx):
    return time.monotonic()
'''


@contextmanager
def acceptances(app: Streamline) -> Iterator[Counter[tuple[str, str]]]:
    """Count within the block, by the server's change stream, how often a result of each (run, step) was accepted.

    The counter is filled at the end of the block. The stream is made from the oplog, so it contains every write.
    """
    counted: Counter[tuple[str, str]] = Counter()
    with MongoClient[dict[str, Any]](app.where.uri) as client:
        runs = client[app.where.database][app.where.collection("runs")]
        runs.insert_one({"_id": "marker-start"})
        with runs.watch(full_document="updateLookup", max_await_time_ms=200) as stream:
            yield counted
            runs.insert_one({"_id": "marker-end"})
            while (change := stream.next())["documentKey"]["_id"] != "marker-end":
                if change["operationType"] == "update":
                    for step in _done_steps(change):
                        counted[change["documentKey"]["_id"], step] += 1
        runs.delete_many({"_id": {"$in": ["marker-start", "marker-end"]}})


def _done_steps(change: dict[str, Any]) -> list[str]:
    """Places of the steps whose status this update has set to `done`."""
    done = []
    for path, value in change["updateDescription"]["updatedFields"].items():
        parts = path.split(".")
        if parts[0] != "steps" or len(parts) < 2:
            continue
        became = value if len(parts) == 3 and parts[2] == "status" else value.get("status") if isinstance(value, dict) else None
        if became == "done":
            done.append(parts[1])
    return done


def entries_overlap(app: Streamline) -> list[tuple[str, str]]:
    """Pairs of entries into handlers of one run that overlap in time, by the host's monotonic clock that all processes share."""
    overlaps = []
    by_run: dict[str, list[dict[str, Any]]] = {}
    for entry in app.store().collection("evidence").find():
        by_run.setdefault(entry["run"], []).append(entry)
    for entries in by_run.values():
        entries.sort(key=lambda entry: entry["entered"])
        for earlier, later in pairwise(entries):
            # An entry without an end belongs to a killed process, and so it ended before.
            if earlier.get("left", 0.0) > later["entered"]:
                overlaps.append((earlier["_id"], later["_id"]))
    return overlaps


def assert_nothing_is_wedged(app: Streamline) -> None:
    """Every run that has not ended must have a lease or a time from which it may be claimed (docs/architecture.md, section 5)."""
    wedged = list(
        app.runs.find(
            {
                "status": {"$nin": ["done", "failed", "cancelled"]},
                "lease": {"$exists": False},
                "wakeAt": {"$exists": False},
            }
        )
    )
    assert not wedged, wedged[:3]
    assert not list(app.runs.find({"status": {"$in": ["done", "failed"]}, "endedAt": None}).limit(3))


def log_line(text: str) -> None:
    """A figure for the reader of the test's output."""
    print(f"[{datetime.now(UTC):%H:%M:%S}] {os.getpid()} {text}")
