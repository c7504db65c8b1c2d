"""The supervisor: one thread and one loop, which turns what happens into events and performs what decide.py returns.

Owns the supervisor's ends of the pipes, the signals of this process, and the order of its start and its end. It never
opens MongoDB and never blocks: not on a child, which may be stopped, not on a reader of its log, and not in a signal handler,
which only enqueues.
Forking is safe at any time because no other thread can hold a lock here.
"""

from __future__ import annotations

import gc
import logging
import os
import selectors
import signal
import socket
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, assert_never

from streamline_pool.config.env import Env
from streamline_pool.config.settings import Settings
from streamline_pool.domain.errors import ValidationError
from streamline_pool.supervisor.ipc.codec import MessageError
from streamline_pool.supervisor.logs import flush_logs, never_wait_for_readers, show
from streamline_pool.supervisor.pool.child import HANDLED_SIGNALS, Child, Main, fork_child
from streamline_pool.supervisor.pool.decide import decide, initial, pause_s
from streamline_pool.supervisor.pool.state import (
    Action,
    Dump,
    Event,
    Exit,
    Exited,
    Forked,
    ForkFailed,
    InvalidMessage,
    Kill,
    Limits,
    Log,
    Measured,
    Received,
    Role,
    Send,
    Signalled,
    Spawn,
    State,
    Tick,
)

if TYPE_CHECKING:
    from streamline_pool.client.app import Streamline

__all__ = ["ChildSpec", "Supervisor", "limits_of", "run_pool"]

log = logging.getLogger("streamline_pool")

MEASURE_INTERVAL_S = 3.0  # between readings of the children's memory; one costs some 50 µs per child
DUMP_WAIT_S = 0.3  # a guess: until every child has written its stacks
LAST_RESORT_S = 2.5  # after a bug of the supervisor: how long children get to notice that their pipe is closed


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """What distinguishes one child from another; `mains_of` turns it into the function that the child runs."""

    role: Role
    nonce: str
    host: str
    supervisor_pid: int
    index: int
    total: int
    first: bool


def run_pool(app: Streamline, settings: Settings, env: Env, *, banner: Sequence[str] = ()) -> int:
    """Run the pool of `app` until a signal ends it; the command's exit code.

    The application must be imported, its settings applied, and no connection open: ValidationError (the command's code 2)
    if this process has a MongoDB client, because PyMongo's clients and threads do not survive a fork.
    """
    from streamline_pool.storage import store

    _refuse_open_clients(store.open_clients())
    never_wait_for_readers()
    _warn_of_threads()
    for line in banner:
        log.info(line)
    app.freeze()
    pool = Supervisor(mains_of(app, settings, env), limits_of(settings), settings.workers, env, json_log=settings.log_format == "json")
    gc.collect()
    gc.freeze()  # the collector then writes to no page that the children share with this process
    return pool.run()


def limits_of(settings: Settings) -> Limits:
    """The part of the settings that decisions depend on."""
    return Limits(
        drain_timeout_s=settings.drain_timeout_s,
        stall_timeout_s=settings.stall_timeout_s,
        restart_budget=settings.restart_budget,
        max_rss_bytes=settings.max_rss_bytes,
        max_runs_per_worker=settings.max_runs_per_worker,
        burst=settings.burst,
    )


def mains_of(app: Streamline, settings: Settings, env: Env) -> Callable[[ChildSpec], Main]:
    """What real children run. Imported before the first fork, so that all share one copy of the code."""
    from streamline_pool.supervisor.steward.steward import StewardBoot, run_steward
    from streamline_pool.supervisor.worker_process import WorkerBoot, run_worker

    def main_of(spec: ChildSpec) -> Main:
        if spec.role == "worker":
            worker = WorkerBoot(nonce=spec.nonce, host=spec.host, index=spec.index, total=spec.total)
            return lambda sock: run_worker(app, settings, env, worker, sock)
        host_id = f"{spec.host}:{spec.supervisor_pid}:{spec.nonce}"
        steward = StewardBoot(host_id=host_id, host=spec.host, pid=spec.supervisor_pid, first=spec.first)
        return lambda sock: run_steward(app, settings, env, steward, sock)

    return main_of


def _refuse_open_clients(clients: Sequence[str]) -> None:
    if clients:
        raise ValidationError(
            f"importing the application has opened a MongoDB client ({', '.join(clients)}); PyMongo is not fork-safe, so "
            "open clients in handlers or on first use, never at import",
            clients=list(clients),
        )


