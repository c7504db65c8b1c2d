"""The health port: `/healthz`, `/readyz` and `/metrics` over plain HTTP. The steward serves it from the pool's facts.

It is bound to 127.0.0.1: the answers need no password, so they are for this machine (or this pod) only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from streamline_pool.supervisor.ipc.messages import PoolFacts

__all__ = ["HOST", "render_metrics", "respond", "start_health_server"]

HOST = "127.0.0.1"
REQUEST_TIMEOUT_S = 5.0  # a guess: a client that takes longer to say GET is not one of ours
HEADER_BYTES_MAX = 8192


async def start_health_server(port: int, facts: Callable[[], PoolFacts | None]) -> asyncio.Server:
    """Serve until closed. `facts` gives what the supervisor last reported; None: nothing recent. OSError: port in use."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(respond(head, facts()))
                await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            pass  # a port scanner, or a client that went away
        finally:
            writer.close()

    return await asyncio.start_server(answer, HOST, port, limit=HEADER_BYTES_MAX)


def respond(head: bytes, facts: PoolFacts | None) -> bytes:
    """The whole response to a request with this head."""
    words = head.split(b"\r\n", 1)[0].decode("latin-1").split()
    method, path = (words[0], words[1].split("?")[0]) if len(words) >= 2 else ("", "")
    if method not in ("GET", "HEAD"):
        status, body = "405 Method Not Allowed", "only GET\n"
    elif path == "/healthz":
        status, body = ("200 OK", "ok\n") if facts is not None else ("503 Service Unavailable", "no recent report from the supervisor\n")
    elif path == "/readyz":
        why_not = _not_ready(facts)
        status, body = ("200 OK", "ready\n") if why_not is None else ("503 Service Unavailable", f"{why_not}\n")
    elif path == "/metrics":
        status, body = "200 OK", render_metrics(facts)
    else:
        status, body = "404 Not Found", "try /healthz, /readyz or /metrics\n"
    content = body.encode()
    headers = (
        f"HTTP/1.1 {status}",
        "Content-Type: text/plain; version=0.0.4; charset=utf-8",
        f"Content-Length: {len(content)}",
        "Connection: close",
    )
    return "\r\n".join((*headers, "", "")).encode() + (b"" if method == "HEAD" else content)


def _not_ready(facts: PoolFacts | None) -> str | None:
    if facts is None:
        return "no recent report from the supervisor"
    if facts.draining:
        return "draining"
    if not facts.ready:
        return "starting"
    if facts.held:
        return "held by SIGTSTP"
    return "circuit open: the database does not answer" if facts.circuit == "open" else None


def render_metrics(facts: PoolFacts | None) -> str:
    """Prometheus text; only `streamline_up 0` without facts."""
    lines = _metric("streamline_up", "gauge", "1 if the supervisor reports", [("", int(facts is not None))])
    if facts is None:
        return "\n".join(lines) + "\n"
    circuit = [(f'{{state="{state}"}}', int(state == facts.circuit)) for state in ("closed", "half-open", "open")]
    each = [(f'{{worker="{w.index}",pid="{w.pid}"}}', w) for w in facts.workers]
    lines += _metric("streamline_ready", "gauge", "1 if every process has started", [("", int(facts.ready))])
    lines += _metric("streamline_workers_wanted", "gauge", "Worker processes wanted", [("", facts.target)])
    lines += _metric("streamline_workers", "gauge", "Worker processes alive", [("", len(facts.workers))])
    lines += _metric("streamline_runs_in_flight", "gauge", "Runs a worker is driving now", [(label, w.in_flight) for label, w in each])
    lines += _metric("streamline_worker_rss_bytes", "gauge", "Resident memory", [(label, w.rss_bytes or 0) for label, w in each])
    lines += _metric("streamline_runs_total", "counter", "Runs driven since the pool started", [("", facts.runs_total)])
    lines += _metric("streamline_steps_total", "counter", "Handlers that have ended since the pool started", [("", facts.steps_total)])
    lines += _metric("streamline_restarts_total", "counter", "Children replaced after a crash", [("", facts.restarts)])
    lines += _metric("streamline_recycled_total", "counter", "Workers replaced on purpose", [("", facts.recycled)])
    lines += _metric("streamline_circuit_state", "gauge", "1 for the state the breaker is in", circuit)
    return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, help_text: str, values: Iterable[tuple[str, int]]) -> list[str]:
    return [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}", *(f"{name}{label} {value}" for label, value in values)]
