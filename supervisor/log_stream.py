"""A text stream into a descriptor that hardly waits for its reader. Owns the lines that the reader has no room for yet.

Standard error of a pool is usually a pipe, a socket or a terminal. If its reader stops reading (a log collector that hangs, `less`,
Ctrl-S), the kernel's buffer fills, and an ordinary write waits. An event loop that waits renews no lease, and a supervisor that waits
replaces no child. So a line that does not fit now is kept and written later. When `KEPT_BYTES_MAX` are kept, the writer waits for a
moment, so that a burst of lines is not lost to a reader that reads. Then lines are lost, and counted.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import stat
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

__all__ = ["KEPT_BYTES_MAX", "LogStream"]

KEPT_BYTES_MAX = 256 * 1024  # per process; a guess: about a thousand lines
WAIT_SHARE, WAIT_MAX_S = 0.1, 0.2  # guesses: a writer waits for a tenth of its time at most, and so long at a time
POLL_S = 0.02  # room for one byte is not room for a line, so poll returns at once sometimes
DRAIN_MAX_S = 3.0  # a guess: for a reader that goes on reading, however slowly


class LogStream:
    """What `logging.StreamHandler` needs of a stream. Its handler's lock is the lock of this object, too.

    It writes into an open file of its own: `O_NONBLOCK` would count for every program that uses the same open file.
    """

    def __init__(self, plain: TextIO) -> None:
        """Write where this stream writes. OSError or ValueError if it has no descriptor."""
        self.plain = plain
        self._encoding = plain.encoding or "utf-8"
        self._fd, self._send, self.close = _opened(plain.fileno())
        self._kept: deque[bytes] = deque()
        self._kept_bytes = 0
        self._pid = os.getpid()
        self._is_flushing = False
        self._is_refused = False  # the last write has failed for another reason than want of room
        self._wait_s, self._waited_at = WAIT_MAX_S, time.monotonic()
        self.lost = 0  # texts that were lost, until they are reported

    def write(self, text: str) -> None:
        """Keep the text; `flush` writes it. Text that finds no place is lost."""
        self._forget_what_the_parent_kept()
        data = text.encode(self._encoding, "backslashreplace")
        if self._kept and self._kept_bytes + len(data) > KEPT_BYTES_MAX:
            self._wait_for_room()
        if self._kept and self._kept_bytes + len(data) > KEPT_BYTES_MAX:
            self.lost += 1
            return
        self._kept.append(data)
        self._kept_bytes += len(data)

    def flush(self) -> None:
        """Write of what is kept as much as there is room for now."""
        self._forget_what_the_parent_kept()
        if self._is_flushing:  # a signal handler or a finalizer logs: the call that it has interrupted writes its line
            return
        self._is_flushing = True
        try:
            while self._kept and self._sent():
                pass
        finally:
            self._is_flushing = False

    def _sent(self) -> bool:
        """Write the oldest of what is kept. False: there is no room."""
        data = self._kept[0]
        try:
            sent = self._send(data)
            self._is_refused = False
        except BlockingIOError:
            return False
        except OSError:  # the reader is gone, or the disk is full
            sent = len(data)
            self.lost += 1
            self._is_refused = True
        self._kept_bytes -= sent
        if sent < len(data):
            self._kept[0] = data[sent:]
        else:
            self._kept.popleft()
        return True

    def drain(self, patience_s: float) -> None:
        """Write all that is kept. Give up after so long without a reader that reads, or after `DRAIN_MAX_S`: what is left is lost."""
        begun = moved_at = time.monotonic()
        self.flush()
        while self._kept and (now := time.monotonic()) < min(moved_at + patience_s, begun + DRAIN_MAX_S):
            before = self._kept_bytes
            _has_room(self._fd, POLL_S)
            self.flush()
            moved_at = now if self._kept_bytes < before else moved_at
        self.lost += len(self._kept)
        self._kept.clear()
        self._kept_bytes = 0

    def _wait_for_room(self) -> None:
        """Wait until half of what is kept is written, as long as this process may wait now."""
        if self._is_flushing:
            return
        now = time.monotonic()
        self._wait_s = min(WAIT_MAX_S, self._wait_s + WAIT_SHARE * (now - self._waited_at))
        deadline = now + self._wait_s
        self.flush()
        while self._kept_bytes > KEPT_BYTES_MAX // 2 and (left_s := deadline - time.monotonic()) > 0:
            _has_room(self._fd, min(left_s, POLL_S))
            self.flush()
        self._waited_at = time.monotonic()
        self._wait_s -= self._waited_at - now

    def may_report_lost(self) -> bool:
        """Whether texts were lost, and there is room to say so."""
        return self.lost > 0 and not self._kept and not self._is_refused

    def _forget_what_the_parent_kept(self) -> None:
        """After a fork: the parent writes it."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._kept.clear()
            self._kept_bytes = self.lost = 0
            self._is_flushing = False


Opened = tuple[int, Callable[[bytes], int], Callable[[], None]]


def _opened(fd: int) -> Opened:
    """A descriptor of our own for what `fd` writes to, how to write there without waiting, and how to close it.

    The second returns how many bytes it has written. It raises BlockingIOError if there is no room.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):
        return _opened_socket(fd)
    if stat.S_ISREG(mode):
        own = os.dup(fd)
        return own, lambda data: os.write(own, data), lambda: os.close(own)
    write = _write_to_terminal if os.isatty(fd) else os.write
    try:
        own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:  # not Linux, or it belongs to another user
        own = os.dup(fd)
        piece = 128 if os.isatty(fd) else select.PIPE_BUF  # what there is room for when `poll` says that there is room
        return own, lambda data: _write_if_room(write, own, data[:piece]), lambda: os.close(own)
    return own, lambda data: write(own, data), lambda: os.close(own)


def _opened_socket(fd: int) -> Opened:
    default = socket.getdefaulttimeout()
    socket.setdefaulttimeout(None)  # with a timeout, Python's socket sets O_NONBLOCK, and waits in spite of MSG_DONTWAIT
    try:
        own = socket.socket(fileno=os.dup(fd))
    finally:
        socket.setdefaulttimeout(default)
    return own.fileno(), lambda data: own.send(data, socket.MSG_DONTWAIT), own.close


def _write_if_room(write: Callable[[int, bytes], int], fd: int, data: bytes) -> int:
    """The best without an open file of our own. It waits if another process takes the room in between, which is rare."""
    if not _has_room(fd, 0.0):
        raise BlockingIOError
    return write(fd, data)


def _write_to_terminal(fd: int, data: bytes) -> int:
    """With `stty tostop`, the kernel sends a background job SIGTTOU instead of writing, again and again if the signal is handled."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTTOU,))
    try:
        return os.write(fd, data)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _has_room(fd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(timeout_s * 1000))
