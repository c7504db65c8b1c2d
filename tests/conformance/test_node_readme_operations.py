"""The README of the Node library, version 1.0.0, in Python: its blocks on indexes, queries, clean-up, webhooks, events and errors.

Each test is one code block, as its user would write it here, run on a real MongoDB. test_node_readme.py lists the blocks.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from flask import Flask, jsonify, request
from old_runs import archive, ids, put_run
from workers import Pool, run_until_idle

from streamline_pool import (
    Context,
    ErrorCode,
    Event,
    Streamline,
    WorkflowError,
    create_hook,
    get_step_timeline,
    get_workflow_progress,
    global_event_bus,
)
from streamline_pool.config.env import system_env
from streamline_pool.protocol.engine_indexes import RUN_INDEXES
from streamline_pool.testing import TestKit
from support import REPOSITORY, eventually, present

DAY_S = 24 * 60 * 60
TERMINAL = ["done", "failed", "cancelled"]


# --- Multi-Tenant & Indexing -----------------------------------------------------------------------------------------------


def test_add_custom_indexes(app: Streamline) -> None:
    """`app.runs` is a PyMongo collection. The TTL of the README, on `createdAt`, deletes runs that still sleep; the last line does not."""
    app.runs.create_index([("context.tenantId", 1), ("status", 1)])
    app.runs.create_index([("context.url", 1), ("workflowId", 1)])
    app.setup_indexes(auto_cleanup_days=30)
    indexes = app.runs.index_information()
    assert {"context.tenantId_1_status_1", "context.url_1_workflowId_1"} <= set(indexes)
    (ttl,) = [index for index in indexes.values() if "expireAfterSeconds" in index]
    assert (ttl["key"], ttl["expireAfterSeconds"]) == ([("endedAt", 1)], 30 * DAY_S)


def scraper_runs(app: Streamline) -> Any:
    """A workflow with one run of each tenant; the first waits."""
    workflow = app.workflow(
        "web-scraper",
        steps={"fetch": lambda ctx: {"html": ""}, "check": lambda ctx: ctx.wait("check the page") if ctx.context["ask"] else None},
    )
    for number, tenant in enumerate(["tenant-123", "tenant-456"]):
        url = f"https://example.com/{number}"
        workflow.start({"url": url, "tenantId": tenant, "ask": number == 0}, {"userId": f"user-{number}", "startedBy": "user"})
    return workflow


def test_query_workflows(app: Streamline) -> None:
    scraper = scraper_runs(app)
    (first, second) = (run["_id"] for run in app.runs.find().sort("createdAt", 1))
    scraper.execute(first)

    runs = app.runs.find({"workflowId": "web-scraper", "status": {"$in": ["running", "waiting"]}}).sort("createdAt", -1)
    assert [(run["_id"], run["status"]) for run in runs] == [(second, "running"), (first, "waiting")]

    url_runs = app.runs.find({"workflowId": "web-scraper", "context.url": "https://example.com/0"})
    assert [run["_id"] for run in url_runs] == [first]

    tenant_runs = app.runs.find({"context.tenantId": "tenant-456", "status": "running"})
    assert [run["_id"] for run in tenant_runs] == [second]


# --- Tracking Workflow Runs (UI Integration) -------------------------------------------------------------------------------


class ScraperService:
    """The README's service: the workflow instead of the engine, and `userId` as a field of the run, which can be indexed."""

    def __init__(self, app: Streamline) -> None:
        self.app = app
        self.scraper = app.workflow("web-scraper", steps={"fetch": lambda ctx: {"html": ""}, "save": lambda ctx: {"saved": True}})

    def scrape_website(self, url: str, user_id: str) -> dict[str, Any]:
        run = self.scraper.start({"url": url}, {"startedBy": "user"}, user_id=user_id)
        return {"runId": run.id, "status": run.status, "url": url}

    def get_all_scraper_runs(self, *, status: str | None = None, user_id: str | None = None, limit: int = 50) -> list[dict[str, Any]]:
        query: dict[str, Any] = {"workflowId": "web-scraper"}
        if status:
            query["status"] = status
        if user_id:
            query["userId"] = user_id
        fields = ["_id", "status", "context.url", "currentStepId", "createdAt", "updatedAt", "steps"]
        return list(self.app.runs.find(query, fields).sort("createdAt", -1).limit(limit))

    def get_run_details(self, run_id: str) -> dict[str, Any]:
        run = present(self.scraper.get(run_id))
        return {
            "id": run.id,
            "status": run.status,
            "url": run.context["url"],
            "currentStep": run.current_step_id,
            "steps": [
                {"id": step.step_id, "status": step.status, "startedAt": step.started_at, "endedAt": step.ended_at, "error": step.error}
                for step in run.steps
            ],
            "createdAt": run.created_at,
            "duration": ((run.ended_at or datetime.now(UTC)) - run.created_at).total_seconds(),
        }


