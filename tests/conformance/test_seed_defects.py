"""The known defects of the library that this one replaces (streamline.js), and for each of them a test that it does not occur here.

The table names the test if another file contains it (in this folder, or under tests/ as given).
`test_every_reference_names_a_test_that_exists` checks the table.

| defect | test |
|---|---|
| a crash between "step done" and "advance" wedges the run | unit/domain/test_transitions.py::test_done_and_advance_are_one_write |
| | chaos/test_kills.py::test_a_crash_or_a_freeze_at_a_named_point_wedges_nothing |
| a run that died mid-step is never taken over | test_supervisor.py::test_the_runs_of_a_killed_worker_restart_at_once |
| | test_engine_leases.py::test_an_expired_lease_is_recovered_and_counted_once_by_any_number_of_sweeps |
| answering a run twice | test_waits.py::test_of_two_answers_from_two_processes_exactly_one_counts |
| an old token answers a newer wait | test_hooks.py::test_a_token_of_a_wait_that_is_over_does_not_answer_the_next_one |
| resume of a paused run answers its wait | here |
| resume does not refresh the lease, so an approved run is recovered as stale | here |
| cancel relabels a finished run | test_engine_cancel.py::test_cancelling_an_ended_run_changes_nothing_and_publishes_nothing |
| resume revives a cancelled run | here |
| whole-document writes overwrite concurrent progress | here |
| waitFor hangs on a stale cache | here |
| | test_engine_waiting.py::test_the_loss_of_a_signal_costs_one_poll |
| events before the wait are lost | test_events_durable.py::test_an_event_reaches_a_run_whenever_it_is_sent |
| events during a pause are lost | test_events_durable.py::test_an_event_sent_during_a_pause_is_not_lost |
| event waits die with the process | test_events_durable.py::test_an_event_wait_outlives_every_process |
| a future start never fires in an idle process | here |
| failed runs lack endedAt and a reason, so the TTL never removes them | here |
| TTL deletes sleeping runs | test_indexes.py::test_the_ttl_holds_no_run_that_has_not_ended |
| a raced idempotent start returns a phantom | test_engine_starting.py::test_of_twenty_threads_with_one_key_one_wins_and_all_get_its_run |
| | test_engine_starting.py::test_of_four_processes_with_one_key_on_a_new_database_one_wins |
| the same key in two workflows returns the wrong run | test_engine_starting.py::test_an_idempotency_key_belongs_to_one_workflow |
| two applications with the same database disturb each other | test_isolation.py::test_two_pools_on_one_database_run_each_its_own |
| long timers overflow | here |
| a handler raising None-like or string-like things breaks failure handling | here |
| | test_engine_retries.py::test_a_misbehaving_handler_fails_only_its_own_run |
| keys with dots or $ change shape | here |
| clean-up of listeners or timers leaks after shutdown | here |
| timed-out attempts keep running beside their retry | here |
| status derived from a stale copy | here |
| skipped steps never reach 100 % | unit/domain/test_progress.py::test_a_done_run_with_skipped_steps_is_at_100_percent |
"""

from __future__ import annotations

import asyncio
import gc
import re
import threading
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from other_program import other_program
from stored_runs import stored
from waiting_app import waiting_app, waiting_pool
from workers import check_invariants, run_until_idle

from streamline_pool import InvalidStateError, Streamline, create_hook
from streamline_pool.protocol import claims, recovery
from support import eventually, present

TESTS = Path(__file__).resolve().parents[1]


def test_every_reference_names_a_test_that_exists() -> None:
    assert __doc__ is not None
    references = re.findall(r"((?:\w+/)*test_\w+\.py)::(test_\w+)", __doc__)
    assert len(references) > 10
    for file, name in references:
        path = TESTS / file if "/" in file else TESTS / "conformance" / file
        assert f"def {name}(" in path.read_text(), f"{file} has no {name}"


@pytest.mark.parametrize("kind", ["human", "webhook", "event"])
def test_resuming_a_paused_run_never_answers_its_wait(app: Streamline, kind: str) -> None:
    """A person who resumes a paused run must not approve the invoice by it."""

    def ask(ctx: Any) -> None:
        if kind == "event":
            ctx.wait_for("news")
        if kind == "webhook":
            create_hook(ctx, "?")
        ctx.wait("?")

    workflow = app.workflow("w", steps={"ask": ask})
    run = workflow.execute(workflow.start().id)
    workflow.pause(run.id)
    with pytest.raises(InvalidStateError):
        workflow.resume(run.id, "an answer")
    resumed = workflow.resume(run.id)
    assert (resumed.paused, resumed.status, resumed.step("ask").status, resumed.step("ask").output) == (False, "waiting", "waiting", None)
    run_until_idle(app)
    assert present(workflow.get(run.id)).step("ask").status == "waiting"


