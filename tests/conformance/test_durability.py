"""What the engine asks of the server: each write that decides is durable on a majority, and each read that decides sees only such writes.

The driver reports each command as it is sent. The tests' server has one member, so no behaviour would show the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from pymongo.monitoring import CommandFailedEvent, CommandListener, CommandStartedEvent, CommandSucceededEvent
from workers import run_until_idle

from streamline_pool import Context, Streamline
from streamline_pool.config.env import system_env
from streamline_pool.domain.errors import StoreUnavailableError
from streamline_pool.protocol.payloads import EXTERNAL_BYTES
from streamline_pool.protocol.run_document import validate_run_document
from streamline_pool.protocol.run_lifecycle import insert_runs
from streamline_pool.storage.outputs import loading_outputs
from streamline_pool.storage.requests import command_result
from streamline_pool.storage.target import DatabaseTarget

WRITES = ("insert", "update", "delete", "findAndModify")
READS = ("find", "aggregate")
HINTS = "workflow_signals"  # no caller relies on them


class Commands(CommandListener):
    """The commands that the driver has sent."""

    def __init__(self) -> None:
        self.sent: list[Mapping[str, Any]] = []

    def started(self, event: CommandStartedEvent) -> None:
        self.sent.append(dict(event.command))

    def succeeded(self, event: CommandSucceededEvent) -> None:
        pass

    def failed(self, event: CommandFailedEvent) -> None:
        pass


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    """What all clients of the test send from here on."""
    listener, options = Commands(), DatabaseTarget.client_options
    monkeypatch.setattr(DatabaseTarget, "client_options", lambda where: {**options(where), "event_listeners": [listener]})
    return listener


def wait(ctx: Context) -> None:
    ctx.checkpoint(1)
    ctx.wait_for("go", timeout=0.01)


def use_everything(app: Streamline) -> None:
    """Start runs, let them end, wait and fail, and call each control operation."""
    flow = app.workflow("flow", steps={"large": lambda ctx: "x" * (EXTERNAL_BYTES + 1), "wait": wait, "ask": lambda ctx: ctx.wait("?")})
    runs = [flow.start(idempotency_key=key) for key in ("a", "b", "a")]
    run_until_idle(app)
    app.send_event("go", 1)
    flow.pause(runs[0].id)
    flow.resume(runs[0].id)
    flow.resume(runs[0].id, "an answer")
    flow.cancel(runs[1].id)
    run_until_idle(app)
    flow.rewind_to(runs[0].id, "large")
    flow.get(runs[0].id)
    app.cleanup_old_runs(0)


def test_writes_that_decide_are_durable_on_a_majority_and_reads_that_decide_see_only_such_writes(
    app: Streamline, commands: Commands
) -> None:
    """A result that a fail-over undoes, or a decision that is made on it, lets two workers go on from different states."""
    use_everything(app)
    about_runs = [sent for sent in commands.sent if HINTS not in sent.values()]
    writes = [sent for sent in about_runs if next(iter(sent)) in WRITES]
    reads = [sent for sent in about_runs if next(iter(sent)) in READS]
    assert {next(iter(sent)) for sent in writes} == set(WRITES)
    assert {next(iter(sent)) for sent in reads} == set(READS)
    assert [sent for sent in writes if sent.get("writeConcern") != {"w": "majority", "j": True}] == []
    assert [sent for sent in reads if sent.get("readConcern", {}).get("level") != "majority"] == []
    assert [sent for sent in reads if sent.get("$readPreference", {"mode": "primary"})["mode"] not in ("primary", "primaryPreferred")] == []


def test_a_write_that_a_majority_has_not_acknowledged_has_an_unknown_outcome() -> None:
    """It is applied on one member, which may lose it again in a fail-over."""
    reply = {"n": 1, "ok": 1.0, "writeConcernError": {"code": 64, "errmsg": "waiting for replication timed out"}}
    with pytest.raises(StoreUnavailableError) as raised:
        command_result(insert_runs([]), reply)
    assert raised.value.context["transient"] is True
    assert command_result(insert_runs([]), {"n": 1, "ok": 1.0}) == []


def test_after_each_write_of_a_worker_another_one_could_go_on(make_app: Callable[..., Streamline]) -> None:
    """A worker may die between any two of its writes. What the first of them refers to must exist, and its steps must fit together."""
    seen: list[tuple[str, str | None]] = []

    def probe(point: str) -> None:
        if point == "commit.after":
            for document in app.store().collection("runs").find():
                assert validate_run_document(document) is None
                app.store().drive(loading_outputs(document))  # raises for an output that is missing
                seen.append((document["status"], document["currentStepId"]))

    app = make_app(env=replace(system_env(), probe=probe))
    large = "x" * (EXTERNAL_BYTES + 1)
    flow = app.workflow("flow", steps={"first": lambda ctx: large, "nap": lambda ctx: ctx.sleep(0.001), "last": lambda ctx: large})
    run = flow.start()
    run_until_idle(app)
    assert [state for state in seen if state[0] == "done"] == [("done", None)]
    assert ("running", "nap") in seen
    assert flow.execute(run.id).output == large
