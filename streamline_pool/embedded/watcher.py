"""The process between a program (the owner) and its private mongod: it ends mongod when the owner has ended.

Owns the mongod process, the lock on its data folder, and its log. Talking to mongod is left to server.py.
Run as a script, never imported: `python -I -S watcher.py PLAN`, with the standard library only. So it starts in some
20 ms, and no installed package can break it. PLAN is JSON, see `Plan`. Standard input is a socket to the owner.

What ends mongod when a process dies:

    the owner, by any signal         its pidfd becomes readable here (the socket is not enough: children that the
                                     owner forked hold its other end open)
    the owner's process group        this process has a session of its own, survives, and does the above
    this process, by any signal      PR_SET_PDEATHSIG kills mongod (Linux)

Orders arrive one per line. Each is answered by exactly one event, a line of JSON. `exited` may also come without an order:

    start PORT      started {pid} | port_taken | failed {reason}
    halt            exited {code}     SIGTERM, which writes a checkpoint; SIGKILL after `stop_timeout_s`
    kill            exited {code}     SIGKILL
    suspend|resume  signalled         SIGSTOP, SIGCONT
    (end of file)   mongod is ended, then this process exits
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, TypedDict

__all__: list[str] = []

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
POLL_S = 0.2  # only without a pidfd (not Linux): how long mongod may live after its owner; a guess


class Plan(TypedDict):
    """What the watcher runs and for which owner. Fixed for its life."""

    owner_pid: int  # must be our parent
    data_dir: str  # absolute, exists
    temporary: bool  # remove `data_dir` at the end
    command: list[str]  # mongod and its arguments, without --port
    stop_timeout_s: float


class _Refused(Exception):
    """The data folder belongs to a living server; `args[0]` is the pid to name, or None when unknown."""


class _Watcher:
    def __init__(self, plan: Plan, channel: socket.socket) -> None:
        self._pid = os.getpid()
        self._plan = plan
        self._channel = channel
        self._data_dir = Path(plan["data_dir"])
        self._mongod: subprocess.Popen[bytes] | None = None
        self._mongod_fd: int | None = None
        self._reserved: socket.socket | None = None
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: not between fork and exec
        self._lock = _lock(self._data_dir)
        _redirect_output(self._data_dir / "mongod.log")

    def run(self) -> None:
        """Carry out orders until the owner closes the socket or ends."""
        owner_fd = _pidfd(self._plan["owner_pid"])
        self._send("ready")
        pending = b""
        while os.getppid() == self._plan["owner_pid"]:
            fds = [self._channel.fileno(), *(fd for fd in (owner_fd, self._mongod_fd) if fd is not None)]
            readable, _, _ = select.select(fds, [], [], POLL_S if owner_fd is None else None)
            if owner_fd in readable:
                return
            if self._mongod is not None and self._mongod.poll() is not None:
                self._send_exit()
            if self._channel.fileno() in readable:
                chunk = self._channel.recv(4096)
                if not chunk:
                    return
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    self._on_message(*line.decode().split())

    def end(self) -> None:
        """Stop mongod in whatever state it is: cleanly, or at once if its data is temporary. Temporary data is removed."""
        self._end_mongod(signal.SIGKILL if self._plan["temporary"] else signal.SIGTERM)
        if self._plan["temporary"]:
            shutil.rmtree(self._data_dir, ignore_errors=True)

    def _on_message(self, order: str, argument: str = "") -> None:
        match order:
            case "start":
                self._start(int(argument))
            case "halt" | "kill":
                self._end_mongod(signal.SIGTERM if order == "halt" else signal.SIGKILL)
                self._send_exit()
            case "suspend" | "resume":
                if self._mongod is not None:
                    self._mongod.send_signal(signal.SIGSTOP if order == "suspend" else signal.SIGCONT)
                self._send("signalled")
            case _:
                raise AssertionError(f"server.py sent an unknown order: {order!r}")

    def _start(self, port: int) -> None:
        try:
            self._reserve(port)
        except OSError:
            self._send("port_taken")
            return
        try:
            self._mongod = subprocess.Popen(
                [*self._plan["command"], "--port", str(port)],
                stdin=subprocess.DEVNULL,
                pass_fds=[self._lock],  # the folder stays locked until mongod itself has ended, and not only this process
                preexec_fn=self._die_with_watcher,  # noqa: PLW1509 -- this process has one thread, so the fork is safe
            )
        except OSError as exc:
            self._send("failed", reason=str(exc))
            return
        self._mongod_fd = _pidfd(self._mongod.pid)
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{self._mongod.pid}\n".encode(), 0)
        self._send("started", pid=self._mongod.pid)

    def _reserve(self, port: int) -> None:
        """Reserve `port` while mongod is down: bound but not listening, it refuses connections, and no other program can bind it.

        mongod can bind it, because both sockets set SO_REUSEADDR and this one never listens.
        """
        if self._reserved is not None:
            if self._reserved.getsockname()[1] == port:
                return
            self._reserved.close()
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", port))

    def _die_with_watcher(self) -> None:
        if self._libc is not None:
            self._libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self._pid:  # the watcher died before the line above took effect
            os._exit(1)

    def _end_mongod(self, signum: signal.Signals) -> None:
        if self._mongod is None:
            return
        self._mongod.send_signal(signum)
        self._mongod.send_signal(signal.SIGCONT)  # a suspended process handles SIGTERM only after SIGCONT
        try:
            self._mongod.wait(self._plan["stop_timeout_s"])
        except subprocess.TimeoutExpired:
            self._mongod.kill()  # the journal has every acknowledged write
            self._mongod.wait()

    def _send_exit(self) -> None:
        code = None if self._mongod is None else self._mongod.wait()
        if self._mongod_fd is not None:
            os.close(self._mongod_fd)
        self._mongod = self._mongod_fd = None
        self._send("exited", code=code)

    def _send(self, event: str, **fields: Any) -> None:
        _send(self._channel, event, **fields)


def _send(channel: socket.socket, event: str, **fields: Any) -> None:
    with contextlib.suppress(OSError):  # the owner has ended; the loop notices that itself
        channel.sendall(json.dumps({"event": event, **fields}).encode() + b"\n")


def _lock(data_dir: Path) -> int:
    """Lock `data_dir`. Returns the descriptor of the lock file, which names the pid of mongod. `_Refused` if a server uses it.

    Two locks are checked: ours, and the one that every mongod holds, because a mongod can also be started by hand.
    """
    fd = os.open(data_dir / "streamline.lock", os.O_RDWR | os.O_CREAT, 0o600)
    _flock(fd)
    theirs = data_dir / "mongod.lock"
    if theirs.exists():
        their_fd = os.open(theirs, os.O_RDWR)
        _flock(their_fd)
        os.close(their_fd)
    return fd


def _flock(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        holder = os.pread(fd, 32, 0).strip()
        raise _Refused(int(holder) if holder.isdigit() else None) from exc


def _redirect_output(log: Path) -> None:
    """Write all further output, ours and that of mongod, to `log`. The log of the previous start is kept beside it."""
    if log.exists():
        log.replace(log.with_name(log.name + ".1"))
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def _pidfd(pid: int) -> int | None:
    if sys.platform != "linux":
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None  # a kernel before 5.3, a sandbox that forbids it, or a process that has ended: polling notices the end


def main() -> None:
    plan: Plan = json.loads(sys.argv[1])
    channel = socket.socket(fileno=0)
    os.set_inheritable(channel.fileno(), False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # runs the `finally` below, which stops mongod cleanly
    try:
        watcher = _Watcher(plan, channel)
    except _Refused as refusal:
        _send(channel, "refused", pid=refusal.args[0])
        return
    try:
        watcher.run()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        watcher.end()


if __name__ == "__main__":
    main()
