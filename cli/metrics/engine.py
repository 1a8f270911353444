"""What an engine says when Prometheus asks."""

from collections.abc import Iterable, Sequence

from prometheus_client.metrics_core import Metric

from cli.metrics import families
from cli.metrics.process import pool_metrics, process_metrics
from core.postgres.protocols import Pool
from delivery.database_stats import DatabaseStats, Reading
from delivery.metrics import EngineMetrics


class EngineCollector:
    """Of the one engine of this process."""

    def __init__(self, metrics: EngineMetrics, pool: Pool, census: DatabaseStats):
        self._metrics = metrics
        self._pool = pool
        self._census = census

    async def scrape(self) -> Sequence[Metric]:
        reading = await self._census.reading()
        return [
            *_engine(self._metrics),
            *_database(reading),
            *pool_metrics(self._pool, database_up=reading.database_up),
            *process_metrics(),
        ]

    async def is_ready(self) -> bool:
        return self._metrics.is_ready


def _engine(metrics: EngineMetrics) -> Iterable[Metric]:
    yield families.ATTEMPTS.of({(o.value,): count for o, count in metrics.attempts.items()})
    yield families.DELIVERIES.of({(s.value,): count for s, count in metrics.deliveries.items()})
    yield families.DELIVERY_ATTEMPTS.one(metrics.delivery_attempts)
    yield families.ATTEMPT_DURATION.of(
        {
            ("dns",): metrics.dns,
            ("connect",): metrics.connect,
            ("first_byte",): metrics.first_byte,
            ("whole",): metrics.whole,
        }
    )
    yield families.PUBLISH_TO_FIRST_ATTEMPT.one(metrics.publish_to_first_attempt)
    yield families.PUBLISH_TO_DELIVERED.one(metrics.publish_to_delivered)
    yield families.DEACTIVATIONS.of({(r.value,): n for r, n in metrics.deactivations.items()})
    yield families.BREAKER_CHANGES.of(
        {("open",): metrics.breakers_opened, ("closed",): metrics.breakers_closed}
    )
    yield families.LEASES_RECLAIMED.one(metrics.leases_reclaimed)
    yield families.LEASES_LOST.one(metrics.leases_lost)
    yield families.IN_FLIGHT.one(metrics.in_flight)
    yield families.IN_FLIGHT_LIMIT.one(metrics.in_flight_limit)
    yield families.CLAIM_DURATION.one(metrics.claim)
    yield families.SETTLE_DURATION.one(metrics.settle)


def _database(reading: Reading) -> Iterable[Metric]:
    queue = reading.queue
    yield families.QUEUE_DELIVERIES.of(
        {(s.value,): count for s, count in queue.deliveries.items()} if queue else {}
    )
    yield families.QUEUE_OLDEST_DUE_AGE.one(queue.oldest_due_age_seconds if queue else None)
    yield families.WEBHOOK_CONFIGS.of(
        {(status,): count for status, count in (reading.configs or {}).items()}
    )
    yield families.BREAKERS.of(
        {("open",): queue.open_breakers, ("half_open",): queue.half_open_breakers} if queue else {}
    )
    yield families.PARTITION_DAYS_AHEAD.one(reading.partition_days_ahead)
    retained_at = reading.retention_completed_at
    yield families.RETENTION_LAST_RUN.one(retained_at.timestamp() if retained_at else None)
    yield families.CLOCK_SKEW.one(reading.clock_skew_seconds)
