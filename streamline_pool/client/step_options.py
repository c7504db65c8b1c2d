"""The types of what programs write to declare steps: handlers, step options, workflow defaults.

Owns these types, for type checkers and readers. The values are checked at run time by domain/definition.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, Literal, TypeAlias, TypedDict

from streamline_pool.domain.model import Run
from streamline_pool.engine.context import Context
from streamline_pool.engine.durable.context import BlockingDurableContext, DurableContext

__all__ = ["Handler", "MainFunction", "MainOptions", "StepDeclaration", "StepDefaults", "StepOptions"]

Handler: TypeAlias = Callable[[Context], Any]
"""A step's function: takes `ctx`, is `def` or `async def`. What it returns is the step's output."""


MainFunction: TypeAlias = Callable[[DurableContext], Awaitable[Any]] | Callable[[BlockingDurableContext], Any]
"""A durable function: an `async def` or a `def`. What it returns is the run's output."""


class MainOptions(TypedDict, total=False):
    """Options of a durable function: `@wf.main(…)`."""

    retries: int  # attempts, including the first: 1..20; 1 if not given. What it has stored before an exception is not made again
    retry_delay: float | timedelta  # base of the back-off, seconds; 1.0 if not given
    retry_backoff: Literal["exponential", "linear", "fixed"] | float  # a number is the multiplier; "exponential" if not given


class StepDefaults(TypedDict, total=False):
    """Options that a workflow may give to all of its steps: `app.workflow(defaults=…)`."""

    retries: int  # attempts, including the first: 1..20; 3 if not given
    timeout: float | timedelta | None  # of one attempt, seconds above 0; None or not given: no limit
    retry_delay: float | timedelta  # base of the back-off, seconds; 1.0 if not given
    retry_backoff: Literal["exponential", "linear", "fixed"] | float  # a number is the multiplier; "exponential" if not given


class StepOptions(StepDefaults, total=False):
    """Options of one step: `@wf.step(…)`, or the second part of a `steps=` value. A condition may be `async def`.

    The engine asks `condition`, then `skip_if`, then `run_if`, once per step, and stores the decision. Together
    they may take as long as an attempt: `timeout`, or 60 seconds without one. One that raises or takes longer fails the attempt.
    """

    condition: Callable[[Context, Run], object] | None  # truthy: the step is entered
    skip_if: Callable[[Context], object] | None  # truthy: the step is skipped
    run_if: Callable[[Context], object] | None  # truthy: the step is entered


StepDeclaration: TypeAlias = Handler | tuple[Handler, StepOptions]
"""A value of `steps=`: a handler, or a handler and its options."""
