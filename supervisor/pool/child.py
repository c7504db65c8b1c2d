"""One child process as its parent holds it: fork, pipe, resources, end. The only importer of multiprocess and psutil.

Owns what must hold across a fork. A pipe shows a death only if no other process holds its other end, so every child
closes what it inherits of its siblings, and a process that a *handler* forks closes its copy too. Signals stay blocked
from before the fork until the child has its own handlers: otherwise the parent would count a Ctrl-C in between twice.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import IO, Any, NoReturn

import multiprocess
import psutil

from streamline_pool.supervisor.ipc.codec import FROM_STEWARD, FROM_WORKER, Direction, FrameReader, decode, encode
from streamline_pool.supervisor.ipc.messages import (
    CheckRun,
    FromSteward,
    FromWorker,
    Parked,
    PoolFacts,
    TimersFired,
    ToSteward,
    ToWorker,
    WakeUp,
)
from streamline_pool.supervisor.logs import drain_logs, wait_for_readers_again
from streamline_pool.supervisor.pool.state import Role

__all__ = ["HANDLED_SIGNALS", "Child", "fork_child"]

HANDLED_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGTSTP,
    signal.SIGCONT,
    signal.SIGUSR1,
)
"""What the supervisor reacts to. A terminal sends Ctrl-C and Ctrl-Z to the whole group, so children ignore them."""

PARENT_DEATH_SIGNAL = signal.SIGUSR2
ORPHAN_LIFE_S = 1.9  # the promise is "no orphan within 2 s"; the kernel's timer ends what cannot end itself
UNSENT_BYTES_MAX = 256 * 1024  # a guess: a child that leaves so much unread does not read at all
DUMP_CHARS_MAX = 20_000  # of the last stack dump kept as evidence
_READ_BYTES = 64 * 1024
_PR_SET_PDEATHSIG = 1

Main = Callable[[socket.socket], int]
"""What a child runs, given its end of the pipe; returns its exit code."""

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None  # loaded once, before any fork


class Child:
    """The parent's side of one child. Never blocks on it, however it behaves."""

    def __init__(self, role: Role, process: Any, sock: socket.socket, dump: IO[bytes]) -> None:
        self.role = role
        self.pid: int = process.pid
        self.sentinel: int = process.sentinel  # becomes readable when the process ends
        self.sock = sock
        self.receiving = True  # False once the child has closed its end
        self._process = process
        self._stats = psutil.Process(self.pid)
        self._dump = dump
        self._frames = FrameReader()
        self._direction: Direction[FromWorker | FromSteward] = FROM_STEWARD if role == "steward" else FROM_WORKER
        self._unsent = bytearray()

    @property
    def inherited_fds(self) -> Sequence[int]:
        """What a sibling must close that is forked from now on."""
        return [self.sock.fileno(), self.sentinel, self._dump.fileno()]

    @property
    def unsent(self) -> bool:
        """Whether the child has not read all that was sent."""
        return bool(self._unsent)

    def send(self, message: ToWorker | ToSteward) -> None:
        """Send without blocking; `flush` sends the rest that the pipe does not take now.

        While a child does not read, messages that will be repeated are dropped. Orders are kept: they are few, and a
        child that does not read sends no heartbeat either, so the supervisor ends it within the stall timeout.
        """
        if len(self._unsent) > UNSENT_BYTES_MAX and isinstance(message, WakeUp | TimersFired | CheckRun | Parked | PoolFacts):
            return
        self._unsent += encode(message)
        self.flush()

    def flush(self) -> None:
        """Send what was left over, as far as the pipe takes it."""
        try:
            while self._unsent:
                sent = self.sock.send(self._unsent)
                del self._unsent[:sent]
        except BlockingIOError:
            pass
        except OSError:  # it has closed its end: it is dying, and its sentinel will show that
            self._unsent.clear()

    def receive(self) -> list[FromWorker | FromSteward]:
        """The messages that have arrived since the last call. MessageError: the bytes are no messages."""
        try:
            data = self.sock.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        self.receiving = bool(data)
        return [decode(body, self._direction) for body in self._frames.feed(data)]

    def receive_rest(self) -> list[FromWorker | FromSteward]:
        """All that is still in the pipe of a child that has ended. MessageError as for `receive`."""
        messages = []
        while self.receiving:
            messages += (received := self.receive())
            if not received:
                break
        return messages

    def exit_code(self) -> int | None:
        """As multiprocess gives it: None while the child lives, -9 for SIGKILL. This call reaps a child that has ended."""
        code: int | None = self._process.exitcode
        return code

    def join(self, timeout_s: float) -> None:
        """Wait for its end. Blocks, so it is for the supervisor's own end only."""
        self._process.join(timeout_s)

    def kill(self, signum: signal.Signals) -> None:
        """Send it a signal. It is not reaped yet, so no other process can have its pid."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def rss_bytes(self) -> int | None:
        """Resident memory; None: the child is ending."""
        try:
            return int(self._stats.memory_info().rss)
        except psutil.Error:
            return None

    def take_dump(self) -> str:
        """The stack dumps it has written since the last call."""
        fd = self._dump.fileno()
        size = os.fstat(fd).st_size
        text = os.pread(fd, size, 0).decode(errors="replace") if size else ""
        if size:
            os.ftruncate(fd, 0)  # it appends, so its next dump begins at 0
        return text[-DUMP_CHARS_MAX:]

    def close(self) -> None:
        """Release what belongs to a child that has been reaped, or that a dying supervisor abandons."""
        self.sock.close()
        self._dump.close()
        if self._process.exitcode is not None:
            self._process.close()


def fork_child(role: Role, main: Main, inherited_fds: Iterable[int]) -> Child:
    """Fork a child that runs `main` and exits. OSError: the system has no room for another process.

    `inherited_fds`: everything of the supervisor's and of the siblings' that the child must not keep open.
    """
    ours, theirs = socket.socketpair()
    dump = tempfile.TemporaryFile("a+b", prefix="streamline-dump-", buffering=0)  # noqa: SIM115 -- lives as long as the child
    parent = os.getpid()
    to_close = [ours.fileno(), *inherited_fds]
    process = multiprocess.get_context("fork").Process(
        target=_run_child, args=(main, theirs, dump, parent, to_close), name=f"streamline-{role}", daemon=False
    )
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)
    try:
        process.start()
    except OSError:
        ours.close()
        dump.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)
        theirs.close()
    ours.setblocking(False)
    return Child(role, process, ours, dump)


# ---- in the child --------------------------------------------------------------------------------------------------


def _run_child(main: Main, sock: socket.socket, dump: IO[bytes], parent: int, to_close: Sequence[int]) -> NoReturn:
    """The whole life of a child; ends in `os._exit`, because a stuck handler's thread must not keep it alive."""
    code = 70  # sysexits' EX_SOFTWARE: a fault of this package
    try:
        _take_own_signals(dump)
        for fd in to_close:
            os.close(fd)
        os.register_at_fork(after_in_child=lambda: _leave_pool(sock, dump))
        _die_with_parent(parent)
        code = main(sock)
    except BaseException:  # noqa: BLE001 -- the outermost frame: every error is shown, and ends here
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            drain_logs()
            with suppress(OSError, ValueError, AttributeError):  # no process reads this output any more, or there is none
                sys.stdout.flush()
                sys.stderr.flush()
        finally:
            os._exit(code)


