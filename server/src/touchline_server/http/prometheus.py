"""Renders snapshots for Prometheus, as its own text or as OpenMetrics."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as MetricFamily
from prometheus_client.registry import Collector

from touchline_protos.types.status import LatencyStatus, ServerStatus
from touchline_server.http.metric_list import METRICS, Metric


class PrometheusExporter:
    """Renders snapshots as Prometheus or OpenMetrics text. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._collector = _Collector()
        self._registry = CollectorRegistry()
        self._registry.register(self._collector)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def render(self, status: ServerStatus, accept: str) -> tuple[bytes, str]:
        """Returns the metrics of a snapshot.

        Args:
            status: the snapshot.
            accept: header ``Accept`` of the request, which chooses between the formats.

        Returns:
            Text of the metrics, and its content type.
        """
        encode, content_type = choose_encoder(accept)
        with self._lock:
            self._collector.status = status
            return encode(self._registry), content_type


class _Collector(Collector):
    """The metrics of the snapshot that it holds."""

    def __init__(self) -> None:
        self.status = ServerStatus()

    def collect(self) -> Iterator[MetricFamily]:
        for metric in METRICS:
            yield _family(metric, self.status)

    def describe(self) -> Iterator[MetricFamily]:
        return iter(())  # so that registering does not collect


def _family(metric: Metric, status: ServerStatus) -> MetricFamily:
    """Returns a metric with its values."""
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        for labels, latency in metric.samples(status):
            assert isinstance(latency, LatencyStatus)
            histogram.add_metric(labels, _buckets(latency), latency.sum_s)
        return histogram
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(metric.name, metric.help, labels=metric.labels)
    for labels, value in metric.samples(status):
        assert not isinstance(value, LatencyStatus)
        family.add_metric(labels, value)
    return family


def _buckets(latency: LatencyStatus) -> list[tuple[str, float]]:
    """Returns the cumulative buckets of a histogram, by upper bound."""
    total, buckets = 0, []
    counts = latency.buckets or (0,)
    for bound, count in zip([*map(str, latency.bounds_s), "+Inf"], counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets
