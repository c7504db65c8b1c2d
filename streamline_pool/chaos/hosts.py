"""Two hosts: each a real pool with its own supervisor, steward and workers, behind a proxy of its own.

Owns their processes, logs and exit codes. What happens to them is decided by the faults.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from .ending import same_package
from .ledger import FOLDER_VARIABLE, real_monotonic
from .link import Link

__all__ = ["APP", "Ending", "Host"]

APP = "streamline_pool.chaos.workload:app"
_READY_S = 60.0
_DRAIN_S = 60.0
_DRAIN_TIMEOUT_CODE = 4
_LAUNCH = (
    "import sys; from streamline_pool.chaos.ending import end_with_parent; end_with_parent(int(sys.argv.pop(1)));"
    "{more}from streamline_pool.supervisor.cli.main import main; main()"
)
# libfaketime 0.9.10 takes the monotonic deadline that `time.sleep` passes to the kernel for one of the faked wall clock: the call
# fails with EINVAL, whatever the offset. `select` is given a length of time and works.
_SLEEP_BY_SELECT = "import select, time; time.sleep = lambda seconds: select.select([], [], [], seconds) and None;"


@dataclass(slots=True)
class Ending:
    """How a pool ended."""

    host: str
    how: str  # killed, drained, or by itself
    code: int  # as `Popen.returncode`
    said: int | None  # the exit code that its log lines `pool_ends` and `drain_timeout` announce


@dataclass(slots=True)
class Host:
    """One pool. `start` it, `end` it; in between it may be killed and started again."""

    name: str
    folder: Path  # its current folder, with its log
    link: Link | None  # None: it reaches the database directly, because a proxy cannot read what it says
    options: Sequence[str]
    uri: str  # by way of `link`, if there is one
    environ: Mapping[str, str] = field(default_factory=dict)
    endings: list[Ending] = field(default_factory=list)
    dead: set[int] = field(default_factory=set)  # pids of its processes that have ended
    reading: threading.Event = field(default_factory=threading.Event)  # what the pool writes to its log is read
    starts: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _stewards: list[int] = field(default_factory=list)  # every pid that said so
    _log_offset: int = 0

    @property
    def pid(self) -> int:
        """Of the supervisor."""
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """The supervisor has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def network(self) -> Link:
        """The proxy, for faults that need it."""
        assert self.link is not None, "a fault that needs the network is left out without a proxy"
        return self.link

    @property
    def log(self) -> Path:
        return self.folder / "pool.log"

    @property
    def log_pipe(self) -> int:
        """The reading end of the pipe to which the pool writes its log."""
        assert self._process is not None and self._process.stderr is not None
        return self._process.stderr.fileno()

    def start(self) -> None:
        """Start the pool; `wait_ready` waits for it."""
        launch = _LAUNCH.format(more=_SLEEP_BY_SELECT if "LD_PRELOAD" in self.environ else "")
        command = [sys.executable, "-c", launch, str(os.getpid()), "--app", APP, "--log-format", "json"]
        command += ["--mongodb-uri", self.uri, *self.options]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("STREAMLINE_") or name == FOLDER_VARIABLE}
        self.starts += 1
        self.reading.set()
        # A session of its own: ^C reaches this process only, which then drains the pool.
        self._process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=same_package({**inherited, **self.environ}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._process.stderr = self._process.stdout
        threading.Thread(target=self._keep_log, args=(self._process,), daemon=True).start()

    def _keep_log(self, process: subprocess.Popen[bytes]) -> None:
        """Copy what the pool writes into its log, except while a fault blocks it."""
        assert process.stderr is not None
        with self.log.open("ab") as log, contextlib.suppress(OSError, ValueError):
            while True:
                self.reading.wait()
                chunk = os.read(process.stderr.fileno(), 65536)
                if not chunk:
                    return
                log.write(chunk)
                log.flush()

    def wait_ready(self, timeout_s: float = _READY_S) -> None:
        """Return when the pool says that it is ready. RuntimeError if it ends or takes too long."""
        deadline = real_monotonic() + timeout_s
        ready = f'"event":"ready","logger":"streamline_pool","process":{self.pid}'
        while ready not in self.log_text():
            if not self.alive or real_monotonic() > deadline:
                raise RuntimeError(f"the pool of host {self.name} did not become ready:\n{self.log_text()[-3000:]}")
            time.sleep(0.05)

    def log_text(self) -> str:
        """Its log so far, of all its starts."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    # --- its processes ---------------------------------------------------------------------------------------------

    def children(self) -> list[psutil.Process]:
        """Steward and workers, as far as they live."""
        try:
            return [child for child in psutil.Process(self.pid).children() if child.status() != psutil.STATUS_ZOMBIE]
        except psutil.NoSuchProcess:
            return []

    def steward(self) -> int | None:
        """The pid of the steward; None if it is just being replaced."""
        self._read_log()
        alive = {child.pid for child in self.children()}
        return next((pid for pid in reversed(self._stewards) if pid in alive), None)

    def workers(self) -> list[int]:
        """The pids of the workers, oldest first."""
        steward = self.steward()
        return [child.pid for child in sorted(self.children(), key=lambda child: child.create_time()) if child.pid != steward]

    def pids(self) -> list[int]:
        """All of its processes."""
        return [self.pid, *(child.pid for child in self.children())] if self.alive else []

    def _read_log(self) -> None:
        """Which processes were stewards (each names the server it uses), and which have died."""
        with self.log.open("rb") as log:
            log.seek(self._log_offset)
            *lines, rest = log.read().split(b"\n")
            self._log_offset = log.tell() - len(rest)
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                entry = json.loads(line)
                if entry["event"] == "server":
                    self._stewards.append(entry["process"])
                if entry["event"] in ("child_died", "child_left"):
                    self.dead.add(entry["pid"])

    # --- its end ---------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        """SIGKILL the supervisor. Its children end by themselves."""
        self.dead.update(self.pids())
        os.kill(self.pid, signal.SIGKILL)
        self._ended("killed")

    def drain(self) -> None:
        """SIGTERM the supervisor, and wait until it has ended."""
        if self._process is None:
            return
        family = self.pids()
        how = "drained" if self.alive else "by itself"
        if self.alive:
            os.kill(self.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_DRAIN_S)
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)
            how = "killed, because it did not drain"
        self._ended(how)
        self.dead.update(family)
        for pid in family[1:]:
            _end_left_over(pid, session=family[0])

    def note_if_ended(self) -> bool:
        """True if the pool has ended by itself. Its ending is noted."""
        if self._process is None or self.alive:
            return False
        self._ended("by itself")
        return True

    def _ended(self, how: str) -> None:
        assert self._process is not None
        code = self._process.wait()
        text, pid = self.log_text(), self._process.pid
        said = re.findall(rf'"event":"pool_ends","logger":"streamline_pool","process":{pid},.*?"exit_code":(\d+)', text)
        if f'"event":"drain_timeout","logger":"streamline_pool","process":{pid},' in text:  # comes later, and changes the code
            said = [str(_DRAIN_TIMEOUT_CODE)]
        self.endings.append(Ending(self.name, how, code, int(said[-1]) if said else None))
        self._process = None

    def end(self) -> None:
        """Drain the pool and end the proxy, whatever state they are in."""
        self.reading.set()
        try:
            self.drain()
        finally:
            if self.link is not None:
                self.link.close()


def _end_left_over(pid: int, *, session: int) -> None:
    """Kill a child that outlived its pool. The pid may belong to another program by now; a session tells."""
    deadline = real_monotonic() + 3.0
    with contextlib.suppress(ProcessLookupError):
        while os.getsid(pid) == session:
            if real_monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.05)
