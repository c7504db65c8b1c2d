"""Waits, answers and events under bad input: data that reads like commands, tokens used where they mean nothing, damage by others."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from workers import check_invariants, run_until_idle

from streamline_pool import Context, Streamline, create_hook
from streamline_pool.client.event_delivery import broadcasting, finishing_broadcasts, sending_event
from streamline_pool.client.run_control import answering_hook, pausing_run, resuming_run, rewinding_run
from streamline_pool.domain.errors import DataCorruptionError, HookTokenError, InvalidStateError, PayloadTooLargeError, WorkflowError
from streamline_pool.protocol import commits, durable_events
from streamline_pool.protocol.codec import SERVER_TICK
from streamline_pool.protocol.operations import Command, Fence, Find
from streamline_pool.storage.procedures import Procedure
from support import eventually, shown

NASTY: list[Any] = [
    "$$NOW",
    "$_id",
    "$$ROOT",
    {"$add": [1]},
    {"$literal": {"$add": [1, 2]}},
    {"a.b": 1, "$x": {"$y": "$z"}, "": 2},
    [["$steps"], {"$set": {"status": "done"}}],
    None,
    {},
    [],
    False,
    "",
    0,
]
"""Values that mean something to an update pipeline, or that are as good as nothing to careless code."""


class Waiting:
    """A workflow whose first step waits in the way that the run's input says."""

    def __init__(self, app: Streamline) -> None:
        self.app = app
        self.tokens: list[str] = []
        self.workflow = app.workflow("waiting", steps={"first": self.first, "last": lambda ctx: ["passed on", ctx.get_output("first")]})

    def first(self, ctx: Context) -> None:
        match ctx.input:
            case "human":
                ctx.wait("say something", {"$add": ["$x"], "a.b": "$$NOW"})
            case "hook":
                self.tokens.append(create_hook(ctx, "say something").token)
                ctx.wait("say something")
            case "event":
                ctx.wait_for("$go.now")
            case "hook, then sleep":
                self.tokens.append(create_hook(ctx, "say something").token)
                ctx.sleep(3600)
            case "hook, then event":
                self.tokens.append(create_hook(ctx, "say something").token)
                ctx.wait_for("$go.now")

    def parked(self, how: str, *, run_id: str | None = None) -> str:
        run = self.workflow.execute(self.workflow.start(how, run_id=run_id).id)
        assert run.step("first").status == "waiting"
        return run.id


@pytest.fixture
def waiting(app: Streamline) -> Waiting:
    return Waiting(app)


@pytest.mark.parametrize("way", ["resume", "hook", "event", "to all", "early event", "look"])
def test_what_a_caller_sends_is_data_and_never_an_expression(app: Streamline, waiting: Waiting, way: str) -> None:
    """Answers and events pass through update pipelines, in which text that begins with `$` is a field of the run."""
    for number, data in enumerate(NASTY):
        run_id = f"$x.{number}"
        match way:
            case "resume":
                waiting.parked("human", run_id=run_id)
                waiting.workflow.resume(run_id, data)
            case "hook":
                waiting.parked("hook", run_id=run_id)
                app.resume_hook(waiting.tokens[-1], data)
            case "event":
                waiting.parked("event", run_id=run_id)
                assert app.send_event("$go.now", data, run_id=run_id) == 1
            case "to all":
                waiting.parked("event", run_id=run_id)
                assert app.send_event("$go.now", data) == 1
            case "early event":
                waiting.workflow.start("event", run_id=run_id)
                assert app.send_event("$go.now", data, run_id=run_id) == 0
            case "look":
                waiting.workflow.start("event", run_id=run_id)
                assert app.send_event("$go.now", data) == 0
        run = waiting.workflow.execute(run_id)
        assert run.status == "done"
        assert run.output == ["passed on", data]
        assert type(run.step("first").output) is type(data)
        assert not {"_item", "_hit"} & set(run.to_dict())