def test_a_run_that_was_just_answered_is_not_taken_for_lost(app: Streamline) -> None:
    """The answer comes long after the last renewal; a sweep at that moment must neither count a lost worker nor enter a step twice."""
    entered: list[int] = []
    workflow = app.workflow("w", steps={"ask": lambda ctx: ctx.wait("?"), "act": lambda ctx: entered.append(ctx.attempt)})
    run = workflow.execute(workflow.start().id)
    long_ago = datetime.now(UTC) - timedelta(days=9)
    app.runs.update_one({"_id": run.id}, {"$set": {"updatedAt": long_ago, "startedAt": long_ago, "steps.0.startedAt": long_ago}})
    workflow.resume(run.id, "yes")
    before = stored(app, run)
    assert app.store().run(recovery.recover_expired(3)) == 0
    assert stored(app, run) == before
    app.store().run(claims.claim_run(run.id, None, "claim", "worker", 60.0))
    assert app.store().run(recovery.recover_expired(3)) == 0, "the worker that claims it has its own lease"
    document = stored(app, run)
    assert (document["crashes"], document["lease"]["owner"], entered) == (0, "worker", [])


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("payload", [None, "yes"])
def test_a_cancelled_run_is_revived_by_nothing(app: Streamline, paused: bool, payload: Any) -> None:
    workflow = app.workflow("w", steps={"ask": lambda ctx: ctx.wait("?", timeout=0.1), "act": lambda ctx: 1})
    run = workflow.execute(workflow.start().id)
    if paused:
        workflow.pause(run.id)
    workflow.cancel(run.id)
    before = stored(app, run)
    with pytest.raises(InvalidStateError):
        workflow.resume(run.id, payload)
    with pytest.raises(InvalidStateError):
        workflow.rewind_to(run.id, "ask")
    assert workflow.pause(run.id).document == before
    run_until_idle(app)
    assert stored(app, run) == before


def test_the_lease_holder_does_not_overwrite_what_others_write_into_its_run(app: Streamline) -> None:
    """The holder's writes change only the fields that they name; fields of other programs, and answers that arrive meanwhile, must stay."""
    entered, go = threading.Event(), threading.Event()

    def work(ctx: Any) -> str:
        ctx.set("mine", 1)
        ctx.checkpoint("half")
        entered.set()
        go.wait(20)
        ctx.checkpoint("three quarters")
        return "worked"

    workflow = app.workflow("w", steps={"work": work, "receive": lambda ctx: ctx.wait_for("news"), "end": lambda ctx: 1}, context=dict)
    run = workflow.start({"theirs": {"kept": 1}}, {"note": "old"})
    thread = threading.Thread(target=workflow.execute, args=(run.id,))
    thread.start()
    assert entered.wait(20)
    app.send_event("news", "meanwhile", run_id=run.id)
    app.send_event("other", "kept", run_id=run.id)
    change = {"meta.note": "new", "context.theirs.added": 2, "context.more": 3, "dashboard": "seen", "tags": ["x"]}
    app.runs.update_one({"_id": run.id}, {"$set": change})
    go.set()
    thread.join(20)
    document = stored(app, run)
    assert document["status"] == "done"
    assert document["context"] == {"theirs": {"kept": 1, "added": 2}, "more": 3, "mine": 1}
    assert (document["meta"], document["dashboard"], document["tags"]) == ({"note": "new"}, "seen", ["x"])
    assert document["steps"][1]["output"] == "meanwhile"
    assert [item["data"] for item in document["inbox"]] == ["kept"]


