"""One run of the nemesis: set-up, load under faults, settling, judgement. Owns the order of these, and the end of all that it starts."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamline_pool.client.app import Streamline
from streamline_pool.domain.errors import StoreUnavailableError
from streamline_pool.protocol.operations import Find

from .audit import ENDED, Audit
from .clients import Load
from .crew import Crew
from .hosts import Host
from .judge import Verdict, judge, missing_act
from .ledger import FOLDER_VARIABLE, Ledger, LedgerTail, Note, real_monotonic
from .link import Link
from .needs import host_environ
from .overlaps import Circumstances
from .servers import ChaosServer
from .stage import Fault, NoTurn, Stage, Turn
from .workload import define

__all__ = ["Outcome", "Plan", "perform", "temporary_folder"]

_CLIENTS = 3
_TTL_S = 5
_CALM_S = 0.7  # between two faults at least, so that a child that was killed is replaced
_SETTLE_S = 60.0
_SETTLE_TIMES = 5  # so many times that long at most, also if something still changes
_WORKERS = 2
_CLOCK_MARGIN_S = 0.25  # a reading of the server's clock through a proxy with 100 ms of latency is wrong by so much at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do."""

    faults: list[Fault]
    seconds: float  # of load under faults
    seed: int
    rate: float  # starts per second
    lease_s: float
    settle_s: float = _SETTLE_S  # after so long without a change of any run, those that are left are wedged
    live_max: int = 300
    environ: Mapping[str, str] = field(default_factory=dict)  # for the pools


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What was seen."""

    plan: Plan
    verdict: Verdict
    turns: list[Turn]
    audit: Audit
    load: Load
    hosts: list[Host]
    untrue_exits: list[str]
    settled_s: float
    audited: bool  # the change stream was read to its end
    notes: list[Note]  # of the ledger
    logs: str


def perform(server: ChaosServer, database: str, plan: Plan, folder: Path, say: Callable[[str], None]) -> Outcome:
    """Run the nemesis on a server whose database is empty."""
    ledger_folder = folder / "ledger"
    ledger_folder.mkdir()
    with contextlib.ExitStack() as stack:
        app = stack.enter_context(define(Streamline(server.uri(), database=database), Ledger(ledger_folder)))
        app.setup_indexes(auto_cleanup_days=1)
        app.client[database].command("collMod", app.runs.name, index={"name": "streamline_ttl", "expireAfterSeconds": _TTL_S})
        hosts = [stack.enter_context(_host(name, server, database, plan, folder, ledger_folder)) for name in ("a", "b")]
        for host in hosts:
            host.start()
        for host in hosts:
            host.wait_ready()
        say(f"two hosts are ready, supervisors {', '.join(str(host.pid) for host in hosts)}")
        tail, audit = LedgerTail(ledger_folder), Audit(app)
        load = Load(app, audit, tail, Ledger(ledger_folder), rate=plan.rate / _CLIENTS, live_max=plan.live_max, seed=plan.seed)
        crew = stack.enter_context(Crew())
        _employ(crew, load, audit)
        chance = random.Random(plan.seed)
        stage = Stage(
            hosts=hosts,
            server=server,
            audit=audit,
            chance=chance,
            lease_s=plan.lease_s,
            folder=str(folder),
            wait=crew.wait,
            around=Circumstances(lease_s=plan.lease_s, clock_margin_s=_CLOCK_MARGIN_S),
        )
        turns = _faults(stage, plan, say)
        load.stop()
        settled_s, stored = _settle(app, load, audit, crew, plan, say)
        audited = audit.catch_up(20.0)
        for host in hosts:
            host.drain()
            stage.around.dead |= host.dead
        list(tail.read())
        verdict = judge(audit, load.acts, tail.notes, stored, stage.around)
        return Outcome(
            plan=plan,
            verdict=verdict,
            turns=turns,
            audit=audit,
            load=load,
            hosts=hosts,
            untrue_exits=[text for host in hosts for text in _untrue(host)],
            settled_s=settled_s,
            audited=audited,
            notes=tail.notes,
            logs="\n".join(host.log_text() for host in hosts),
        )


@contextlib.contextmanager
def _host(name: str, server: ChaosServer, database: str, plan: Plan, folder: Path, ledger_folder: Path) -> Iterator[Host]:
    home = folder / f"host-{name}"
    home.mkdir()
    options = ["--database", database, "--workers", str(_WORKERS), "--lease", f"{plan.lease_s:g}"]
    environ = {**plan.environ, FOLDER_VARIABLE: str(ledger_folder), **host_environ(name, home, plan.faults)}
    link = Link(server.addresses) if server.can_be_proxied else None
    host = Host(name, home, link, options, server.uri(link.addresses if link else None), environ)
    try:
        yield host
    finally:
        host.end()


def _employ(crew: Crew, load: Load, audit: Audit) -> None:
    """Start the threads: clients, and the reader of what the database accepts."""
    crew.start(audit.run, audit.stop)
    for loop in (load.read_ledger, load.look_after_runs, load.clean_up, *[load.act_when_due] * 2, *[load.start_runs] * _CLIENTS):
        crew.start(loop, load.stop)


def _faults(stage: Stage, plan: Plan, say: Callable[[str], None]) -> list[Turn]:
    """Give each fault its turn, in an order that the seed decides, again and again until the time is over.

    The first round may take twice the time, so that each fault has a turn also on a slow machine.
    """
    begun = real_monotonic()
    turns: list[Turn] = []
    agenda: list[Fault] = []
    slot_s = plan.seconds / max(1, len(plan.faults))
    stage.wait(min(2.0, plan.seconds / 10))  # so that the first fault finds runs
    while (left_s := plan.seconds - (real_monotonic() - begun)) > 0 or (
        agenda and left_s > -plan.seconds and len(turns) < len(plan.faults)
    ):
        if not agenda:
            agenda = stage.chance.sample(plan.faults, len(plan.faults))
        if not agenda:
            stage.wait(left_s)
            continue
        fault = agenda.pop()
        hold_s = fault.hold_s(plan.lease_s, slot_s)
        if left_s < hold_s and {fault.name for fault in plan.faults} <= {turn.fault for turn in turns}:
            break
        turns.append(_one_fault(stage, fault, hold_s))
        counts = f"{len(stage.audit.stories)} runs, {sum(stage.audit.ended.values())} ends"
        say(f"{real_monotonic() - begun:5.0f} s  {fault.name}{f': {turns[-1].no_turn}' if turns[-1].no_turn else ''}  ({counts})")
        stage.wait(_CALM_S)
        _restart_ended(stage, say)
        _await_recovery(stage, turns[-1], 2 * plan.lease_s)
    return turns


def _one_fault(stage: Stage, fault: Fault, hold_s: float) -> Turn:
    try:
        running = fault.start(stage)
    except NoTurn as exc:
        return Turn(fault.name, no_turn=str(exc))
    try:
        stage.wait(0.0 if fault.kill else hold_s)
    except BaseException as exc:
        running.abort(exc)
        raise
    running.stop()
    return running.turn


def _await_recovery(stage: Stage, turn: Turn, timeout_s: float) -> None:
    """Wait, and do nothing else, until the runs that were hit have gone on: a second fault would be counted as part of the first."""
    deadline = real_monotonic() + timeout_s
    while real_monotonic() < deadline and turn.recoveries(stage.audit)[1]:
        stage.wait(0.1)


def _restart_ended(stage: Stage, say: Callable[[str], None]) -> None:
    """A pool that has ended by itself is started again, as a service manager does."""
    for host in stage.hosts:
        if host.note_if_ended():
            say(f"the pool of host {host.name} ended by itself with code {host.endings[-1].code}; it is started again")
            host.start()
            host.wait_ready()


def _settle(
    app: Streamline, load: Load, audit: Audit, crew: Crew, plan: Plan, say: Callable[[str], None]
) -> tuple[float, dict[str, dict[str, Any]]]:
    """Wait, and do nothing else, until every run has ended or waits for what no client has done. Returns what has not ended."""
    say(f"no more faults and no more calls; waiting for {audit.live_count()} runs")
    begun = real_monotonic()
    while True:
        stored = _not_ended(app)
        now = real_monotonic()
        quiet_s = now - max([begun, *(story.changed_at for story in audit.live())])
        over = quiet_s > plan.settle_s or now - begun > _SETTLE_TIMES * plan.settle_s
        if stored is not None and (over or all(missing_act(document, load.acts) for document in stored.values())):
            return now - begun, stored
        if now - begun > 2 * _SETTLE_TIMES * plan.settle_s:
            raise RuntimeError("the database does not answer, though no fault is left")
        crew.wait(0.5)


def _not_ended(app: Streamline) -> dict[str, dict[str, Any]] | None:
    find = Find(name="find_live", collection="runs", filter={"status": {"$nin": list(ENDED)}})
    try:
        return {document["_id"]: dict(document) for document in app.store().run(find)}
    except StoreUnavailableError:
        return None


def _untrue(host: Host) -> Iterator[str]:
    """Exit codes that do not say what happened."""
    for ending in host.endings:
        killed = ending.how == "killed"
        if killed and ending.code != -9:
            yield f"host {host.name} was killed and ended with {ending.code}"
        elif not killed and (ending.code != ending.said or (ending.how == "drained" and ending.code not in (0, 4))):
            yield f"host {host.name} {ending.how}: exit code {ending.code}, its log says {ending.said}"


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Where everything is that the nemesis writes. It is removed with the block."""
    return tempfile.TemporaryDirectory(prefix=f"streamline-chaos-{os.getpid()}-")
