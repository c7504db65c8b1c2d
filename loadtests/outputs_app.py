"""The application of the `outputs` pools: one workflow of three steps, each with an output of OUTPUT_VARIABLE bytes."""

from __future__ import annotations

import os
from typing import Any

from streamline_pool import Streamline

from .payload import text_of

__all__ = ["OUTPUT_VARIABLE", "WORKFLOW_ID", "add_workflow", "app"]

OUTPUT_VARIABLE = "LOADTEST_OUTPUT_BYTES"
WORKFLOW_ID = "output"

_SIZE = int(os.environ.get(OUTPUT_VARIABLE, "0"))


async def _produce(ctx: Any) -> str | None:
    return text_of(_SIZE) if _SIZE else None


def add_workflow(target: Streamline) -> Streamline:
    """Add the workflow to the application, and return it."""
    target.workflow(WORKFLOW_ID, steps={"first": _produce, "second": _produce, "third": _produce})
    return target


app = add_workflow(Streamline())