def test_a_programs_older_copy_of_a_run_never_overrules_the_database(
    make_app: Callable[..., Streamline], mongodb_uri: str, database: str
) -> None:
    """The program has read, driven and cached the run before; its status and `wait_for` must still come from the database."""
    app = make_app()
    entered: list[str] = []
    workflow = app.workflow("w", steps={"ask": lambda ctx: ctx.wait("?"), "act": lambda ctx: entered.append(ctx.run_id)})
    with other_program(mongodb_uri, database) as other:
        runs = [workflow.execute(workflow.start().id) for _ in range(3)]
        answered, cancelled, rewound = runs
        other.call("resume_run", answered.id, "yes")
        assert present(workflow.get(answered.id)).status == "running"
        other.call("cancel_run", cancelled.id)
        assert present(workflow.get(cancelled.id)).status == "cancelled"
        assert workflow.wait_for(cancelled.id, timeout=5).status == "cancelled"
        assert workflow.execute(cancelled.id).status == "cancelled"
        with pytest.raises(InvalidStateError):
            workflow.resume(cancelled.id, "yes")
        assert workflow.execute(answered.id).status == "done"
        other.call("rewind_run", answered.id, "act")
        with pytest.raises(TimeoutError):
            workflow.wait_for(answered.id, timeout=0.2)
        other.call("pause_run", rewound.id)
        assert (present(workflow.get(rewound.id)).paused, workflow.execute(rewound.id).paused) == (True, True)
    assert entered == [answered.id]


def started_at(app: Streamline, run: Any) -> Any:
    return stored(app, run).get("startedAt")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_future_start_fires_in_an_idle_pool(mongodb_uri: str, database: str, tmp_path: Path) -> None:
    """No other run, signal or request occurs at that time: only the timer can start the run."""
    with waiting_app(mongodb_uri, database) as app, waiting_pool(tmp_path, mongodb_uri, database):
        approval = app.workflows["approval"]
        late_s = []
        runs = [approval.start(start_at=delay_s) for delay_s in (0.5, 1.5, 8.0)]  # the last is longer than the sweep's horizon
        assert {run.status for run in runs} == {"draft"}
        for run in runs:
            begun = eventually(partial(started_at, app, run), timeout=20)
            late_s.append((begun - run.document["wakeAt"]).total_seconds())
    print([f"{late * 1000:.0f} ms" for late in late_s])
    assert min(late_s) >= 0
    assert min(late_s) < 0.1
    assert max(late_s) < 2.0, "a sweep would find it only every six seconds"


def _worker_lost(app: Streamline, run_id: str) -> None:
    for _ in range(3):
        app.store().run(claims.claim_run(run_id, None, "claim", "worker", 60.0))
        app.runs.update_one({"_id": run_id}, {"$set": {"lease.alone": True}})  # as before the handler of a suspect
        app.store().run(recovery.release_owner("worker", 3, {"signal": "SIGKILL"}))


def _corrupted(app: Streamline, run_id: str) -> None:
    app.runs.update_one({"_id": run_id}, {"$set": {"rev": "garbage"}})


def _misplaced(app: Streamline, run_id: str) -> None:
    app.runs.update_one({"_id": run_id}, {"$set": {"steps.0.stepId": "other", "currentStepId": "other"}})


def _paused(app: Streamline, run_id: str) -> None:
    app.pause_run(run_id)
    app.resume_run(run_id)


@pytest.mark.parametrize(
    ("handler", "meanwhile", "code"),
    [
        (lambda ctx: 1 / 0, _paused, "MAX_RETRIES_EXCEEDED"),
        (lambda ctx: object(), _paused, "VALIDATION_ERROR"),
        (lambda ctx: ctx.signal.wait(9), _paused, "MAX_RETRIES_EXCEEDED"),
        (lambda ctx: 1, _worker_lost, "WORKER_CRASHED"),
        (lambda ctx: 1, _corrupted, "DATA_CORRUPTION"),
        (lambda ctx: 1, _misplaced, "VERSION_MISMATCH"),
    ],
    ids=["raised", "unstorable", "timed out", "lost workers", "corrupted", "misplaced"],
)
def test_a_failed_run_has_its_error_and_the_time_of_its_end(app: Streamline, handler: Any, meanwhile: Any, code: str) -> None:
    """A TTL on `endedAt` deletes only runs that have this field."""
    workflow = app.workflow("w", steps={"a": (handler, {"retries": 2, "retry_delay": 0, "timeout": 0.1})})
    run = workflow.start()
    meanwhile(app, run.id)
    run_until_idle(app)
    document = stored(app, run)
    check_invariants([document])
    assert (document["status"], document["error"]["code"]) == ("failed", code)
    assert document["error"]["message"]
    assert timedelta(0) <= datetime.now(UTC) - document["endedAt"] < timedelta(minutes=1)


