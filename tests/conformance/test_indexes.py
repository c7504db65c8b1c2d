"""`setup_indexes` on a real server: which indexes it creates, calls by several processes, and indexes that exist already."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from old_runs import put_run
from pymongo import ASCENDING

from streamline_pool import StoreUnavailableError, Streamline, ValidationError
from streamline_pool.protocol.engine_indexes import EVENT_INDEXES, HOST_INDEXES, OUTPUT_INDEXES, RUN_INDEXES
from streamline_pool.protocol.operations import Op
from streamline_pool.storage.store import Store
from support import REPOSITORY, present, shown

TERMINAL = ["cancelled", "done", "failed"]
ENGINE = [index.name for index in (*RUN_INDEXES, *HOST_INDEXES, *EVENT_INDEXES, *OUTPUT_INDEXES)]


def indexes(app: Streamline) -> dict[str, dict[str, Any]]:
    return {index["name"]: dict(index) for index in app.runs.list_indexes()}


def keys(app: Streamline) -> dict[str, list[str]]:
    return {name: list(index["key"]) for name, index in indexes(app).items()}


def test_it_makes_what_it_says_and_returns_every_name(app: Streamline) -> None:
    names = app.setup_indexes(
        tenant_field="context.tenantId", auto_cleanup_days=30, context_fields=["orderId", "context.sku", "customer.id", "orderId"]
    )
    custom = {
        "streamline_workflow_status": ["workflowId", "status"],
        "streamline_status_updated": ["status", "updatedAt"],
        "streamline_tenant_context.tenantId": ["context.tenantId", "status", "createdAt"],
        "streamline_user_userId": ["userId", "createdAt"],
        "streamline_field_context.orderId": ["context.orderId"],
        "streamline_field_context.sku": ["context.sku"],
        "streamline_field_context.customer.id": ["context.customer.id"],
        "streamline_ttl": ["endedAt"],
    }
    assert names == [*ENGINE, *custom]
    made = keys(app)
    assert {name: made[name] for name in custom} == custom
    assert set(made) == {"_id_", *custom, *(index.name for index in RUN_INDEXES)}
    ttl = indexes(app)["streamline_ttl"]
    assert ttl["expireAfterSeconds"] == 30 * 86_400
    assert ttl["partialFilterExpression"] == {"status": {"$in": TERMINAL}}


def test_a_bare_name_is_a_field_of_the_context_unless_the_run_has_it(app: Streamline) -> None:
    """As in the Node library. An index on a field that no run has costs time, and serves no query."""
    app.setup_indexes(tenant_field="tenantId", user_field="customer.userId")
    made = keys(app)
    assert made["streamline_tenant_context.tenantId"] == ["context.tenantId", "status", "createdAt"]
    assert made["streamline_user_context.customer.userId"] == ["context.customer.userId", "createdAt"]
    app.setup_indexes(tenant_field="meta.tenant", user_field="userId")
    assert {"streamline_tenant_meta.tenant", "streamline_user_userId"} <= set(keys(app))


def test_clean_up_of_a_tenant_uses_the_field_that_a_bare_name_stands_for(app: Streamline, make_app: Callable[..., Streamline]) -> None:
    """An index that an earlier version made for the bare name must not make the field ambiguous."""
    put_run(app, "a", context={"shop": "x"})
    put_run(app, "b", context={"shop": "y"})
    app.runs.create_index([("shop", 1), ("status", 1), ("createdAt", 1)], name="streamline_tenant_shop")
    app.setup_indexes(tenant_field="shop")
    assert app.cleanup_old_runs(tenant_id="x", dry_run=True) == 1
    assert make_app().cleanup_old_runs(tenant_id="x") == 1


def test_without_arguments_there_is_no_tenant_and_no_ttl(app: Streamline) -> None:
    """Each index costs time at every step, so none is created without a request."""
    assert app.setup_indexes() == [*ENGINE, "streamline_workflow_status", "streamline_status_updated", "streamline_user_userId"]
    assert all("expireAfterSeconds" not in index for index in indexes(app).values())


def test_the_asyncio_function_does_the_same(app: Streamline) -> None:
    async def both() -> tuple[list[str], list[str]]:
        async with app:
            return await app.setup_indexes_async(user_field="meta.owner"), await app.setup_indexes_async(user_field="meta.owner")

    first, second = asyncio.run(both())
    assert first == second
    assert keys(app)["streamline_user_meta.owner"] == ["meta.owner", "createdAt"]


def test_users_queries_are_answered_from_the_indexes(app: Streamline) -> None:
    app.setup_indexes(tenant_field="context.tenantId", context_fields=["orderId"])

    def used(query: dict[str, Any], sort: str = "") -> str:
        found = app.runs.find(query)
        plan = (found.sort(sort, ASCENDING) if sort else found).explain()["queryPlanner"]["winningPlan"]
        while "inputStage" in plan:
            assert plan["stage"] != "SORT", query
            plan = plan["inputStage"]
        return str(plan.get("indexName"))

    assert used({"context.tenantId": "t", "status": "done"}, "createdAt") == "streamline_tenant_context.tenantId"
    assert used({"userId": "ann"}, "createdAt") == "streamline_user_userId"
    assert used({"context.orderId": 7}) == "streamline_field_context.orderId"
    assert used({"workflowId": "w", "status": "failed"}) == "streamline_workflow_status"
    assert used({"status": "failed"}, "updatedAt") == "streamline_status_updated"


def test_another_ttl_changes_the_index_in_place_and_none_leaves_it(app: Streamline) -> None:
    """Building the index again would take an hour on a large collection, and there would be no TTL meanwhile."""
    built: list[str] = []

    class Watched(Store):
        def run(self, op: Op, session: Any = None) -> Any:
            built.append(op.name)
            return super().run(op, session)

    app.connections.use(Watched(app.where, app.env))
    app.setup_indexes(auto_cleanup_days=30)
    for days, after_s in ((7, 604_800), (0.5, 43_200), (0, 0), (timedelta(days=1), 86_400)):
        built.clear()
        assert "streamline_ttl" in app.setup_indexes(auto_cleanup_days=days)
        assert indexes(app)["streamline_ttl"]["expireAfterSeconds"] == after_s
        assert indexes(app)["streamline_ttl"]["partialFilterExpression"] == {"status": {"$in": TERMINAL}}
        assert "change_ttl" in built
        assert "create_custom_indexes" not in built
    built.clear()
    assert "streamline_ttl" not in app.setup_indexes()
    assert indexes(app)["streamline_ttl"]["expireAfterSeconds"] == 86_400
    assert "change_ttl" not in built


def test_the_ttl_holds_no_run_that_has_not_ended(app: Streamline) -> None:
    """A TTL that deletes a sleeping run loses work silently (a defect of the library before this one)."""
    app.setup_indexes(auto_cleanup_days=0)
    flow = app.workflow("flow", steps={"nap": lambda ctx: ctx.sleep(3600)})
    sleeping = flow.execute(flow.start().id)
    running = flow.start()
    draft = flow.start(start_at=3600)
    cancelled = flow.cancel(flow.start().id)
    assert [run.status for run in (sleeping, running, draft)] == ["waiting", "running", "draft"]
    app.runs.update_many({"status": {"$nin": TERMINAL}}, {"$set": {"endedAt": present(cancelled.ended_at) - timedelta(days=9)}})
    held = app.runs.find({"status": {"$in": TERMINAL}, "endedAt": {"$exists": True}}, {"_id": 1}).hint("streamline_ttl")
    assert [run["_id"] for run in held] == [cancelled.id]
    plan = app.runs.find({"status": "done", "endedAt": None}).hint("streamline_ttl").explain()["queryPlanner"]["winningPlan"]
    assert "FETCH" in str(plan)
    stats = next(app.runs.aggregate([{"$collStats": {"storageStats": {}}}]))["storageStats"]["indexDetails"]["streamline_ttl"]
    assert stats is not None
    assert app.runs.database.command("validate", app.runs.name)["keysPerIndex"]["streamline_ttl"] == 1, "one run has ended"


@pytest.mark.slow
def test_processes_that_set_up_at_once_all_succeed(app: Streamline, mongodb_uri: str, database: str) -> None:
    """Every worker calls it at its start, and a worker that loses the race must still start. The last TTL counts."""
    code = (
        "import sys; from streamline_pool import Streamline; app = Streamline(sys.argv[1], database=sys.argv[2]);"
        "[print(app.setup_indexes(tenant_field='context.t', auto_cleanup_days=int(sys.argv[3]) + i, context_fields=['a', 'b']))"
        " for i in range(5)]; app.close()"
    )
    calls = [[sys.executable, "-c", code, mongodb_uri, database, str(days)] for days in (1, 1, 2, 30)]
    started = [subprocess.Popen(call, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for call in calls]
    ended = [process.communicate(timeout=50) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0, 0], ended
    assert len({line for out, _ in ended for line in out.splitlines()}) == 1
    assert indexes(app)["streamline_ttl"]["expireAfterSeconds"] / 86_400 in {5, 6, 34}
    assert len(indexes(app)) == 1 + len(RUN_INDEXES) + 7


def test_an_index_that_appears_meanwhile_is_noticed(app: Streamline) -> None:
    """Between the read and the write another process may have created the index with another TTL."""
    other = Streamline(app.mongodb_uri, database=app.database)

    class Overtaken(Store):
        def run(self, op: Op, session: Any = None) -> Any:
            if op.name == "create_custom_indexes" and not overtaken:
                overtaken.append(True)
                other.setup_indexes(auto_cleanup_days=5)
            return super().run(op, session)

    overtaken: list[bool] = []
    app.connections.use(Overtaken(app.where, app.env))
    app.setup_indexes(auto_cleanup_days=9)
    assert overtaken
    assert indexes(app)["streamline_ttl"]["expireAfterSeconds"] == 9 * 86_400
    other.close()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        pytest.param({"keys": [("endedAt", 1)]}, "it lacks expireAfterSeconds 864000", id="no TTL"),
        pytest.param({"keys": [("endedAt", 1)], "expireAfterSeconds": 60}, "it lacks partialFilterExpression", id="TTL of everything"),
        pytest.param({"keys": [("context.orderId", 1)], "unique": True}, "it has unique True", id="unique"),
        pytest.param({"keys": [("context.orderId", 1)], "sparse": True}, "it has sparse True", id="sparse"),
        pytest.param({"keys": [("context.orderId", 1)], "collation": {"locale": "de"}}, "it has collation", id="collation"),
        pytest.param({"keys": [("x", 1)], "name": "streamline_status_updated"}, "its keys are {'x': 1}", id="our name"),
    ],
)
def test_a_conflicting_hand_made_index_is_reported_in_plain_words(
    mongodb_uri: str, new_database: str, made: dict[str, Any], message: str
) -> None:
    """MongoDB's own message is an error number and two index specifications."""
    app = Streamline(mongodb_uri, database=new_database)
    app.runs.create_index(**made)
    before = indexes(app)
    with pytest.raises(ValidationError, match="setup_indexes: the collection has an index") as caught:
        app.setup_indexes(auto_cleanup_days=10, context_fields=["orderId"])
    assert message in caught.value.message
    name = next(name for name in before if name != "_id_")
    assert f"app.runs.drop_index({name!r})" in caught.value.message
    assert not {"streamline_user_userId", "streamline_ttl"} & set(indexes(app)), "nothing was created"
    app.runs.drop_index(name)
    assert app.setup_indexes(auto_cleanup_days=10, context_fields=["orderId"])
    app.close()


