"""Runs that wait, and client procedures that a test interrupts or records. Owns no assertion about their outcome."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from streamline_pool import Context, Streamline, create_hook
from streamline_pool.protocol.operations import Command
from streamline_pool.storage.procedures import Procedure

__all__ = ["Waiting", "interrupted", "recorded"]


class Waiting:
    """A workflow whose first step waits in the way that the run's input names. `tokens` are those of the hooks, oldest first."""

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
        """Start a run that waits in the way `how`, and return its id as soon as it waits."""
        run = self.workflow.execute(self.workflow.start(how, run_id=run_id).id)
        assert run.step("first").status == "waiting"
        return run.id


def interrupted(app: Streamline, procedure: Procedure[Any], before: str, meanwhile: Callable[[], Any]) -> Any:
    """Run a client's procedure, and call `meanwhile` immediately before its first operation named `before`."""
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
    assert not todo, f"{before} was never sent"
    return result


def recorded(app: Streamline, procedure: Procedure[Any], meanwhile: Callable[[], Any] | None = None) -> list[Command]:
    """Run a client's procedure. Returns its writes, so that a test can send them again, as a network may do.

    `meanwhile` is called immediately before the first of them.
    """
    sent: list[Command] = []

    def watched() -> Procedure[None]:
        try:
            effect = next(procedure)
            while True:
                if isinstance(effect, Command):
                    if meanwhile is not None and not sent:
                        meanwhile()
                    sent.append(effect)
                effect = procedure.send((yield effect))
        except StopIteration:
            return

    app.store().drive(watched())
    assert sent
    return sent