def test_track_multiple_scraper_runs(app: Streamline) -> None:
    service = ScraperService(app)
    first = service.scrape_website("https://example.com", "ann")
    second = service.scrape_website("https://example.com/2", "bob")
    assert first["status"] == "running"
    run_until_idle(app)
    assert [run["_id"] for run in service.get_all_scraper_runs()] == [second["runId"], first["runId"]]
    assert [run["context"]["url"] for run in service.get_all_scraper_runs(status="done", user_id="ann")] == ["https://example.com"]
    details = service.get_run_details(first["runId"])
    assert (details["status"], details["url"]) == ("done", "https://example.com")
    assert [(step["id"], step["status"], step["error"]) for step in details["steps"]] == [("fetch", "done", None), ("save", "done", None)]
    assert 0 <= details["duration"] < 600, "seconds"


def test_ui_example(app: Streamline) -> None:
    """React stays as it is: it polls this route. The helpers compute what `<ProgressBar>` and the lines of the README show."""
    service = ScraperService(app)
    web = Flask(__name__)

    @web.get("/api/scraper/runs")
    def runs() -> Any:
        found = [present(service.scraper.get(run["_id"])) for run in service.get_all_scraper_runs()]
        return jsonify(
            [
                {
                    "id": run.id,
                    "status": run.status,
                    "url": run.context["url"],
                    "currentStep": run.current_step_id,
                    "percent": get_workflow_progress(run).percent,
                    "steps": [{"id": step.step_id, "status": step.status} for step in get_step_timeline(run)],
                }
                for run in found
            ]
        )

    run_id = service.scrape_website("https://example.com", "ann")["runId"]
    browser = web.test_client()
    assert [(run["status"], run["percent"]) for run in browser.get("/api/scraper/runs").get_json()] == [("running", 0)]
    service.scraper.execute(run_id)
    (shown,) = browser.get("/api/scraper/runs").get_json()
    assert (shown["id"], shown["status"], shown["percent"]) == (run_id, "done", 100)
    assert shown["steps"] == [{"id": "fetch", "status": "done"}, {"id": "save", "status": "done"}]


# --- Cleanup Strategies ----------------------------------------------------------------------------------------------------


def test_ttl_index(app: Streamline) -> None:
    """Both TTLs of the README are this one: only runs that have ended, by the time of their end. Another value changes it in place."""
    app.setup_indexes(auto_cleanup_days=30)
    app.setup_indexes(auto_cleanup_days=7)
    (ttl,) = [index for index in app.runs.index_information().values() if "expireAfterSeconds" in index]
    assert (ttl["key"], ttl["expireAfterSeconds"]) == ([("endedAt", 1)], 7 * DAY_S)
    assert set(ttl["partialFilterExpression"]["status"]["$in"]) == set(TERMINAL)


def test_manual_cleanup(app: Streamline) -> None:
    """Three methods of the library; cron calls `streamline-pool cleanup`."""
    for run_id, days, status, tenant in [("a", 40, "done", 1), ("b", 40, "failed", 2), ("c", 100, "cancelled", 2), ("d", 1, "done", 1)]:
        put_run(app, run_id, days=days, status=status, context={"tenantId": tenant})
    put_run(app, "sleeps", days=None, status="waiting")
    assert app.archive_old_runs(days=90) == 1
    assert ids(archive(app)) == {"c"}
    assert app.cleanup_old_runs(days=0, tenant_id=2) == 1
    assert app.cleanup_old_runs(days=30) == 1
    assert ids(app.runs) == {"d", "sleeps"}


@pytest.mark.slow
def test_cleanup_from_cron(shell: Any, app: Streamline) -> None:
    """In the crontab: `0 2 * * * streamline-pool cleanup --days 30`."""
    put_run(app, "old", days=40)
    assert shell("cleanup", "--days", "30").stdout == "1 run deleted\n"
    assert ids(app.runs) == set()


def test_workflow_specific_expiry(mongodb_uri: str) -> None:
    """The date must have a time zone: without one the README's seven days would end some hours too early or too late."""
    with TestKit(mongodb_uri) as kit:
        app = kit.use(Streamline())
        workflow = app.workflow("expiring", steps={"a": lambda ctx: 1})
        run = kit.run(workflow, {"url": "https://example.com", "expireAt": datetime.now(UTC) + timedelta(days=7)})
        app.runs.create_index("context.expireAt")
        assert app.cleanup_expired() == 0
        assert present(workflow.get(run.id)).status == "done"
        app.runs.update_one({"_id": run.id}, {"$set": {"context.expireAt": datetime.now(UTC) - timedelta(seconds=1)}})
        assert app.cleanup_expired() == 1
        assert workflow.get(run.id) is None


