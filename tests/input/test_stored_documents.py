"""A stored run with one field removed, retyped or null concerns that run alone, in whatever state it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

import pytest
from damaged_runs import DAMAGES, Damaged, damaged_copies, runs_in_every_state, working
from workers import Pool

from streamline_pool import Streamline, Workflow
from streamline_pool.client.event_delivery import finishing_broadcasts
from streamline_pool.client.run_lists import listing_runs
from streamline_pool.domain.errors import WorkflowError
from streamline_pool.protocol.run_lifecycle import get_run
from streamline_pool.protocol.run_list import RunFilter
from support import present

SETTLED_S = 3.0
CLAIMS_MAX = 12
"""Claims of one run: more would be a loop. A run has three steps, two attempts, and may lose its worker twice."""


SAYING_SO = ("DATA_CORRUPTION", "VERSION_MISMATCH", "WORKER_CRASHED", "STEP_FAILED", "MAX_RETRIES_EXCEEDED")
"""Codes of a damaged run that failed. The last three: its input or its attempts were damaged, so its handler has failed."""


def work_among(app: Streamline, workflow: Workflow, damaged: Sequence[Damaged], *, timeout: float) -> None:
    """Workers and sweeps work until healthy runs, stored before and after the damaged ones, have ended, and then a while longer."""
    neighbours = [workflow.start("neighbour", priority=priority).id for priority in (-5, 0)]
    app.runs.insert_many([each.document for each in damaged], ordered=False)
    neighbours += [workflow.start("neighbour", priority=priority).id for priority in (0, 5, -9)]

    async def work() -> None:
        async with Pool(app, workers=2, recover_every_s=0.05) as pool:
            await pool.until(
                lambda: app.runs.count_documents({"_id": {"$in": neighbours}, "status": "done"}) == len(neighbours), timeout=timeout
            )
            await pool.until(lambda: not app.runs.count_documents({"lease.owner": {"$regex": "^test"}}), timeout=timeout)
            late = await asyncio.to_thread(workflow.start, "neighbour")
            await pool.until(lambda: app.runs.find_one({"_id": late.id, "status": "done"}), timeout=timeout)
            # A run that has just slept or failed is due at the end of any work. One that is never claimed still is after this.
            with suppress(AssertionError, TimeoutError):
                await pool.until(lambda: not app.runs.count_documents(at_work(app)), timeout=SETTLED_S)

    asyncio.run(work())


def at_work(app: Streamline) -> dict[str, Any]:
    """A filter of runs that are held, or are due and have not ended."""
    due = {"wakeAt": {"$lt": app.store().now()}, "paused": {"$ne": True}, "status": {"$nin": ["done", "failed", "cancelled"]}}
    return {"$or": [{"lease.owner": {"$regex": "^test"}}, due]}


def check_each(app: Streamline, damaged: Sequence[Damaged]) -> None:
    """Each damaged run has ended, or is in a state from which it goes on, or its reader is told what is wrong with it."""
    complaints: list[tuple[Any, ...]] = []
    for each in damaged:
        (found,) = app.store().run(get_run(None, each.document["_id"]))
        token = found.get("token")
        if (
            isinstance(token, int)
            and token - max(0, each.document["token"] if isinstance(each.document.get("token"), int) else 0) > CLAIMS_MAX
        ):
            complaints.append((each[:3], "claimed again and again", token))
        try:
            run = app.get_run(each.document["_id"])
        except WorkflowError as exc:
            if exc.code != "DATA_CORRUPTION" or "\n" in exc.message or each.document["_id"] not in exc.message:
                complaints.append((each[:3], "unclear", str(exc)))
            continue
        assert run is not None
        if (
            run.status == "failed"
            and each.state != "failed"
            and present(run.error)["code"]
            not in ("DATA_CORRUPTION", "WORKER_CRASHED", "STEP_FAILED", "VERSION_MISMATCH", "MAX_RETRIES_EXCEEDED")
        ):
            complaints.append((each[:3], "failed without saying so", run.error))
        due_at = found.get("wakeAt")
        if not run.is_terminal and isinstance(due_at, datetime) and due_at < app.store().now() and not run.paused:
            complaints.append((each[:3], "due, and not claimed", {key: found.get(key) for key in ("status", "lane", "queue", "lease")}))
    assert not complaints, "\n".join(map(str, [len(complaints), *complaints[:25]]))


CALLS: tuple[Callable[[Streamline, str], Any], ...] = (
    lambda app, run_id: app.pause_run(run_id),
    lambda app, run_id: app.resume_run(run_id),
    lambda app, run_id: app.resume_run(run_id, 1),
    lambda app, run_id: app.send_event("news", 1, run_id=run_id),
    lambda app, run_id: app.rewind_run(run_id, "first"),
    lambda app, run_id: app.cancel_run(run_id),
)


def check_calls(app: Streamline, damaged: Sequence[Damaged]) -> None:
    """Every call on a damaged run works, or raises an error of ours that a repetition would not help."""
    for each in damaged:
        for call in CALLS:
            try:
                call(app, each.document["_id"])
            except WorkflowError as exc:
                assert not exc.context.get("transient"), (each[:3], exc)
    app.send_event("news", 1)
    app.store().drive(finishing_broadcasts(app.services))
    assert app.store().drive(listing_runs(RunFilter(), limit=10_000)).after is None


def every_damage(app: Streamline, workflow: Workflow) -> list[Damaged]:
    return [each for state, document in runs_in_every_state(app, workflow).items() for each in damaged_copies(state, document)]


def test_a_damaged_run_concerns_itself_alone(make_app: Callable[..., Streamline]) -> None:
    """A sample: every field in one state, with one damage each. Another run of the same batch must not suffer from any."""
    app = make_app(lease_s=5.0)
    workflow = working(app)
    sample = every_damage(app, workflow)[::97]
    work_among(app, workflow, sample, timeout=20)
    check_each(app, sample)
    check_calls(app, sample[::5])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_of_every_field_in_every_state_concerns_that_run_alone(make_app: Callable[..., Streamline], damage: str) -> None:
    """As above, with every field at every depth, in every state."""
    app = make_app(lease_s=2.0)
    workflow = working(app)
    damaged = [each for each in every_damage(app, workflow) if each.damage == damage]
    work_among(app, workflow, damaged, timeout=200)
    check_each(app, damaged)
    check_calls(app, damaged)
