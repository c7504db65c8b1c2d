"""What the tests of durable functions share: a record of what was entered, a call that fails at first, and what a run has stored."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from streamline_pool import Run, current_step

__all__ = ["Calls", "failing", "kinds", "states"]


class Calls:
    """What was entered, in order."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    def note(self, value: Any) -> Any:
        self.made.append(value)
        return value

    async def note_async(self, value: Any) -> Any:
        await asyncio.sleep(0)
        return self.note(value)


def failing(times: int, made: list[int], error: type[Exception] = ValueError) -> Callable[[], str]:
    def work() -> str:
        made.append(current_step().attempt)
        if len(made) <= times:
            raise error("refused")
        return "done"

    return work


def states(run: Run) -> dict[str, str]:
    return {step.step_id: str(step.status) for step in run.steps}


def kinds(run: Run) -> dict[str, str]:
    return {step["stepId"]: step["kind"] for step in run.document["steps"]}