def _take_own_signals(dump: IO[bytes]) -> None:
    signal.set_wakeup_fd(-1)  # the parent's: a byte written there would count as a signal to the parent
    for signum in HANDLED_SIGNALS:
        # A handler that does nothing, not SIG_IGN: programs that handlers start would inherit that.
        signal.signal(signum, _ignore)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    faulthandler.enable(dump, all_threads=True)
    faulthandler.register(signal.SIGUSR1, dump, all_threads=True, chain=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)


def _ignore(_signum: int, _frame: object) -> None:
    return None


def _leave_pool(sock: socket.socket, dump: IO[bytes]) -> None:
    """In a process that a handler has forked: it is an ordinary process, not a member of the pool.

    The objects are closed, not their numbers: a process forked by this one comes here again, and the kernel may have
    given the numbers to something else by then.
    """
    faulthandler.disable()
    faulthandler.unregister(signal.SIGUSR1)
    sock.close()
    dump.close()
    wait_for_readers_again()
    for signum in (*HANDLED_SIGNALS, PARENT_DEATH_SIGNAL):
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)


def _die_with_parent(parent: int) -> None:
    """Have the kernel signal the parent's death: a second way besides the pipe, and one that no blocked loop can delay."""
    if _libc is None:
        return
    signal.signal(PARENT_DEATH_SIGNAL, _on_parent_death)
    _libc.prctl(_PR_SET_PDEATHSIG, int(PARENT_DEATH_SIGNAL), 0, 0, 0)
    if os.getppid() != parent:  # the parent died before the request to the kernel
        _on_parent_death(PARENT_DEATH_SIGNAL, None)


def _on_parent_death(_signum: int, _frame: object) -> None:
    # The closed pipe starts the orderly release; this only limits how long that may take.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, ORPHAN_LIFE_S)