def test_acts_reasons_are_text_and_never_expressions(app: Streamline, waiting: Waiting) -> None:
    run_id = waiting.parked("human", run_id="$$NOW")
    assert waiting.workflow.pause(run_id, reason="$$NOW").to_dict()["pauseReason"] == "$$NOW"
    assert waiting.workflow.rewind_to(run_id, "first").paused
    assert waiting.workflow.cancel(run_id, reason="$status").to_dict()["cancelReason"] == "$status"


def test_a_hook_takes_as_large_an_answer_as_a_person_may_give(app: Streamline, waiting: Waiting) -> None:
    """A command ends at 16 MiB: an answer that is sent in it twice would be refused from 8 MiB on."""
    large = "x" * (11 * 1024 * 1024)
    waiting.parked("hook")
    assert app.resume_hook(waiting.tokens[-1], large).run.step("first").output == large


@pytest.mark.parametrize("how", ["hook, then sleep", "hook, then event"])
def test_a_hook_ends_no_sleep_and_no_wait_for_an_event(app: Streamline, waiting: Waiting, how: str) -> None:
    """Its token belongs to a `ctx.wait` that never came; used all the same, a step would be done before its time."""
    run_id = waiting.parked(how)
    with pytest.raises(HookTokenError):
        app.resume_hook(waiting.tokens[-1], "too soon")
    assert waiting.workflow.get(run_id).step("first").status == "waiting"


def test_everybody_gets_an_event_though_some_cannot_take_it(app: Streamline, waiting: Waiting) -> None:
    """A sender that stops at the first batch of which nobody was woken would count the event as delivered, and those
    behind it would wait for ever. Here the batch is as small as it gets, and all of it has gone on before the delivery."""
    run_ids = sorted(waiting.parked("event") for _ in range(6))
    app.store().run(durable_events.record_event("e1", "$go.now", 7, app.store().now()))
    (event,) = app.store().run(durable_events.read_event("e1"))
    gone_on: list[str] = []

    def racing() -> Procedure[int]:
        procedure = broadcasting(app.services, event)
        effect = next(procedure)
        try:
            while True:
                if isinstance(effect, Find) and effect.name == "find_waiters":
                    effect = Find(**{**{name: getattr(effect, name) for name in effect.__slots__}, "limit": 2})
                answer = yield effect
                if effect.name == "find_waiters" and not gone_on:
                    gone_on.extend(found["_id"] for found in answer)
                    for run_id in gone_on:
                        yield durable_events.deliver_event(run_id, f"other {run_id}", "$go.now", 1, 100)
                effect = procedure.send(answer)
        except StopIteration as stop:
            return int(stop.value)

    assert app.store().drive(racing()) == 4
    outputs = {run_id: waiting.workflow.get(run_id).step("first").output for run_id in run_ids}
    assert outputs == {run_id: 1 if run_id in gone_on else 7 for run_id in run_ids}
    assert app.store().collection("events").find_one({"_id": "e1"})["pending"] is False


def test_a_damaged_waiter_keeps_an_event_from_nobody_else(app: Streamline, waiting: Waiting) -> None:
    """The danger: one run whose steps or counters another program has spoilt ends the sender, for all who wait behind it."""
    run_ids = sorted(waiting.parked("event") for _ in range(4))
    app.runs.update_one({"_id": run_ids[0]}, {"$unset": {"waitGen": ""}, "$set": {"steps": {"stepId": "first"}}})
    app.runs.update_one({"_id": run_ids[1]}, {"$set": {"steps": ["garbage", 5, None]}})
    app.runs.update_one({"_id": run_ids[2]}, {"$unset": {"waitGen": ""}, "$set": {"seen": "garbage", "inbox": 7}})
    assert app.send_event("$go.now", 1) == 2
    assert app.runs.find_one({"_id": run_ids[2]})["seen"] != "garbage"
    assert waiting.workflow.execute(run_ids[3]).status == "done"


def test_a_run_whose_step_does_not_wait_is_not_resolved_by_a_leftover(app: Streamline, waiting: Waiting) -> None:
    """`awaits` is an index's field; that a step waits is what its step says. A handler at work must not be overtaken."""
    run = waiting.workflow.start("human")
    app.runs.update_one({"_id": run.id}, {"$set": {"awaits": "$go.now"}})
    assert app.send_event("$go.now", 1) == 0
    assert waiting.workflow.get(run.id).step("first").status == "pending"


