"""Why a run does not go on, or where it is, in one sentence. Pure: a stored run, the pools seen lately, the time -> text.

Every run that has not ended is leased, or has `wakeAt`, or waits for a control operation. This module says which; for a
run that is due and that no worker claims, it says what the live pools lack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from streamline_pool.supervisor.cli.console import ago, short, span

__all__ = ["explain", "part_of", "seen_lately"]

_LATELY = timedelta(seconds=65)  # pools write their record every 30 s; two writes may be late before "the last minute" becomes untrue

Document = Mapping[str, Any]


def explain(run: Document, hosts: Sequence[Document], now: datetime) -> str:
    """One sentence on `run` as stored. `hosts` are the records of pools that were written lately; `now` is the server's time."""
    status = run.get("status")
    if status in ("done", "failed", "cancelled"):
        return _ended(run, now)
    if run.get("paused"):
        return _paused(run)
    if part_of(run, "lease"):
        return _held(run, now)
    step = _current_step(run)
    if status == "waiting" and step.get("status") == "waiting":
        return _waiting(step, run, now)
    return _claimable(run, step, hosts, now)


def seen_lately(hosts: Sequence[Document], now: datetime) -> list[Document]:
    """The pools that wrote their record in the last minute. A killed pool leaves a record, which the server removes later."""
    return [host for host in hosts if not isinstance(host.get("seenAt"), datetime) or host["seenAt"] >= now - _LATELY]


def part_of(holder: Document, name: str) -> Document:
    """A document within a document; an empty one if another program has put something else there."""
    part = holder.get(name)
    return part if isinstance(part, Mapping) else {}


def _ended(run: Document, now: datetime) -> str:
    when = ago(run.get("endedAt"), now)
    if run["status"] == "done":
        return f"It was done {when}."
    if run["status"] == "cancelled":
        reason = run.get("cancelReason")
        return f"It was cancelled {when}{f': {reason}' if reason else ''}."
    error = part_of(run, "error")
    where = f" at step {error['stepId']}" if error.get("stepId") else ""
    return f"It failed {when}{where}: {error.get('code', 'no code stored')}: {short(error.get('message') or '', 200)}"


def _paused(run: Document) -> str:
    reason = f" ({run['pauseReason']})" if run.get("pauseReason") else ""
    if part_of(run, "lease"):
        return f"It is paused{reason}; worker {run['lease'].get('owner')} still finishes step {run.get('currentStepId')}."
    return f"It is paused{reason} before step {run.get('currentStepId')}, until it is resumed."


def _held(run: Document, now: datetime) -> str:
    lease, step = run["lease"], _current_step(run)
    expires_at = lease.get("expiresAt")
    if isinstance(expires_at, datetime) and expires_at <= now:
        return (
            f"Worker {lease.get('owner')} had it but stopped renewing its lease, which ended {ago(expires_at, now)}; "
            "any pool that is alive takes it over."
        )
    began = f", begun {ago(step['startedAt'], now)}" if step.get("startedAt") else ""
    return f"Worker {lease.get('owner')} is running step {run.get('currentStepId')} (attempt {step.get('attempts', 1)}{began})."


def _waiting(step: Document, run: Document, now: datetime) -> str:
    waits = part_of(step, "waitingFor")
    kind, reason = waits.get("type"), waits.get("reason")
    at_step = f"step {step.get('stepId')}"
    if kind == "timer":
        return f"{at_step.capitalize()} sleeps; it goes on {ago(waits.get('resumeAt') or run.get('wakeAt'), now)}."
    what = {
        "human": f"an answer{f' ({reason})' if reason else ''}",
        "webhook": f"a call of its hook{f' ({reason})' if reason else ''}",
        "event": f"the event {waits.get('eventName')!r}",
    }.get(str(kind), f"{kind}")
    limit = f"; it times out {ago(waits['expiresAt'], now)}" if waits.get("expiresAt") else ""
    advice = f" Answer it with: streamline-pool runs resume {run.get('_id')} --payload JSON" if kind == "human" else ""
    return f"{at_step.capitalize()} waits for {what}{limit}.{advice}"


def _claimable(run: Document, step: Document, hosts: Sequence[Document], now: datetime) -> str:
    wake_at = run.get("wakeAt")
    if not isinstance(wake_at, datetime):
        return "No worker has it, and it has no time to wake at: another program changed the document; cancel it, or start it anew."
    if wake_at > now:
        if run["status"] == "draft":
            return f"It starts {ago(wake_at, now)}, as asked by start_at."
        error = part_of(step, "error")
        cause = f" failed ({short(error.get('message') or error.get('code') or '', 100)}) and" if error else ""
        return f"Step {step.get('stepId')}{cause} is attempted again {ago(wake_at, now)} (attempt {step.get('attempts', 0) + 1})."
    return _ready(run, hosts, now, wake_at)


def _ready(run: Document, hosts: Sequence[Document], now: datetime, wake_at: datetime) -> str:
    """The run is due, and no worker has claimed it: because of the pools' code, their queues, or their load."""
    since = f"ready for {span(max(0.0, (now - wake_at).total_seconds()))}"
    workflow, version, queue = run.get("workflowId"), run.get("version"), run.get("queue", "default")
    needs = f"a worker that has workflow {workflow} {version} on queue {queue}"
    if not hosts:
        return f"It is {since} and needs {needs}; no pool has been seen in the last minute. Start one with: streamline-pool"
    lanes = [lane for host in hosts for lane in host.get("lanes") or ()]
    if f"{queue}/{workflow}/{version}" in lanes:
        states = sorted({str(host.get("state", "alive")) for host in hosts if f"{queue}/{workflow}/{version}" in (host.get("lanes") or ())})
        return f"It is {since}; pools that can run it are alive ({', '.join(states)}), so it is next as soon as a worker has a free place."
    return f"It is {since} and needs {needs}: none seen in the last minute. {_nearest(str(workflow), str(version), str(queue), lanes)}"


def _nearest(workflow: str, version: str, queue: str, lanes: Sequence[str]) -> str:
    """What the pools have instead: the same workflow in another version or on other queues, or no such workflow."""
    have = [parts for parts in (lane.split("/", 2) for lane in lanes) if len(parts) == 3 and parts[1] == workflow]
    if not have:
        return "The pools that are alive do not have this workflow."
    versions = sorted({parts[2] for parts in have})
    if version not in versions:
        return f"The pools that are alive have version {', '.join(versions)}; deploy {version} again to finish this run."
    queues = sorted({parts[0] for parts in have if parts[2] == version})
    return f"The pools that are alive work on queue {', '.join(queues)}; start one with --queue {queue}."


def _current_step(run: Document) -> Document:
    steps = run.get("steps")
    current = run.get("currentStepId")
    found = [step for step in steps if isinstance(step, Mapping) and step.get("stepId") == current] if isinstance(steps, list) else []
    return found[0] if found else {}
