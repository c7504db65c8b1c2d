"""The kit for users' tests: time that jumps and nothing else that differs from earnest. Most of these read as such tests do."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from streamline_pool import Context, InvalidStateError, Settings, Streamline, ValidationError
from streamline_pool.protocol import claims
from streamline_pool.storage.store import AsyncStore, Store
from streamline_pool.testing import SERVER_VARIABLE, TestKit
from support import eventually

REPOSITORY = Path(__file__).resolve().parents[2]
DAY = timedelta(days=1)
NOWHERE = "mongodb://127.0.0.1:1/nowhere"  # the apps of these tests are at home where nothing listens


@pytest.fixture
def kit(mongodb_uri: str) -> Iterator[TestKit]:
    with TestKit(mongodb_uri) as kit:
        yield kit


@pytest.fixture
def app(kit: TestKit) -> Streamline:
    return kit.use(Streamline(NOWHERE))


def fine(ctx: Context) -> str:
    return "fine"


def nap(length: float | timedelta) -> Callable[[Context], None]:
    return lambda ctx: ctx.sleep(length)


# --- time ----------------------------------------------------------------------------------------------------------


def test_thirty_days_of_sleep_take_moments(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow", steps={"nap": nap(30 * DAY), "after": fine})
    run = kit.run(flow)
    assert (run.status, run.current_step_id) == ("waiting", "nap")
    began = time.monotonic()
    kit.jump(30 * DAY)
    assert time.monotonic() - began < 5
    run = flow.get(run.id)
    assert (run.status, run.output) == ("done", "fine")
    assert 30 * DAY <= run.ended_at - run.started_at < 30 * DAY + timedelta(minutes=1)
    assert run.step("nap").duration >= 30 * 86400


def test_nothing_happens_before_its_time(kit: TestKit, app: Streamline) -> None:
    """A kit that wakes whatever sleeps, however long, lets a wrong duration pass."""
    flow = app.workflow("flow", steps={"nap": nap(30 * DAY), "after": fine})
    run = kit.run(flow)
    kit.jump(30 * DAY - timedelta(minutes=1))
    assert flow.get(run.id).status == "waiting"
    kit.jump(60)
    assert flow.get(run.id).status == "done"


def test_what_becomes_due_in_a_jump_happens_in_its_order_and_at_its_time(kit: TestKit, app: Streamline) -> None:
    """Woken at the end of the jump instead, a week of daily letters would be one letter a week late."""
    woken: list[tuple[str, datetime]] = []

    def note(name: str) -> Callable[[Context], None]:
        return lambda ctx: woken.append((name, kit.now()))

    steps: dict[str, Any] = {}
    for day in range(1, 4):
        steps |= {f"sleep{day}": nap(DAY), f"letter{day}": note(f"day {day}")}
    daily = app.workflow("daily", steps=steps)
    once = app.workflow("once", steps={"sleep": nap(1.5 * DAY), "letter": note("day 1.5")})
    began = kit.now()
    kit.run(daily)
    kit.run(once)
    kit.jump(7 * DAY)
    assert [name for name, _ in woken] == ["day 1", "day 1.5", "day 2", "day 3"]
    for name, at in woken:
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
    assert flow.get(run.id).status == "draft"
    kit.jump_to(at + timedelta(minutes=1))
    assert flow.get(run.id).status == "done"


def test_all_instants_that_are_stored_are_of_the_same_time(kit: TestKit, app: Streamline) -> None:
    """A writer that was left behind would store a run which ended before it started."""
    kit.jump(100 * DAY)
    flow = app.workflow("flow", steps={"one": fine, "nap": nap(1), "two": fine})
    since = kit.now()
    run = kit.finish(kit.run(flow))
    cancelled = flow.cancel(kit.run(flow).id)
    until = kit.now()
    instants = [run.created_at, run.started_at, run.updated_at, run.ended_at, cancelled.updated_at, cancelled.ended_at]
    instants += [step.started_at for step in run.steps] + [step.ended_at for step in run.steps]
    instants += [event.at for event in kit.events()]
    assert all(since <= at <= until for at in instants)


def test_what_looks_like_the_time_and_is_a_users_text_stays_one(kit: TestKit, app: Streamline) -> None:
    """The offset is put in wherever an operation says `$$NOW`; data that says so is data."""
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


def test_a_jump_waits_for_the_handler_that_is_at_work(kit: TestKit, app: Streamline) -> None:
    """Overtaken, its lease would be over: the run would be taken back as if its worker had died, and entered twice."""
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
    stored = flow.get(run.id).to_dict()
    assert (stored["status"], stored["token"], stored["crashes"], stored["steps"][0]["attempts"]) == ("done", 1, 0, 1)


def test_leases_end_at_the_kits_time(kit: TestKit, app: Streamline) -> None:
    """A run that another program has claimed, and died with, is taken back when its lease is over."""
    flow = app.workflow("flow", steps={"only": fine})
    run = flow.start()
    app.store().run(claims.claim_run(run.id, None, "another", "another:1:1", 60.0))
    kit.jump(59)
    assert flow.get(run.id).status == "running"
    kit.jump(2)
    run = flow.get(run.id)
    assert (run.status, run.step("only").attempts) == ("done", 2)


@pytest.mark.slow
def test_a_jump_that_never_arrives_says_so(mongodb_uri: str) -> None:
    """Runs that start each other for ever would keep a test busy for ever."""
    with TestKit(mongodb_uri, timeout=2) as kit:
        app = kit.use(Streamline(NOWHERE))
        flow = app.workflow("flow", steps={"again": lambda ctx: app.workflows["flow"].start(start_at=1).id})
        flow.start()
        with pytest.raises(TimeoutError, match=r"ever more to do; jump less far|still at work"):  # wherever it is when time is up
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


def test_runs_move_within_the_kits_calls_only(kit: TestKit, app: Streamline) -> None:
    """With a worker in the background every assertion about what has not happened yet would be a race."""
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


def test_code_that_waits_by_itself_runs_while_the_kit_is_working(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow", steps={"one": fine, "nap": nap(0.05), "two": fine})
    with kit.working():
        assert flow.wait_for(flow.start().id, timeout=10).status == "done"
        assert kit.run(flow).status in ("waiting", "done")
        assert kit.run(kit.use(Streamline(NOWHERE)).workflow("later", steps={"only": fine})).status == "done"


def test_a_workflow_that_is_defined_later_is_worked_on_too(kit: TestKit, app: Streamline) -> None:
    assert kit.run(app.workflow("early", steps={"only": fine})).status == "done"
    assert kit.run(app.workflow("late", steps={"only": fine})).status == "done"


def test_a_call_that_takes_too_long_says_what_is_at_work(kit: TestKit, app: Streamline) -> None:
    """A test that hangs for ever tells nobody why. Afterwards the kit is of use again."""
    go_on = threading.Event()
    flow = app.workflow("flow", steps={"endless": lambda ctx: go_on.wait(20)})
    run = flow.start()
    with pytest.raises(TimeoutError, match=f"run {run.id} at step endless"):
        kit.settle(timeout=0.2)
    go_on.set()
    kit.settle()
    assert flow.get(run.id).status == "done"


def test_finish_says_what_keeps_a_run_from_its_end(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow", steps={"only": fine})
    run = kit.run(flow, queue="elsewhere")
    with pytest.raises(InvalidStateError, match="queue elsewhere; name queues in use"):
        kit.finish(run)


def test_the_queues_to_work_on_can_be_named(kit: TestKit) -> None:
    app = kit.use(Streamline(NOWHERE), queues=["default", "elsewhere"])
    flow = app.workflow("flow", steps={"only": fine})
    assert kit.run(flow, queue="elsewhere").status == "done"


def test_events_are_all_there_when_they_are_asked_for(kit: TestKit, app: Streamline) -> None:
    """Subscribers hear of events on a thread of their own, in their own time."""
    ready = threading.Event()
    app.events.once("workflow:started", lambda event: ready.wait(10))
    flow = app.workflow("flow", steps={"one": lambda ctx: ctx.emit("mine", 1), "two": fine})
    first, second = kit.run(flow), kit.run(flow)
    names = ["workflow:started", "step:started", "mine", "step:completed", "step:started", "step:completed", "workflow:completed"]
    threading.Timer(0.2, ready.set).start()
    assert [event.name for event in kit.events(run=first)] == names
    assert [event.run_id for event in kit.events("workflow:completed")] == [first.id, second.id]
    assert [event.data for event in kit.events("mine", run=second.id)] == [1]


def test_async_tests_have_twins_and_their_loop_goes_on(kit: TestKit, app: Streamline) -> None:
    """A handler may need something that only the test's own loop can give, such as a server in the test."""

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
        assert (await flow.get_async(run.id)).current_step_id == "more"
        assert (await kit.finish_async(run)).status == "done"
        second = await flow.start_async(start_at=DAY)
        await kit.settle_async()
        assert (await flow.get_async(second.id)).status == "draft"
        await kit.jump_to_async(kit.now() + DAY)
        assert (await flow.get_async(second.id)).current_step_id == "nap"

    asyncio.run(scenario())
    gc.collect()  # what was left open would be complained of here, and pytest's users often make errors of warnings