DAMAGE: list[dict[str, Any]] = [
    {"inbox": "garbage"},
    {"seen": 5},
    {"steps.0.hooks": "garbage"},
    {"steps.0.hooks": [5]},
    {"steps.0.hooks": [{"hash": "text", "gen": 1}]},
    {"steps.0.gen": "garbage"},
    {"steps.0.waitingFor": "garbage"},
    {"steps.0.waitingFor": {"type": "no such thing"}},
    {"steps.0.waitingFor": {}},
    {"steps.0.waitingFor.expiresAt": "$$NOW"},
    {"steps": {"stepId": "first"}},
    {"steps": [5]},
    {"acts": "garbage"},
    {"acts": None},
    {"acts": {"gt": 0}},
    {"waitGen": "garbage"},
    {"currentStepId": {"first": 1}},
    {"status": "no such status"},
    {"token": "garbage"},
    {"lease": "garbage"},
    {"wakeAt": "garbage", "pausedWakeAt": "garbage"},
    {"lastAct": {"$x": 1}},
]


@pytest.mark.parametrize("how", ["hook", "event"])
def test_damage_by_another_program_is_told_and_breaks_nothing(app: Streamline, waiting: Waiting, how: str) -> None:
    """Every call from outside either works or raises an error of ours; whatever it stores, the run's neighbours go on."""
    neighbour = waiting.parked("human")
    for damage in DAMAGE:
        run_id = waiting.parked(how)
        token = waiting.tokens[-1] if waiting.tokens else f"{run_id}.{'x' * 32}"
        app.runs.update_one({"_id": run_id}, {"$set": damage})
        calls: list[Callable[[], Any]] = [
            lambda run_id=run_id: app.send_event("$go.now", 1, run_id=run_id),
            lambda: app.send_event("$go.now", 1),
            lambda token=token: app.resume_hook(token, 1),
            lambda run_id=run_id: waiting.workflow.resume(run_id, 1),
            lambda run_id=run_id: waiting.workflow.pause(run_id),
            lambda run_id=run_id: waiting.workflow.resume(run_id),
            lambda run_id=run_id: waiting.workflow.rewind_to(run_id, "first"),
            lambda run_id=run_id: waiting.workflow.cancel(run_id),
        ]
        for call in calls:
            try:
                call()
            except WorkflowError as exc:
                assert not exc.context.get("transient"), (damage, exc)
    waiting.workflow.resume(neighbour, 1)
    run_until_idle(app)
    assert waiting.workflow.get(neighbour).status == "done"


@pytest.mark.parametrize("damage", [{"steps.0.gen": "x"}, {"steps.0.waitingFor": {"type": "?"}}, {"steps.0.hooks": [5]}], ids=shown)
def test_an_answer_to_a_damaged_wait_says_what_is_wrong(app: Streamline, waiting: Waiting, damage: dict[str, Any]) -> None:
    run_id = waiting.parked("hook")
    app.runs.update_one({"_id": run_id}, {"$set": damage})
    with pytest.raises(DataCorruptionError, match=run_id):
        waiting.workflow.resume(run_id, 1)
    with pytest.raises(DataCorruptionError, match=run_id):
        app.resume_hook(waiting.tokens[-1], 1)


def test_a_damaged_event_holds_up_no_other_and_no_steward(app: Streamline, waiting: Waiting) -> None:
    """A steward that stumbles over one stored event would finish none of those that come after it, ever."""
    events = app.store().collection("events")
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    run_id = waiting.parked("event")
    deep: Any = 1
    for _ in range(150):
        deep = [deep]
    events.insert_many(
        [
            {"_id": "no name", "at": long_ago, "pending": True, "data": 1},
            {"_id": "odd name", "at": long_ago, "pending": True, "data": 1, "name": {"$gt": ""}},
            {"_id": "no data", "at": long_ago, "pending": True, "name": "nobody waits for it"},
            {"_id": "deep", "at": long_ago, "pending": True, "name": "nor for this", "data": deep},
            {"_id": 5, "at": "no date", "pending": True, "name": "$go.now"},
        ]
    )
    assert app.send_event("$go.now", 1) == 1
    app.store().drive(finishing_broadcasts(app.services))
    assert events.find_one({"_id": "no data"})["pending"] is False
    assert waiting.workflow.execute(run_id).output == ["passed on", 1]


