"""Processes that die, freeze and are replaced. Owns the faults of workers, stewards and supervisors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil

from streamline_pool.chaos.hosts import Host
from streamline_pool.chaos.stage import Fault, NoTurn, Stage, past_lease

__all__ = ["FAULTS"]

_COMMIT_S = 5.0  # until a commit comes by
_APPLIED_S = 0.3  # until the database has applied a commit that was held


@contextlib.contextmanager
def _kill_worker(stage: Stage) -> Iterator[None]:
    pid = stage.any_worker(stage.any_host())
    stage.strikes([pid])
    stage.kill(pid)
    yield


@contextlib.contextmanager
def _kill_steward(stage: Stage) -> Iterator[None]:
    host = stage.any_host()
    pid = host.steward()
    if pid is None:
        raise NoTurn(f"host {host.name} has no steward at the moment")
    stage.strikes(host.workers())
    stage.kill(pid)
    yield


@contextlib.contextmanager
def _kill_supervisor(stage: Stage) -> Iterator[None]:
    host = stage.any_host()
    stage.strikes(host.workers())
    host.kill()
    yield
    host.start()
    host.wait_ready()


@contextlib.contextmanager
def _freeze_in_commit(stage: Stage) -> Iterator[None]:
    host, pid = _commit_on_the_way(stage)
    stage.strikes([pid])
    with stage.suspended([pid]):
        yield
        host.network.order("release")  # the database gets the commit only now, long after the lease
        stage.wait(_APPLIED_S)


def _commit_on_the_way(stage: Stage) -> tuple[Host, int]:
    """A host whose proxy holds a commit, and the worker that sent it."""
    for host in stage.chance.sample(stage.hosts, len(stage.hosts)):
        host.network.order("hold")
        if host.network.wait_held(_COMMIT_S):
            pid = _process_of(host, host.network.held_port)
            if pid is not None:
                return host, pid
        host.network.order("release")
    raise NoTurn(f"no worker of either host committed within {_COMMIT_S:g} s")


def _process_of(host: Host, port: int | None) -> int | None:
    """Which worker has a connection from that port."""
    for pid in host.workers():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(one.laddr and one.laddr.port == port for one in psutil.Process(pid).net_connections("tcp4")):
                return pid
    return None


@contextlib.contextmanager
def _freeze_worker(stage: Stage) -> Iterator[None]:
    pid = stage.any_worker(stage.any_host())
    stage.strikes([pid])
    with stage.suspended([pid]):
        yield


@contextlib.contextmanager
def _freeze_steward(stage: Stage) -> Iterator[None]:
    host = stage.any_host()
    pid = host.steward()
    if pid is None:
        raise NoTurn(f"host {host.name} has no steward at the moment")
    stage.strikes(host.workers())
    with stage.suspended([pid]):
        yield


@contextlib.contextmanager
def _freeze_supervisor(stage: Stage) -> Iterator[None]:
    host = stage.any_host()
    stage.strikes(host.workers())
    with stage.suspended([host.pid]):
        yield


@contextlib.contextmanager
def _rolling_restart(stage: Stage) -> Iterator[None]:
    stage.strikes([pid for host in stage.hosts for pid in host.workers()])
    for host in stage.hosts:
        host.drain()
        host.start()
        host.wait_ready()
    yield


FAULTS = (
    Fault(name="kill-worker", what="SIGKILL of a worker that holds runs", happens=_kill_worker, kill=True),
    Fault(name="kill-steward", what="SIGKILL of a steward", happens=_kill_steward, kill=True),
    Fault(name="kill-supervisor", what="SIGKILL of a supervisor; its host is started again", happens=_kill_supervisor, kill=True),
    Fault(
        name="freeze-in-commit",
        what="SIGSTOP of a worker for longer than its leases while its commit is on the way; the commit arrives afterwards",
        happens=_freeze_in_commit,
        needs=frozenset({"network"}),
        hold_min=past_lease,
        hold_max=0.0,  # no longer than that: the commit is to arrive while another worker has the run, or soon after
    ),
    Fault(
        name="freeze-worker",
        what="SIGSTOP of a worker for longer than its leases",
        happens=_freeze_worker,
        hold_min=past_lease,
        hold_max=12.0,
    ),
    Fault(name="freeze-steward", what="SIGSTOP of a steward", happens=_freeze_steward, hold_min=past_lease, hold_max=15.0),
    Fault(name="freeze-supervisor", what="SIGSTOP of a supervisor", happens=_freeze_supervisor, hold_min=past_lease, hold_max=15.0),
    Fault(name="rolling-restart", what="SIGTERM, end and start of one host after the other", happens=_rolling_restart),
)
