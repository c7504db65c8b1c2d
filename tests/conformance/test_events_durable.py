"""Durable events: sent before, during or after the wait, from any process, each reaches each waiting run once."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from other_program import other_program
from stored_runs import stored, until_step
from waiting_app import evidence, waiting_pool
from workers import Pool, check_invariants, run_until_idle

from streamline_pool import PayloadTooLargeError, Run, Streamline, ValidationError, Workflow, WorkflowNotFoundError, is_timeout
from streamline_pool.client.event_delivery import finishing_broadcasts
from streamline_pool.protocol import durable_events, inbox
from support import eventually, present


def receiving(app: Streamline, times: int = 1, *, name: str = "receiving", **options: Any) -> Workflow:
    """A workflow that waits for "news" `times` times, and returns the data that it received."""
    steps: dict[str, Any] = {f"receive{number}": lambda ctx: ctx.wait_for("news", **options) for number in range(times)}
    steps["end"] = lambda ctx: [ctx.get_output(step_id) for step_id in steps if step_id != "end"]
    return app.workflow(name, steps=steps)


def begun(workflow: Workflow) -> Run:
    """A run that waits for its event."""
    run = workflow.execute(workflow.start().id)
    assert run.steps[0].status == "waiting"
    assert "lease" not in run.document
    return run


def events(app: Streamline) -> list[dict[str, Any]]:
    return list(app.store().collection("events").find())


# --- before, during and after the wait -------------------------------------------------------------------------------


@pytest.mark.parametrize(("moment", "target"), [*product(["before", "during", "after"], ["one", "all"]), ("before the start", "all")])
def test_an_event_reaches_a_run_whenever_it_is_sent(app: Streamline, moment: str, target: str) -> None:
    """`during`: the handler itself sends the event, so it is stored after the run was claimed and before the wait is stored."""

    def send() -> int:
        return app.send_event("news", {"n": 1}, run_id=run.id if target == "one" else None)

    def receive(ctx: Any) -> None:
        if moment == "during":
            assert send() == 0, "no run waits for it yet"
        ctx.wait_for("news")

    workflow = app.workflow("w", steps={"receive": receive, "end": lambda ctx: ctx.get_output("receive")})
    if moment == "before the start":
        assert app.send_event("news", "old") == 0
    run = workflow.start()
    if moment == "before":
        assert send() == 0
    run = workflow.execute(run.id)
    if moment in ("after", "before the start"):
        assert run.status == "waiting", "an event that was sent before the run existed must not reach it"
        assert send() == 1
        run = workflow.execute(run.id)
    assert (run.status, run.output, run.step("receive").attempts) == ("done", {"n": 1}, 1)
    check_invariants([run.to_dict()])


@pytest.mark.parametrize("target", ["one", "all"])
def test_each_event_ends_one_wait_in_the_order_of_sending(app: Streamline, target: str) -> None:
    workflow = receiving(app, times=3)
    run = workflow.start()
    for number in (1, 2):
        app.send_event("news", number, run_id=run.id if target == "one" else None)
    waiting = workflow.execute(run.id)
    assert [step.output for step in waiting.steps] == [1, 2, None, None]
    assert (waiting.status, waiting.steps[2].status) == ("waiting", "waiting"), "two events, two waits"
    assert app.send_event("news", 3, run_id=run.id if target == "one" else None) == 1
    assert workflow.execute(run.id).output == [1, 2, 3]


def test_one_broadcast_ends_one_wait_of_each_run(app: Streamline) -> None:
    """A run that waits again for the same name must not get the same event again."""
    workflow = receiving(app, times=2)
    runs = [begun(workflow) for _ in range(5)]
    assert app.send_event("news", "first") == 5
    for run in runs:
        again = workflow.execute(run.id)
        assert (again.steps[0].output, again.steps[1].status) == ("first", "waiting")
    assert app.send_event("news", "second") == 5
    assert {tuple(workflow.execute(run.id).output) for run in runs} == {("first", "second")}


def test_an_event_reaches_only_the_run_that_it_names(app: Streamline) -> None:
    workflow = receiving(app)
    one, other = begun(workflow), begun(workflow)
    before = stored(app, other)
    assert app.send_event("news", 1, run_id=one.id) == 1
    assert app.send_event("other news", 2) == 0
    assert stored(app, other) == before
    assert workflow.execute(one.id).output == [1]


def test_more_runs_than_one_command_takes_are_all_woken(app: Streamline) -> None:
    workflow = receiving(app)
    first = begun(workflow)
    template = stored(app, first)
    app.runs.insert_many([{**template, "_id": f"r{number}"} for number in range(1, 1234)])
    assert app.send_event("news", "x" * 1000) == 1234
    assert app.runs.count_documents({"steps.0.output": "x" * 1000, "awaits": {"$exists": False}, "wakeAt": {"$exists": True}}) == 1234
    assert [event["pending"] for event in events(app)] == [False]


@pytest.mark.parametrize("target", ["one", "all"])
@pytest.mark.parametrize("data", [None, "$status", {"$inc": {"a": 1}, "a.b": "$$NOW"}, [["$steps"]], b"\x00", {"$ref": 1}])
def test_the_data_of_an_event_is_never_an_expression(app: Streamline, data: Any, target: str) -> None:
    workflow = receiving(app)
    waiting, later = begun(workflow), workflow.start()
    if target == "one":
        for run in (waiting, later):
            app.send_event("news", data, run_id=run.id)
    else:
        app.send_event("news", data)
    assert [workflow.execute(run.id).output for run in (waiting, later)] == [[data], [data]]


@pytest.mark.parametrize("name", ["$status", "a.b", "$$NOW", "news/5", "…", "x" * 200, " "])
def test_an_event_may_have_any_name(app: Streamline, name: str) -> None:
    workflow = app.workflow("w", steps={"a": lambda ctx: ctx.wait_for(name), "b": lambda ctx: ctx.wait_for(name)})
    run = workflow.execute(workflow.start().id)
    assert app.send_event(name, 1, run_id=run.id) == 1
    workflow.execute(run.id)
    assert app.send_event(name, 2) == 1
    assert workflow.execute(run.id).output == 2


@pytest.mark.parametrize("name", [None, "", 5, "x" * 201, "a\0b", "\ud800"])
def test_a_name_that_cannot_be_waited_for_cannot_be_sent(app: Streamline, name: Any) -> None:
    with pytest.raises(ValidationError, match="send_event"):
        app.send_event(name, 1)
    assert events(app) == []


def test_what_ctx_emits_answers_no_wait(app: Streamline) -> None:
    """Emitted events go to subscribers and are lost with the process; an event that a run waits for must be durable."""
    workflow = app.workflow("w", steps={"emit": lambda ctx: ctx.emit("news", 1), "receive": lambda ctx: ctx.wait_for("news")})
    run = workflow.execute(workflow.start().id)
    assert (run.status, run.step("receive").status) == ("waiting", "waiting")


# --- events that cannot be delivered ---------------------------------------------------------------------------------


def test_an_unknown_run_is_named_and_an_ended_one_is_not_woken(app: Streamline) -> None:
    workflow = receiving(app)
    with pytest.raises(WorkflowNotFoundError):
        app.send_event("news", 1, run_id="unknown")
    run = begun(workflow)
    workflow.cancel(run.id)
    before = stored(app, run)
    assert (app.send_event("news", 1, run_id=run.id), app.send_event("news", 1)) == (0, 0)
    assert stored(app, run) == before


def test_a_full_inbox_refuses_an_event_with_an_error_and_drops_nothing(app: Streamline) -> None:
    workflow = receiving(app, times=2)
    run = workflow.start()
    for number in range(inbox.INBOX_MAX):
        assert app.send_event("news" if number % 2 else "other", number, run_id=run.id) == 0
    before = stored(app, run)
    with pytest.raises(PayloadTooLargeError, match=r"inbox is full: 100 items.*send again") as caught:
        app.send_event("news", "too much", run_id=run.id)
    assert (caught.value.http_status, stored(app, run)) == (413, before)
    done = workflow.execute(run.id)
    assert done.output == [1, 3], "the oldest event is taken first"
    assert len(done.document["inbox"]) == inbox.INBOX_MAX - 2


def test_an_inbox_is_bounded_in_bytes_too_but_a_wait_takes_its_event_even_then(app: Streamline) -> None:
    workflow = app.workflow("w", steps={"ask": lambda ctx: ctx.wait("?"), "receive": lambda ctx: ctx.wait_for("news")})
    run = workflow.execute(workflow.start().id)
    for _ in range(8):
        app.send_event("other", b"x" * 250_000, run_id=run.id)
    with pytest.raises(PayloadTooLargeError, match="bytes are the limit"):
        app.send_event("other", b"x" * 250_000, run_id=run.id)
    workflow.resume(run.id)
    assert workflow.execute(run.id).step("receive").status == "waiting"
    assert app.send_event("news", b"y" * 250_000, run_id=run.id) == 1, "it ends the wait and needs no space in the inbox"
    assert workflow.execute(run.id).output == b"y" * 250_000


def test_an_event_above_its_limit_is_refused_and_not_stored(app: Streamline) -> None:
    workflow = receiving(app)
    run = begun(workflow)
    before = stored(app, run)
    for run_id in (None, run.id):
        with pytest.raises(PayloadTooLargeError, match=str(durable_events.EVENT_BYTES_MAX)):
            app.send_event("news", b"x" * durable_events.EVENT_BYTES_MAX, run_id=run_id)
    assert (stored(app, run), events(app)) == (before, [])


# --- pauses, deadlines, rewinds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["one", "all"])
@pytest.mark.parametrize("when", ["before the wait", "during the wait"])
def test_an_event_sent_during_a_pause_is_not_lost(app: Streamline, when: str, target: str) -> None:
    workflow = receiving(app)
    run = workflow.start() if when == "before the wait" else begun(workflow)
    workflow.pause(run.id)
    app.send_event("news", "in the pause", run_id=run.id if target == "one" else None)
    run_until_idle(app)
    assert present(workflow.get(run.id)).status in ("running", "waiting"), "paused"
    workflow.resume(run.id)
    run_until_idle(app)
    assert present(workflow.get(run.id)).output == ["in the pause"]


def test_a_run_that_is_paused_before_its_wait_still_finds_the_event_that_was_sent(app: Streamline) -> None:
    """The write under pause releases the run before the stored events were searched; the search must happen after the resume."""
    entered, go = threading.Event(), threading.Event()

    def receive(ctx: Any) -> None:
        entered.set()
        assert go.wait(10)
        ctx.wait_for("news")

    workflow = app.workflow("w", steps={"receive": receive})
    run = workflow.start()
    executing = threading.Thread(target=workflow.execute, args=(run.id,))
    executing.start()
    assert entered.wait(10)
    workflow.pause(run.id)
    app.send_event("news", "on the way")
    go.set()
    executing.join(10)
    document = stored(app, run)
    assert (document["steps"][0]["status"], "lease" in document, "pausedWakeAt" in document) == ("waiting", False, True)
    workflow.resume(run.id)
    run_until_idle(app)
    assert present(workflow.get(run.id)).output == "on the way"


def test_an_event_wait_without_an_event_ends_by_its_timeout(app: Streamline) -> None:
    workflow = receiving(app, timeout=0.2)
    run = begun(workflow)
    run_until_idle(app)
    done = present(workflow.get(run.id))
    assert done.status == "done"
    assert is_timeout(done.output[0])
    assert app.send_event("news", "too late") == 0
    assert "awaits" not in stored(app, run)


def test_an_event_stored_before_the_deadline_counts_although_it_was_not_delivered(app: Streamline) -> None:
    """The sender died after storing the event; the worker that claims the run at its deadline must search the stored events first."""
    workflow = receiving(app, timeout=0.2)
    run = begun(workflow)
    app.store().run(durable_events.record_event("e1", "news", "from the dead", app.store().now()))
    run_until_idle(app)
    assert present(workflow.get(run.id)).output == ["from the dead"]


def test_a_rewound_wait_does_not_get_the_same_event_again(app: Streamline) -> None:
    workflow = receiving(app)
    run = begun(workflow)
    app.send_event("news", "old")
    workflow.execute(run.id)
    workflow.rewind_to(run.id, "receive0")
    assert workflow.execute(run.id).step("receive0").status == "waiting"
    assert app.send_event("news", "new") == 1
    assert workflow.execute(run.id).output == ["new"]


def test_a_steward_finishes_the_broadcast_of_a_sender_that_died(app: Streamline) -> None:
    """The event is stored and not delivered: the steward must deliver it once, to the runs that existed when it was sent."""
    workflow = receiving(app)
    run = begun(workflow)
    sent_at = datetime.now(UTC) - timedelta(seconds=60)
    app.store().run(durable_events.record_event("e1", "news", "from the dead", app.store().now()))
    younger = begun(workflow)
    assert app.store().drive(finishing_broadcasts(app.services)) == 0, "the sender may still be at work"
    app.store().collection("events").update_one({"_id": "e1"}, {"$set": {"at": sent_at}})
    assert app.store().drive(finishing_broadcasts(app.services)) == 1
    assert app.store().drive(finishing_broadcasts(app.services)) == 0
    assert workflow.execute(run.id).output == ["from the dead"]
    assert workflow.execute(younger.id).status == "waiting", "it began after the event was sent"


def test_a_delivery_that_is_repeated_counts_once(app: Streamline) -> None:
    """After a lost reply the same delivery is sent again, and a late copy of it may arrive."""
    workflow = receiving(app, times=2)
    run = begun(workflow)
    deliver = durable_events.deliver_event(run.id, "e1", "news", "once", 100)
    assert app.store().run(deliver) is not None
    workflow.execute(run.id)
    before = stored(app, run)
    assert app.store().run(deliver) is None
    assert (stored(app, run), before["steps"][1]["status"]) == (before, "waiting")


def test_the_asyncio_function_sends_too(app: Streamline) -> None:
    workflow = receiving(app)
    run = begun(workflow)

    async def send() -> int:
        woken: int = await app.send_event_async("news", 1)
        await app.close_async()
        return woken

    assert asyncio.run(send()) == 1
    assert workflow.execute(run.id).output == [1]


def test_every_way_to_wait_and_to_send_at_once_delivers_each_event_once(app: Streamline) -> None:
    """Workers begin waits while events are sent; many random events meet the inbox, the search of stored events and the delivery."""
    chance = random.Random(5)
    workflow = receiving(app, times=4)
    runs = workflow.start_many([None] * 30)
    sent: dict[str, set[str]] = {run.id: set() for run in runs}

    def send_all() -> bool:
        for number in range(2):
            app.send_event("news", f"all {number}")
            for run in chance.sample(runs, len(runs)):
                app.send_event("news", f"{run.id} {number}", run_id=run.id)
        return True

    for run in runs:
        sent[run.id] = {"all 0", "all 1", f"{run.id} 0", f"{run.id} 1"}

    async def play() -> None:
        async with Pool(app, workers=2) as pool:
            await asyncio.gather(
                pool.until(lambda: app.runs.count_documents({"endedAt": None}) == 0, timeout=40), asyncio.to_thread(send_all)
            )

    asyncio.run(play())
    for run in runs:
        done = present(workflow.get(run.id))
        assert (done.status, len(done.output), set(done.output)) == ("done", 4, sent[run.id])
        assert done.document.get("inbox", []) == []


# --- several processes ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_events_from_two_other_processes_reach_every_run_of_a_pool_once(
    client: Streamline, mongodb_uri: str, database: str, tmp_path: Path
) -> None:
    """Two processes send to all while two workers begin the waits: three events, three waits, and each event must count once."""
    subscriber = client.workflows["listener"]
    with (
        waiting_pool(tmp_path, mongodb_uri, database),
        other_program(mongodb_uri, database) as left,
        other_program(mongodb_uri, database) as right,
    ):
        runs = subscriber.start_many([None] * 40)
        left.ask("send_event", "news", "left")
        right.ask("send_event", "news", "right")
        woken = [left.answer(), right.answer()]
        for run in runs:
            until_step(client, run, "third", "waiting")
        woken.append(left.call("send_event", "news", "last"))
        done = [subscriber.wait_for(run.id, timeout=30) for run in runs]
    print(f"woken at once: {woken}")
    assert woken[2] == 40
    for run in done:
        assert sorted(run.output) == ["last", "left", "right"]
        assert run.output[2] == "last"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_event_wait_outlives_every_process(client: Streamline, mongodb_uri: str, database: str, tmp_path: Path) -> None:
    """The pool is killed while its runs wait; the event is sent while no pool exists; the next pool must continue the runs."""
    single = client.workflows["single"]
    with waiting_pool(tmp_path / "first", mongodb_uri, database) as pool:
        runs = single.start_many([None] * 4)
        for run in runs:
            until_step(client, run, "receive", "waiting")
        for child in pool.children():
            child.kill()
        os.kill(pool.pid, signal.SIGKILL)
    with other_program(mongodb_uri, database) as other:
        assert other.call("send_event", "news", "to one", run_id=runs[0].id) == 1
        assert other.call("send_event", "news", "to all") == 3
    with waiting_pool(tmp_path / "second", mongodb_uri, database):
        assert [single.wait_for(run.id, timeout=20).output for run in runs] == ["to one", "to all", "to all", "to all"]
    assert len(evidence(client, "entered", step="receive")) == 4, "no handler was called again"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("action", ["kill", "stop"])
def test_a_worker_lost_between_its_wait_and_its_search_for_events_loses_no_event(
    client: Streamline, mongodb_uri: str, database: str, tmp_path: Path, action: str
) -> None:
    """The event was sent before the wait was stored, so its sender does not deliver it: only the search of stored events finds it."""
    single = client.workflows["single"]
    run = single.start()
    assert client.send_event("news", "before the wait") == 0
    once = tmp_path / "happened"
    probe = {"STREAMLINE_PROBE": f"commit.after={action}@{once}"}
    options = ("--lease", "2", "--stall-timeout", "6")
    with waiting_pool(tmp_path / "pool", mongodb_uri, database, *options, environ=probe):
        assert single.wait_for(run.id, timeout=40).output == "before the wait"
    assert once.exists(), "the crash point was never reached"
    assert len(evidence(client, "entered", step="receive")) == 1
    assert stored(client, run)["steps"][0]["attempts"] == 1


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_pool_finishes_for_a_sender_that_was_killed(client: Streamline, mongodb_uri: str, database: str, tmp_path: Path) -> None:
    single = client.workflows["single"]
    with waiting_pool(tmp_path, mongodb_uri, database, "--lease", "2"):  # its steward searches for such events every two seconds
        run = single.start()
        until_step(client, run, "receive", "waiting")
        # The state that a sender leaves if it is killed after its first write, one minute later.
        sent_at = datetime.now(UTC) - timedelta(seconds=60)
        client.store().run(durable_events.record_event("e1", "news", "last words", sent_at))
        assert single.wait_for(run.id, timeout=60).output == "last words"
        eventually(lambda: [event["pending"] for event in events(client)] == [False])
