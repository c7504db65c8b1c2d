"""The pool of the demonstration: the real command as a child process, with its log in a file. Leaves its runs to program.py."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

__all__ = ["APP", "DemoFailed", "Pool"]

APP = "streamline_pool.demo.workflow:app"
READY_TIMEOUT_S = 30.0  # a guess: half a second is usual
DRAIN_TIMEOUT_S = 30.0
POLL_S = 0.1


class DemoFailed(Exception):
    """The demonstration cannot continue; the text says why."""


class Pool:
    """`streamline-pool --app streamline_pool.demo.workflow:app` on the database `database` of a server, running within a `with` block.

    `folder` is where its log goes, and its current folder, so that no file of the user's current folder is taken for a setting
    or a module.
    """

    def __init__(self, uri: str, database: str, workers: int, concurrency: int, folder: Path) -> None:
        command = [sys.executable, "-m", "streamline_pool.supervisor.cli", "--app", APP, "--log-format", "json"]
        command += ["--mongodb-uri", uri, "--database", database, "--workers", str(workers), "--concurrency", str(concurrency)]
        self._log_path = folder / "pool.log"
        with self._log_path.open("w") as log:
            self._process = subprocess.Popen(command, cwd=folder, env=_environ(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.pid = self._process.pid

    def __enter__(self) -> Pool:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not any(self._is_ready(line) for line in self._log_path.read_text().splitlines()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise DemoFailed(f"the pool did not get ready; its log ends:\n{self.log_end()}")
            time.sleep(POLL_S)
        return self

    @staticmethod
    def _is_ready(line: str) -> bool:
        try:
            return bool(json.loads(line)["event"] == "ready")
        except (ValueError, TypeError, KeyError):
            return False  # an incomplete line, or no log line

    def check_alive(self) -> None:
        """Raise DemoFailed if the pool has ended by itself: the remaining runs would not advance."""
        if self._process.poll() is not None:
            raise DemoFailed(f"the pool ended by itself with code {self.returncode}; its log ends:\n{self.log_end()}")

    def drain(self) -> list[int]:
        """End the pool as a service manager does. Returns the pids of its processes that still exist; there should be none."""
        family = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(DRAIN_TIMEOUT_S)
        _, alive = psutil.wait_procs(family[1:], timeout=1.0)
        return [process.pid for process in alive]

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def log_end(self) -> str:
        """The last lines of its log, and the first traceback in it, which is most likely the cause."""
        lines = self._log_path.read_text().splitlines()
        traces = [json.loads(line)["traceback"] for line in lines if '"traceback":' in line and line.endswith("}")]
        return "\n".join([*(line[:300] for line in lines[-12:]), *traces[:1]])

    def __exit__(self, *exc_info: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(DRAIN_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()  # its children notice that, and end, too
                self._process.wait()


def _environ() -> dict[str, str]:
    """The environment without our settings, which are the user's and not meant for the demonstration."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("STREAMLINE_")}
    root = Path(__file__).resolve().parents[2]
    if root.name not in ("site-packages", "dist-packages"):  # in a checkout that is not installed, the current folder finds the package
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return environ
