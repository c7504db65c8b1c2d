"""The time of day of a host jumps by an hour in the middle of a run: no stored instant moves, no lease is lost, no step runs twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from workers import run_until_idle

from streamline_pool import Streamline
from streamline_pool.config.env import system_env

HOUR = timedelta(hours=1)


class WrongClock:
    """The system's clock, whose time of day is off. Its monotonic part is right, as that of a real host is."""

    def __init__(self) -> None:
        self._system = system_env().clock
        self.off = timedelta(0)

    def now(self) -> datetime:
        return self._system.now() + self.off

    def monotonic(self) -> float:
        return self._system.monotonic()


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
def test_a_jump_within_a_step_changes_no_stored_instant_and_repeats_nothing(make_app: Callable[..., Streamline], jump: timedelta) -> None:
    """A `wakeAt` from a wrong clock would let a sleep last an hour, a lease from one would give the run to another worker."""
    clock = WrongClock()
    app = make_app(env=replace(system_env(), clock=clock), lease_s=30)
    entered: list[str] = []

    def first(ctx: Any) -> None:
        entered.append("first")
        clock.off = jump
        ctx.sleep(0.05)

    def second(ctx: Any) -> str:
        entered.append("second")
        clock.off = -jump
        return "done"

    workflow = app.workflow("w", steps={"first": first, "second": second})
    run = workflow.start()
    before = server_time(app)
    run_until_idle(app)
    stored = app.runs.find_one({"_id": run.id})

    assert (stored["status"], entered, stored["failures"], stored["crashes"]) == ("done", ["first", "second"], 0, 0)
    instants = [stored["createdAt"], stored["updatedAt"], stored["endedAt"]]
    instants += [step[name] for step in stored["steps"] for name in ("startedAt", "endedAt")]
    margin = timedelta(seconds=1)
    assert all(before - margin <= instant <= server_time(app) + margin for instant in instants), instants


def server_time(app: Streamline) -> datetime:
    """The clock of the database server."""
    found: datetime = app.client.admin.command("hello")["localTime"]
    return found.replace(tzinfo=UTC)
