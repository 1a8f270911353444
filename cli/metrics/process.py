"""Metrics that servers and engines have in common."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Protocol

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from core.postgres.protocols import Pool


class Metrics(Protocol):
    """The metrics of a process, or of a supervisor and its engines."""

    async def scrape(self) -> Sequence[Metric]:
        """Return the current metrics, within a few seconds."""

    async def is_ready(self) -> bool:
        """Return the result of the readiness probe."""


def labelled_gauge[L: str](
    name: str, documentation: str, label: str, values: Mapping[L, float]
) -> GaugeMetricFamily:
    """Return a gauge with one sample for each value of its label."""
    family = GaugeMetricFamily(name, documentation, labels=[label])
    for label_value, value in values.items():
        family.add_metric([label_value], value)
    return family


def process_metrics() -> Iterable[Metric]:
    """Return memory, CPU, file descriptors and garbage collections of this process."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    GCCollector(registry)
    return registry.collect()


def pool_metrics(pool: Pool, *, database_up: bool) -> Iterable[Metric]:
    """Return the state of the database connections, and the release."""
    idle = pool.get_idle_size()
    yield GaugeMetricFamily(
        "postrider_database_up", "Whether the database answers.", int(database_up)
    )
    yield labelled_gauge(
        "postrider_database_pool_connections",
        "Connections of the pool of the hot path.",
        "state",
        {"idle": idle, "used": pool.get_size() - idle},
    )
    yield GaugeMetricFamily(
        "postrider_database_pool_size",
        "Limit of the connections of the pool of the hot path.",
        pool.get_max_size(),
    )
    yield CounterMetricFamily(
        "postrider_statements_total",
        "SQL statements sent on the pool of the hot path.",
        pool.statements,
    )
    yield labelled_gauge(
        "postrider_build_info", "The release; always 1.", "version", {version("postrider"): 1}
    )
