"""Collects the metrics of an engine process."""

from collections.abc import Iterable, Sequence

from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from cli.metrics.process import labelled_gauge, pool_metrics, process_metrics
from core.postgres.protocols import Pool
from delivery.database_stats import DatabaseStats, Reading
from delivery.metrics import EngineMetrics


class EngineCollector:
    def __init__(self, metrics: EngineMetrics, pool: Pool, stats: DatabaseStats):
        self._metrics = metrics
        self._pool = pool
        self._stats = stats

    async def scrape(self) -> Sequence[Metric]:
        reading = await self._stats.reading()
        return [
            *self._metrics.registry.collect(),
            *_database_metrics(reading),
            *pool_metrics(self._pool, database_up=reading.database_up),
            *process_metrics(),
        ]

    async def is_ready(self) -> bool:
        return self._metrics.is_ready


def _database_metrics(reading: Reading) -> Iterable[Metric]:
    """Yield the state of the database. A value that could not be read has no sample."""
    queue = reading.queue
    retained_at = reading.retention_completed_at
    yield labelled_gauge(
        "postrider_queue_deliveries",
        "Open deliveries in the database.",
        "state",
        queue.deliveries if queue else {},
    )
    yield GaugeMetricFamily(
        "postrider_queue_oldest_due_age_seconds",
        "Time since the oldest delivery that only waits for an engine became due.",
        queue.oldest_due_age_seconds if queue else None,
    )
    yield labelled_gauge(
        "postrider_webhook_configs",
        "Webhook configs in the database.",
        "status",
        reading.configs or {},
    )
    yield labelled_gauge(
        "postrider_breakers",
        "Webhook configs with a backlog and a breaker in this state.",
        "state",
        {"open": queue.open_breakers, "half_open": queue.half_open_breakers} if queue else {},
    )
    yield GaugeMetricFamily(
        "postrider_partition_days_ahead",
        "Whole days after today for which every partitioned table has partitions.",
        reading.partition_days_ahead,
    )
    yield GaugeMetricFamily(
        "postrider_retention_last_run_timestamp_seconds",
        "Database time when retention last completed.",
        retained_at.timestamp() if retained_at else None,
    )
    yield GaugeMetricFamily(
        "postrider_clock_skew_seconds",
        "This process's clock minus the database's.",
        reading.clock_skew_seconds,
    )
