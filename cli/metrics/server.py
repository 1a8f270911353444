"""Collects the metrics of a server process."""

from collections.abc import Sequence

from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from cli.metrics.process import pool_metrics, process_metrics
from core.postgres.protocols import Pool
from server.auth.jwks import JwksKeys, KeySource
from server.metrics import ServerMetrics


class ServerCollector:
    def __init__(self, metrics: ServerMetrics, pool: Pool, keys: KeySource):
        self._metrics = metrics
        self._pool = pool
        self._keys = keys

    async def scrape(self) -> Sequence[Metric]:
        age = self._keys.age_seconds if isinstance(self._keys, JwksKeys) else float("inf")
        return [
            *self._metrics.registry.collect(),
            GaugeMetricFamily(
                "postrider_jwks_age_seconds",
                "Time since the issuer's key set was last fetched.",
                age if age < float("inf") else None,
            ),
            *pool_metrics(self._pool, database_up=self._metrics.database_up),
            *process_metrics(),
        ]

    async def is_ready(self) -> bool:
        return self._metrics.database_up
