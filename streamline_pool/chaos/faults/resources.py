"""What a process needs runs out: memory, descriptors, room in a pipe. Owns these faults."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Collection, Iterator

import psutil

from streamline_pool.chaos.stage import Fault, NoTurn, Stage, some_seconds

__all__ = ["FAULTS"]

_LINUX = frozenset({"linux"})
_SPARE_BYTES = 2 * 1024 * 1024  # how much address space a process may still get; a guess
_DESCRIPTORS = 3  # no new descriptor has a number below this
_PIDFD_GETFD = 438  # the number of the system call, the same on every architecture
_SMALL_BUFFER = 1024  # the kernel makes this its least, 4.5 KiB


@contextlib.contextmanager
def _memory(stage: Stage) -> Iterator[None]:
    host = stage.any_host()
    pids = host.workers()
    stage.strikes(pids)
    with _limited(pids, psutil.RLIMIT_AS, {pid: psutil.Process(pid).memory_info().vms + _SPARE_BYTES for pid in pids}):
        yield


@contextlib.contextmanager
def _descriptors(stage: Stage) -> Iterator[None]:
    host = stage.any_host()
    pids = [child.pid for child in host.children()]
    stage.strikes(pids)
    with _limited(pids, psutil.RLIMIT_NOFILE, dict.fromkeys(pids, _DESCRIPTORS)):
        host.network.order("refuse")  # its connections end, so it needs new ones
        host.network.order("pass")
        yield


@contextlib.contextmanager
def _limited(pids: Collection[int], resource: int, soft: dict[int, int]) -> Iterator[None]:
    """Lower the soft limit of these processes for the length of the block."""
    before: dict[int, tuple[int, int]] = {}
    try:
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                before[pid] = process.rlimit(resource)
                process.rlimit(resource, (soft[pid], before[pid][1]))
        yield
    finally:
        for pid, limits in before.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).rlimit(resource, limits)


@contextlib.contextmanager
def _blocked_log(stage: Stage) -> Iterator[None]:
    host = stage.any_host()
    stage.strikes(host.workers())
    host.reading.clear()
    try:
        _fill_pipe(host.pid)
        yield
    finally:
        host.reading.set()


def _fill_pipe(pid: int) -> None:
    """Write empty lines into the process's standard error until nothing more fits."""
    pipe = os.open(f"/proc/{pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK)
    try:
        for size in (4096, 1):
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(pipe, b"\n" * size)
    finally:
        os.close(pipe)


@contextlib.contextmanager
def _full_pipe(stage: Stage) -> Iterator[None]:
    host = stage.any_host()
    pids = [child.pid for child in host.children()]
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(found) for pid in pids for found in _unix_sockets(pid)]
        if not sockets:
            raise NoTurn("the kernel gives no access to the pipes of another process")
        stage.strikes(pids)
        sizes = [found.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) for found in sockets]
        for found in sockets:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SMALL_BUFFER)
        with stage.suspended([host.pid]):
            yield
        for found, size in zip(sockets, sizes, strict=True):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size // 2)  # the kernel doubles what it is given


def _unix_sockets(pid: int) -> Iterator[socket.socket]:
    """Duplicates of the process's Unix sockets, its pipe to the supervisor among them."""
    with contextlib.suppress(OSError):
        process = os.pidfd_open(pid)
        try:
            for name in os.listdir(f"/proc/{pid}/fd"):
                fd = ctypes.CDLL(None).syscall(_PIDFD_GETFD, process, int(name), 0)
                if fd < 0:
                    continue
                try:
                    found = socket.socket(fileno=fd)
                except OSError:  # a file
                    os.close(fd)
                    continue
                if found.family == socket.AF_UNIX:
                    yield found
                else:
                    found.detach()
                    os.close(fd)
        finally:
            os.close(process)


def _until_full(_lease_s: float) -> float:
    return 8.0  # a beat per second, some 0.8 KiB each in the kernel


FAULTS = (
    Fault(
        name="memory",
        what="the workers of one host get no more memory",
        happens=_memory,
        needs=_LINUX,
        hold_min=some_seconds,
        hold_max=15.0,
    ),
    Fault(
        name="descriptors",
        what="the processes of one host get no new file descriptors, and their connections are reset",
        happens=_descriptors,
        needs=_LINUX | {"network"},
        hold_min=some_seconds,
        hold_max=15.0,
    ),
    Fault(
        name="blocked-log",
        what="the pipe to which one host writes its log is full, and nothing is read from it",
        happens=_blocked_log,
        needs=_LINUX,
        hold_min=some_seconds,
        hold_max=20.0,
    ),
    Fault(
        name="full-pipe",
        what="the supervisor of one host is frozen, and the pipes to it are full",
        happens=_full_pipe,
        needs=_LINUX,
        hold_min=_until_full,
        hold_max=20.0,
    ),
)