@pytest.mark.parametrize("days", [25, 60, 365, 36_000])
def test_no_timer_is_too_long(app: Streamline, days: int) -> None:
    """2^31 milliseconds are 24.8 days; a timer that overflows fires at once."""
    delay = timedelta(days=days)
    workflow = app.workflow(
        "w",
        steps={"nap": lambda ctx: ctx.sleep(delay), "after": lambda ctx: 1},
    )
    asking = app.workflow("asking", steps={"ask": lambda ctx: ctx.wait("?", timeout=delay), "after": lambda ctx: 1})
    receiving = app.workflow("receiving", steps={"receive": lambda ctx: ctx.wait_for("news", timeout=delay), "after": lambda ctx: 1})
    hooked = app.workflow("hooked", steps={"ask": lambda ctx: create_hook(ctx, "?", expires_in=delay) and ctx.wait("?")})
    runs = [flow.start() for flow in (workflow, asking, receiving, hooked)] + [workflow.start(start_at=delay)]
    run_until_idle(app)
    for run in runs[:3]:
        document = stored(app, run)
        assert (document["status"], document["steps"][1]["status"]) == ("waiting", "pending")
        assert abs(document["wakeAt"] - datetime.now(UTC) - delay) < timedelta(minutes=1)
    hook = stored(app, runs[3])["steps"][0]["hooks"][0]
    assert abs(hook["expiresAt"] - datetime.now(UTC) - delay) < timedelta(minutes=1)
    draft = stored(app, runs[4])
    assert (draft["status"], draft["steps"][0]["attempts"]) == ("draft", 0)


class Empty(Exception):
    """An exception with an empty text."""

    def __str__(self) -> str:
        return ""


class Nothing(BaseException):
    """Not an `Exception`, false as a bool, and with an empty text."""

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return ""


class Odd(Exception):
    """An exception whose text, code and message are invalid."""

    def __str__(self) -> Any:
        return None  # noqa: PLE0307 -- the test needs an invalid __str__

    code = "NO_SUCH_CODE"
    message = None


def _raise(value: Any) -> Callable[[Any], None]:
    def handler(ctx: Any) -> None:
        raise value

    return handler


@pytest.mark.parametrize(
    "value", [None, "text", 5, ValueError(), ValueError(None), ValueError(""), Empty(), Empty, Nothing(), Odd(), {"code": "X"}], ids=repr
)
@pytest.mark.parametrize("retries", [1, 2])
def test_every_raised_object_becomes_a_readable_failure(app: Streamline, value: Any, retries: int) -> None:
    """Careless programs raise None, text, and exceptions that are false or have no text."""
    workflow = app.workflow("w", steps={"a": (_raise(value), {"retries": retries, "retry_delay": 0})})
    run = workflow.start()
    run_until_idle(app)
    failed = present(workflow.get(run.id))
    check_invariants([failed.to_dict()])
    assert (failed.status, failed.step("a").status, failed.step("a").attempts) == ("failed", "failed", retries)
    for error in (failed.error, failed.step("a").error):
        assert present(error)["type"] == (
            type(value).__name__ if isinstance(value, BaseException) else "Empty" if value is Empty else "TypeError"
        )
        assert present(error)["message"].strip()


ODD = {"a.b": 1, "$inc": {"$set": 2, "": 3}, "x.$[].y": [{"..": None}], "$$NOW": "$$REMOVE", ".": {"$ref": 1}, " ": 4, "é.": 5}


def test_keys_with_dots_and_dollars_are_kept_on_every_path(app: Streamline) -> None:
    tokens: list[str] = []

    def work(ctx: Any) -> Any:
        assert ctx.input == ODD
        assert ctx.context == ODD
        assert ctx.get_checkpoint() == (None if ctx.attempt == 1 else ODD)
        ctx.checkpoint(ODD)
        if ctx.attempt == 1:
            raise ValueError("once more, with the checkpoint")
        for key, value in ODD.items():
            ctx.set(f"set {key}", value)
            ctx.set(key, {"set": value})
        return ODD

    def ask(ctx: Any) -> None:
        ctx.wait("?", ODD)

    def offer(ctx: Any) -> None:
        tokens.append(create_hook(ctx, "?").token)
        ctx.wait("?")

    names = ["work", "ask", "offer", "receive", "receive_all"]
    workflow = app.workflow(
        "w",
        steps={
            "work": (work, {"retry_delay": 0}),
            "ask": ask,
            "offer": offer,
            "receive": lambda ctx: ctx.wait_for("a.$b"),
            "receive_all": lambda ctx: ctx.wait_for("a.$b"),
            "end": lambda ctx: [ctx.get_output(step) for step in names],
        },
    )
    run = workflow.start(ODD, ODD)
    run_until_idle(app)
    waiting = present(workflow.get(run.id))
    assert present(waiting.step("ask").waiting_for)["data"] == ODD
    assert waiting.meta == ODD
    assert waiting.context == ODD | {f"set {key}": value for key, value in ODD.items()} | {
        key: {"set": value} for key, value in ODD.items()
    }
    workflow.resume(run.id, ODD)
    run_until_idle(app)
    app.resume_hook(tokens[0], ODD)
    run_until_idle(app)
    app.send_event("a.$b", ODD, run_id=run.id)
    run_until_idle(app)
    app.send_event("a.$b", ODD)
    run_until_idle(app)
    assert present(workflow.get(run.id)).output == [ODD] * 5


