"""A checkpoint that the database does not answer: its outcome is settled before the next write, and no worker counts as lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from faulty_store import OUTAGE, Faults, FaultyAsyncStore, hasty_env, install_faults
from workers import Pool, check_invariants, run_until_idle

from streamline_pool import Streamline, create_hook
from streamline_pool.domain.errors import StoreUnavailableError
from streamline_pool.protocol.operations import Op
from streamline_pool.storage.store import AsyncStore
from support import present


class LastingFaults(Faults):
    """Faults that no repetition within the call could outlast."""

    @staticmethod
    def error(op: Op) -> StoreUnavailableError:
        return StoreUnavailableError(f"{op.name}: a fault of this test")


@pytest.mark.parametrize("save", ["checkpoint", "hook"])
@pytest.mark.parametrize("handler", ["raises", "returns", "saves again"])
@pytest.mark.parametrize("kind", ["lost", "unknown", "late"])
def test_an_unanswered_checkpoint_interrupts_the_attempt(make_app: Callable[..., Streamline], kind: str, handler: str, save: str) -> None:
    """The lease was left to expire, and the run counted a lost worker, though the worker was well."""
    app = make_app(env=hasty_env())
    store = install_faults(app)
    seen: list[Any] = []

    def store_something(ctx: Any, value: str) -> None:
        ctx.checkpoint(value) if save == "checkpoint" else create_hook(ctx, value)

    async def work(ctx: Any) -> str:
        if ctx.attempt > 1:
            seen.append(ctx.get_checkpoint())
            return "again"
        store.faults = LastingFaults(kind, 1)
        try:
            store_something(ctx, "one")
        except StoreUnavailableError:
            if handler == "raises":
                raise
            if handler == "saves again":
                ctx.checkpoint("two")
        return "at once"

    workflow = app.workflow("w", steps={"work": (work, {"retries": 1}), "end": lambda ctx: ctx.get_output("work")})
    run = workflow.start()
    run_until_idle(app)
    store.late_applied()
    stored = present(workflow.get(run.id))
    check_invariants([stored.to_dict()])
    assert stored.output == ("again" if handler == "raises" else "at once")
    assert (stored.document["failures"], stored.document["crashes"], stored.document["token"]) == (0, 0, 2 if handler == "raises" else 1)
    assert seen == ([] if handler != "raises" else ["one"] if save == "checkpoint" else [None]), "what was acknowledged late is kept"


def test_a_def_handler_waits_for_its_checkpoint(make_app: Callable[..., Streamline]) -> None:
    """Its thread may wait, so it hears of an outage only by its signal."""
    app = make_app(env=hasty_env())
    stores: list[FaultyAsyncStore] = []

    def work(ctx: Any) -> int:
        stores[0].faults = LastingFaults("unknown", 1, OUTAGE)
        ctx.checkpoint("one")
        return int(ctx.attempt)

    workflow = app.workflow("w", steps={"work": (work, {"retries": 1})})
    run = workflow.start()

    async def play() -> None:
        stores.append(app.connections.use(FaultyAsyncStore(app.where, app.env)))
        async with Pool(app) as pool:
            await pool.until(lambda: present(workflow.get(run.id)).status == "done")

    asyncio.run(play())
    stored = present(workflow.get(run.id))
    assert "commit_runs" in stores[0].faults.hit
    assert (stored.output, stored.document["failures"], stored.document["crashes"]) == (1, 0, 0)


def test_a_checkpoint_that_is_stored_while_its_attempt_is_aborted_is_kept(make_app: Callable[..., Streamline]) -> None:
    """What follows from the attempt stores the whole step. Decided too early, it overwrote the checkpoint."""
    app = make_app()
    contexts: list[Any] = []

    class WaitingStore(AsyncStore):
        async def run(self, op: Op, session: Any = None) -> Any:
            if op.name == "commit_runs" and len(contexts) == 1:
                await contexts[0].signal  # the handler's time is over
            return await super().run(op, session)

    def work(ctx: Any) -> Any:
        contexts.append(ctx)
        if ctx.attempt == 1:
            ctx.checkpoint("one")
        return ctx.get_checkpoint()

    workflow = app.workflow("w", steps={"work": (work, {"timeout": 0.1, "retries": 2, "retry_delay": 0})})
    run = workflow.start()

    async def play() -> None:
        app.connections.use(WaitingStore(app.where, app.env))
        async with Pool(app) as pool:
            await pool.until(lambda: present(workflow.get(run.id)).status in ("done", "failed"))

    asyncio.run(play())
    assert present(workflow.get(run.id)).output == "one"