def test_a_look_finds_an_event_without_data(app: Streamline, waiting: Waiting) -> None:
    """A driver that stumbles over it loses the run's lease, again and again, until its worker is convicted of killing it."""
    run = waiting.workflow.start("event")
    app.store().collection("events").insert_one(
        {"_id": "e", "name": "$go.now", "at": run.created_at, "bornAt": SERVER_TICK, "pending": False}
    )
    assert waiting.workflow.execute(run.id).output == ["passed on", None]


def test_an_entry_that_a_pause_has_prevented_is_not_counted(app: Streamline) -> None:
    """`attempts` counts entries into the handler. A step whose condition has been decided when the pause is found is not entered."""
    paused: list[Any] = []

    def pause_once(ctx: Context) -> bool:
        if not paused:
            paused.append(app.pause_run(ctx.run_id))
        return True

    workflow = app.workflow("conditional", steps={"one": (lambda ctx: ctx.attempt, {"run_if": pause_once})})
    run = workflow.execute(workflow.start().id)
    assert run.paused
    check_invariants([run.to_dict()])
    assert run.step("one").status == "pending"
    assert run.step("one").attempts == 0
    workflow.resume(run.id)
    assert workflow.execute(run.id).output == 1


def test_an_event_is_sent_where_nobody_has_made_the_indexes(app: Streamline) -> None:
    """A program that only sends, on a database in which other programs have made the runs' collection: hints need their index."""
    app.runs.insert_one({"_id": "somebody's"})
    app.runs.delete_one({"_id": "somebody's"})
    assert app.send_event("go") == 0


def test_a_nested_event_for_a_busy_run_is_not_refused_for_its_depth(app: Streamline, waiting: Waiting) -> None:
    """A payload as deep as payloads may be lies some levels deeper in the inbox; that it is there must not make others unsendable."""
    deep: Any = 1
    for _ in range(99):
        deep = [deep]
    run_id = waiting.workflow.start("event").id
    app.send_event("other", deep, run_id=run_id)
    large = "x" * (250 * 1024)
    for _ in range(8):
        app.send_event("other", large, run_id=run_id)
    with pytest.raises(PayloadTooLargeError, match="its inbox is full"):
        app.send_event("other", large, run_id=run_id)


def test_a_run_that_ends_for_want_of_room_awaits_nothing(app: Streamline, waiting: Waiting) -> None:
    """Its entry in the index of those who wait would be found by every sender from then on."""
    run_id = waiting.parked("event")
    fence = Fence(run_id, "lease", 1, 1)
    app.runs.update_one({"_id": run_id}, {"$set": {"lease": {"id": "lease"}, "rev": 1}, "$unset": {"wakeAt": ""}})
    error = InvalidStateError("full")
    app.store().run(commits.write_statements([commits.fail_minimal(fence, 0, error.code, "full", app.store().now())]))
    document = app.runs.find_one({"_id": run_id})
    assert document["status"] == "failed"
    assert "awaits" not in document


def interrupted(app: Streamline, procedure: Procedure[Any], before: str, meanwhile: Callable[[], Any]) -> Any:
    """Run a client's procedure, and do something just before the first operation of that name."""
    todo = [meanwhile]

    def watched() -> Procedure[Any]:
        try:
            effect = next(procedure)
            while True:
                if getattr(effect, "name", None) == before and todo:
                    todo.pop()()
                effect = procedure.send((yield effect))
        except StopIteration as stop:
            return stop.value

    result = app.store().drive(watched())
    assert not todo, f"{before} was never asked for"
    return result