# --- crashes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [True, False])
def test_a_worker_can_be_made_to_die_after_a_handler(kit: TestKit, app: Streamline, is_async: bool) -> None:
    """Whoever has to prove that a charge is not made twice needs a crash at exactly this point."""
    keys: list[tuple[str, int]] = []

    def charge(ctx: Context) -> str:
        keys.append((ctx.idempotency_key, ctx.attempt))
        return f"charged by attempt {ctx.attempt}"

    async def charge_async(ctx: Context) -> str:
        return charge(ctx)

    flow = app.workflow("flow", steps={"before": fine, "charge": charge_async if is_async else charge, "after": fine})
    kit.crash_after("charge")
    run = kit.run(flow)
    assert run.status == "done"
    assert (run.step("before").attempts, run.step("charge").attempts, run.step("after").attempts) == (1, 2, 1)
    assert run.step("charge").output == "charged by attempt 2"
    assert keys == [(keys[0][0], 1), (keys[0][0], 2)]
    assert len(kit.events("workflow:recovered", run=run)) == 1
    assert kit.run(flow).step("charge").attempts == 1, "it dies as often as it was told to"


@pytest.mark.parametrize("step", ["nap", "shaky"])
def test_a_worker_dies_after_handlers_that_end_otherwise_too(kit: TestKit, app: Streamline, step: str) -> None:
    entered: list[str] = []

    def shaky(ctx: Context) -> None:
        entered.append("shaky")
        if len(entered) < 3:
            raise ValueError("no")

    def doze(ctx: Context) -> None:
        entered.append("nap")
        ctx.sleep(DAY)

    flow = app.workflow("flow", steps={step: {"nap": doze, "shaky": shaky}[step]})
    kit.crash_after(step)
    run = kit.run(flow)
    assert run.status == "waiting" and entered == [step, step]
    assert kit.finish(run).status == "done"


