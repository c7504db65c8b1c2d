"""The handler of a durable function: the user's function, which knows by a context variable which run it belongs to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from streamline_pool.domain.definition import StepDefinition

from .calls import Calls
from .names import current_names, current_user

__all__ = ["durable_step"]


def durable_step(step: StepDefinition, calls: Calls) -> StepDefinition:
    """The step of a durable function, for one entry into it."""
    handler = step.handler

    async def enter_async(context: Any) -> Any:
        calls.names.owner = current_user()
        token = current_names.set(calls.names)
        try:
            return await handler(context)
        finally:
            current_names.reset(token)

    def enter(context: Any) -> Any:
        calls.names.owner = current_user()
        token = current_names.set(calls.names)
        try:
            return handler(context)
        finally:
            current_names.reset(token)

    return replace(step, handler=enter_async if step.is_async else enter)