def _warn_of_threads() -> None:
    others = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if others:
        advice = "a lock that one of them holds during a fork stays locked in the child; start threads in handlers instead"
        log.warning("threads_before_fork", extra={"threads": others, "advice": advice})


class Supervisor:
    """The loop, and the children that it holds. All that it knows is in `state`; all that it decides comes from `decide`."""

    def __init__(self, main_of: Callable[[ChildSpec], Main], limits: Limits, workers: int, env: Env, *, json_log: bool = False) -> None:
        self._main_of = main_of
        self._env = env
        self._json_log = json_log
        self._host = socket.gethostname()
        self._nonce = env.new_id()[-12:]
        self._children: dict[int, Child] = {}
        self._events: deque[Event] = deque()
        self._exit_code: int | None = None
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._reap_wanted = False
        self._measured_at = 0.0
        self._dumps_due_at: float | None = None
        self.state: State = initial(workers, limits, self._now())

    def run(self) -> int:
        """Run until every child has ended; the exit code."""
        before = self._take_signals()
        try:
            self._handle(Tick())
            while self._exit_code is None:
                self._turn()
            return self._exit_code
        finally:
            self._restore_signals(before)
            self._abandon_children()
            self._selector.close()

    def _now(self) -> float:
        return self._env.clock.monotonic()

    # ---- the loop --------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        pause = pause_s(self.state, self._now())
        for key, mask in self._selector.select(pause):
            key.data(mask)
        if self._reap_wanted:
            self._reap()
        now = self._now()
        if now - self.state.ticked_at >= pause:
            self._measure(now)
            self._collect_dumps(now)
            flush_logs()
            self._events.append(Tick())
        while self._events and self._exit_code is None:
            self._handle(self._events.popleft())

    def _handle(self, event: Event) -> None:
        self.state, actions = decide(self.state, event, self._now())
        for action in actions:
            self._perform(action)

    def _perform(self, action: Action) -> None:
        match action:
            case Send(pid=pid, message=message):
                if (child := self._children.get(pid)) is not None:
                    child.send(message)
                    self._watch(child)
            case Log(level=level, event=event, fields=fields):
                # The ready line is a promise to the program that started the pool, so the log level does not silence it.
                log.log(max(level, log.getEffectiveLevel()) if event == "ready" else level, event, extra=dict(fields))
            case Spawn():
                self._spawn(action)
            case Kill(pid=pid, signum=signum):
                if (child := self._children.get(pid)) is not None:
                    child.kill(signum)
            case Dump():
                self._dump_all()
            case Exit(code=code):
                self._exit_code = code
            case _:
                assert_never(action)

    # ---- children --------------------------------------------------------------------------------------------------

    def _spawn(self, order: Spawn) -> None:
        nonce = self._nonce if order.role == "steward" else self._env.new_id()[-12:]
        spec = ChildSpec(
            role=order.role,
            nonce=nonce,
            host=self._host,
            supervisor_pid=os.getpid(),
            index=order.index,
            total=order.total,
            first=order.first,
        )
        own = [self._wake_read.fileno(), self._wake_write.fileno(), *self._selector_fds()]
        inherited = [fd for child in self._children.values() for fd in child.inherited_fds]
        try:
            child = fork_child(order.role, self._main_of(spec), [*own, *inherited])
        except OSError as exc:
            self._events.append(ForkFailed(role=order.role, index=order.index, error=str(exc), jitter=self._env.random()))
            return
        self._children[child.pid] = child
        self._selector.register(child.sentinel, selectors.EVENT_READ, lambda _mask: self._want_reaping())
        self._selector.register(child.sock, selectors.EVENT_READ, lambda mask: self._ready_io(child, mask))
        owner = f"{self._host}:{child.pid}:{nonce}"
        self._events.append(Forked(pid=child.pid, owner=owner, role=order.role, index=order.index, total=order.total))

    def _selector_fds(self) -> list[int]:
        fileno = getattr(self._selector, "fileno", None)  # epoll and kqueue have one, poll and select do not
        return [fileno()] if fileno is not None else []

    def _ready_io(self, child: Child, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            child.flush()
        if mask & selectors.EVENT_READ:
            self._receive(child, child.receive)
        self._watch(child)

    def _receive(self, child: Child, receive: Callable[[], Sequence[Any]]) -> None:
        try:
            self._events.extend(Received(pid=child.pid, message=message) for message in receive())
        except MessageError as exc:
            child.receiving = False
            self._events.append(InvalidMessage(pid=child.pid, error=str(exc)))

    def _watch(self, child: Child) -> None:
        """Wait for what can happen on the child's pipe, and for nothing else: a closed pipe is readable for ever."""
        wanted = (selectors.EVENT_READ if child.receiving else 0) | (selectors.EVENT_WRITE if child.unsent else 0)
        key = self._selector.get_map().get(child.sock)
        if key is None:
            return
        if not wanted:
            self._selector.unregister(child.sock)
        elif key.events != wanted:
            self._selector.modify(child.sock, wanted, key.data)

    def _want_reaping(self) -> None:
        self._reap_wanted = True

    def _reap(self) -> None:
        """Every child that has ended: read what it had still sent, then report its end to `decide`."""
        self._reap_wanted = False
        for child in list(self._children.values()):
            code = child.exit_code()
            if code is None:
                continue
            self._receive(child, child.receive_rest)
            dump = child.take_dump()
            self._show_dump(child.pid, dump)
            by_signal = signal.Signals(-code).name if code < 0 else None
            exited = Exited(
                pid=child.pid, exit_code=code if code >= 0 else None, signal=by_signal, dump=dump or None, jitter=self._env.random()
            )
            self._events.append(exited)
            self._forget(child)

    def _forget(self, child: Child) -> None:
        del self._children[child.pid]
        self._selector.unregister(child.sentinel)
        with suppress(KeyError):  # not watched any more if it had closed its end
            self._selector.unregister(child.sock)
        child.close()

    def _measure(self, now: float) -> None:
        if now - self._measured_at >= MEASURE_INTERVAL_S:
            self._measured_at = now
            sizes = {pid: size for pid, child in self._children.items() if (size := child.rss_bytes()) is not None}
            self._events.append(Measured(rss_bytes=sizes))

    def _abandon_children(self) -> None:
        """Normally none is left. After a bug of the supervisor: close the pipes, so that children release and exit; then kill."""
        for child in self._children.values():
            child.sock.close()
        deadline = self._now() + LAST_RESORT_S
        for child in self._children.values():
            child.join(max(0.0, deadline - self._now()))
            if child.exit_code() is None:
                child.kill(signal.SIGKILL)
                child.join(LAST_RESORT_S)
            child.close()

    # ---- signals ---------------------------------------------------------------------------------------------------

    def _take_signals(self) -> Mapping[int, Any]:
        """From now on a signal is a byte in a pipe. SIGCHLD too: a sentinel stays silent while a grandchild holds it."""
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, lambda _mask: self._on_wake_byte())
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        return {signum: signal.signal(signum, _enqueue_only) for signum in (*HANDLED_SIGNALS, signal.SIGCHLD)}

    def _restore_signals(self, before: Mapping[int, Any]) -> None:
        signal.set_wakeup_fd(-1)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        self._wake_read.close()
        self._wake_write.close()

    def _on_wake_byte(self) -> None:
        with suppress(BlockingIOError):
            for signum in self._wake_read.recv(4096):
                if signum == signal.SIGCHLD:
                    self._reap_wanted = True
                elif signum in HANDLED_SIGNALS:
                    self._events.append(Signalled(signum=signal.Signals(signum)))

    # ---- stack dumps -----------------------------------------------------------------------------------------------

    def _dump_all(self) -> None:
        for child in self._children.values():
            child.kill(signal.SIGUSR1)
        self._dumps_due_at = self._now() + DUMP_WAIT_S

    def _collect_dumps(self, now: float) -> None:
        if self._dumps_due_at is None or now < self._dumps_due_at:
            return
        self._dumps_due_at = None
        for child in self._children.values():
            self._show_dump(child.pid, child.take_dump())
        self._show_dump(os.getpid(), "".join(traceback.format_stack()))

    def _show_dump(self, pid: int, dump: str) -> None:
        """Stacks are for people: a text log shows them as they are, a JSON log as one object."""
        if dump and self._json_log:
            log.warning("stack_dump", extra={"of_pid": pid, "dump": dump})
        elif dump:
            log.warning("stack_dump", extra={"of_pid": pid})
            show(dump.rstrip())


def _enqueue_only(_signum: int, _frame: FrameType | None) -> None:
    """Do nothing. Python writes a signal's number to the wake-up pipe only if the signal has a handler."""