def test_a_hand_made_index_that_does_the_same_is_used(app: Streamline) -> None:
    """An index under another name must not be built a second time."""
    app.runs.create_index([("context.orderId", 1)], name="mine")
    ended = {"status": {"$in": ["failed", "done", "cancelled"]}}
    app.runs.create_index([("endedAt", 1)], name="old", expireAfterSeconds=5, partialFilterExpression=ended)
    names = app.setup_indexes(auto_cleanup_days=1, context_fields=["orderId"])
    assert {"mine", "old"} <= set(names)
    assert not {"streamline_ttl", "streamline_field_context.orderId"} & set(indexes(app))
    assert indexes(app)["old"]["expireAfterSeconds"] == 86_400


@pytest.mark.parametrize("field", ["", ".", "a.", ".a", "a..b", "$a", "a.$b", "a\0b", "x" * 201, "\ud800", 7, None, ["a"]], ids=shown)
@pytest.mark.parametrize("argument", ["tenant_field", "user_field", "context_fields"])
def test_an_invalid_field_name_is_refused(app: Streamline, argument: str, field: Any) -> None:
    if field is None and argument != "context_fields":
        return
    options: dict[str, Any] = {argument: [field] if argument == "context_fields" else field}
    with pytest.raises(ValidationError, match=f"setup_indexes: {argument}: "):
        app.setup_indexes(**options)