def test_index_setup_function(app: Streamline) -> None:
    """The README's helper is a method. `userId` is the run's own field, as `user_id=` of `start` stores it."""
    names = app.setup_indexes(
        tenant_field="tenantId", user_field="userId", auto_cleanup_days=30, context_fields=["url", "orderId", "email"]
    )
    indexes = app.runs.index_information()
    keys = [[field for field, _ in index["key"]] for name, index in indexes.items() if name in names]
    for wanted in ("context.tenantId", "userId", "context.url", "context.orderId", "context.email", "endedAt", "workflowId", "status"):
        assert any(key[0] == wanted for key in keys), wanted
    assert app.setup_indexes(tenant_field="tenantId") is not None, "it may be called at each start"


# --- Webhooks & External Resume --------------------------------------------------------------------------------------------


def test_webhooks(app: Streamline) -> None:
    """The token is random, not `runId:stepId:timestamp`, and works once."""
    paths: list[str] = []

    def request_approval(ctx: Context) -> Any:
        hook = create_hook(ctx, "awaiting-approval")
        paths.append(hook.path)  # to be mailed
        return ctx.wait("Waiting for approval")

    approval = app.workflow(
        "approval", steps={"request": request_approval, "process": lambda ctx: {"approved": ctx.get_output("request")["approved"]}}
    )
    web = Flask(__name__)

    @web.post("/hooks/<token>")
    def resume(token: str) -> Any:
        run_id, run = app.resume_hook(token, request.get_json())
        return {"success": True, "runId": run_id, "status": run.status}

    @web.errorhandler(WorkflowError)
    def explain(error: WorkflowError) -> Any:
        return {"code": error.code}, error.http_status

    run = approval.execute(approval.start().id)
    assert run.status == "waiting"
    caller = web.test_client()
    answer = caller.post(paths[0], json={"approved": True})
    assert answer.get_json() == {"success": True, "runId": run.id, "status": "running"}
    again = caller.post(paths[0], json={"approved": False})
    assert (again.status_code, again.get_json()) == (401, {"code": "HOOK_TOKEN_INVALID"})
    assert approval.execute(run.id).output == {"approved": True}


# --- Monitoring & Observability --------------------------------------------------------------------------------------------


def test_monitoring(make_app: Callable[..., Streamline]) -> None:
    """Subscribers take one `event`; what the README destructures beside `runId` is in `event.data`."""
    counts: Counter[str] = Counter()
    logged: list[Any] = []
    broken: list[bool] = []

    def chance() -> float:  # makes the engine itself fail, to see its event
        if broken:
            raise ZeroDivisionError("a defect")
        return 0.5

    def count(event: Event) -> None:
        counts[event.name] += 1

    def alert(event: Event) -> None:
        logged.append((event.run_id, event.data["code"]))

    def engine_error(event: Event) -> None:
        logged.append(("engine", event.run_id))

    def scheduler_error(event: Event) -> None:
        logged.append(("scheduler", event.data["error"]))

    subscribed: list[tuple[str, Callable[[Event], None]]] = [
        ("workflow:started", count), ("workflow:completed", count), ("workflow:failed", alert),
        ("engine:error", engine_error), ("scheduler:error", scheduler_error), ("step:started", count),
    ]  # fmt: skip
    for name, subscriber in subscribed:
        global_event_bus.on(name, subscriber)
    try:
        app = make_app(env=replace(system_env(), random=chance))

        def work(ctx: Context) -> float:
            if ctx.input == "break the engine":
                broken.append(True)
            return float(1 / ctx.input["number"])

        workflow = app.workflow("watched", steps={"work": (work, {"retries": 1})})
        workflow.execute(workflow.start({"number": 1}).id)
        failed = workflow.execute(workflow.start({"number": 0}).id)
        eventually(lambda: counts["workflow:completed"] and logged)
        assert counts == {"workflow:started": 2, "step:started": 2, "workflow:completed": 1}
        assert logged == [(failed.id, "STEP_FAILED")]
        defect = workflow.start("break the engine")
        workflow.execute(defect.id)
        eventually(lambda: ("engine", defect.id) in logged)
        broken.clear()
        assert asyncio.run(_with_a_claim_that_fails(app, logged))
    finally:
        for name, subscriber in subscribed:
            global_event_bus.off(name, subscriber)


