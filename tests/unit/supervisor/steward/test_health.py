"""What the health port answers, without a port; how it is served is in test_health_server.py."""

from __future__ import annotations

import sys
from dataclasses import replace
from http import HTTPStatus

import pytest
from pool_facts import FACTS

from streamline_pool.supervisor.ipc.messages import PoolFacts
from streamline_pool.supervisor.steward.health import Answer, Report, answer, load_exposition


def asked(path: str, facts: PoolFacts | None, accept: str = "") -> Answer:
    """The answer, of a steward that has been up for a while."""
    return answer(path, accept, Report(alive=facts is not None, facts=facts), load_exposition())


def metrics(facts: PoolFacts | None) -> list[str]:
    return asked("/metrics", facts).body.decode().splitlines()


@pytest.mark.parametrize(
    ("facts", "alive", "ready"),
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
def test_livez_and_healthz_are_about_the_process_and_readyz_about_its_work(facts: PoolFacts | None, alive: int, ready: int) -> None:
    """An orchestrator kills what is not alive: an outage of the database must not make it kill the pool."""
    assert [asked(path, facts).status for path in ("/livez", "/healthz", "/readyz")] == [alive, alive, ready]


def test_a_steward_that_has_just_started_is_alive_and_not_ready() -> None:
    """The supervisor's first report comes within a second. A probe before it must not have the pool killed."""
    found = [answer(path, "", Report(alive=True, facts=None), None) for path in ("/livez", "/healthz", "/readyz")]
    assert [one.status for one in found] == [200, 200, 503]
    assert found[2].body == b"starting\n"


def test_an_unknown_path_is_told_the_known_ones() -> None:
    found = asked("/", FACTS)
    assert found.status == HTTPStatus.NOT_FOUND
    for path in (b"/livez", b"/readyz", b"/healthz", b"/metrics"):
        assert path in found.body


def test_metrics_are_prometheus_text() -> None:
    lines = metrics(FACTS)
    assert 'streamline_runs_in_flight{pid="7",worker="0"} 3.0' in lines
    assert "# TYPE streamline_restarts_total counter" in lines
    assert "streamline_restarts_total 2.0" in lines
    assert 'streamline_circuit_state{state="closed"} 1.0' in lines
    assert 'streamline_circuit_state{state="open"} 0.0' in lines
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names)), "a metric declared twice is refused by Prometheus"


def test_without_a_report_the_pool_is_down_and_nothing_else_is_claimed() -> None:
    assert [line for line in metrics(None) if not line.startswith("#")] == ["streamline_up 0.0"]


def test_a_scraper_chooses_the_format() -> None:
    """Prometheus asks for OpenMetrics first; a browser gets the text."""
    assert asked("/metrics", FACTS).content_type == "text/plain; version=0.0.4; charset=utf-8"
    found = asked("/metrics", FACTS, "application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert found.content_type.startswith("application/openmetrics-text")
    assert found.body.endswith(b"# EOF\n")
    assert b"streamline_runs_total 5.0\n" in found.body


def test_a_version_that_is_no_number_gets_the_text() -> None:
    """prometheus-client raises TypeError for it, and the client got no answer."""
    found = asked("/metrics", FACTS, "application/openmetrics-text; version=abc")
    assert (found.status, found.content_type) == (HTTPStatus.OK, "text/plain; version=0.0.4; charset=utf-8")


def test_without_the_extra_metrics_says_what_to_install_and_the_probes_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["prometheus_client", *(name for name in sys.modules if name.startswith("prometheus_client."))]:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "streamline_pool.supervisor.steward.metrics", raising=False)
    found = asked("/metrics", FACTS)
    assert found.status == HTTPStatus.NOT_IMPLEMENTED
    assert b"pip install 'streamline-pool[metrics]'" in found.body
    assert [asked(path, FACTS).status for path in ("/livez", "/healthz", "/readyz")] == [200, 200, 200]
