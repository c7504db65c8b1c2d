"""The kit for users' tests: time that jumps, and runs that advance within its calls. Most of these read as users' tests do."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from kit_workflows import DAY, NOWHERE, fine, nap

from streamline_pool import Context, InvalidStateError, Streamline, ValidationError
from streamline_pool.protocol import claims
from streamline_pool.testing import TestKit
from support import present

CLOCKS_AGREE = timedelta(seconds=1)  # the server's clock, and what each of the kit's stores takes for it on a loaded machine


@pytest.fixture
def app(kit: TestKit) -> Streamline:
    return kit.use(Streamline(NOWHERE))


# --- time ----------------------------------------------------------------------------------------------------------


def test_thirty_days_of_sleep_take_moments(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow", steps={"nap": nap(30 * DAY), "after": fine})
    run = kit.run(flow)
    assert (run.status, run.current_step_id) == ("waiting", "nap")
    began = time.monotonic()
    kit.jump(30 * DAY)
    assert time.monotonic() - began < 5
    run = present(flow.get(run.id))
    assert (run.status, run.output) == ("done", "fine")
    assert 30 * DAY <= present(run.ended_at) - present(run.started_at) < 30 * DAY + timedelta(minutes=1)
    assert present(run.step("nap").duration) >= 30 * 86400


def test_nothing_happens_before_its_time(kit: TestKit, app: Streamline) -> None:
    """A kit that ends every sleep, however long, would not detect a wrong duration."""
    flow = app.workflow("flow", steps={"nap": nap(30 * DAY), "after": fine})
    run = kit.run(flow)
    kit.jump(30 * DAY - timedelta(minutes=1))
    assert present(flow.get(run.id)).status == "waiting"
    kit.jump(60)
    assert present(flow.get(run.id)).status == "done"


def test_what_becomes_due_in_a_jump_happens_in_its_order_and_at_its_time(kit: TestKit, app: Streamline) -> None:
    """If all runs went on at the end of the jump only, daily letters would all come at the end of the week."""
    entered: list[tuple[str, datetime]] = []

    def note(name: str) -> Callable[[Context], None]:
        return lambda ctx: entered.append((name, kit.now()))

    steps: dict[str, Any] = {}
    for day in range(1, 4):
        steps |= {f"sleep{day}": nap(DAY), f"letter{day}": note(f"day {day}")}
    daily = app.workflow("daily", steps=steps)
    once = app.workflow("once", steps={"sleep": nap(1.5 * DAY), "letter": note("day 1.5")})
    began = kit.now()
    kit.run(daily)
    kit.run(once)
    kit.jump(7 * DAY)
    assert [name for name, _ in entered] == ["day 1", "day 1.5", "day 2", "day 3"]
    for name, at in entered:
        assert timedelta(0) <= at - began - float(name.removeprefix("day ")) * DAY < timedelta(minutes=1)
    assert timedelta(0) <= kit.now() - began - 7 * DAY < timedelta(minutes=1)


def test_attempts_are_as_far_apart_as_the_back_off_says(kit: TestKit, app: Streamline) -> None:
    at: list[datetime] = []

    def shaky(ctx: Context) -> None:
        at.append(kit.now())
        if len(at) < 4:
            raise ValueError("not yet")

    flow = app.workflow("flow", steps={"shaky": (shaky, {"retries": 4, "retry_delay": 50, "retry_backoff": "fixed"})})
    run = kit.run(flow)
    assert (run.status, run.step("shaky").status) == ("waiting", "pending")
    run = kit.finish(run)
    assert run.status == "done" and len(at) == 4
    assert all(timedelta(seconds=35) <= later - earlier <= timedelta(seconds=70) for earlier, later in itertools.pairwise(at))


@pytest.mark.parametrize("as_instant", [True, False])
def test_a_start_in_a_year_comes_in_a_year(kit: TestKit, app: Streamline, as_instant: bool) -> None:
    flow = app.workflow("flow", steps={"only": fine})
    at = kit.now() + 365 * DAY
    run = kit.run(flow, start_at=at if as_instant else 365 * DAY)
    assert run.status == "draft"
    kit.jump_to(at - timedelta(hours=1))
    assert present(flow.get(run.id)).status == "draft"
    kit.jump_to(at + timedelta(minutes=1))
    assert present(flow.get(run.id)).status == "done"


def test_all_stored_instants_are_of_the_kits_time(kit: TestKit, app: Streamline) -> None:
    """A writer without the offset of 100 days would store a run that ended before it started."""
    kit.jump(100 * DAY)
    flow = app.workflow("flow", steps={"one": fine, "nap": nap(1), "two": fine})
    since = kit.now() - CLOCKS_AGREE
    run = kit.finish(kit.run(flow))
    cancelled = flow.cancel(kit.run(flow).id)
    until = kit.now() + CLOCKS_AGREE
    instants = [run.created_at, run.started_at, run.updated_at, run.ended_at, cancelled.updated_at, cancelled.ended_at]
    instants += [step.started_at for step in run.steps] + [step.ended_at for step in run.steps]
    instants += [event.at for event in kit.events()]
    assert all(since <= present(at) <= until for at in instants)


def test_a_users_text_that_looks_like_the_time_stays_unchanged(kit: TestKit, app: Streamline) -> None:
    """The offset is added to `$$NOW` in operations. The same text in data is data."""
    text: Any = {"said": "$$NOW", "list": ["$$NOW"]}

    def answer(ctx: Context) -> Any:
        ctx.set("set", text)
        ctx.checkpoint(text)
        return text

    kit.jump(DAY)
    flow = app.workflow("flow", steps={"only": answer})
    run = kit.run(flow, text, meta=text, idempotency_key="$$NOW")
    assert run.input == run.output == run.meta == run.context["set"] == text
    run = kit.run(app.workflow("sleeper", steps={"nap": nap(DAY)}))
    assert app.cancel_run(run.id, reason="$$NOW").to_dict()["cancelReason"] == "$$NOW"


def test_a_jump_waits_for_the_handler_that_runs(kit: TestKit, app: Streamline) -> None:
    """Otherwise the jump would end its lease. The run would be recovered as if its worker had died, and entered twice."""
    entered, go_on = threading.Event(), threading.Event()

    def long(ctx: Context) -> None:
        entered.set()
        assert go_on.wait(10)

    flow = app.workflow("flow", steps={"long": long})
    with kit.working():
        run = flow.start()
        assert entered.wait(10)
        jump = threading.Thread(target=kit.jump, args=[DAY])
        before = kit.now()
        jump.start()
        jump.join(0.2)
        assert jump.is_alive() and kit.now() - before < DAY
        go_on.set()
        jump.join(10)
        assert kit.now() - before >= DAY
    stored = present(flow.get(run.id)).to_dict()
    assert (stored["status"], stored["token"], stored["crashes"], stored["steps"][0]["attempts"]) == ("done", 1, 0, 1)


def test_leases_end_at_the_kits_time(kit: TestKit, app: Streamline) -> None:
    """A run of a program that claimed it and died is recovered when its lease expires."""
    flow = app.workflow("flow", steps={"only": fine})
    run = flow.start()
    app.store().run(claims.claim_run(run.id, None, "another", "another:1:1", 60.0))
    kit.jump(59)
    assert present(flow.get(run.id)).status == "running"
    kit.jump(2)
    run = present(flow.get(run.id))
    assert (run.status, run.step("only").attempts) == ("done", 2)


@pytest.mark.slow
def test_a_jump_that_never_arrives_says_so(mongodb_uri: str) -> None:
    """Runs that start each other would keep a test busy for ever. Where the time limit meets the kit decides which error it raises."""
    with TestKit(mongodb_uri, timeout=2) as kit:
        app = kit.use(Streamline(NOWHERE))
        flow = app.workflow("flow", steps={"again": lambda ctx: app.workflows["flow"].start(start_at=1).id})
        flow.start()
        with pytest.raises(TimeoutError, match=r"keep becoming due; jump less far|there is always a due run|still at work"):
            kit.jump(365 * DAY)


def test_time_does_not_go_back(kit: TestKit, app: Streamline) -> None:
    with pytest.raises(ValidationError):
        kit.jump(-1)
    with pytest.raises(ValidationError):
        kit.jump_to(kit.now() - DAY)
    with pytest.raises(ValidationError, match="no time zone"):
        kit.jump_to(datetime(2100, 1, 1))  # noqa: DTZ001 -- what is refused
    with pytest.raises(ValidationError, match="hundred years"):
        kit.jump(101 * 365 * DAY)


# --- work ----------------------------------------------------------------------------------------------------------


def test_runs_advance_within_the_kits_calls_only(kit: TestKit, app: Streamline) -> None:
    """With a worker in the background, every assertion that something has not happened yet would be a race."""
    entered: list[str] = []
    flow = app.workflow("flow", steps={"only": lambda ctx: entered.append(ctx.run_id)})
    first = flow.start()
    kit.settle()
    second = flow.start()
    threads = {thread.name for thread in threading.enumerate()}
    assert not any(name.startswith("streamline-handler") for name in threads)
    assert app.store().run(claims.find_due_before(app.lanes(), kit.now(), 10)) != []
    assert entered == [first.id]
    kit.settle()
    assert entered == [first.id, second.id]


def test_a_handler_may_wait_for_a_run_that_it_has_started(kit: TestKit, app: Streamline) -> None:
    child = app.workflow("child", steps={"only": fine})

    def parent(ctx: Context) -> Any:
        return child.wait_for(child.start().id, timeout=10).output

    assert kit.run(app.workflow("parent", steps={"only": parent})).output == "fine"


def test_code_that_itself_waits_for_runs_works_in_working(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow", steps={"one": fine, "nap": nap(0.05), "two": fine})
    with kit.working():
        assert flow.wait_for(flow.start().id, timeout=10).status == "done"
        assert kit.run(flow).status in ("waiting", "done")
        assert kit.run(kit.use(Streamline(NOWHERE)).workflow("later", steps={"only": fine})).status == "done"


def test_a_workflow_that_is_defined_later_is_worked_on_too(kit: TestKit, app: Streamline) -> None:
    assert kit.run(app.workflow("early", steps={"only": fine})).status == "done"
    assert kit.run(app.workflow("late", steps={"only": fine})).status == "done"


def test_a_call_that_takes_too_long_names_the_running_step(kit: TestKit, app: Streamline) -> None:
    """A test that hangs for ever does not show the reason. After the error, the kit can be used again."""
    go_on = threading.Event()
    flow = app.workflow("flow", steps={"endless": lambda ctx: go_on.wait(20)})
    run = flow.start()
    with pytest.raises(TimeoutError, match=f"run {run.id} at step endless"):
        kit.settle(timeout=0.2)
    go_on.set()
    kit.settle()
    assert present(flow.get(run.id)).status == "done"


def test_finish_says_why_a_run_does_not_end(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow", steps={"only": fine})
    run = kit.run(flow, queue="elsewhere")
    with pytest.raises(InvalidStateError, match="queue elsewhere; name queues in use"):
        kit.finish(run)


def test_the_queues_to_work_on_can_be_named(kit: TestKit) -> None:
    app = kit.use(Streamline(NOWHERE), queues=["default", "elsewhere"])
    flow = app.workflow("flow", steps={"only": fine})
    assert kit.run(flow, queue="elsewhere").status == "done"


def test_events_returns_all_events_published_so_far(kit: TestKit, app: Streamline) -> None:
    """Subscribers get events later, on a thread of their own."""
    ready = threading.Event()
    app.events.once("workflow:started", lambda event: ready.wait(10))
    flow = app.workflow("flow", steps={"one": lambda ctx: ctx.emit("mine", 1), "two": fine})
    first, second = kit.run(flow), kit.run(flow)
    names = ["workflow:started", "step:started", "mine", "step:completed", "step:started", "step:completed", "workflow:completed"]
    threading.Timer(0.2, ready.set).start()
    assert [event.name for event in kit.events(run=first)] == names
    assert [event.run_id for event in kit.events("workflow:completed")] == [first.id, second.id]
    assert [event.data for event in kit.events("mine", run=second.id)] == [1]
    with pytest.raises(ValidationError, match="did you mean 'workflow:failed'"):
        kit.events("workflow:fail")  # else `assert not kit.events("workflow:fail")` would pass whatever has happened


def test_the_async_forms_do_not_block_the_loop_of_the_test(kit: TestKit, app: Streamline) -> None:
    """A handler may need something that runs in the test's own loop, such as a server in the test."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()

        async def served_here() -> str:
            return "from the test's loop"

        def ask(ctx: Context) -> str:
            return asyncio.run_coroutine_threadsafe(served_here(), loop).result(10)

        flow = app.workflow("flow", steps={"ask": ask, "nap": nap(DAY), "more": nap(DAY), "last": fine})
        run = await kit.run_async(flow)
        assert (run.status, run.step("ask").output) == ("waiting", "from the test's loop")
        await kit.jump_async(DAY)
        assert (present(await flow.get_async(run.id))).current_step_id == "more"
        assert (await kit.finish_async(run)).status == "done"
        second = await flow.start_async(start_at=DAY)
        await kit.settle_async()
        assert (present(await flow.get_async(second.id))).status == "draft"
        await kit.jump_to_async(kit.now() + DAY)
        assert (present(await flow.get_async(second.id))).current_step_id == "nap"

    asyncio.run(scenario())
    gc.collect()  # anything left open would cause a warning here, and many users of pytest make warnings errors