@pytest.mark.parametrize("others", [1, 2, 3, 6])
def test_an_act_is_done_though_others_act_between_its_look_and_its_write(app: Streamline, waiting: Waiting, others: int) -> None:
    """Told that the run was rewound, while two other acts had kept the write from matching, a caller would rely on what never was."""
    run_id = waiting.parked("human")

    def act() -> None:
        for number in range(others):
            waiting.workflow.pause(run_id) if number % 2 == 0 else waiting.workflow.resume(run_id)

    run = interrupted(app, rewinding_run(app.services, None, run_id, "first"), "rewind_run", act)
    assert run.step("first").status == "pending"
    assert run.to_dict()["rewinds"] == 1
    assert run.to_dict()["acts"] == others + 1


@pytest.mark.parametrize("others", [0, 1, 2, 5])
def test_an_act_whose_reply_was_lost_is_known_by_its_id_whatever_others_did_since(app: Streamline, waiting: Waiting, others: int) -> None:
    """Repeated with a new decision, a rewind would throw away the results that came after the first."""
    run_id = waiting.parked("human")
    landed: list[Any] = []

    def land_and_act() -> None:
        waiting.workflow.execute(run_id)
        landed.append(waiting.workflow.get(run_id).to_dict())
        for number in range(others):
            waiting.workflow.pause(run_id) if number % 2 == 0 else waiting.workflow.resume(run_id)

    procedure = rewinding_run(app.services, None, run_id, "first")

    def lossy() -> Procedure[Any]:
        try:
            effect = next(procedure)
            while True:
                if getattr(effect, "name", None) == "rewind_run" and not landed:
                    yield effect  # the reply of this one is lost, and the caller sends it again
                    land_and_act()
                effect = procedure.send((yield effect))
        except StopIteration as stop:
            return stop.value

    app.store().drive(lossy())
    assert waiting.workflow.get(run_id).to_dict()["rewinds"] == 1
    assert waiting.workflow.get(run_id).step("first").status == "waiting"


@pytest.mark.parametrize("wrong_s", [-30.0, 30.0])
@pytest.mark.parametrize("way", ["waits now", "waits later"])
def test_who_existed_when_an_event_was_sent_is_no_question_of_clocks(app: Streamline, waiting: Waiting, wrong_s: float, way: str) -> None:
    """A starter whose idea of the time is ahead would make runs that events sent after them pass by, and they wait for ever."""
    app.store().syncing_clock()
    old = waiting.workflow.start("event")
    clock = app.store().clock
    clock.read(clock.now() + timedelta(seconds=wrong_s), app.env.clock.monotonic(), app.env.clock.monotonic())
    run = waiting.workflow.start("event")
    app.runs.update_many({}, {"$set": {"wakeAt": datetime(2020, 1, 1, tzinfo=UTC)}})
    if way == "waits now":
        waiting.workflow.execute(old.id)
        waiting.workflow.execute(run.id)
    assert app.send_event("$go.now", 1) == (2 if way == "waits now" else 0)
    young = waiting.workflow.start("event")
    app.runs.update_one({"_id": young.id}, {"$set": {"wakeAt": datetime(2020, 1, 1, tzinfo=UTC)}})
    assert waiting.workflow.execute(run.id).status == "done"
    assert waiting.workflow.execute(old.id).status == "done"
    assert waiting.workflow.execute(young.id).status == "waiting", "an event from before its start reached a run"


def test_of_two_answers_that_meet_only_one_is_reported_as_accepted(app: Streamline, waiting: Waiting) -> None:
    """Both have read that the run waits; who is told that his answer counts must be the one whose answer it is."""
    run_id = waiting.parked("human")
    second = resuming_run(app.services, None, run_id, "second")
    with pytest.raises(InvalidStateError, match="another answer"):
        interrupted(app, second, "answer_wait", lambda: waiting.workflow.resume(run_id, "first"))
    run_id = waiting.parked("hook")
    token = waiting.tokens[-1]
    with pytest.raises(HookTokenError):
        interrupted(app, answering_hook(app.services, token, "second"), "answer_hook", lambda: app.resume_hook(token, "first"))
    assert waiting.workflow.get(run_id).step("first").output == "first"