def test_an_app_that_is_closed_leaves_nothing_behind(make_app: Callable[..., Streamline]) -> None:
    """An application that is opened and closed for hours, as test suites do, must not collect threads, sockets or timers."""
    process = psutil.Process()

    def use() -> None:
        app = make_app()
        app.events.on("*", lambda event: None)
        workflow = app.workflow("w", steps={"nap": lambda ctx: ctx.sleep(3600), "quick": lambda ctx: 1})
        timed = app.workflow("timed", steps={"a": (lambda ctx: 1, {"timeout": 3600})})
        timed.execute(timed.start().id)
        run = workflow.execute(workflow.start().id)
        with pytest.raises(TimeoutError):
            workflow.wait_for(run.id, timeout=0.01)
        app.close()

    use()
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        gc.collect()  # a socket that an earlier test has left is none of this test's

    def left_behind() -> tuple[int, int]:
        gc.collect()
        return threading.active_count(), process.num_fds()

    before = left_behind()
    for _ in range(5):
        use()
    eventually(lambda: left_behind()[0] <= before[0] and left_behind()[1] <= before[1] + 2)


def test_an_app_used_in_an_event_loop_leaves_no_task_in_it(make_app: Callable[..., Streamline]) -> None:
    async def use() -> set[str]:
        before = asyncio.all_tasks()
        app = make_app()
        workflow = app.workflow("w", steps={"nap": lambda ctx: ctx.sleep(3600)})
        async with app:
            run = await workflow.start_async()
            await workflow.execute_async(run.id)
            with pytest.raises(TimeoutError):
                await workflow.wait_for_async(run.id, timeout=0.01)
        return {repr(task) for task in asyncio.all_tasks() - before}

    assert asyncio.run(use()) == set()


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_timed_out_attempt_does_not_write_beside_its_retry(app: Streamline, kind: str) -> None:
    """A coroutine must have ended before the next attempt begins, and nothing that a thread does may be stored any more."""
    alive: list[str] = []
    late: list[str] = []
    over = threading.Event()

    def stubborn(ctx: Any) -> str:
        if ctx.attempt == 2:
            return "second"
        ctx.signal.wait(20)
        time.sleep(0.2)  # a thread cannot be stopped; this is what it does afterwards
        for call in (
            lambda: ctx.set("late", 1),
            lambda: ctx.checkpoint("late"),
            lambda: ctx.wait("late?"),
            lambda: create_hook(ctx, "late"),
        ):
            try:
                call()
            except BaseException as exc:  # noqa: BLE001 -- a wait raises a BaseException
                late.append(type(exc).__name__)
        over.set()
        return "first"

    async def obedient(ctx: Any) -> str:
        assert alive == [], "the previous attempt still works"
        if ctx.attempt == 2:
            over.set()
            return "second"
        alive.append("first")
        try:
            await asyncio.sleep(20)
        finally:
            await asyncio.sleep(0.1)
            alive.clear()
        return "first"

    handler = stubborn if kind == "def" else obedient
    workflow = app.workflow("w", steps={"a": (handler, {"timeout": 0.1, "retries": 2, "retry_delay": 0}), "b": lambda ctx: ctx.context})
    run = workflow.start()
    run_until_idle(app)
    assert over.wait(20)
    done = present(workflow.get(run.id))
    assert (done.status, done.step("a").output, done.step("a").attempts, done.output) == (
        "done",
        "second",
        2,
        {},
    )
    assert late == (["InvalidStateError"] * 4 if kind == "def" else [])