@pytest.mark.parametrize("days", [-1, -0.001, float("nan"), float("inf"), "30", True, 25_000, timedelta(days=-1)], ids=shown)
def test_an_invalid_ttl_is_refused(app: Streamline, days: Any) -> None:
    with pytest.raises(ValidationError, match="setup_indexes: auto_cleanup_days"):
        app.setup_indexes(auto_cleanup_days=days)


@pytest.mark.parametrize(
    "arguments", [{"context_fields": "orderId"}, {"context_fields": 7}, {"tenant_field": "status"}, {"user_field": "createdAt"}], ids=shown
)
def test_other_invalid_arguments_are_refused(app: Streamline, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="setup_indexes: "):
        app.setup_indexes(**arguments)


def test_prefixes_have_their_own_indexes(make_app: Callable[..., Streamline]) -> None:
    one, other = make_app(), make_app(collection_prefix="other_")
    one.setup_indexes(auto_cleanup_days=1)
    other.setup_indexes()
    assert "streamline_ttl" in indexes(one)
    assert "streamline_ttl" not in indexes(other)


def test_the_role_readwrite_is_sufficient_except_for_changing_a_ttl(guarded: str) -> None:
    """A pool's user has no other role; an operation that needs more rights must say so in plain words."""
    with Streamline(f"mongodb://writer:s3cret@{guarded}/shop", collection_prefix="ix_") as app:
        app.setup_indexes(auto_cleanup_days=1)
        app.setup_indexes(auto_cleanup_days=1)
        with pytest.raises(StoreUnavailableError, match=r"collMod.*dbAdmin"):
            app.setup_indexes(auto_cleanup_days=2)
