"""A Hypothesis state machine on the public API: one run beside a model of it, on a real server.

After every call the stored run is what the model expects: its status, its steps' outputs, and what the call answered. Workers
and sleeps are driven by the testing kit, whose clock jumps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from workers import check_invariants

from streamline_pool import Context, HookTokenError, InvalidStateError, Streamline, Workflow, WorkflowNotFoundError, create_hook
from streamline_pool.testing import TestKit
from support import present

STEPS = ("sleeps", "asks", "hooks", "hears", "ends")
SLEEP_S = 100.0
payloads = st.sampled_from([1, None, "$$NOW", {"$set": 1}, [{"a.b": ""}]])


@dataclass
class Model:
    """What the acknowledged calls have made of the run."""

    at: int = 0  # which of STEPS is current
    parked: bool = False  # a worker has entered that step, and it waits or sleeps
    paused: bool = False
    outputs: dict[str, Any] = field(default_factory=dict)
    heard: list[Any] = field(default_factory=list)  # events in the inbox, oldest first
    status: str = "running"
    slept_s: float = 0.0  # since the sleep began

    @property
    def step(self) -> str | None:
        return STEPS[self.at] if self.at < len(STEPS) else None

    def pass_on(self, output: Any) -> None:
        """The current step is done, with this output."""
        self.outputs[STEPS[self.at]] = output
        self.at, self.parked = self.at + 1, False

    def work(self) -> None:
        """What a worker does until the run cannot go on."""
        while self.status not in ("done", "cancelled") and not self.paused:
            match self.step:
                case "sleeps" if self.parked and self.slept_s >= SLEEP_S:
                    self.pass_on(None)
                case "hears" if self.heard:
                    self.pass_on(self.heard.pop(0))
                case "ends":
                    self.pass_on("the end")
                    self.status = "done"
                case _:
                    if not self.parked:
                        self.slept_s = 0.0
                    self.parked, self.status = True, "waiting"
                    return
            self.status = "done" if self.step is None else "running"


class RunMachine(RuleBasedStateMachine):
    """The rules. `kit` and `make_app` are set by the test."""

    kit: TestKit
    app: Streamline
    workflow: Workflow
    other: str  # the token of a hook of another run, which waits the whole time
    tokens: dict[str, list[str]]  # of every run, oldest first

    @initialize()
    def start(self) -> None:
        self.run_id = self.workflow.start({"kept": "$input"}).id
        self.model = Model()
        self.stale: list[str] = []

    @property
    def own_tokens(self) -> list[str]:
        return self.tokens.setdefault(self.run_id, [])

    # --- time and workers ------------------------------------------------------------------------------------------

    @rule()
    def work(self) -> None:
        self.kit.settle()
        self.model.work()

    @rule(share=st.sampled_from([0.4, 1.1]))
    def jump(self, share: float) -> None:
        self.kit.jump(share * SLEEP_S)
        self.model.work()  # a jump begins with all work that is due
        self.model.slept_s += share * SLEEP_S
        self.model.work()

    # --- control operations ----------------------------------------------------------------------------------------

    @rule()
    def pause(self) -> None:
        run = self.workflow.pause(self.run_id)
        if self.model.status not in ("done", "cancelled"):
            self.model.paused = True
        assert run.paused == self.model.paused

    @rule(payload=payloads)
    def resume(self, payload: Any) -> None:
        model = self.model
        if model.status in ("done", "cancelled") or (model.paused and payload is not None):
            self.refused(InvalidStateError, lambda: self.workflow.resume(self.run_id, payload))
        elif model.paused:
            self.workflow.resume(self.run_id)
            model.paused = False
        elif model.parked and model.step in ("asks", "hooks"):
            self.workflow.resume(self.run_id, payload)
            self.answered(payload)
        else:
            self.refused(InvalidStateError, lambda: self.workflow.resume(self.run_id, payload))

    def answered(self, payload: Any) -> None:
        """A wait is answered: the next step is pending, and due unless the run is paused."""
        self.model.pass_on(payload)
        self.model.status = "running"

    @precondition(lambda self: self.model.status in ("done", "cancelled") or self.model.at >= 2)
    @rule()
    def cancel(self) -> None:
        run = self.workflow.cancel(self.run_id)
        if self.model.status != "done":
            self.model.status, self.model.paused = "cancelled", run.paused
        assert run.status == self.model.status

    @rule(step=st.sampled_from(STEPS))
    def rewind(self, step: str) -> None:
        model, place = self.model, STEPS.index(step)
        if model.status == "cancelled" or place > model.at:
            self.refused(InvalidStateError, lambda: self.workflow.rewind_to(self.run_id, step))
            return
        self.workflow.rewind_to(self.run_id, step)
        self.stale += self.own_tokens
        self.own_tokens.clear()
        model.at, model.parked, model.status = place, False, "running"
        model.outputs = {name: output for name, output in model.outputs.items() if STEPS.index(name) < place}

    # --- events and tokens -----------------------------------------------------------------------------------------

    @rule(payload=payloads)
    def send_event_to_one(self, payload: Any) -> None:
        if self.model.status in ("done", "cancelled"):
            self.refused(InvalidStateError, lambda: self.app.send_event("news", payload, run_id=self.run_id))
            return
        self.app.send_event("news", payload, run_id=self.run_id)
        self.heard(payload)

    def heard(self, payload: Any) -> None:
        if self.model.parked and self.model.step == "hears":
            self.answered(payload)
        else:
            self.model.heard.append(payload)

    @rule(payload=payloads)
    def answer_by_token(self, payload: Any) -> None:
        if not self.own_tokens:
            return
        token = self.own_tokens[-1]
        if self.model.parked and self.model.step == "hooks":
            self.app.resume_hook(token, payload)
            self.answered(payload)
        else:
            self.refused(HookTokenError, lambda: self.app.resume_hook(token, payload))

    @rule()
    def answer_by_a_stale_token(self) -> None:
        for token in self.stale[-2:]:
            self.refused(HookTokenError, lambda token=token: self.app.resume_hook(token, "stale"))  # type: ignore[misc]

    @rule()
    def answer_by_the_token_of_another_run(self) -> None:
        secret = self.other.rpartition(".")[2]
        self.refused(HookTokenError, lambda: self.app.resume_hook(f"{self.run_id}.{secret}", "forged"))

    @rule()
    def clean_up(self) -> None:
        """A run that has not ended is never removed, however old."""
        if self.model.status not in ("done", "cancelled"):
            assert self.app.cleanup_old_runs(0) == 0

    @precondition(lambda self: self.model.status in ("done", "cancelled"))
    @rule()
    def clean_up_and_start_again(self) -> None:
        self.kit.jump(1.0)
        assert self.app.cleanup_old_runs(0) == 1
        assert self.workflow.get(self.run_id) is None
        for call in (self.workflow.cancel, self.workflow.pause, self.workflow.resume):
            with pytest.raises(WorkflowNotFoundError):
                call(self.run_id)
        self.start()

    # --- what must hold --------------------------------------------------------------------------------------------

    def refused(self, kind: type[Exception], call: Callable[[], Any]) -> None:
        """The call raises this error, and stores nothing."""
        before = self.app.runs.find_one({"_id": self.run_id})
        with pytest.raises(kind):
            call()
        assert self.app.runs.find_one({"_id": self.run_id}) == before

    @invariant()
    def the_stored_run_is_as_the_model_says(self) -> None:
        run, model = present(self.workflow.get(self.run_id)), self.model
        assert (run.status, run.paused) == (model.status, model.paused)
        assert run.input == run.context == {"kept": "$input"}
        assert {step.step_id: step.output for step in run.steps if step.status == "done"} == model.outputs
        assert run.current_step_id == model.step or model.status == "cancelled"
        document = run.to_dict()
        check_invariants([document])
        if model.status not in ("done", "cancelled"):
            assert [item["data"] for item in document.get("inbox", []) if item.get("name") == "news"] == model.heard
        assert "lease" not in document

    def teardown(self) -> None:
        self.app.runs.delete_one({"_id": self.run_id})


@pytest.fixture
def machine(mongodb_uri: str) -> Any:
    """The class of the state machine, on an application of its own."""
    tokens: dict[str, list[str]] = {}
    app = Streamline(mongodb_uri)

    def hooks(ctx: Context) -> None:
        tokens.setdefault(ctx.run_id, []).append(create_hook(ctx, "?").token)
        ctx.wait("?")

    workflow = app.workflow(
        "modelled",
        steps={
            "sleeps": lambda ctx: ctx.sleep(SLEEP_S), "asks": lambda ctx: ctx.wait("?"), "hooks": hooks,
            "hears": lambda ctx: ctx.wait_for("news"), "ends": lambda ctx: "the end",
        },
    )  # fmt: skip
    waits = app.workflow("waits", steps={"hooks": hooks})
    with TestKit(mongodb_uri) as kit:
        kit.use(app)
        other = kit.run(waits).id
        yield type("Machine", (RunMachine,), {"kit": kit, "app": app, "workflow": workflow, "tokens": tokens, "other": tokens[other][0]})
        assert present(waits.get(other)).status == "waiting"


@pytest.mark.parametrize(
    ("examples", "length"), [(3, 18), pytest.param(60, 30, marks=[pytest.mark.slow, pytest.mark.timeout(900)])], ids=["some", "many"]
)
def test_a_run_is_what_its_acknowledged_calls_have_made_of_it(machine: Any, examples: int, length: int) -> None:
    """Each call is tested alone elsewhere; here any call follows any other."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=length,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
