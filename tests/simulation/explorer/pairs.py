"""The steps of a run before and after a change, side by side. Owns how calls of a durable function are paired: by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["is_code", "paired"]

Step = Mapping[str, Any]


def is_code(run: Mapping[str, Any]) -> bool:
    """Whether the run is one of a durable function."""
    return bool(run["steps"][0].get("kind") == "main")


def paired(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[Step, Step]]:
    """Each step of the new state with what it was. A call that was not stored was running; one that is dropped is left out."""
    if not is_code(new):
        return list(zip(old["steps"], new["steps"], strict=True))
    before = {step["stepId"]: step for step in old["steps"]}
    return [(before.get(step["stepId"], {**step, "status": "running"}), step) for step in new["steps"]]
