"""The real command as a child process of a test: start it, watch its log, signal it, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from support import eventually

__all__ = ["PoolProcess", "running"]

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-c", "from streamline_pool.supervisor.cli.main import main; main()"]


class PoolProcess:
    """One supervisor and its children, seen through its log (JSON) and the process table."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.pid = process.pid
        self._process = process
        self._log = log
        self._ever_seen: set[psutil.Process] = set()

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The log entries of that event so far."""
        lines = [line for line in self._log.read_text().splitlines() if line.startswith("{")]
        return [entry for line in lines if (entry := json.loads(line))["event"] == event]

    @property
    def log_text(self) -> str:
        return self._log.read_text()

    def ready(self) -> PoolProcess:
        """Wait for the line that docs/reference/command.md promises."""
        eventually(lambda: self.logged("ready") or self._process.poll() is not None, timeout=30)
        assert self.logged("ready"), self.log_text
        self.children()
        return self

    def children(self) -> list[psutil.Process]:
        """The children alive now; the steward is the oldest unless it was restarted."""
        try:
            found = [p for p in psutil.Process(self.pid).children() if p.status() != psutil.STATUS_ZOMBIE]
        except psutil.NoSuchProcess:
            found = []
        self._ever_seen |= set(found)
        return sorted(found, key=lambda p: (p.create_time(), p.pid))

    def workers(self) -> list[int]:
        """Pids of the workers that the pool had when it logged that it was ready."""
        pids: list[int] = self.logged("ready")[0]["pids"]
        return pids

    def steward(self) -> int:
        """Pid of the first steward: the child that is not a worker."""
        return next(p.pid for p in self.children() if p.pid not in self.workers())

    def signal(self, signum: signal.Signals) -> None:
        self._process.send_signal(signum)

    def exit_code(self, timeout: float = 20.0) -> int:
        """Wait for the end."""
        return self._process.wait(timeout)

    def end(self) -> None:
        """Kill whatever is left of it."""
        self.children()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for child in self._ever_seen:
            if child.is_running():
                child.kill()


@contextmanager
def running(
    folder: Path,
    app_text: str,
    uri: str,
    *options: str,
    database: str = "",
    command: Sequence[str] = COMMAND,
    environ: Mapping[str, str] | None = None,
) -> Iterator[PoolProcess]:
    """A pool of the application `app_text` on that database, with `environ` added to the test's own. It ends with the block."""
    (folder / "pool_app.py").write_text(app_text)
    log = folder / "pool.log"
    target = ["--mongodb-uri", uri, *(["--database", database] if database else [])]
    arguments = [*command, "--app", "pool_app:app", "--log-format", "json", *target, *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STREAMLINE_")}
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            arguments, cwd=folder, env={**environment, "PYTHONPATH": str(ROOT), **(environ or {})}, stderr=stderr, stdout=stderr
        )
    pool = PoolProcess(process, log)
    try:
        yield pool
    finally:
        pool.end()
        print(pool.log_text)  # pytest shows it if the test has failed
