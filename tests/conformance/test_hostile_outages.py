"""A database that is unreachable for hours, or that refuses single writes."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from workers import run_until_idle

from streamline_pool import Context, Settings, Streamline, create_hook
from streamline_pool.chaos.link import Link
from streamline_pool.config.env import system_env
from streamline_pool.domain.errors import PayloadTooLargeError, StoreUnavailableError, ValidationError
from streamline_pool.embedded import EmbeddedServer
from streamline_pool.engine.group_commit import GroupCommitter
from streamline_pool.engine.write_outcome import WriteOutcome
from streamline_pool.protocol.operations import Fence, Find, Op, Statement
from streamline_pool.worker.worker import Worker

SLOW_MACHINE_S = 5.0
"""The limit of a socket alone is 20 seconds."""

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


@pytest.mark.parametrize(
    "save",
    [
        pytest.param(lambda ctx: ctx.checkpoint(1), id="checkpoint"),
        pytest.param(lambda ctx: create_hook(ctx, "?"), id="hook", marks=pytest.mark.slow),
    ],
)
def test_a_save_blocks_the_loop_no_longer_than_the_lease(mongod: EmbeddedServer, database: str, save: Callable[[Context], Any]) -> None:
    """The database takes everything and answers nothing. No other handler of the worker can be stopped while its loop is blocked."""
    link = Link([f"127.0.0.1:{mongod.port}"])
    blocked_s: list[float] = []

    async def saving(ctx: Context) -> str:
        if not blocked_s:
            link.order("swallow")
            begun = time.monotonic()
            try:
                save(ctx)
            finally:
                blocked_s.append(time.monotonic() - begun)
                link.order("pass")
        save(ctx)
        return "saved"

    uri = f"mongodb://{link.addresses[0]}/?replicaSet=rs0"
    with closing(link), Streamline(uri, database=database, settings=Settings(lease_s=2)) as app:
        workflow = app.workflow("w", steps={"save": saving})
        run_id = workflow.start().id
        run_until_idle(app)
        assert workflow.execute(run_id).output == "saved"
    assert len(blocked_s) == 1
    assert blocked_s[0] < 2 + SLOW_MACHINE_S


def test_a_worker_that_has_failed_thousands_of_times_still_claims(app: Streamline) -> None:
    """As above, in the claim loop: if it ended, the worker would end."""
    app.workflow("w", steps={"one": lambda ctx: None})
    worker = Worker(app, Settings(), owner="test:1:x", index=0, total=1)
    for _ in range(3_000):
        worker.store_answered(False)
    assert 0 < worker._retry_pause_s() <= 1
