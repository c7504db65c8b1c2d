"""Is anything lost, stuck or doubled in ten minutes of everything at once, and does the memory of the pools stay flat?

Two pools of two workers each work on fifty workflows in two queues, on a replica set of three members that the storm starts.
Clients use every capability. Ended runs are archived, deleted and expired seconds after their end, by three clean-ups and a TTL
index at once. Meanwhile workers and a steward are killed, workers are frozen for longer than their leases, a pool is restarted, and
the primary is killed. Then the faults and the starts end, answers and clean-ups go on, and everything must end.

There are three witnesses. The clients note which calls were acknowledged. Handlers write a ledger of what they see of earlier
results (storm_app.py). The audit reads the change stream of the stored runs (storm_audit.py), because a run may be deleted as soon
as it has ended.

lost: a run whose start was acknowledged, and which has neither ended nor is stored; a run that was deleted before its end, that
failed though its handlers do not, or that ended without its last handler; a handler that was entered without the result of an
earlier step, or with an older checkpoint than one that was durable; an acknowledged answer or event that no later step of the run
has seen, an acknowledged cancel after which the run has another end, an acknowledged rewind after which no handler was entered. A
call does not count if a later or simultaneous cancel or rewind of the same run may have made it void. A call that the database did
not answer may have happened or not, and counts neither way.

wedged: a run that is stored and has not ended after the drain. The drain ends when no run is left, or when no run has changed for a
minute. By then every wait was answered: clients answer every wait that they find, but send no second event to a run whose event was
acknowledged. A stream of events that delivers nothing after the failover counts, too.

doubled: a step's result that the database accepted twice without a rewind in between; two entries of one generation of a run that
see different results of one step; two runs that were stored with one idempotency key at the same time.

early: a handler that was entered before the end of its run's sleep, before `start_at`, or during a pause. The one handler whose step
was granted before the pause may still be entered.

Memory is the resident memory (RSS) of every process of both pools that lives for at least four minutes. It is flat if the median of
its last minute exceeds that of its third minute by at most 5 MiB or 10 %, whichever is more. A storm of less than five minutes has no
such budget.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from streamline_pool import Streamline

from .common import Budget, Report, Server, UsageError, report_progress
from .storm_app import LEDGER, WORKFLOWS, define
from .storm_audit import ENDED, Audit
from .storm_faults import LEASE_S, Faults, Members, Memory, Pools, replica_set, wait_until_whole
from .storm_judge import Verdict, judge
from .storm_load import Load

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
    with define(Streamline(server.uri, database=database)) as app, Pools(server, database) as pools:
        app.setup_indexes(auto_cleanup_days=1)
        server.client[database].command("collMod", app.runs.name, index={"name": "streamline_ttl", "expireAfterSeconds": _TTL_S})
        audit = Audit(server.uri, database, app.runs.name)
        load = Load(app, audit, options.rate / _CLIENTS, options.live)
        memory = Memory(pools)
        with app.events.stream(["workflow:completed", "storm:slow"]) as stream, _Crew() as crew:
            faults = Faults(server=server, pools=pools, wait=crew.wait)
            crew.start(audit.run, audit.stop)
            sampling = crew.start(memory.run, memory.stop)
            for loop in (load.look_after_runs, load.clean_up, *[load.start_runs] * _CLIENTS):
                crew.start(loop, load.stop)
            crew.start(lambda: load.follow(stream), stream.close)
            faults.run(seconds)
            load.stop_starting()
            memory.stop()
            sampling.join()
            wait_until_whole(server)
            drained_s = _drain(load, audit, crew)
        stored = {run["_id"]: run for run in app.runs.find({"status": {"$nin": list(ENDED)}})}
        verdict = judge(audit, load.acts, app.store().collection(LEDGER).find(), stored)
        if load.last_streamed_at < faults.failed_over_at:
            verdict.wedged["the stream of events"].append("it delivered nothing after the primary was killed")
        missed = stream.missed
        evidence = _Evidence(app, audit, load, pools).write(verdict, options.evidence)
    figures = _figures(options, verdict, audit, load, faults, memory)
    figures["load"].update({"drained_s": drained_s, "events_missed_by_the_stream": missed})
    return _report(server, options, figures, evidence)


class _Crew:
    """Threads. An error in one of them is raised in the thread that waits for them."""

    def __init__(self) -> None:
        self._threads: list[tuple[threading.Thread, Callable[[], None]]] = []
        self._errors: list[BaseException] = []

    def start(self, loop: Callable[[], None], stop: Callable[[], None]) -> threading.Thread:
        """Run `loop` on a thread; `stop` ends it."""
        thread = threading.Thread(target=self._run, args=(loop,), daemon=True)
        self._threads.append((thread, stop))
        thread.start()
        return thread

    def _run(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as exc:  # noqa: BLE001 - raised by `check`
            self._errors.append(exc)

    def check(self) -> None:
        """Raise the first error of a thread."""
        if self._errors:
            raise self._errors[0]

    def wait(self, seconds: float) -> None:
        """Let the threads work for that time, or until one fails."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.check()
            time.sleep(0.2)

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for _, stop in self._threads:
            stop()
        for thread, _ in self._threads:
            thread.join(60)


def _drain(load: Load, audit: Audit, crew: _Crew) -> float:
    """Wait until every run has ended, or nothing changes any more. Returns how long it took, in seconds."""
    begun = time.monotonic()
    while True:
        crew.check()
        now = time.monotonic()
        live, quiet_s = audit.live(), now - max((story.changed_at for story in audit.live()), default=begun)
        if not live and load.app.runs.count_documents({"status": {"$nin": list(ENDED)}}) == 0:
            return now - begun
        if (live and min(quiet_s, now - begun) > _QUIET_S) or now - begun > _DRAIN_S:
            report_progress(f"{len(live)} runs do not end")
            return now - begun
        time.sleep(0.5)


class _Evidence:
    """Writes the stories of the runs with a finding."""

    def __init__(self, app: Streamline, audit: Audit, load: Load, pools: Pools) -> None:
        self._app = app
        self._audit, self._load, self._pools = audit, load, pools

    def write(self, verdict: Verdict, folder: str | None) -> str | None:
        """The folder with one file for each run and the logs of the pools; None if there is nothing to tell."""
        found = verdict.all()
        if not found and folder is None:
            return None
        target = Path(folder or tempfile.mkdtemp(prefix="streamline-storm-"))
        target.mkdir(parents=True, exist_ok=True)
        log = self._pools.log_text()
        (target / "pools.log").write_text(log)
        for run_id, reasons in list(found.items())[:50]:
            (target / f"{run_id.replace('/', '_')}.txt").write_text("\n".join(self._story(run_id, reasons, log)))
        return str(target)

    def _story(self, run_id: str, reasons: list[str], log: str) -> list[str]:
        story = self._audit.stories.get(run_id)
        acts = sorted(self._load.acts.by_run.get(run_id, ()), key=lambda act: act.begun)
        return [
            *(run_id, story.workflow_id if story else "never stored", *reasons),
            *("", "calls of clients", *map(str, acts)),
            *("", "changes of the stored run", *(story.trail if story else ())),
            *("", "ledger", *map(str, self._app.store().collection(LEDGER).find({"run": run_id}).sort("at"))),
            *("", "stored", str(self._app.runs.find_one({"_id": run_id}))),
            *("", "log", *(line for line in log.splitlines() if run_id in line)),
        ]


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
