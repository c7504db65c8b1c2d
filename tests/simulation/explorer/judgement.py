"""What must hold at the end of a schedule, when nothing goes wrong any more and everything has come to rest.

Owns these rules, and what "at rest" means.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from streamline_pool.protocol.payloads import external_ids
from streamline_pool.protocol.retention import ARCHIVE

from .ledger import Violation
from .pairs import is_code
from .transitions import TERMINAL

if TYPE_CHECKING:
    from .world import World

__all__ = ["is_quiet", "judge"]

Run = Mapping[str, Any]


def is_quiet(world: World) -> bool:
    """Whether no run will change by itself: each has ended, or is paused, or waits for a call without a deadline."""
    for run in world.rules.runs.values():
        if run["status"] not in TERMINAL and ("lease" in run or ("wakeAt" in run and not run.get("paused"))):
            return False
    if any(call.outcome == "open" for call in world.ledger.calls):
        return False
    return not any(event.get("pending") for event in world.server.all_of("events"))


def judge(world: World) -> None:
    """Raise Violation if something is lost, stuck or inconsistent."""
    runs = world.server.runs()
    events = list(world.rules.waits.events.values())
    outputs = {output["_id"] for output in world.server.all_of("outputs")}
    for run in runs.values():
        _judge_run(run, is_strayed=run["_id"] in world.rules.strayed)
        _judge_wait(world, run, events)
        _judge_outputs(world, run, outputs)
    _judge_starts(world, runs)
    _judge_archive(world, outputs)


def _judge_run(run: Run, *, is_strayed: bool) -> None:
    where, status = f"run {run['_id']}", run["status"]
    if status in TERMINAL:
        if run.get("endedAt") is None:
            raise Violation(f"{where} is {status}, and has no endedAt")
        if {"lease", "wakeAt", "pausedWakeAt", "awaits"} & set(run) and not is_strayed:
            raise Violation(f"{where} is {status}, and would be claimed or woken: {sorted(run)}")
        if status == "failed" and not (run.get("error") or {}).get("code"):
            raise Violation(f"{where} failed, and does not say why")
        if status == "failed" and run["error"]["code"] == "DATA_CORRUPTION":
            raise Violation(f"{where} failed, and nothing has damaged it: {run['error']['message']}")
        steps = run["steps"][:1] if is_code(run) else run["steps"]  # a durable function may end although a call has failed
        if status == "done" and any(step["status"] not in ("done", "skipped") for step in steps):
            raise Violation(f"{where} is done, but not its steps: {run['steps']}")
        return
    step = next((step for step in run["steps"] if step["stepId"] == run["currentStepId"]), None)
    if run.get("paused") is True:
        if "wakeAt" in run and not is_strayed:
            raise Violation(f"{where} is paused, and claimable")
        if "pausedWakeAt" not in run and not _waits_for_a_call(step):
            raise Violation(f"{where} is paused, and would be stuck after a resume")
        return
    if not _waits_for_a_call(step):
        raise Violation(f"{where} is stuck: {status}, step {step}, no lease, no wakeAt")
    assert step is not None, "it waits"
    if run.get("awaits") != step["waitingFor"].get("eventName"):
        raise Violation(f"{where} awaits {run.get('awaits')!r}, and its step waits for {step['waitingFor']}")


def _waits_for_a_call(step: Run | None) -> bool:
    if step is None or step["status"] != "waiting":
        return False
    waiting_for = step["waitingFor"]
    return waiting_for["type"] in ("human", "webhook", "event") and waiting_for.get("expiresAt") is None


def _judge_wait(world: World, run: Run, events: list[dict[str, Any]]) -> None:
    """A run that waits must not have missed what it waits for."""
    if run["status"] in TERMINAL or run.get("paused") is True or run.get("awaits") is None:
        return
    seen = run.get("seen") or ()
    for event in events:
        if event["name"] == run["awaits"] and world.rules.waits.is_older(run, event) and event["_id"] not in seen:
            raise Violation(f"run {run['_id']} waits for {run['awaits']!r} and has missed event {event['_id']}")
    for item in run.get("inbox") or ():
        if item.get("name") == run["awaits"]:
            raise Violation(f"run {run['_id']} waits for {run['awaits']!r}, which is in its inbox")


def _judge_outputs(world: World, run: Run, outputs: set[str]) -> None:
    """What a run refers to is there, and each result is what the handler of that step returned."""
    missing = [output_id for output_id in external_ids(run) if output_id not in outputs]
    if missing:
        raise Violation(f"run {run['_id']} refers to outputs that are not there: {missing}")
    for step in run["steps"]:
        output = step.get("output")
        if step["status"] != "done" or "answer" in step or not isinstance(output, Mapping) or "entry" not in output:
            continue
        entry = world.ledger.entries[output["entry"]]
        if (entry.run_id, entry.step_id) != (run["_id"], step["stepId"]):
            raise Violation(f"step {step['stepId']} of run {run['_id']} has the result of {entry.step_id} of {entry.run_id}")


def _judge_archive(world: World, outputs: set[str]) -> None:
    """What was moved is in the archive, as it was when it was moved, with its outputs."""
    archive = {run["_id"]: run for run in world.server.all_of(ARCHIVE)}
    for run_id, moved in world.rules.archived.items():
        copy = archive.get(run_id)
        # Another program may have stored a due time before or after the copy was made.
        strayed = {"wakeAt": None} if run_id in world.rules.strayed else {}
        if copy is None or {**copy, **strayed} != {**moved, **strayed}:
            raise Violation(f"run {run_id} was moved to the archive, which has {'another state of it' if run_id in archive else 'none'}")
    for run in archive.values():
        if run["status"] not in TERMINAL:
            raise Violation(f"the archive has run {run['_id']}, which is {run['status']}")
        _judge_outputs(world, run, outputs)


def _judge_starts(world: World, runs: Mapping[str, Run]) -> None:
    """Every acknowledged start is stored, and one key has one run."""
    for call in world.ledger.calls:
        is_start = call.kind.startswith("start") and call.outcome == "ok"
        for run in (call.result if call.kind == "start many" else [call.result]) if is_start else ():
            if run.id not in runs and run.id not in world.rules.deleted:
                raise Violation(f"{call} was acknowledged, and run {run.id} is lost")
    keys = [(run["workflowId"], run["idempotencyKey"]) for run in runs.values() if "idempotencyKey" in run]
    if len(keys) != len(set(keys)):
        raise Violation(f"two runs have one key: {sorted(keys)}")