def test_a_resume_that_has_read_a_pause_never_answers(app: Streamline, waiting: Waiting) -> None:
    """Somebody else un-pauses the run between the two: decided anew, the call would answer a wait that nobody has answered."""
    run_id = waiting.parked("human")
    waiting.workflow.pause(run_id)
    run = interrupted(app, resuming_run(app.services, None, run_id, None), "unpause_run", lambda: waiting.workflow.resume(run_id))
    assert not run.paused
    assert run.step("first").status == "waiting"


@pytest.mark.parametrize("last", [False, True])
def test_an_event_that_comes_between_the_handler_and_its_wait_is_taken(app: Streamline, last: bool) -> None:
    """The holder's copy of the run does not have it yet: a wait that is stored all the same waits for what it has."""

    def asks(ctx: Context) -> None:
        assert app.send_event("go", {"$n": 1}, run_id=ctx.run_id) == 0
        ctx.set("sent", True)
        ctx.wait_for("go")

    steps = {"asks": asks} if last else {"asks": asks, "then": lambda ctx: ctx.get_output("asks")}
    workflow = app.workflow("meeting", steps=steps)
    run = workflow.execute(workflow.start().id)
    assert (run.status, run.output, run.context) == ("done", {"$n": 1}, {"sent": True})
    assert run.to_dict()["inbox"] == []
    check_invariants([run.to_dict()])


@pytest.mark.parametrize("last", [False, True])
def test_an_event_taken_from_the_inbox_under_pause_is_stored_once(app: Streamline, last: bool) -> None:
    """Two twists at once: the wait's answer is there already, and the run was paused: the result is stored, and nothing starts."""
    entered: list[str] = []

    def asks(ctx: Context) -> None:
        app.send_event("go", 1, run_id=ctx.run_id)
        app.pause_run(ctx.run_id)
        ctx.wait_for("go")

    steps = {"asks": asks} if last else {"asks": asks, "then": lambda ctx: entered.append(ctx.step_id)}
    workflow = app.workflow("meeting", steps=steps)
    run = workflow.execute(workflow.start().id)
    assert (run.paused, run.status, run.step("asks").output, entered) == (True, "running", 1, [])
    assert run.to_dict()["inbox"] == []
    check_invariants([run.to_dict()])
    workflow.resume(run.id)
    assert workflow.execute(run.id).status == "done"


def test_an_answer_to_an_older_wait_answers_no_newer_one(app: Streamline, waiting: Waiting) -> None:
    """Who has read the run before it was rewound answers a question that was taken back."""
    run_id = waiting.parked("human")

    def rewind_and_wait_again() -> None:
        waiting.workflow.rewind_to(run_id, "first")
        assert waiting.workflow.execute(run_id).step("first").status == "waiting"

    with pytest.raises(InvalidStateError):
        interrupted(app, resuming_run(app.services, None, run_id, "old"), "answer_wait", rewind_and_wait_again)
    assert waiting.workflow.get(run_id).step("first").status == "waiting"
    run_id = waiting.parked("hook")
    old = waiting.tokens[-1]
    with pytest.raises(HookTokenError):
        interrupted(app, answering_hook(app.services, old, "old"), "answer_hook", rewind_and_wait_again)
    with pytest.raises(HookTokenError):
        app.resume_hook(old, "old")
    assert waiting.workflow.get(run_id).step("first").status == "waiting"


@pytest.mark.parametrize("early", [True, False])
def test_an_expired_hook_is_refused_and_its_wait_goes_on(app: Streamline, early: bool) -> None:
    tokens: list[str] = []

    def asks(ctx: Context) -> None:
        tokens.append(create_hook(ctx, "?", expires_in=0.001).token)
        if early:
            eventually(lambda: app.store().now() > ctx._document["steps"][0]["hooks"][0]["expiresAt"])
            with pytest.raises(HookTokenError):
                app.resume_hook(tokens[0], "too late")
        ctx.wait("?")

    workflow = app.workflow("asks", steps={"asks": asks})
    run = workflow.execute(workflow.start().id)
    assert run.step("asks").status == "waiting"
    with pytest.raises(HookTokenError):
        app.resume_hook(tokens[0], "too late")
    assert workflow.resume(run.id, "by its name").step("asks").output == "by its name"


