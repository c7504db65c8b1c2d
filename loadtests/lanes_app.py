"""The application of the `lanes` pools: as many workflows of three no-op steps as WORKFLOWS_VARIABLE says."""

from __future__ import annotations

import os

from streamline_pool import Streamline

from .app import noop

__all__ = ["WORKFLOWS_VARIABLE", "add_workflows", "app"]

WORKFLOWS_VARIABLE = "LOADTEST_WORKFLOWS"


def add_workflows(target: Streamline, count: int) -> Streamline:
    """Add workflows "lane-0000", "lane-0001", … to the application, and return it."""
    steps = {step.id: step.handler for step in noop.definition.steps}
    for number in range(count):
        target.workflow(f"lane-{number:04d}", steps=steps)
    return target


app = add_workflows(Streamline(), int(os.environ.get(WORKFLOWS_VARIABLE, "1")))
