"""One of the two hosts and the database do not reach each other as they should. Owns these faults; proxy.py performs them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from streamline_pool.chaos.stage import Fault, Stage, past_lease

__all__ = ["FAULTS"]

_LATENCY_S = 0.1  # of each message, so a round trip takes 200 ms more
_NETWORK = frozenset({"network"})


def _mode(mode: str, **more: Any) -> Callable[[Stage], AbstractContextManager[None]]:
    """One host's proxy is in this mode for as long as the fault lasts."""

    @contextlib.contextmanager
    def happens(stage: Stage) -> Iterator[None]:
        host = stage.any_host()
        stage.strikes(host.workers())
        host.network.order(mode, **more)
        try:
            yield
        finally:
            host.network.order("pass")

    return happens


def _short(_lease_s: float) -> float:
    return 2.0


FAULTS = (
    Fault(
        name="partition",
        what="one host and the database do not reach each other; what was sent arrives afterwards",
        happens=_mode("partition"),
        needs=_NETWORK,
        hold_min=past_lease,
        hold_max=30.0,
    ),
    Fault(
        name="latency",
        what="every message between one host and the database takes 100 ms more, a round trip 200 ms",
        happens=_mode("delay", s=_LATENCY_S),
        needs=_NETWORK,
        hold_min=_short,
        hold_max=30.0,
    ),
    Fault(
        name="black-hole",
        what="what one host and the database send each other is lost, and no connection ends",
        happens=_mode("swallow"),
        needs=_NETWORK,
        hold_min=past_lease,
        hold_max=30.0,
    ),
    Fault(
        name="lost-replies",
        what="the database gets what one host sends, and the host gets no reply",
        happens=_mode("deaf"),
        needs=_NETWORK,
        hold_min=past_lease,
        hold_max=30.0,
    ),
    Fault(
        name="half-open",
        what="the connections of one host are closed at the database, and the host is not told; new ones work",
        happens=_mode("half-open"),
        needs=_NETWORK,
        hold_min=_short,
        hold_max=20.0,
    ),
    Fault(
        name="refused",
        what="the connections of one host are reset, and new ones refused",
        happens=_mode("refuse"),
        needs=_NETWORK,
        hold_min=_short,
        hold_max=20.0,
    ),
)
