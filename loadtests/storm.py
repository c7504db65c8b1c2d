"""Is anything lost, stuck or doubled in ten minutes of everything at once, and does the memory of the pools stay flat?

Two pools of two workers each work on fifty workflows in two queues, on a replica set of three members that the storm starts.
Clients use every capability. Ended runs are archived, deleted and expired seconds after their end, by three clean-ups and a TTL
index at once. Meanwhile workers and a steward are killed, workers are frozen for longer than their leases, a pool is restarted, and
the primary is killed. Then the faults and the starts end, answers and clean-ups go on, and everything must end.

There are three witnesses. The clients note which calls were acknowledged. Handlers write a ledger of what they see of earlier
results (streamline_pool/chaos/workload.py). The audit reads the change stream of the stored runs (streamline_pool/chaos/audit.py),
because a run may be deleted as soon as it has ended. What counts as lost, wedged, doubled and early is said by
streamline_pool/chaos/judge.py. The drain ends when no run is left, or when no run has changed for a minute. By then every wait was
answered: clients answer every wait that they find, but send no second event to a run whose event was acknowledged. A stream of events
that delivers nothing after the failover counts as wedged, too.

Memory is the resident memory (RSS) of every process of both pools that lives for at least four minutes. It is flat if the median of
its last minute exceeds that of its third minute by at most 5 MiB or 10 %, whichever is more. A storm of less than five minutes has no
such budget.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from streamline_pool import Streamline
from streamline_pool.chaos.audit import ENDED, Audit
from streamline_pool.chaos.clients import Load
from streamline_pool.chaos.crew import Crew
from streamline_pool.chaos.judge import Verdict, judge
from streamline_pool.chaos.ledger import Ledger, LedgerTail, Note, real_monotonic
from streamline_pool.chaos.overlaps import Circumstances
from streamline_pool.chaos.stories import write_stories
from streamline_pool.chaos.workload import WORKFLOWS, define

from .common import Budget, Report, Server, UsageError, report_progress
from .storm_faults import CRASHES_MAX, LEASE_S, Faults, Members, Memory, Pools, replica_set, wait_until_whole

__all__ = ["add_options", "measure", "serving"]

_CLIENTS = 4
_TTL_S = 5
_QUIET_S = 60.0  # after so long without a change of any run, those that are left are wedged
_DRAIN_S = 300.0
_MEMORY_SETTLE_S, _MEMORY_WINDOW_S = 120.0, 60.0
_MEMORY_MIB, _MEMORY_SHARE = 5.0, 0.1
_MEMORY_MINUTES = 5.0  # shorter storms have no budget for memory


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this question."""
    parser.add_argument("--minutes", type=float, default=10.0, help="how long runs are started and processes killed (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=20.0, help="starts per second (default: %(default)s)")
    parser.add_argument("--live", type=int, default=800, help="start none while so many runs have not ended (default: %(default)s)")
    parser.add_argument(
        "--evidence", metavar="FOLDER", help="where to write the stories of lost and stuck runs (default: a new temporary folder)"
    )


def serving(uri: str | None) -> AbstractContextManager[Server]:
    """A replica set of the storm's own, because it kills the primary. UsageError if a server is given."""
    if uri is not None:
        raise UsageError("the storm kills the primary of its replica set, so it starts one of its own: leave out --mongodb-uri")
    return replica_set()


def measure(server: Server, options: argparse.Namespace) -> Report:
    """The storm, the drain, and the judgement."""
    assert isinstance(server, Members), "see `serving`"
    database, seconds = server.database(), options.minutes * 60
    with ExitStack() as stack:
        notes = stack.enter_context(tempfile.TemporaryDirectory(prefix="streamline-storm-ledger-"))
        app = stack.enter_context(define(Streamline(server.uri, database=database), Ledger(notes)))
        pools = stack.enter_context(Pools(server, database, notes))
        app.setup_indexes(auto_cleanup_days=1)
        server.client[database].command("collMod", app.runs.name, index={"name": "streamline_ttl", "expireAfterSeconds": _TTL_S})
        audit, tail = Audit(app), LedgerTail(notes)
        chance = random.randrange(2**31)
        load = Load(app, audit, tail, Ledger(notes), rate=options.rate / _CLIENTS, live_max=options.live, seed=chance)
        memory = Memory(pools)
        with app.events.stream(["workflow:completed", "chaos:slow"]) as stream, Crew() as crew:
            faults = Faults(server=server, pools=pools, wait=crew.wait)
            crew.start(audit.run, audit.stop)
            sampling = crew.start(memory.run, memory.stop)
            for loop in (load.read_ledger, load.look_after_runs, load.clean_up, *[load.act_when_due] * 2, *[load.start_runs] * _CLIENTS):
                crew.start(loop, load.stop)
            crew.start(lambda: load.follow(stream), stream.close)
            faults.run(seconds)
            load.stop_starting()
            memory.stop()
            sampling.join()
            wait_until_whole(server)
            drained_s = _drain(load, audit, crew)
        stored = {run["_id"]: run for run in app.runs.find({"status": {"$nin": list(ENDED)}})}
        list(tail.read())
        around = Circumstances(
            suspensions=faults.suspensions, dead=faults.dead, strikes=faults.strikes, crashes_max=CRASHES_MAX, lease_s=LEASE_S
        )
        verdict = judge(audit, load.acts, tail.notes, stored, around)
        if load.last_streamed_at < faults.failed_over_at:
            verdict.wedged["the stream of events"].append("it delivered nothing after the primary was killed")
        missed = stream.missed
        evidence = _evidence(load, audit, pools, verdict, tail.notes, options.evidence)
    figures = _figures(options, verdict, audit, load, faults, memory)
    figures["load"].update({"drained_s": drained_s, "events_missed_by_the_stream": missed})
    return _report(server, options, figures, evidence)


def _drain(load: Load, audit: Audit, crew: Crew) -> float:
    """Wait until every run has ended, or nothing changes any more. Returns how long it took, in seconds."""
    begun = real_monotonic()
    while True:
        crew.check()
        now = real_monotonic()
        live, quiet_s = audit.live(), now - max((story.changed_at for story in audit.live()), default=begun)
        if not live and load.app.runs.count_documents({"status": {"$nin": list(ENDED)}}) == 0:
            return now - begun
        if (live and min(quiet_s, now - begun) > _QUIET_S) or now - begun > _DRAIN_S:
            report_progress(f"{len(live)} runs do not end")
            return now - begun
        time.sleep(0.5)


def _evidence(load: Load, audit: Audit, pools: Pools, verdict: Verdict, notes: list[Note], folder: str | None) -> str | None:
    """The folder with one file for each run with a finding, and the logs of the pools; None if there is nothing to tell."""
    found = verdict.all()
    if not found and folder is None:
        return None
    target = Path(folder or tempfile.mkdtemp(prefix="streamline-storm-"))
    write_stories(target, found, audit, load, notes, pools.log_text())
    return str(target)


def _figures(options: argparse.Namespace, verdict: Verdict, audit: Audit, load: Load, faults: Faults, memory: Memory) -> dict[str, Any]:
    processes = memory.rows(*_memory_times(options), _MEMORY_MIB, _MEMORY_SHARE)
    by_ttl = audit.deleted - sum(count for name, count in load.cleaned.items() if name != "not answered")
    return {
        **{name: len(getattr(verdict, name)) for name in ("lost", "wedged", "doubled", "early")},
        "processes_not_flat": sum(not row["flat"] for row in processes),
        "findings": [f"{run_id}: {'; '.join(reasons)}" for run_id, reasons in list(verdict.all().items())[:20]],
        "faults": dict(faults.counts),
        "load": {
            "runs": len(audit.stories),
            "deleted": audit.deleted,
            "ends": dict(audit.ended),
            "cleaned": {**load.cleaned, "by_ttl": by_ttl},
        },
        "acts": dict(sorted(load.acts.counts.items())),
        "checked": dict(verdict.checked),
        "streamed": dict(load.streamed),
        "memory": processes,
    }


def _memory_times(options: argparse.Namespace) -> tuple[float, float]:
    """Seconds from the birth of a process to the first window, and of a window."""
    return (_MEMORY_SETTLE_S, _MEMORY_WINDOW_S) if options.minutes >= _MEMORY_MINUTES else (options.minutes * 20, options.minutes * 10)


def _report(server: Server, options: argparse.Namespace, figures: dict[str, Any], evidence: str | None) -> Report:
    judged = ["lost", "wedged", "doubled", "early"] + (["processes_not_flat"] if options.minutes >= _MEMORY_MINUTES else [])
    settings = {
        **server.facts,
        **{"minutes": options.minutes, "rate_per_s": options.rate, "live_max": options.live, "workflows": WORKFLOWS},
        **{"pools": 2, "workers": 4, "lease_s": LEASE_S, "ttl_s": _TTL_S},
        "memory": "RSS; medians of {1:g} s, after {0:g} s of a process's life and at its end".format(*_memory_times(options)),
    }
    notes = ["findings: run and reason, at most 20"]
    notes += [f"the stories of the runs with findings, and the logs of the pools, are in {evidence}"] if evidence else []
    return Report(question="storm", settings=settings, figures=figures, budgets=[Budget(key=key, limit=0) for key in judged], notes=notes)
