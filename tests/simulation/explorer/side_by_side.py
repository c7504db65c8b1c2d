"""Many schedules, played by several processes side by side. Owns which process plays which."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial

from .schedule import Played, play
from .server import Server

__all__ = ["playing"]

_CHUNK = 20  # seeds that a process is given at a time
_servers: list[Server] = []  # of a process of the pool: its own databases


@contextmanager
def playing(server: Server, uri: str, seeds: Sequence[int], kinds: tuple[str, ...], processes: int) -> Iterator[Iterator[Played]]:
    """The schedules, in the order of their seeds, as they are played. Those that are not asked for any more are not played."""
    if processes == 1:
        yield (play(server, uri, seed, kinds=kinds) for seed in seeds)
        return
    spawn = multiprocessing.get_context("spawn")  # a client of MongoDB must not be forked
    pool = ProcessPoolExecutor(processes, spawn, initializer=_open_server, initargs=(uri,))
    try:
        yield pool.map(partial(_play_here, uri, kinds), seeds, chunksize=_CHUNK)
    finally:
        pool.shutdown(cancel_futures=True)


def _open_server(uri: str) -> None:
    _servers.append(Server(uri, f"explorer_{os.getpid()}"))


def _play_here(uri: str, kinds: tuple[str, ...], seed: int) -> Played:
    return play(_servers[0], uri, seed, kinds=kinds)
