"""What a supervisor reports about a pool, as tests of the health port and of the documents use it."""

from __future__ import annotations

from streamline_pool.supervisor.ipc.messages import PoolFacts, WorkerFacts

__all__ = ["FACTS"]

_WORKER = WorkerFacts(
    pid=7, owner="h:7:n", index=0, state="ready", in_flight=3, runs_total=5, steps_total=9, rss_bytes=1000, uptime_s=1.0, lru={}
)

FACTS = PoolFacts(
    ready=True,
    draining=False,
    held=False,
    target=1,
    restarts=2,
    recycled=1,
    runs_total=5,
    steps_total=9,
    circuit="closed",
    workers=(_WORKER,),
)
