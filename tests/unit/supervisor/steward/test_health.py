"""What the health port answers, without a port."""

from __future__ import annotations

from dataclasses import replace

import pytest

from streamline_pool.supervisor.ipc.messages import PoolFacts, WorkerFacts
from streamline_pool.supervisor.steward.health import render_metrics, respond

WORKER = WorkerFacts(
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
    workers=(WORKER,),
)


def status(path: str, facts: PoolFacts | None, method: str = "GET") -> int:
    return int(respond(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), facts).split()[1])


@pytest.mark.parametrize(
    ("facts", "healthy", "ready"),
    [
        (FACTS, 200, 200),
        (replace(FACTS, circuit="half-open"), 200, 200),
        (replace(FACTS, circuit="open"), 200, 503),
        (replace(FACTS, ready=False), 200, 503),
        (replace(FACTS, ready=False, draining=True), 200, 503),
        (replace(FACTS, held=True), 200, 503),
        (None, 503, 503),
    ],
)
def test_healthz_is_about_the_process_and_readyz_about_its_work(facts: PoolFacts | None, healthy: int, ready: int) -> None:
    """An orchestrator kills what is not healthy: an outage of the database must not make it kill the pool."""
    assert (status("/healthz", facts), status("/readyz?verbose", facts)) == (healthy, ready)


@pytest.mark.parametrize("head", [b"", b"\r\n\r\n", b"GET\r\n\r\n", b"\xff\xfe \x00\r\n\r\n", b"POST /healthz HTTP/1.1\r\n\r\n"])
def test_nonsense_is_answered_with_an_error(head: bytes) -> None:
    assert int(respond(head, FACTS).split()[1]) in (404, 405)


def test_metrics_are_prometheus_text() -> None:
    lines = render_metrics(FACTS).splitlines()
    assert 'streamline_runs_in_flight{worker="0",pid="7"} 3' in lines
    assert "streamline_restarts_total 2" in lines
    assert 'streamline_circuit_state{state="closed"} 1' in lines
    assert 'streamline_circuit_state{state="open"} 0' in lines
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names)), "a metric declared twice is refused by Prometheus"
    assert render_metrics(None).endswith("streamline_up 0\n")


def test_head_has_the_length_and_no_body() -> None:
    whole, head = (respond(f"{method} /healthz HTTP/1.1\r\n\r\n".encode(), FACTS) for method in ("GET", "HEAD"))
    assert whole == head + b"ok\n"
