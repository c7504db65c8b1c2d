"""The rule that what a caller was told is what has happened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from streamline_pool.domain.errors import WorkflowNotFoundError

from .ledger import Call, Violation

if TYPE_CHECKING:
    from .world import World

__all__ = ["check_outcome"]


def check_outcome(world: World, call: Call, outcome: str) -> None:
    """What the caller was told is what happened. Raises Violation."""
    effects = [effect for effect in call.effects if effect[1] != "start"]
    rules = world.rules
    if call.kind == "event to all" and outcome == "ok" and all(event["data"] != call.argument for event in rules.waits.events.values()):
        raise Violation(f"{call} was acknowledged, and the event is not stored")
    is_stored = call.run_id in rules.runs and call.run_id in rules.durable() and call.run_id not in rules.deleted
    if isinstance(call.result, WorkflowNotFoundError) and is_stored:
        raise Violation(f"{call} found no run, and it is stored")
    if call.run_id is not None and call.run_id in world.rules.deleted:
        return
    if outcome == "refused" and effects:
        if call.kind in ("answer", "hook") and _rewound(world, call):
            return  # its answer counted until the rewind, or the next generation, which removed it
        raise Violation(f"{call} was refused, and took effect: {effects}; {call.result}")
    if outcome != "ok" or (effects and call.kind != "forged hook"):
        return
    states: list[Mapping[str, Any]] = [
        run for _, run_id, run in world.rules.history if run_id == call.run_id and _ >= call.began and run is not None
    ]
    before = [run for _, run_id, run in world.rules.history if run_id == call.run_id and _ < call.began and run is not None]
    states = world.rules.lagging(call.began, call.run_id) or [*states, *before[-1:], *world.rules.durable_since(call.began, call.run_id)]
    ended = any(run["status"] in ("done", "failed", "cancelled") for run in states)
    match call.kind:
        case "forged hook":
            raise Violation(f"{call} was acknowledged")
        case "rewind" | "answer" | "hook":
            raise Violation(f"{call} was acknowledged, and had no effect")
        case "cancel" | "event" if not ended:
            raise Violation(f"{call} was acknowledged, and had no effect")
        case "pause" if not ended and not any(run.get("paused") for run in states):
            raise Violation(f"{call} was acknowledged, and the run was not paused")
        case "resume" if not ended and all(run.get("paused") for run in states):
            raise Violation(f"{call} was acknowledged, and the run is paused")


def _rewound(world: World, call: Call) -> bool:
    continued = (world.rules.runs.get(str(call.run_id)) or {}).get("generation", 0)
    return bool(continued) or any(other.kind == "rewind" and other.run_id == call.run_id and other.effects for other in world.ledger.calls)
