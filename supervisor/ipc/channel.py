"""A child's end of its pipe to the supervisor, inside an asyncio loop. Owns the socket; knows no message by name.

The supervisor's end is in pool/child.py. When the supervisor dies, by whatever signal, the kernel closes that end and the
channel calls `on_lost`: that is how a child learns that it is an orphan.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Generic

from streamline_pool.supervisor.ipc.codec import Direction, FrameReader, M_co, MessageError, decode, encode
from streamline_pool.supervisor.ipc.messages import FromSteward, FromWorker

__all__ = ["ORPHAN_EXIT_S", "Channel", "arm_orphan_exit"]

ORPHAN_EXIT_S = 1.8  # an orphan may live for 2 s
_READ_BYTES = 64 * 1024


class Channel(Generic[M_co]):
    """Calls `on_message(message)` for each message and `on_lost()` once at the end; `send` never blocks."""

    def __init__(
        self, sock: socket.socket, direction: Direction[M_co], on_message: Callable[[M_co], None], on_lost: Callable[[], None]
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._direction = direction
        self._on_message = on_message
        self._on_lost = on_lost
        self._frames = FrameReader()
        self._unsent = bytearray()
        self._latest: dict[type, FromWorker | FromSteward] = {}  # to be sent when nothing is unsent, at most one of each type
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._loop.add_reader(sock, self._readable)

    @property
    def unsent_bytes(self) -> int:
        """What the supervisor has not read yet. Senders of repeated messages wait until it is 0."""
        return len(self._unsent)

    def send(self, message: FromWorker | FromSteward) -> None:
        """Queue a message. It is dropped silently if the supervisor is gone, because no process is left to need it."""
        if not self._open:
            return
        waiting = bool(self._unsent)
        self._unsent += encode(message)
        if not waiting:
            self._flush()
            if self._unsent and self._open:
                self._loop.add_writer(self._sock, self._writable)

    def send_latest(self, message: FromWorker | FromSteward) -> None:
        """Queue a message that replaces earlier ones of its type. While the supervisor does not read, only the newest is kept."""
        if self._unsent:
            self._latest[type(message)] = message
        else:
            self.send(message)

    def _writable(self) -> None:
        self._flush()
        if not self._unsent:
            latest, self._latest = self._latest, {}
            for message in latest.values():
                self.send(message)
        if not self._unsent and self._open:
            self._loop.remove_writer(self._sock)

    def _flush(self) -> None:
        try:
            sent = self._sock.send(self._unsent)
        except BlockingIOError:
            return
        except OSError:  # the other end is closed; kernels report that by several errors
            self._end()
        else:
            del self._unsent[:sent]

    def _readable(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end()
            return
        try:
            for body in self._frames.feed(data):
                self._on_message(decode(body, self._direction))
        except MessageError:
            self._end()  # orders that cannot be understood are as good as none: end, as if the supervisor were gone
            raise

    def _end(self) -> None:
        if self._open:
            self._open = False
            self._unsent.clear()
            self._latest.clear()
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._on_lost()


def arm_orphan_exit(loop: asyncio.AbstractEventLoop) -> None:
    """End this process after `ORPHAN_EXIT_S`, whatever still runs in it. Called once the supervisor is gone."""
    loop.call_later(ORPHAN_EXIT_S, os._exit, 0)