def test_one_hook_is_answered_once_early_or_not(app: Streamline) -> None:
    """The first answer is kept; a second one would be refused after the wait began, so it is before, too."""
    tokens: list[str] = []

    def asks(ctx: Context) -> None:
        tokens.append(create_hook(ctx, "?").token)
        app.resume_hook(tokens[0], "first")
        with pytest.raises(HookTokenError):
            app.resume_hook(tokens[0], "second")
        ctx.wait("?")

    workflow = app.workflow("asks", steps={"asks": asks})
    run = workflow.execute(workflow.start().id)
    assert (run.status, run.output, run.to_dict()["inbox"]) == ("done", "first", [])


def recorded(app: Streamline, procedure: Procedure[Any]) -> list[Command]:
    """Run a client's procedure; the writes that it has sent, as a network may deliver them once more, later."""
    sent: list[Command] = []

    def watched() -> Procedure[None]:
        try:
            effect = next(procedure)
            while True:
                if isinstance(effect, Command):
                    sent.append(effect)
                effect = procedure.send((yield effect))
        except StopIteration:
            return

    app.store().drive(watched())
    assert sent
    return sent


LATE: dict[str, tuple[str, Callable[[Streamline, str, str], Procedure[Any]], tuple[str, ...]]] = {
    "pause": ("human", lambda app, run_id, token: pausing_run(app.services, None, run_id, None), ("resume",)),
    "resume": ("human", lambda app, run_id, token: resuming_run(app.services, None, run_id, None), ("pause",)),
    "rewind": ("human", lambda app, run_id, token: rewinding_run(app.services, None, run_id, "first"), ("execute",)),
    "answer": ("human", lambda app, run_id, token: resuming_run(app.services, None, run_id, "late"), ("rewind", "execute")),
    "hook": ("hook", lambda app, run_id, token: answering_hook(app.services, token, "late"), ("rewind", "execute")),
    "event": ("event", lambda app, run_id, token: sending_event(app.services, "$go.now", "late", run_id), ("rewind", "execute")),
    "to all": ("event", lambda app, run_id, token: sending_event(app.services, "$go.now", "late", None), ("rewind", "execute")),
}
"""By name: what the run waits for, the call, and what happens to the run before a copy of the call arrives."""


@pytest.mark.parametrize("name", LATE)
def test_a_late_copy_of_a_call_that_is_over_changes_nothing(app: Streamline, waiting: Waiting, name: str) -> None:
    """A network that delivers a write twice must not pause a run that was resumed, or answer a question that was not asked yet."""
    how, call, then = LATE[name]
    run_id = waiting.parked(how)
    if name == "resume":
        waiting.workflow.pause(run_id)
    sent = recorded(app, call(app, run_id, waiting.tokens[-1] if waiting.tokens else ""))
    for act in then:
        match act:
            case "pause":
                waiting.workflow.pause(run_id)
            case "resume":
                waiting.workflow.resume(run_id)
            case "rewind":
                waiting.workflow.rewind_to(run_id, "first")
            case "execute":
                waiting.workflow.execute(run_id)
    before = app.runs.find_one({"_id": run_id})
    assert before["steps"][0]["status"] == "waiting"
    for op in sent:
        app.store().run(op)
    assert app.runs.find_one({"_id": run_id}) == before


def test_an_event_is_forgotten_when_no_run_is_left_that_is_older(app: Streamline, waiting: Waiting) -> None:
    """Told by the starter's clock, a run that is still to wait for it might seem to be the younger of the two."""
    run = waiting.workflow.start("event")
    app.send_event("$go.now", 1)
    events = app.store().collection("events")
    hours_ago = datetime.now(UTC) - timedelta(hours=2)
    events.update_many({}, {"$set": {"at": hours_ago}})
    app.cleanup_old_runs(30)
    assert events.count_documents({}) == 1
    assert waiting.workflow.execute(run.id).status == "done"
    app.cleanup_old_runs(30)
    assert events.count_documents({}) == 0