async def _with_a_claim_that_fails(app: Streamline, logged: list[Any]) -> bool:
    """Hide the index of the claims from a worker, as an operator's mistake would, until it has said so."""
    claims_by = next(index.name for index in RUN_INDEXES if "wakeAt" in index.key)

    async def hide(hidden: bool) -> None:
        await asyncio.to_thread(app.runs.database.command, "collMod", app.runs.name, index={"name": claims_by, "hidden": hidden})

    await hide(True)
    try:
        async with Pool(app) as pool:
            await pool.until(lambda: any(who == "scheduler" for who, _ in logged))
            await hide(False)
    finally:
        await hide(False)
    return True


# --- Error Handling --------------------------------------------------------------------------------------------------------


def test_error_handling(app: Streamline) -> None:
    """`error.http_status` is the status that the README picks by hand; INVALID_STATE is 409, a conflict, where the README has 400."""
    web = Flask(__name__)

    async def hang(ctx: Context) -> None:
        await asyncio.sleep(60)

    workflow = app.workflow("errors", steps={"hang": (hang, {"timeout": 0.05, "retries": 1})})

    @web.post("/resume/<run_id>")
    def resume(run_id: str) -> Any:
        try:
            return {"status": workflow.resume(run_id, request.get_json()).status}
        except WorkflowError as error:
            match error.code:
                case ErrorCode.WORKFLOW_NOT_FOUND:
                    return {"error": "Workflow not found"}, 404
                case ErrorCode.INVALID_STATE:
                    return {"error": "Cannot resume - workflow not waiting"}, 400
                case ErrorCode.STEP_TIMEOUT:
                    return {"error": "Step timed out"}, 408
                case _:
                    raise

    run = workflow.start()
    caller = web.test_client()
    assert caller.post("/resume/unknown", json={}).status_code == 404
    assert caller.post(f"/resume/{run.id}", json={}).get_json() == {"error": "Cannot resume - workflow not waiting"}
    # A step's timeout is no error of `resume`, which runs no step: it is stored in the run.
    assert present(workflow.execute(run.id).error)["code"] == ErrorCode.STEP_TIMEOUT


def test_every_error_code_of_the_table() -> None:
    table = ["WORKFLOW_NOT_FOUND", "WORKFLOW_CANCELLED", "STEP_NOT_FOUND", "STEP_TIMEOUT", "INVALID_STATE", "DATA_CORRUPTION"]
    assert [ErrorCode(code).value for code in [*table, "MAX_RETRIES_EXCEEDED"]] == [*table, "MAX_RETRIES_EXCEEDED"]


# --- WorkflowRunModel ------------------------------------------------------------------------------------------------------


def test_workflow_run_model(app: Streamline) -> None:
    """Read by `app.runs`. Change by methods: an update of `status` by hand stops no handler, and the engine does not expect it."""
    workflow = app.workflow("model", steps={"a": lambda ctx: 1})
    done, other = workflow.execute(workflow.start().id), workflow.start()
    assert [run["_id"] for run in app.runs.find({"status": "running"})] == [other.id]
    assert workflow.cancel(other.id).status == "cancelled"
    assert app.cleanup_old_runs(days=0) == 2, "all runs that have ended; of one status only: app.runs.delete_many"
    assert workflow.get(done.id) is None
    workflow.execute(workflow.start().id)
    assert app.runs.delete_many({"status": "done"}).deleted_count == 1


# --- Testing ---------------------------------------------------------------------------------------------------------------


def test_how_tests_are_run() -> None:
    """`make test` for `npm test`. Coverage is `pytest --cov`, by pytest-cov; there is no watch mode. Users' tests: test_sleep."""
    done = subprocess.run(["make", "--dry-run", "test", "test-slow"], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert "pytest" in done.stdout


# --- Advanced: Dependency Injection ----------------------------------------------------------------------------------------


def test_dependency_injection(make_app: Callable[..., Streamline]) -> None:
    """A `Streamline` is the container: own registry, event bus and connections. A prefix of its own keeps the runs apart, too."""
    app1, app2 = make_app(), make_app(collection_prefix="second_")
    heard: list[str | None] = []
    app1.events.on("workflow:completed", lambda event: heard.append(event.run_id))
    workflow1 = app1.workflow("same-id", steps={"a": lambda ctx: 1})
    workflow2 = app2.workflow("same-id", steps={"a": lambda ctx: 2})
    run1, run2 = workflow1.start(), workflow2.start()
    assert workflow2.execute(run2.id).output == 2
    assert workflow1.execute(run1.id).output == 1
    app1.events.flush()
    app2.events.flush()
    assert heard == [run1.id]
    assert workflow1.get(run2.id) is None
