"""A value that looks like an operator comes out of every exit as it went in at every entry, or is refused at the door."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cli_in_process import command_process, invoked
from hostile_values import REFUSED, TEXTS, VALUES, any_values, same
from hypothesis import HealthCheck, given, settings
from stream_reading import read_until

from streamline_pool import Context, Event, Run, Streamline, Workflow, create_hook
from streamline_pool.client.run_lists import listing_runs
from streamline_pool.domain.errors import InvalidStateError, ValidationError
from streamline_pool.protocol.payloads import is_external
from streamline_pool.protocol.plain_json import json_text
from streamline_pool.protocol.run_list import RunFilter
from support import eventually, present, shown


def executed(workflow: Workflow, run_id: str, step_id: str | None = None) -> Run:
    """Execute the run until it is at that step, or has ended. A run may be due some milliseconds after its start: clocks differ."""

    def there() -> Run | None:
        run = workflow.execute(run_id)
        return run if run.is_terminal or (run.current_step_id == step_id and run.status == "waiting") else None

    return present(eventually(there))


class Carrier:
    """A workflow that takes a value at every entry. `seen`: what came out inside of handlers and at subscribers, by place."""

    def __init__(self, app: Streamline) -> None:
        self.app = app
        self.value: Any = None
        self.sent: Any = None
        self.events: list[Any] = []
        self.seen: dict[str, Any] = {}
        self.token = ""
        app.events.on("*", self.on_event)
        self.workflow = app.workflow(
            "carrier",
            steps={
                "first": self.first, "ask": self.ask, "hook": self.hook, "one": self.receive, "everyone": self.receive, "last": self.last,
            },
        )  # fmt: skip

    def on_event(self, event: Event) -> None:
        if event.name == "carried":
            self.seen["bus"] = event.data
        elif event.name == "workflow:resumed":
            is_news = event.step_id in ("one", "everyone")
            self.events.append(event.data) if is_news else self.seen.update({f"resumed {event.step_id}": event.data})

    def first(self, ctx: Context) -> Any:
        self.seen["ctx.input"] = ctx.input
        ctx.set("kept", self.value)
        ctx.checkpoint(self.value)
        self.seen["get_checkpoint"] = ctx.get_checkpoint()
        ctx.emit("carried", self.value)
        return self.value

    def ask(self, ctx: Context) -> None:
        ctx.wait("?", self.value)

    def hook(self, ctx: Context) -> None:
        self.token = create_hook(ctx, "?").token
        ctx.wait("?")

    def receive(self, ctx: Context) -> None:
        ctx.wait_for("$news")

    def last(self, ctx: Context) -> Any:
        self.seen["ctx.context"] = ctx.context["kept"]
        self.seen |= {f"get_output {step_id}": ctx.get_output(step_id) for step_id in ("first", "ask", "hook")}
        self.events += [ctx.get_output("one"), ctx.get_output("everyone")]
        return self.value

    def carry(self, value: Any) -> Run:
        """A run that has taken the value everywhere."""
        self.value, self.seen, self.events = value, {}, []
        run_id = self.workflow.start(value, meta={"kept": value}).id
        asked = executed(self.workflow, run_id, "ask")
        self.seen["waiting_for"] = present(asked.step("ask").waiting_for).get("data")
        self.seen["answer"] = self.workflow.resume(run_id, value).step("ask").output
        executed(self.workflow, run_id, "hook")
        self.seen["hook"] = self.app.resume_hook(self.token, value).run.step("hook").output
        executed(self.workflow, run_id, "one")
        if is_external(value):
            with pytest.raises(ValidationError, match="stands for an output"):  # the only value that events do not take
                self.app.send_event("$news", value)
            self.sent = [value]
        else:
            self.sent = value
        self.app.send_event("$news", self.sent, run_id=run_id)
        executed(self.workflow, run_id, "everyone")
        assert self.app.send_event("$news", self.sent) == 1
        return executed(self.workflow, run_id)

    def check(self, value: Any) -> None:
        """Carry the value, and compare what comes out."""
        done = self.carry(value)
        assert done.status == "done", done.error
        (listed,) = self.app.store().drive(listing_runs(RunFilter(), limit=1)).runs
        read = present(self.workflow.get(done.id))
        for place, run in {
            "execute": done,
            "get": read,
            "wait_for": self.workflow.wait_for(done.id),
            "get_run": present(self.app.get_run(done.id)),
        }.items():
            self.seen |= {f"{place} input": run.input, f"{place} output": run.output, f"{place} meta": present(run.meta)["kept"]}
            self.seen |= {f"{place} context": run.context["kept"], f"{place} step": run.step("hook").output}
            assert same(run.step("everyone").output, self.sent)
        self.seen |= {"list input": listed["input"], "list context": listed["context"]["kept"]}
        self.app.events.flush()
        assert len(self.seen) >= 30, sorted(self.seen)
        assert [same(found, self.sent) for found in self.events] == [True] * 4
        changed = [place for place, found in self.seen.items() if not same(found, value)]
        assert not changed, shown(value)


def test_every_value_comes_out_of_every_exit_as_it_went_in_at_every_entry(app: Streamline) -> None:
    """A payload that the server evaluated, as an expression or an operator, would be changed silently, or change the run."""
    carrier = Carrier(app)
    carrier.check(VALUES)
    carrier.check(list(VALUES.values()))
    carrier.check(VALUES["a marker of an output"])
    carrier.check("$$REMOVE")


@pytest.mark.slow
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_every_value_alone_comes_out_as_it_went_in(app: Streamline, value: Any) -> None:
    carrier = Carrier(app)
    carrier.check(value)
    carrier.check([value, "x" * 5_000])  # large: the outputs are stored beside the run
    for part in value if isinstance(value, list) else ():
        if any(same(part, refused) for name, refused in REFUSED.items() if name == "a time that the server replaces"):
            continue
        if isinstance(part, dict) and {"$ref", "$id"} <= set(part):
            continue  # a mapping as the input is the context, too, and that is refused
        carrier.check(part)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_any_value_comes_out_as_it_went_in(app: Streamline) -> None:
    carrier = Carrier(app)

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(any_values)
    def check(value: Any) -> None:
        try:
            app.send_event("door", value)
        except ValidationError:
            return
        carrier.check(value)

    check()


def test_a_stream_gives_every_value_as_it_was_emitted(app: Streamline) -> None:
    carrier = Carrier(app)
    carrier.value = VALUES
    with app.events.stream("carried") as stream:
        executed(carrier.workflow, carrier.workflow.start().id, "ask")
        (event,) = read_until(stream, "carried")
    assert same(event.data, VALUES)


def test_the_command_prints_every_value_in_its_plain_form(app: Streamline, mongodb_uri: str, database: str, tmp_path: Path) -> None:
    carrier = Carrier(app)
    run_id = carrier.carry(VALUES).id
    with command_process(tmp_path):
        environ = {"STREAMLINE_MONGODB_URI": mongodb_uri, "STREAMLINE_DATABASE": database}
        shown_run = json.loads(invoked(["runs", "show", run_id, "--json"], environ).out)
        (listed,) = json.loads(invoked(["runs", "list", "--json"], environ).out)
        assert invoked(["runs", "show", run_id], environ).code == 0
    plain = json.loads(json_text(VALUES))
    for document in (shown_run, listed):
        assert document["input"] == document["context"]["kept"] == document["meta"]["kept"] == plain
    assert shown_run["output"] == plain


def test_what_would_be_changed_is_refused_at_every_door_and_nothing_is_stored(app: Streamline) -> None:
    """A value that readers get as another one is worse than an error."""
    carrier = Carrier(app)
    run_id = carrier.workflow.start().id
    executed(carrier.workflow, run_id, "ask")
    before = app.runs.find_one({"_id": run_id})
    for value in REFUSED.values():
        doors: list[Callable[[], Any]] = [
            partial(carrier.workflow.start, value),
            partial(carrier.workflow.start_many, [1, value]),
            partial(carrier.workflow.resume, run_id, value),
            partial(app.resume_hook, f"{run_id}.{'x' * 32}", value),
            partial(app.send_event, "$news", value, run_id=run_id),
            partial(app.send_event, "$news", value),
        ]
        as_meta: list[Callable[[], Any]] = [partial(carrier.workflow.start, None, value)] if isinstance(value, dict) else []
        for door in doors + as_meta:
            with pytest.raises(ValidationError):
                door()
    assert app.runs.find_one({"_id": run_id}) == before
    assert app.runs.count_documents({}) == 1
    assert app.store().collection("events").count_documents({}) == 0


def _return(value: Any, _ctx: Context) -> Any:
    return value


def test_a_handler_is_told_at_its_call_what_it_cannot_store(app: Streamline) -> None:
    told: list[str] = []

    def work(ctx: Context) -> None:
        for name, value in REFUSED.items():
            calls: list[Callable[[], Any]] = [
                partial(ctx.set, "k", value),
                partial(ctx.checkpoint, value),
                partial(ctx.emit, "carried", value),
                partial(ctx.wait, "?", value),
            ]
            for call in calls:
                with pytest.raises(ValidationError):
                    call()
            told.append(name)

    workflow = app.workflow("w", steps={"work": work})
    assert executed(workflow, workflow.start().id).status == "done"
    assert told == list(REFUSED)
    for place, value in enumerate(REFUSED.values()):
        failing = app.workflow(f"w{place}", steps={"work": partial(_return, value)})
        run = executed(failing, failing.start().id)
        assert (run.status, present(run.error)["code"]) == ("failed", "VALIDATION_ERROR"), run.error


@pytest.mark.parametrize("texts", [["$set", "a.b", "\0"], pytest.param(TEXTS, marks=pytest.mark.slow)], ids=["some", "all"])
def test_every_text_is_kept_or_refused_wherever_a_text_is_taken(app: Streamline, texts: list[str]) -> None:
    """Ids, keys and names become parts of filters; a text that began with $ must be a text there too."""
    said = ""

    def fail(ctx: Context) -> None:
        raise RuntimeError(said)

    workflow = app.workflow("w", steps={"one": (fail, {"retries": 1})})
    for text in dict.fromkeys([*texts, "$$NOW"]):
        said = text
        run = workflow.start(
            {"tenantId": text}, {text.replace("\0", ""): text}, user_id=text, tags=[text], idempotency_key=text, start_at=timedelta(days=1)
        )
        assert workflow.start(idempotency_key=text).id == run.id
        stored = present(workflow.get(run.id))
        assert (stored.user_id, stored.tags, stored.context) == (text, (text,), {"tenantId": text})
        assert stored.to_dict()["idempotencyKey"] == text
        assert [each["_id"] for each in app.store().drive(listing_runs(RunFilter(user_id=text, tags=[text]), limit=9)).runs] == [run.id]
        assert workflow.pause(run.id, reason=text).to_dict()["pauseReason"] == text
        assert workflow.cancel(run.id, reason=text).to_dict()["cancelReason"] == text
        failed = executed(workflow, workflow.start(user_id=text).id)
        assert present(failed.error)["message"] == text
        app.events.flush()
        if len(text) <= 100:
            assert present(workflow.get(workflow.start(run_id=text).id)).id == text
            assert executed(workflow, text).status == "failed"
            versioned = (
                app.workflow(
                    f"versioned{texts.index(text)}" if text in texts else "now", version=text, steps={"one": lambda ctx: ctx.input}
                )
                if text != "\n"
                else workflow
            )
            assert executed(versioned, versioned.start(text).id).is_terminal
            with pytest.raises(InvalidStateError):
                workflow.start(run_id=text)
    assert app.cleanup_old_runs(0, tenant_id="$$NOW") == 1


def test_a_name_that_could_be_a_path_or_an_operator_is_refused_at_the_door(app: Streamline) -> None:
    """Names of queues and workflows are parts of lanes, and those are cut at slashes: they have a closed set of characters."""
    workflow = app.workflow("w", steps={"one": lambda ctx: None})
    for text in [text for text in [*TEXTS, "", "a/b"] if not re.fullmatch("[A-Za-z0-9_.:-]{1,100}", text)]:
        doors: list[Callable[[], Any]] = [
            partial(app.workflow, text, steps={"one": partial(_return, None)}),
            partial(app.workflow, "v", queue=text, steps={"one": partial(_return, None)}),
            partial(workflow.start, queue=text),
        ]
        for door in doors:
            with pytest.raises(ValidationError):
                door()
    assert app.runs.count_documents({}) == 0
