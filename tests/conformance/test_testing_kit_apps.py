"""The kit for users' tests: workers that die on demand, and applications that are taken over and released."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from kit_workflows import DAY, NOWHERE, fine, nap
from pymongo import MongoClient

from streamline_pool import Context, InvalidStateError, Settings, Streamline, ValidationError
from streamline_pool.client.connections import PYMONGO_STORES
from streamline_pool.storage.store import Store
from streamline_pool.testing import TestKit
from support import present


@pytest.fixture
def app(kit: TestKit) -> Streamline:
    return kit.use(Streamline(NOWHERE))


# --- crashes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [True, False])
def test_a_worker_can_be_made_to_die_after_a_handler(kit: TestKit, app: Streamline, is_async: bool) -> None:
    """A test that a charge is not made twice needs a crash at exactly this point."""
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
    assert kit.run(flow).step("charge").attempts == 1, "it dies as often as `crash_after` says"


@pytest.mark.parametrize("step", ["nap", "shaky"])
def test_a_worker_dies_also_after_a_handler_that_suspends_or_fails(kit: TestKit, app: Streamline, step: str) -> None:
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


def test_a_run_whose_workers_keep_dying_fails(kit: TestKit, app: Streamline) -> None:
    flow = app.workflow("flow", steps={"deadly": fine})
    kit.crash_after("deadly", times=3)
    run = kit.run(flow)
    assert run.status == "failed"
    assert present(run.error)["code"] == "WORKER_CRASHED" and "signal SIGKILL" in present(run.error)["message"]


def test_a_crash_after_an_unknown_step_is_refused(kit: TestKit, app: Streamline) -> None:
    """With a misspelt step no crash would happen, and the test would test nothing."""
    app.workflow("flow", steps={"charge": fine})
    with pytest.raises(ValidationError, match="'chrage'; they have charge"):
        kit.crash_after("chrage")


# --- applications--------------------------------------------------------------------------------------------------


def test_the_application_is_released_as_it_was(mongodb_uri: str, make_app: Callable[..., Streamline]) -> None:
    """Otherwise the code that runs after the test would use a database that was dropped."""
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
    assert flow.get(tested.id) is None and present(flow.get(own.id)).status == "running"
    assert isinstance(app.store(), Store) and not app.events.active
    assert flow.start().created_at - own.created_at < timedelta(hours=1), "it is at the real time again"
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        assert database not in client.list_database_names()
    with TestKit(mongodb_uri) as kit:
        kit.use(app)  # another kit can use it


def test_an_event_loop_that_outlives_the_test_keeps_nothing_of_it(mongodb_uri: str) -> None:
    """Plugins let the tests of a module share a loop. The next test would use the connections and the time of the last one."""
    app = Streamline(NOWHERE)
    flow = app.workflow("flow", steps={"only": fine})
    loop = asyncio.new_event_loop()
    try:
        for _ in range(2):
            with TestKit(mongodb_uri) as kit:
                kit.use(app)
                run = loop.run_until_complete(flow.start_async(run_id="the same"))
                kit.settle()
                assert present(loop.run_until_complete(flow.get_async(run.id))).status == "done"
                kit.jump(DAY)
            assert not app.connections.open_loops()
    finally:
        loop.close()


def test_two_kits_at_once_do_not_disturb_each_other(mongodb_uri: str) -> None:
    with TestKit(mongodb_uri) as one, TestKit(mongodb_uri) as other:
        apps = [one.use(Streamline(NOWHERE)), other.use(Streamline(NOWHERE))]
        flows = [app.workflow("flow", steps={"nap": nap(DAY), "last": fine}) for app in apps]
        runs = [kit.run(flow, run_id="the same") for kit, flow in zip((one, other), flows, strict=True)]
        one.jump(DAY)
        assert other.now() - one.now() < timedelta(hours=-23)
        assert present(flows[0].get(runs[0].id)).status == "done"
        other.settle()
        assert present(flows[1].get(runs[1].id)).status == "waiting"
        one.events(), other.events()
        assert {event.name for event in other.events()}.isdisjoint({"workflow:completed"})
        with pytest.raises(InvalidStateError, match="has this app already"):
            other.use(apps[0])
        with pytest.raises(InvalidStateError, match=r"call use\(app\) first"):
            other.run(flows[0])


def test_apps_share_a_database_in_the_kit_if_they_do_in_production(kit: TestKit) -> None:
    one, same = kit.use(Streamline("mongodb://a/shop")), kit.use(Streamline("mongodb://a/shop", collection_prefix="crm_"))
    other = kit.use(Streamline("mongodb://a/shop", database="bank"))
    assert one.where.database == same.where.database != other.where.database
    assert (one.collection_prefix, same.where.prefix) == ("workflow_", "crm_")
    bank = other.workflow("bank", steps={"only": fine})
    shop = one.workflow("shop", steps={"only": lambda ctx: bank.start(run_id="from the shop").id})
    assert kit.run(shop).status == "done"
    assert present(bank.get("from the shop")).status == "done", "`settle` goes on until all apps are idle"


def test_a_server_that_cannot_be_reached_is_named_at_once(kit: TestKit) -> None:
    lost = TestKit("mongodb://127.0.0.1:1/?serverSelectionTimeoutMS=200")
    app = Streamline(NOWHERE)
    with pytest.raises(Exception, match="is it running"), lost:
        lost.use(app)
    assert (app.mongodb_uri, app.connections.factories) == (NOWHERE, PYMONGO_STORES)
    assert app.settings == Settings()
