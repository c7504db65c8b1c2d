"""Runs in every state, and copies of their stored documents with one field damaged. Owns no assertion about what follows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

from bson import Binary
from stored_runs import stored

from streamline_pool import Context, Streamline, Workflow, create_hook
from streamline_pool.protocol import claims
from support import eventually

__all__ = ["DAMAGES", "STATES", "Damaged", "damaged_copies", "runs_in_every_state", "working"]

_REMOVED = object()

DAMAGES: dict[str, Any] = {
    "removed": _REMOVED, "null": None, "text": "garbage", "number": 5, "negative": -1, "fraction": 0.5, "truth": True, "mapping": {},
    "operators": {"$set": {"a": 1}}, "list": [], "list of garbage": [None, 5, "x", {}], "old date": datetime(1970, 1, 1, tzinfo=UTC),
    "far date": datetime(9999, 12, 31, tzinfo=UTC), "malformed UUID": Binary(b"x" * 15, 4), "bytes": b"x",
}  # fmt: skip
"""What is stored in place of the field, by name."""

STATES = (
    "started", "leased", "between", "sleeping", "waiting", "hook", "event", "paused", "paused, leased", "retrying", "done",
    "failed", "cancelled", "large",
)  # fmt: skip


class Damaged(NamedTuple):
    """One damaged copy."""

    state: str
    path: str  # of the field, such as steps.0.status
    damage: str
    document: dict[str, Any]


def working(app: Streamline, *, queue: str = "default") -> Workflow:
    """The workflow whose runs get into the state that their input names."""

    def first(ctx: Context) -> Any:
        match ctx.input:
            case "sleeping":
                ctx.sleep(0.05)
            case "waiting" | "paused":
                ctx.wait("?", {"asked": [1]})
            case "hook":
                create_hook(ctx, "?")
                ctx.wait("?")
            case "event":
                ctx.wait_for("news", timeout=3600)
            case "failed":
                raise ValueError("the handler's own")
            case "retrying" if ctx.attempt == 1:
                ctx.set("kept", 1)
                ctx.checkpoint({"place": 1})
                raise ValueError("once")
            case "between":
                app.pause_run(ctx.run_id)
            case "large":
                return "x" * 10_000
        return ctx.input

    steps: Any = {"first": (first, {"retries": 2, "retry_delay": 0.01}), "second": _pass_on, "last": lambda ctx: "the end"}
    return app.workflow("damaged", queue=queue, steps=steps)


def _pass_on(ctx: Context) -> Any:
    return ctx.get_output("first")


def runs_in_every_state(app: Streamline, workflow: Workflow) -> dict[str, dict[str, Any]]:
    """The stored document of one run in each of STATES. Their leases expire at once."""
    found = {}
    for state in STATES:
        run_id = workflow.start(state, meta={"about": state}, tags=["a"]).id
        if state in ("leased", "paused, leased"):
            eventually(partial(app.store().run, claims.claim_runs([run_id], None, f"claim of {run_id}", "dead:1:x", 0.05)))
        elif state != "started":
            eventually(partial(_moved, workflow, run_id))
        if state == "between":
            workflow.resume(run_id)
        elif state.startswith("paused"):
            workflow.pause(run_id)
        elif state == "cancelled":
            workflow.cancel(run_id)
        found[state] = stored(app, run_id)
        app.runs.delete_one({"_id": run_id})
    return found


def _moved(workflow: Workflow, run_id: str) -> bool:
    """Execute the run. True once that has changed it: it may be due some milliseconds after its start."""
    return bool(workflow.execute(run_id).to_dict()["rev"])


def damaged_copies(state: str, document: dict[str, Any], damages: dict[str, Any] = DAMAGES) -> Iterator[Damaged]:
    """A copy for every field at every depth and every damage."""
    for place, path in enumerate(_paths(document, ())):
        for name, damage in damages.items():
            made = copy.deepcopy(document)
            holder: Any = made
            for part in path[:-1]:
                holder = holder[part]
            if damage is not _REMOVED:
                holder[path[-1]] = damage
            elif isinstance(holder, list):
                holder.pop(path[-1])
            else:
                del holder[path[-1]]
            made["_id"] = f"{state} {place} {name}"
            yield Damaged(state, ".".join(map(str, path)), name, made)


def _paths(value: Any, above: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        if above or key != "_id":
            yield (*above, key)
            yield from _paths(part, (*above, key))
