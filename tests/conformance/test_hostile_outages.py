"""A database that is unreachable for hours, or that refuses single writes."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
from workers import run_until_idle

from streamline_pool import Context, Settings, Streamline, create_hook
from streamline_pool.chaos.link import Link
from streamline_pool.client.run_lists import listing_runs
from streamline_pool.config.env import system_env
from streamline_pool.domain.errors import PayloadTooLargeError, StoreUnavailableError, ValidationError
from streamline_pool.engine.group_commit import GroupCommitter
from streamline_pool.engine.write_outcome import WriteOutcome
from streamline_pool.protocol.operations import Fence, Find, Op, Statement
from streamline_pool.protocol.run_list import RunFilter
from streamline_pool.worker.worker import Worker

LEASE_S = 4.0
SLOW_MACHINE_S = 4.0
"""The limit of a socket alone is 20 seconds, and eight handlers that waited one after the other would take at least 7 seconds more."""

STATEMENT = Statement(Fence("run", "lease", 0, 1), {"q": {"paused": {"$ne": True}}, "u": {"$set": {}}}, 100)


class Scripted:
    """A store that answers each write as the test's script says."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self._answer = answer

    async def run(self, op: Op) -> Any:
        return [{"_id": "run", "lease": {"id": "lease"}, "rev": 0, "token": 1}] if isinstance(op, Find) else self._answer()


def outcome(answer: Callable[[], Any], slept: list[float]) -> WriteOutcome:
    """The outcome of one statement, with back-offs that take no time."""

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def write() -> WriteOutcome:
        committer = GroupCommitter(Scripted(answer), dataclasses.replace(system_env(), async_sleep=sleep))  # type: ignore[arg-type]
        committer.start()
        try:
            return await asyncio.wait_for(committer.write(STATEMENT), 10)
        finally:
            await committer.close()

    return asyncio.run(write())


def test_a_write_refused_for_an_unknown_reason_delays_the_others_only_briefly() -> None:
    """Such writes, repeated for ever in both senders, would stop every run of the worker (code 388 is an example)."""
    slept: list[float] = []
    with pytest.raises(ValidationError, match="too large") as raised:
        outcome(lambda: {"n": 0, "writeErrors": [{"index": 0, "code": 388, "errmsg": "transaction is too large"}]}, slept)
    assert not isinstance(raised.value, PayloadTooLargeError)
    assert sum(slept) < 5


def test_a_write_is_repeated_through_an_outage_of_hours() -> None:
    """A back-off that doubles without a limit is too large for a float after a thousand attempts, and the write would be lost."""
    tries = 0

    def answer() -> Any:
        nonlocal tries
        tries += 1
        if tries < 3_000:
            raise StoreUnavailableError("away", transient=True)
        return {"n": 0, "writeErrors": [{"index": 0, "code": 121, "errmsg": "it is back"}]}

    slept: list[float] = []
    with pytest.raises(ValidationError, match="it is back"):
        outcome(answer, slept)
    assert max(slept) <= 1


@pytest.fixture
def behind(link: Link, database: str) -> Callable[..., Streamline]:
    """Makes an application that reaches the database only through `link`."""
    return lambda **settings: Streamline(f"mongodb://{link.addresses[0]}/?replicaSet=rs0", database=database, settings=Settings(**settings))


@pytest.mark.parametrize(
    ("save", "runs"),
    [
        pytest.param(lambda ctx: ctx.checkpoint(1), 8, id="checkpoint"),
        pytest.param(lambda ctx: create_hook(ctx, "?"), 1, id="hook", marks=pytest.mark.slow),
    ],
)
def test_saves_block_the_loop_no_longer_than_the_lease(
    link: Link, behind: Callable[..., Streamline], save: Callable[[Context], Any], runs: int
) -> None:
    """The database takes everything and answers nothing. No handler of the worker can be stopped while its loop is blocked.

    Handlers that are ready at once do not wait one after the other.
    """
    ready = asyncio.Event()
    entered: list[str] = []
    instants: list[float] = []

    async def saving(ctx: Context) -> str:
        entered.append(ctx.run_id)
        if len(entered) == runs:
            link.order("swallow")
            ready.set()
        await ready.wait()
        if entered.count(ctx.run_id) == 1:
            instants.append(time.monotonic())
            try:
                save(ctx)
            finally:
                instants.append(time.monotonic())
                if len(instants) == 2 * runs:
                    link.order("pass")
        save(ctx)
        return "saved"

    with behind(lease_s=LEASE_S) as app:
        workflow = app.workflow("w", steps={"save": saving})
        run_ids = [run.id for run in workflow.start_many([None] * runs)]
        run_until_idle(app)
        assert [workflow.execute(run_id).output for run_id in run_ids] == ["saved"] * runs
    assert len(instants) == 2 * runs
    assert max(instants) - min(instants) < LEASE_S + SLOW_MACHINE_S


def test_a_call_whose_connection_is_dead_goes_by_another_one_in_time(link: Link, behind: Callable[..., Streamline]) -> None:
    """What is sent is lost, and no error tells of it: the first try must not use up the time that the call may block the loop."""
    with behind() as app:
        store = app.store()
        assert store.drive_within(3.0, listing_runs(RunFilter(), limit=1)).runs == []
        link.order("half-open")
        assert store.drive_within(3.0, listing_runs(RunFilter(), limit=1)).runs == []


def test_a_worker_that_has_failed_thousands_of_times_still_claims(app: Streamline) -> None:
    """As above, in the claim loop: if it ended, the worker would end."""
    app.workflow("w", steps={"one": lambda ctx: None})
    worker = Worker(app, Settings(), owner="test:1:x", index=0, total=1)
    for _ in range(3_000):
        worker.store_answered(False)
    assert 0 < worker._retry_pause_s() <= 1
