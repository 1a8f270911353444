"""What a process says when Prometheus asks, as far as it is the same of each."""

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Protocol

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.metrics_core import Metric

from cli.metrics import families
from core.postgres.protocols import Pool


class Metrics(Protocol):
    """Of a process, or of several that it looks after."""

    async def scrape(self) -> Sequence[Metric]:
        """All figures of this moment; it takes a few seconds at most."""

    async def is_ready(self) -> bool:
        """Whether it does what it is there for."""


def process_metrics() -> Iterable[Metric]:
    """Memory, CPU, descriptors and collections of garbage of this process."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    GCCollector(registry)
    return registry.collect()


def pool_metrics(pool: Pool, *, database_up: bool) -> Iterable[Metric]:
    """The database as this process has it, and which release it is."""
    idle = pool.get_idle_size()
    yield families.DATABASE_UP.one(int(database_up))
    yield families.POOL_CONNECTIONS.of({("idle",): idle, ("used",): pool.get_size() - idle})
    yield families.POOL_SIZE.one(pool.get_max_size())
    yield families.STATEMENTS.one(pool.statements)
    yield families.BUILD_INFO.of({(version("postrider"),): 1})
