"""What a server says when Prometheus asks."""

from collections.abc import Iterable, Sequence

from prometheus_client.metrics_core import Metric

from cli.metrics import families
from cli.metrics.process import pool_metrics, process_metrics
from core.postgres.protocols import Pool
from server.auth.jwks import JwksKeys, KeySource
from server.metrics import ServerMetrics


class ServerCollector:
    """Of the one server of this process."""

    def __init__(self, metrics: ServerMetrics, pool: Pool, keys: KeySource):
        self._metrics = metrics
        self._pool = pool
        self._keys = keys

    async def scrape(self) -> Sequence[Metric]:
        return [
            *_server(self._metrics, self._keys),
            *pool_metrics(self._pool, database_up=self._metrics.database_up),
            *process_metrics(),
        ]

    async def is_ready(self) -> bool:
        return self._metrics.database_up


def _server(metrics: ServerMetrics, keys: KeySource) -> Iterable[Metric]:
    yield families.RPCS.of(
        {
            (method, code): count
            for method, of_method in metrics.methods.items()
            for code, count in of_method.codes.items()
        }
    )
    yield families.RPC_DURATION.of(
        {
            (method,): of_method.duration
            for method, of_method in metrics.methods.items()
            if of_method.duration is not None
        }
    )
    yield families.EVENTS.of(
        {
            ("accepted",): metrics.events_accepted,
            ("duplicate",): metrics.events_duplicate,
            ("rejected",): metrics.events_rejected,
        }
    )
    yield families.COMMIT_DURATION.one(metrics.commit)
    yield families.COMMIT_EVENTS.one(metrics.commit_events)
    age = keys.age_seconds if isinstance(keys, JwksKeys) else float("inf")
    yield families.JWKS_AGE.one(age if age < float("inf") else None)
    yield families.WATCHERS.one(metrics.watchers)
