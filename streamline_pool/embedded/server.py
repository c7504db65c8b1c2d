"""Runs a private mongod, as a single-node replica set on 127.0.0.1.

Owns the server's address, its data folder and its readiness. The mongod process is left to watcher.py, which ends it when
this process has ended for any reason; finding the program is left to mongod.py. Starts no thread and opens no MongoClient,
so the caller may fork at any time. In a forked child, `EmbeddedServer.stop` has no effect.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from streamline_pool.config.env import Clock, system_env
from streamline_pool.config.settings import Settings
from streamline_pool.domain.errors import StoreUnavailableError

from .mongod import HOW_TO_GET_ONE, VERSION_MIN, find_mongod
from .wire import run_command

__all__ = ["DEFAULT_DATA_DIR", "EmbeddedServer", "serving", "start"]

DEFAULT_DATA_DIR = Path(".streamline/mongod")
REPLICA_SET = "rs0"

START_TIMEOUT_S = 60.0  # a guess: an empty folder takes 0.7 s; after a SIGKILL mongod first replays its journal
STOP_TIMEOUT_S = 20.0  # a guess: 0.3 to 1 s measured; a checkpoint of a full cache takes longer
PROBE_S = 0.01  # between attempts to connect to a starting server; each costs one refused connection
REPLY_TIMEOUT_S = 10.0  # for one command to a server that accepts connections; a guess
PORTS = range(20_000, 32_000)
"""Below the ephemeral ports of Linux (32768) and macOS (49152). Any outgoing connection could take an ephemeral port while
mongod is down, even a client's own attempt to reconnect to it (TCP's simultaneous open)."""

_WATCHER = Path(__file__).with_name("watcher.py")
_EXIT_PORT_TAKEN = 48  # mongod's EXIT_NET_ERROR
_ALREADY_INITIALIZED = 23  # MongoDB's error code for replSetInitiate on a folder with a set in it


@contextlib.contextmanager
def serving(app: App) -> Iterator[str]:
    """Connect `app` to a server for the length of a `with` block: that of STREAMLINE_MONGODB_URI, else a private one.

    Yields the server's URI. Closes `app` at the end, and stops the private server. For examples that run without any set-up.
    """
    with contextlib.ExitStack() as stack:
        uri = os.environ.get("STREAMLINE_MONGODB_URI")
        if not uri:
            uri = stack.enter_context(start(None)).uri
        app.configure(replace(app.settings, mongodb_uri=uri))
        stack.callback(app.close)
        yield uri


class App(Protocol):
    """What `serving` needs of a `Streamline`."""

    settings: Settings

    def configure(self, settings: Settings) -> None: ...

    def close(self) -> None: ...


def start(
    data_dir: str | os.PathLike[str] | None = DEFAULT_DATA_DIR,
    *,
    mongod: str | os.PathLike[str] | None = None,
    port: int | None = None,
    cache_gb: float = 0.25,
    initiate: bool = True,
    start_timeout_s: float = START_TIMEOUT_S,
    clock: Clock | None = None,
) -> EmbeddedServer:
    """Run a private mongod and return once it is PRIMARY: 0.7 s on an empty folder.

    data_dir: where its data is kept; None for a temporary folder, which is removed at the end.
    mongod: the program; None to find one, see `find_mongod`.
    port: None for a free one.
    cache_gb: the size of WiredTiger's cache, at least 0.25.
    initiate: False to return once the server answers; the caller then builds a larger replica set of several servers.
    start_timeout_s: real seconds until the server must be ready.

    Raises `StoreUnavailableError` when there is no mongod, the folder is in use (`context["pid"]` is the pid of its user),
    `port` is taken, or the server does not start. The message ends with the last errors in its log.
    """
    binary = find_mongod(mongod)
    clock = clock or system_env().clock
    folder = Path(tempfile.mkdtemp(prefix="streamline-mongod-") if data_dir is None else data_dir).absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = [
        *(str(binary), "--replSet", REPLICA_SET, "--bind_ip", "127.0.0.1", "--nounixsocket", "--dbpath", str(folder)),
        *("--wiredTigerCacheSizeGB", str(cache_gb), "--oplogSize", "256", "--quiet"),
        *("--setParameter", "diagnosticDataCollectionEnabled=false"),
    ]
    server = EmbeddedServer(folder, command, temporary=data_dir is None, initiate=initiate, clock=clock, start_timeout_s=start_timeout_s)
    try:
        server._boot(port)  # not public: callers get started servers only
    except BaseException:
        server.stop()
        raise
    return server


class EmbeddedServer:
    """A running private mongod. Use it as a context manager, or call `stop`. It also ends with this process.

    `halt`, `kill`, `restart`, `suspend` and `resume` are for tests of outages.
    """

    def __init__(
        self, data_dir: Path, command: list[str], *, temporary: bool, initiate: bool, clock: Clock, start_timeout_s: float
    ) -> None:
        self.data_dir = data_dir
        self.port = 0  # 0 until started
        self.pid = 0  # of mongod; 0 while it is down
        self.version = ""  # such as "6.0.5"
        self._temporary = temporary
        self._initiate = initiate
        self._clock = clock
        self._start_timeout_s = start_timeout_s
        self._owner_pid = os.getpid()
        self._stopped = False
        self._unread = b""
        ours, theirs = socket.socketpair()
        self._channel = ours
        plan = {
            "owner_pid": self._owner_pid,
            "data_dir": str(data_dir),
            "temporary": temporary,
            "command": command,
            "stop_timeout_s": STOP_TIMEOUT_S,
        }
        with theirs:
            self._watcher = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_WATCHER), json.dumps(plan)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                cwd=data_dir,
                start_new_session=True,  # Ctrl-C and kills of our process group must not reach it
            )

    @property
    def uri(self) -> str:
        """The connection string, without a database."""
        return f"mongodb://127.0.0.1:{self.port}/?replicaSet={REPLICA_SET}"

    @property
    def log_path(self) -> Path:
        """The log of mongod. The log of the previous start is beside it, as `mongod.log.1`."""
        return self.data_dir / "mongod.log"

    @property
    def watcher_pid(self) -> int:
        """The process that ends mongod when this process has ended."""
        return self._watcher.pid

    def stop(self) -> None:
        """End the server cleanly, and for good. Does nothing when called again, and nothing in a forked child."""
        if self._stopped or os.getpid() != self._owner_pid:
            return
        self._stopped = True
        with contextlib.suppress(OSError):  # the watcher has ended already, and mongod with it
            self._channel.shutdown(socket.SHUT_RDWR)  # not just close: forked children hold the socket open
        self._channel.close()
        try:
            self._watcher.wait(STOP_TIMEOUT_S + REPLY_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._watcher.kill()  # which ends mongod, too
            self._watcher.wait()
        self.pid = 0
        if self._temporary:
            shutil.rmtree(self.data_dir, ignore_errors=True)  # a second time, in case the watcher was killed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def halt(self) -> None:
        """Shut mongod down cleanly; port and folder stay reserved for `restart`."""
        self._order("halt", "exited")
        self.pid = 0

    def kill(self) -> None:
        """SIGKILL mongod, as a crash would; port and folder stay reserved for `restart`."""
        self._order("kill", "exited")
        self.pid = 0

    def restart(self) -> None:
        """Start mongod again on the same port and folder, after a clean shutdown if it runs. Return once it is PRIMARY."""
        self.halt()
        self._launch(self.port)
        self._await_ready()

    def suspend(self) -> None:
        """Freeze mongod (SIGSTOP): connections stay open, and get no answer."""
        self._order("suspend", "signalled")

    def resume(self) -> None:
        """Undo `suspend`."""
        self._order("resume", "signalled")

    # -- starting ---------------------------------------------------------------------------------------------------

    def _boot(self, port: int | None) -> None:
        first = self._next_event(START_TIMEOUT_S)
        if first["event"] == "refused":
            raise self._in_use(first["pid"])
        for candidate in _free_ports() if port is None else (port,):
            if self._launch(candidate) and self._await_ready():
                return
        if port is None:
            raise StoreUnavailableError(f"No free port for mongod on 127.0.0.1 from {PORTS.start} to {PORTS.stop - 1}.")
        raise StoreUnavailableError(
            f"Port {port} on 127.0.0.1 is taken by another program. Stop that program or choose another port.", port=port
        )

    def _launch(self, port: int) -> bool:
        """Start mongod; False when `port` is taken."""
        event = self._order(f"start {port}", "started", "port_taken", "failed")
        if event["event"] == "failed":
            raise StoreUnavailableError(f"mongod could not be started: {event['reason']}. {HOW_TO_GET_ONE}")
        if event["event"] == "port_taken":
            return False
        self.port, self.pid = port, event["pid"]
        return True

    def _await_ready(self) -> bool:
        """Wait until the server is PRIMARY (without `initiate`: until it answers); False if another program took its port meanwhile."""
        deadline = self._clock.monotonic() + self._start_timeout_s
        configured = not self._initiate
        while True:
            event = self._poll_event(PROBE_S)
            if event is not None and event["event"] == "exited":
                self.pid = 0
                if event["code"] == _EXIT_PORT_TAKEN:
                    return False
                raise self._not_up(f"mongod exited with code {event['code']} while starting")
            if self._clock.monotonic() > deadline:
                raise self._not_up(f"mongod was not ready after {self._start_timeout_s:g} s")
            # A connection that is refused, reset or slow: the server does not run yet, or has ended; the event says which.
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), REPLY_TIMEOUT_S) as connection:
                configured = configured or self._configure(connection)
                if configured and (not self._initiate or run_command(connection, hello=1).get("isWritablePrimary")):
                    self._check_version(run_command(connection, buildInfo=1)["version"])
                    return True

    def _configure(self, connection: socket.socket) -> bool:
        """Make it a replica set of one at its present port; False while it does not know its own configuration yet."""
        members = [{"_id": 0, "host": f"127.0.0.1:{self.port}"}]
        reply = run_command(connection, replSetInitiate={"_id": REPLICA_SET, "members": members})
        if reply["ok"] or reply.get("code") != _ALREADY_INITIALIZED:
            return bool(reply["ok"])
        config = run_command(connection, replSetGetConfig=1).get("config")
        if config is None:  # it still reads its configuration
            return False
        if [member["host"] for member in config["members"]] == [members[0]["host"]]:
            return True
        # The folder was last used with another port. `force`, because otherwise only a primary may change its set. (Before
        # this, mongod asks the process that listens at the old port whether it is mongod itself. If that does not answer,
        # this takes 30 s.)
        changed = {**config, "members": members, "version": config["version"] + 1}
        return bool(run_command(connection, replSetReconfig=changed, force=True)["ok"])

    def _check_version(self, version: str) -> None:
        self.version = version
        if tuple(int(part) for part in version.split(".")[:2]) < VERSION_MIN:
            needed = ".".join(map(str, VERSION_MIN))
            raise StoreUnavailableError(f"mongod is version {version}; {needed} or newer is needed. {HOW_TO_GET_ONE}", version=version)

    # -- the watcher ------------------------------------------------------------------------------------------------

    def _order(self, order: str, *answers: str) -> Mapping[str, Any]:
        """Send an order to the watcher, drop the events before its answer, and return the answer."""
        assert os.getpid() == self._owner_pid, "a forked child must not command its parent's server"
        while self._poll_event(0) is not None:
            pass
        with contextlib.suppress(OSError):  # the watcher has ended; reading raises the error
            self._channel.sendall(order.encode() + b"\n")
        while True:
            event = self._next_event(STOP_TIMEOUT_S + REPLY_TIMEOUT_S)
            if event["event"] in answers:
                return event

    def _next_event(self, timeout_s: float) -> Mapping[str, Any]:
        event = self._poll_event(timeout_s)
        if event is None:
            raise self._not_up(f"the watcher of mongod (pid {self._watcher.pid}) did not answer within {timeout_s:g} s")
        return event

    def _poll_event(self, timeout_s: float) -> Mapping[str, Any] | None:
        """The next event of the watcher, or None if no complete event arrives within `timeout_s`."""
        if b"\n" not in self._unread:
            readable, _, _ = select.select([self._channel], [], [], timeout_s)
            if not readable:
                return None
            chunk = b""
            with contextlib.suppress(ConnectionResetError):  # end of file while an order of ours was unread
                chunk = self._channel.recv(4096)
            if not chunk:
                self.pid = 0
                raise self._not_up(f"the watcher of mongod (pid {self._watcher.pid}) has ended, and mongod with it")
            self._unread += chunk
        line, newline, rest = self._unread.partition(b"\n")
        if not newline:
            return None
        self._unread = rest
        event: dict[str, Any] = json.loads(line)
        return event

    # -- errors -----------------------------------------------------------------------------------------------------

    def _in_use(self, pid: int | None) -> StoreUnavailableError:
        holder = "another process" if pid is None else f"a mongod with pid {pid}"
        return StoreUnavailableError(
            f"The data folder {self.data_dir} is in use by {holder}. Stop the pool that runs it, "
            f"or start this one in another folder, or connect to that server with `--mongodb-uri`.",
            data_dir=str(self.data_dir),
            pid=pid,
        )

    def _not_up(self, what: str) -> StoreUnavailableError:
        return StoreUnavailableError(f"{what}.{_last_words(self.log_path)}", data_dir=str(self.data_dir), port=self.port)


def _free_ports() -> Iterator[int]:
    """Ports that are not bound, each tried once. Processes begin at different ports, so that they seldom collide."""
    first = os.getpid() * 16 % len(PORTS)
    for offset in range(len(PORTS)):
        port = PORTS[(first + offset) % len(PORTS)]
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))  # without SO_REUSEADDR: fails also for a port that a watcher has reserved
            probe.close()
            yield port


def _last_words(log: Path) -> str:
    """The first errors in a log, or else its last lines, for the end of an error message."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    errors = [line for line in lines if '"s":"E"' in line or '"s":"F"' in line or not line.startswith("{")]
    return "".join(f"\n  {line[:400]}" for line in errors[:3] or lines[-3:]) + f"\n  (from {log})"
