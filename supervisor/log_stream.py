"""A text stream into a descriptor that never waits for its reader. Owns the lines that the reader has no room for yet.

Standard error of a pool is usually a pipe, a socket or a terminal. If its reader stops reading (a log collector that hangs, `less`,
Ctrl-S), the kernel's buffer fills, and an ordinary write waits. An event loop that waits renews no lease, and a supervisor that waits
replaces no child. So a line that does not fit now is kept and written later. Lines beyond `KEPT_BYTES_MAX` are lost, and counted.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import time
from collections import deque
from collections.abc import Callable

__all__ = ["KEPT_BYTES_MAX", "LogStream"]

KEPT_BYTES_MAX = 256 * 1024  # per process; a guess: about a thousand lines


class LogStream:
    """What `logging.StreamHandler` needs of a stream. Its handler's lock is the lock of this object, too.

    The descriptor itself stays as it is: other programs use the same one, and `O_NONBLOCK` would count for them, too.
    """

    def __init__(self, fd: int) -> None:
        self._send, self.close = _sender(fd)
        self._fd = fd
        self._pid = os.getpid()
        self._kept: deque[bytes] = deque()
        self._kept_bytes = 0
        self._lost = 0

    def write(self, text: str) -> None:
        """Write the text, or keep it if there is no room now."""
        self._forget_what_the_parent_kept()
        data = text.encode(errors="backslashreplace")
        if self._kept_bytes + len(data) > KEPT_BYTES_MAX:
            self._lost += 1
            return
        self._kept.append(data)
        self._kept_bytes += len(data)

    def flush(self) -> None:
        """Write of what is kept as much as there is room for now."""
        self._forget_what_the_parent_kept()
        while self._kept:
            data = self._kept[0]
            try:
                sent = self._send(data)
            except BlockingIOError:
                return
            except OSError:  # the reader is gone, or the disk is full
                sent = len(data)
                self._lost += 1
            self._kept_bytes -= sent
            if sent < len(data):
                self._kept[0] = data[sent:]
            else:
                self._kept.popleft()

    def drain(self, timeout_s: float) -> None:
        """Wait at most so long until all that is kept is written."""
        deadline = time.monotonic() + timeout_s
        self.flush()
        while self._kept and (left_s := deadline - time.monotonic()) > 0:
            _has_room(self._fd, min(left_s, 0.05))  # room for one byte is not room for a line
            self.flush()

    def take_lost(self) -> int:
        """How many texts were lost since the last call, once there is room again; 0 before."""
        if self._kept:
            return 0
        lost, self._lost = self._lost, 0
        return lost

    def _forget_what_the_parent_kept(self) -> None:
        """After a fork: the parent writes it."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._kept.clear()
            self._kept_bytes = self._lost = 0


def _sender(fd: int) -> tuple[Callable[[bytes], int], Callable[[], None]]:
    """How to write without waiting, and how to end that.

    The first function returns how many bytes it has written; it raises BlockingIOError if there is no room.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return (lambda data: os.write(fd, data)), (lambda: None)
    if stat.S_ISSOCK(mode):
        stream = socket.socket(fileno=os.dup(fd))
        return (lambda data: stream.send(data, socket.MSG_DONTWAIT)), stream.close
    try:
        # Opened again: O_NONBLOCK is a property of the open file, which `fd` shares with other programs.
        own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:  # not Linux, or the pipe belongs to another user
        return (lambda data: _write_if_room(fd, data)), (lambda: None)
    return (lambda data: os.write(own, data)), (lambda: os.close(own))


def _write_if_room(fd: int, data: bytes) -> int:
    """The best without an open file of our own. It waits if another process takes the room in between, which is rare."""
    if not _has_room(fd, 0.0):
        raise BlockingIOError
    return os.write(fd, data[: select.PIPE_BUF])


def _has_room(fd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(timeout_s * 1000))
