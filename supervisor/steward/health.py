"""What the health port answers: `/livez`, `/healthz`, `/readyz` and `/metrics`, from the pool's newest facts.

Owns the meaning of each path. HTTP is in health_server.py, and the metrics are in metrics.py, which needs an extra.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from streamline_pool.supervisor.ipc.messages import PoolFacts

__all__ = ["METRICS_ADVICE", "Answer", "Exposition", "Report", "answer", "load_exposition"]

METRICS_ADVICE = "metrics need the package prometheus-client: pip install 'streamline-pool[metrics]'"
PATHS = "/livez, /readyz, /healthz, /metrics"
NO_REPORT = "no recent report from the supervisor"

Exposition = Callable[[PoolFacts | None, str], tuple[str, bytes]]
"""Facts and the request's Accept header -> content type and text: `streamline_pool.supervisor.steward.metrics.exposition`."""


@dataclass(frozen=True, slots=True)
class Report:
    """What the steward knows of the pool now."""

    alive: bool  # the supervisor has reported lately, or the steward has only just started
    facts: PoolFacts | None  # its newest facts; None: none lately


@dataclass(frozen=True, slots=True)
class Answer:
    """One response."""

    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


def load_exposition() -> Exposition | None:
    """The renderer of the metrics; None: the extra `metrics` is not installed."""
    try:
        from streamline_pool.supervisor.steward.metrics import exposition
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] != "prometheus_client":
            raise
        return None
    return exposition


def answer(path: str, accept: str, report: Report, exposition: Exposition | None) -> Answer:
    """The answer to GET `path` (a query is ignored).

    `exposition` is what `load_exposition` gave, and `accept` the request's Accept header, by which it chooses the format.
    """
    match path.partition("?")[0]:
        case "/livez" | "/healthz":  # the same: orchestrators differ in the name that they expect
            return _probe("ok", None if report.alive else NO_REPORT)
        case "/readyz":
            return _probe("ready", _not_ready(report))
        case "/metrics":
            if exposition is None:
                return _text(HTTPStatus.NOT_IMPLEMENTED, METRICS_ADVICE)
            content_type, body = exposition(report.facts, accept)
            return Answer(HTTPStatus.OK, body, content_type)
        case _:
            return _text(HTTPStatus.NOT_FOUND, f"there are: {PATHS}")


def _probe(good: str, fault: str | None) -> Answer:
    return _text(HTTPStatus.OK, good) if fault is None else _text(HTTPStatus.SERVICE_UNAVAILABLE, fault)


def _text(status: HTTPStatus, text: str) -> Answer:
    return Answer(status, f"{text}\n".encode())


def _not_ready(report: Report) -> str | None:
    facts = report.facts
    if facts is None:
        return "starting" if report.alive else NO_REPORT
    if facts.draining:
        return "draining"
    if not facts.ready:
        return "starting"
    if facts.held:
        return "held by SIGTSTP"
    return "circuit open: the database does not answer" if facts.circuit == "open" else None
