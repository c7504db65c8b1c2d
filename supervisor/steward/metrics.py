"""The pool's metrics, rendered by prometheus-client (extra `metrics`): Prometheus text, or OpenMetrics for those who ask for it.

Owns the names of the metrics. Importing this module without the extra raises ModuleNotFoundError.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import CollectorRegistry, CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from streamline_pool.supervisor.ipc.messages import PoolFacts

__all__ = ["exposition"]


def exposition(facts: PoolFacts | None, accept: str) -> tuple[str, bytes]:
    """Content type and body for a request with this Accept header; only `streamline_up 0` without facts.

    The registry is made for each request: the process-wide one has metrics of this process, and the pool is more than that.
    """
    registry = CollectorRegistry(auto_describe=True)  # True: it refuses a name that is declared twice
    registry.register(_PoolCollector(facts))
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # prometheus-client reads no version such as "abc"
        encode, content_type = choose_encoder("")
    return content_type, encode(registry)


class _PoolCollector(Collector):
    """The facts as metric families. Nothing is counted here: the supervisor counts."""

    def __init__(self, facts: PoolFacts | None) -> None:
        self._facts = facts

    def collect(self) -> Iterator[Metric]:
        facts = self._facts
        yield _gauge("streamline_up", "1 if the supervisor reports", facts is not None)
        if facts is None:
            return
        yield _gauge("streamline_ready", "1 if every process has started", facts.ready)
        yield _gauge("streamline_workers_wanted", "Worker processes wanted", facts.target)
        yield _gauge("streamline_workers", "Worker processes alive", len(facts.workers))
        each = [((str(worker.index), str(worker.pid)), worker) for worker in facts.workers]
        in_flight = [(labels, worker.in_flight) for labels, worker in each]
        yield _gauges("streamline_runs_in_flight", "Runs a worker is driving now", ("worker", "pid"), in_flight)
        rss = [(labels, worker.rss_bytes or 0) for labels, worker in each]
        yield _gauges("streamline_worker_rss_bytes", "Resident memory", ("worker", "pid"), rss)
        yield _counter("streamline_runs_total", "Runs driven since the pool started", facts.runs_total)
        yield _counter("streamline_steps_total", "Handlers that have ended since the pool started", facts.steps_total)
        yield _counter("streamline_restarts_total", "Children replaced after a crash", facts.restarts)
        yield _counter("streamline_recycled_total", "Workers replaced on purpose", facts.recycled)
        circuit = [((state,), int(state == facts.circuit)) for state in ("closed", "half-open", "open")]
        yield _gauges("streamline_circuit_state", "1 for the state the breaker is in", ("state",), circuit)


def _gauge(name: str, text: str, value: int) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: int) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _gauges(name: str, text: str, labels: tuple[str, ...], values: Iterable[tuple[tuple[str, ...], int]]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for label_values, value in values:
        family.add_metric(label_values, value)
    return family
