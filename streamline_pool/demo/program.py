"""The demonstration: indexes every Python file of the standard library, one run per file, and kills a worker meanwhile.

Each run is `read` -> `parse` -> `save` (workflow.py). The program starts a private MongoDB, and the real pool as a child process
(pool_process.py). When half of the runs have ended, it kills one worker with SIGKILL. At the end it compares the stored counts with
its own count of the same files, made in one process without the engine. Exit code 0: the counts are equal, no result was accepted
twice, and no process is left. Exit code 1: otherwise.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from streamline_pool import Settings
from streamline_pool.demo.pool_process import DemoFailed, Pool
from streamline_pool.demo.workflow import COUNTED, app, count_source, index, saved
from streamline_pool.embedded.server import start

__all__ = ["run_demo"]

DATABASE = "stdlib_index"
STEADY_TIMEOUT_S = 120.0  # if no run has ended for so long, something is wrong
POLL_S = 0.1
RECOVERY_POLL_S = 0.02


class Kill(NamedTuple):
    """The killed worker and the runs that it held."""

    pid: int
    runs: int
    recovery_s: float  # from the kill until each of them had advanced


def run_demo(*, limit: int | None, workers: int, concurrency: int) -> int:
    """Run the whole demonstration; its exit code. `limit`: index only about so many of the files, evenly spread; None: all.
    `concurrency`: runs in flight per worker. Parsing is CPU work, so with many the threads of a worker would only wait for each other.

    Raises StoreUnavailableError if no MongoDB can be started. SIGTERM ends it with its pool and its server.
    """
    # SystemExit, so that the pool is drained and the server stopped.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return _demonstrate(_sample(library_files(), limit), workers, concurrency)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except DemoFailed as exc:
        print(f"\n{exc}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


def _demonstrate(files: Sequence[Path], workers: int, concurrency: int) -> int:
    library = sysconfig.get_path("stdlib")
    print(f"{len(files)} Python files in {library}: one run of three steps each, {workers} workers", flush=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stdlib-index-")))
        server = stack.enter_context(start(None))
        app.configure(Settings(mongodb_uri=server.uri, database=DATABASE))
        stack.enter_context(app)
        pool = Pool(server.uri, DATABASE, workers, concurrency, folder)
        stack.enter_context(pool)
        print(f"MongoDB {server.version} and the pool (pid {pool.pid}) are ready", flush=True)

        began = time.monotonic()
        index.start_many([{"path": str(path)} for path in files])
        kill = None
        for ended in progress(len(files), pool):
            if kill is None and ended >= len(files) // 2:
                kill = kill_one_worker()  # None if no worker holds a run now; then the next round tries again
        took_s = time.monotonic() - began

        left = pool.drain()
        print("counting the same files in this process, without the engine", flush=True)
        direct = total(count_source(path.read_bytes()) for path in files)
        stored = total(saved().find())
        duplicates, again = count_duplicates()
        report(len(files), took_s, kill, duplicates, again, stored, direct)
        faults = []
        if kill is None:
            faults.append("no worker was killed: no worker held a run after half of the runs had ended")
        if failed := app.runs.find_one({"status": "failed"}, {"error": 1, "input": 1}):
            faults.append(f"a run failed: {failed}")
        if pool.returncode != 0 or left:
            faults.append(f"the pool ended with code {pool.returncode}, processes left: {left}; its log ends:\n{pool.log_end()}")
        for fault in faults:
            print(fault, file=sys.stderr)
        return int(stored != direct or duplicates > 0 or bool(faults))


def library_files() -> list[Path]:
    """Every `.py` file of the standard library with its tests, without installed packages."""
    found = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = sorted(name for name in folders if name not in ("site-packages", "dist-packages", "__pycache__"))
        found += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    return found


def _sample(files: list[Path], limit: int | None) -> list[Path]:
    return files if limit is None else files[:: max(1, len(files) // max(1, limit))]


def progress(runs: int, pool: Pool) -> Iterator[int]:
    """Yields the number of ended runs until all have ended. Prints it: on a terminal one line that changes, else single lines."""
    tty = sys.stdout.isatty()
    ended, ended_at, shown = 0, time.monotonic(), -1
    while ended < runs:
        counts = {row["_id"]: row["n"] for row in app.runs.aggregate([{"$group": {"_id": "$status", "n": {"$sum": 1}}}])}
        now_ended = counts.get("done", 0) + counts.get("failed", 0)
        if now_ended > ended:
            ended, ended_at = now_ended, time.monotonic()
        elif time.monotonic() - ended_at > STEADY_TIMEOUT_S:
            raise DemoFailed(f"no run has ended for {STEADY_TIMEOUT_S:g} s; {ended} of {runs} had: {counts}")
        pool.check_alive()
        tenth = 10 * ended // runs
        if tty:
            print(f"\r{ended:6} of {runs} runs have ended, {_in_flight():4} are in flight ", end="", flush=True)
        elif tenth > shown:
            shown = tenth
            _print_line(f"{ended:6} of {runs} runs have ended, {_in_flight():4} are in flight")
        yield ended
        time.sleep(POLL_S)
    if tty:
        print()


def _print_line(line: str) -> None:
    """Print a line. On a terminal it replaces the unfinished line of `progress`."""
    print(f"\r{line:60}" if sys.stdout.isatty() else line, flush=True)


def _in_flight() -> int:
    return int(app.runs.count_documents({"lease.expiresAt": {"$exists": True}}))


def kill_one_worker() -> Kill | None:
    """Kill the worker that holds the most runs, and measure how long they make no progress. None if no worker holds a run."""
    held: dict[str, list[str]] = {}
    for run in app.runs.find({"lease.expiresAt": {"$exists": True}}, {"lease.owner": 1}):
        held.setdefault(run["lease"]["owner"], []).append(run["_id"])
    if not held:
        return None
    owner, run_ids = max(held.items(), key=lambda item: len(item[1]))
    pid = int(owner.split(":")[1])  # an owner is host:pid:nonce
    os.kill(pid, signal.SIGKILL)
    killed_at = time.monotonic()
    # Their state at the death of the worker, except for writes in progress. Runs that had ended already are not counted.
    query = {"_id": {"$in": run_ids}, "status": {"$nin": ["done", "failed", "cancelled"]}}
    before = {run["_id"]: run["rev"] for run in app.runs.find(query, {"rev": 1})}
    _print_line(f"killed worker {pid} with SIGKILL; it held {len(before)} runs")
    waiting = dict(before)
    recovered_at = killed_at
    while waiting:
        time.sleep(RECOVERY_POLL_S)
        now = {run["_id"]: run["rev"] for run in app.runs.find({"_id": {"$in": list(waiting)}}, {"rev": 1})}
        moved = [run_id for run_id, rev in now.items() if rev > waiting[run_id]]
        for run_id in moved:
            del waiting[run_id]
        if moved:
            recovered_at = time.monotonic()
        elif time.monotonic() - recovered_at > STEADY_TIMEOUT_S:
            raise DemoFailed(f"{len(waiting)} runs of the killed worker {pid} make no progress: {sorted(waiting)[:5]}")
    _print_line(f"all {len(before)} have advanced after {recovered_at - killed_at:.2f} s")
    return Kill(pid, len(before), recovered_at - killed_at)


def count_duplicates() -> tuple[int, int]:
    """The number of results that were accepted more than once, and of repeated entries into handlers.

    Two results can be accepted twice: that of a step, and a save. `rev` grows by one at every accepted write of a lease
    holder, so a run of three steps without failures ends at 3. A repeated save would be a second document for one file.
    A repeated entry is no duplicate: the step that the killed worker executed is entered again, hence the key of the saves.
    """
    runs = list(app.runs.find({}, {"rev": 1, "steps.attempts": 1}))
    results = sum(run["rev"] - 3 for run in runs)
    paths = [row["_id"] for row in saved().aggregate([{"$group": {"_id": "$path"}}])]
    saves = saved().count_documents({}) - len(paths)
    again = sum(step["attempts"] - 1 for run in runs for step in run["steps"])
    return results + saves, again


def total(counts: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    totals = dict.fromkeys(COUNTED, 0)
    for count in counts:
        for name in COUNTED:
            totals[name] += count[name]
    return totals


def report(
    runs: int,
    took_s: float,
    kill: Kill | None,
    duplicates: int,
    again: int,
    stored: Mapping[str, int],
    direct: Mapping[str, int],
) -> None:
    rows = [
        ("runs", f"{runs} in {took_s:.1f} s"),
        ("steps per second", f"{3 * runs / took_s:.0f}"),
        ("recovery time", f"{kill.recovery_s:.2f} s for the {kill.runs} runs of the killed worker" if kill else "-"),
        ("duplicates accepted", str(duplicates)),
        ("handlers entered again", str(again)),
    ]
    print()
    for name, value in rows:
        print(f"{name:24}{value}")
    print(f"\n{'':16}{'stored':>14}{'counted directly':>20}")
    for name in COUNTED:
        print(f"{name:16}{stored[name]:14}{direct[name]:20}{'' if stored[name] == direct[name] else '   DIFFERENT'}")
    print("\nequal" if stored == direct else "\nNOT EQUAL", flush=True)
