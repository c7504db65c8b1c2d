"""What is left in memory of a run that has left its worker: nothing that only a full garbage collection can remove."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from streamline_pool import (
    BlockingDurableContext,
    DurableContext,
    NonRetriableError,
    Streamline,
    create_hook,
    current_step,
    execute_parallel,
)
from support import eventually


@contextmanager
def circles() -> Iterator[Counter[str]]:
    """Counts, by type, the objects that became garbage within the block and that reference counts did not free."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found.update(type(one).__name__ for one in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


async def _returns_much(ctx: Any) -> Any:
    return b"x" * 8192


async def _plain(ctx: Any) -> Any:
    return {"attempt": ctx.attempt, "before": ctx.get_output("none")}


def _plain_def(ctx: Any) -> Any:
    return {"input": ctx.input, "attempt": ctx.attempt}


async def _fails_once(ctx: Any) -> Any:
    if ctx.attempt == 1:
        ctx.checkpoint(1)
        raise RuntimeError("the first attempt fails")
    return ctx.get_checkpoint()


async def _fans_out(ctx: Any) -> Any:
    async def task() -> int:
        return 1

    return await execute_parallel([task, task])


async def _falls_asleep(ctx: Any) -> None:
    ctx.sleep(0)


async def _waits(ctx: Any) -> None:
    create_hook(ctx, "an answer")
    try:
        raise ValueError("an error that is handled")
    except ValueError:
        ctx.wait("an answer", timeout=0.001)


def _waits_in_vain(ctx: Any) -> Any:
    try:
        ctx.wait("an answer", timeout=0.001)
    except BaseException:  # noqa: BLE001 -- what the manual tells handlers not to do
        return "swallowed"


@pytest.mark.parametrize("handler", [_plain, _plain_def, _fails_once, _fans_out, _falls_asleep, _waits, _waits_in_vain])
@pytest.mark.slow
def test_a_run_that_has_ended_leaves_no_circle_in_memory(app: Streamline, handler: Callable[[Any], Any]) -> None:
    """Each run kept its document, context and handler's variables until a full collection: 2 000 ended runs in a busy worker."""
    steps = {"large": _returns_much, "do": handler, "last": lambda ctx: len(ctx.get_output("large"))}
    flow = app.workflow("flow", steps=steps, defaults={"retry_delay": 0.001})

    def go_through_a_run() -> None:
        run_id = flow.start().id
        eventually(lambda: flow.execute(run_id).output == 8192)  # it rests when it is to be tried again later, or waits

    go_through_a_run()  # what is made once and kept
    with circles() as found:
        go_through_a_run()

    assert found["ActiveRun"] == found["Context"] == found["Attempt"] == found["Future"] == 0, found


async def _work() -> int:
    return 1


def _refuses() -> None:
    raise NonRetriableError("refused")


def _fails_first() -> int:
    if current_step().attempt == 1:
        raise RuntimeError("the first attempt fails")
    return 1


async def _calls_and_waits(ctx: DurableContext) -> Any:
    await ctx.step("work", _work)
    await ctx.map("each", _work_of, [1, 2])
    await ctx.step("again", _fails_first, retry_delay=0.001)
    return await asyncio.gather(ctx.step("beside", _work), ctx.wait("go on"))


async def _work_of(value: int) -> int:
    return value


async def _fails_in_a_call(ctx: DurableContext) -> None:
    await ctx.step("refused", _refuses)


def _calls_and_waits_def(ctx: BlockingDurableContext) -> Any:
    ctx.step("work", _work)
    ctx.step("again", _fails_first, retry_delay=0.001)
    return ctx.wait("go on")


def _fails_in_a_call_def(ctx: BlockingDurableContext) -> None:
    ctx.step("refused", _refuses)


@pytest.mark.parametrize("main", [_calls_and_waits, _fails_in_a_call, _calls_and_waits_def, _fails_in_a_call_def])
def test_a_durable_function_that_was_left_leaves_no_circle_in_memory(app: Streamline, main: Any) -> None:
    """The function, its ctx, its calls and the errors of these know each other while it runs."""
    flow = app.workflow("flow")
    flow.main(main)

    def go_through_a_run() -> None:
        run = flow.execute(flow.start().id)
        assert run.status in ("waiting", "failed")

    go_through_a_run()  # what is made once and kept
    with circles() as found:
        go_through_a_run()

    kinds = ("ActiveRun", "Calls", "DurableContext", "BlockingDurableContext", "StepContext", "CallAttempt", "Attempt", "Recorder")
    assert not any(found[kind] for kind in kinds), found