def test_workers_that_keep_dying_convict_the_run(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow", steps={"deadly": fine})
    kit.crash_after("deadly", times=3)
    run = kit.run(flow)
    assert run.status == "failed"
    assert run.error["code"] == "WORKER_CRASHED" and "signal SIGKILL" in run.error["message"]


def test_a_crash_after_an_unknown_step_is_refused(kit: TestKit, app: Streamline) -> None:
    """A crash that never comes makes a test pass which tests nothing."""
    app.workflow("flow", steps={"charge": fine})
    with pytest.raises(ValidationError, match="'chrage'; they have charge"):
        kit.crash_after("chrage")


# --- borrowing -----------------------------------------------------------------------------------------------------


def test_the_application_is_given_back_as_it_was(mongodb_uri: str, make_app: Callable[..., Streamline]) -> None:
    """Left on the test's server, the next test, or whatever runs after them, would work on a database that is gone."""
    app = make_app(concurrency=7)
    flow = app.workflow("flow", steps={"only": fine})
    own = flow.start()
    before = (app.settings, app.mongodb_uri, app.database, app.where.database)
    with TestKit(mongodb_uri) as kit:
        kit.use(app)
        database = app.where.database
        assert database != before[3] and flow.get(own.id) is None
        kit.jump(DAY)
        tested = kit.run(flow)
        assert tested.status == "done" and app.settings.concurrency == 7
    kit.close()
    assert (app.settings, app.mongodb_uri, app.database, app.where.database) == before
    assert flow.get(tested.id) is None and flow.get(own.id).status == "running"
    assert isinstance(app.store(), Store) and not app.events.active
    assert flow.start().created_at - own.created_at < timedelta(hours=1), "it is at its own time again"
    with MongoClient(mongodb_uri) as client:
        assert database not in client.list_database_names()
    with TestKit(mongodb_uri) as kit:
        kit.use(app)  # and another kit may have it


def test_a_loop_that_outlives_the_test_keeps_nothing_of_it(mongodb_uri: str) -> None:
    """Plugins let a module's tests share a loop: the next one would find the last one's connections, and its time."""
    app = Streamline(NOWHERE)
    flow = app.workflow("flow", steps={"only": fine})
    loop = asyncio.new_event_loop()
    try:
        for _ in range(2):
            with TestKit(mongodb_uri) as kit:
                kit.use(app)
                run = loop.run_until_complete(flow.start_async(run_id="the same"))
                kit.settle()
                assert loop.run_until_complete(flow.get_async(run.id)).status == "done"
                kit.jump(DAY)
            assert not app._async_stores
    finally:
        loop.close()


def test_two_kits_at_once_do_not_disturb_each_other(mongodb_uri: str) -> None:
    with TestKit(mongodb_uri) as one, TestKit(mongodb_uri) as other:
        apps = [one.use(Streamline(NOWHERE)), other.use(Streamline(NOWHERE))]
        flows = [app.workflow("flow", steps={"nap": nap(DAY), "last": fine}) for app in apps]
        runs = [kit.run(flow, run_id="the same") for kit, flow in zip((one, other), flows, strict=True)]
        one.jump(DAY)
        assert other.now() - one.now() < timedelta(hours=-23)
        assert flows[0].get(runs[0].id).status == "done"
        other.settle()
        assert flows[1].get(runs[1].id).status == "waiting"
        one.events(), other.events()
        assert {event.name for event in other.events()}.isdisjoint({"workflow:completed"})
        with pytest.raises(InvalidStateError, match="has this app already"):
            other.use(apps[0])
        with pytest.raises(InvalidStateError, match=r"call use\(app\) first"):
            other.run(flows[0])


def test_apps_share_a_database_here_if_they_do_in_earnest(kit: TestKit) -> None:
    one, same = kit.use(Streamline("mongodb://a/shop")), kit.use(Streamline("mongodb://a/shop", collection_prefix="crm_"))
    other = kit.use(Streamline("mongodb://a/shop", database="bank"))
    assert one.where.database == same.where.database != other.where.database
    assert (one.collection_prefix, same.where.prefix) == ("workflow_", "crm_")
    bank = other.workflow("bank", steps={"only": fine})
    shop = one.workflow("shop", steps={"only": lambda ctx: bank.start(run_id="from the shop").id})
    assert kit.run(shop).status == "done"
    assert bank.get("from the shop").status == "done", "settling goes on until all apps are at rest"


def test_a_server_that_is_away_is_named_at_once(kit: TestKit) -> None:
    lost = TestKit("mongodb://127.0.0.1:1/?serverSelectionTimeoutMS=200")
    app = Streamline(NOWHERE)
    with pytest.raises(Exception, match="is it running"), lost:
        lost.use(app)
    assert (app.mongodb_uri, app._open_store, app._open_async_store) == (NOWHERE, Store, AsyncStore)
    assert app.settings == Settings()


# --- as a plugin of a stranger's pytest ------------------------------------------------------------------------------


def project(folder: Path) -> Path:
    """The application, the conftest and the tests that docs/testing.md shows."""
    text = (REPOSITORY / "docs/testing.md").read_text("utf-8")
    for name, block in re.findall(r"^```python\n# ([\w.]+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        (folder / name).write_text(block)
    return folder


def run_pytest(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("STREAMLINE_", "PYTEST_"))}
    environ |= {"PYTHONPATH": str(REPOSITORY), **variables}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", "-q", *words]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=50)


@pytest.mark.slow
def test_the_project_of_the_documentation_passes_on_a_private_server_and_leaves_nothing(tmp_path: Path) -> None:
    """What is documented fails at a stranger's: a warning that is an error there, a fixture that is missing, a server that stays."""
    folder = project(tmp_path)
    with (folder / "test_orders.py").open("a") as tests:
        tests.write("\n\ndef test_where(streamline_server):\n    Path('uri').write_text(streamline_server)\n\n\nfrom pathlib import Path\n")
    done = run_pytest(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed" in done.stdout
    port = int(re.search(r":(\d+)/", (folder / "uri").read_text())[1])

    def is_gone() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) != 0

    eventually(is_gone)


@pytest.mark.slow
def test_processes_of_xdist_share_a_server_that_is_named_and_leave_no_database(tmp_path: Path, mongodb_uri: str) -> None:
    with MongoClient(mongodb_uri) as client:
        before = set(client.list_database_names())
        done = run_pytest(project(tmp_path), "-n", "2", **{SERVER_VARIABLE: mongodb_uri})
        assert done.returncode == 0, done.stdout + done.stderr
        assert "5 passed" in done.stdout
        assert {name for name in set(client.list_database_names()) - before if name.startswith("streamline_test_")} == set()


def test_without_a_server_it_is_said_how_to_get_one(tmp_path: Path) -> None:
    folder = project(tmp_path)
    with (folder / "conftest.py").open("a") as conftest:
        conftest.write("\n\nimport sys\n\nsys.modules['fiftyone'] = None  # as if the extra were not installed\n")
    done = run_pytest(folder, PATH=str(folder))
    assert done.returncode == 1
    assert "pip install '.[testing]'" in done.stdout and SERVER_VARIABLE in done.stdout
    assert "Traceback" not in done.stdout


def test_the_kit_works_without_pytest(tmp_path: Path, mongodb_uri: str) -> None:
    """pytest is no dependency of ours; unittest's users have a kit as well."""
    program = tmp_path / "plain.py"
    program.write_text(
        "import sys\n"
        "sys.modules['pytest'] = None  # as if it were not installed\n"
        "from streamline_pool import Streamline\n"
        "from streamline_pool.testing import TestKit\n"
        "app = Streamline('mongodb://127.0.0.1:1')\n"
        "flow = app.workflow('flow', steps={'only': lambda ctx: 1})\n"
        f"with TestKit({mongodb_uri!r}) as kit:\n"
        "    print(kit.run(kit.use(app).workflows['flow']).status)\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-X", "dev", "-W", "error", program], env=environ, capture_output=True, text=True, timeout=50)
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)
