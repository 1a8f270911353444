"""Merges the metrics of several engine processes, each with the label `engine`.

An engine responds over its pipe to the supervisor, as JSON. Without a response its metrics are
absent and `postrider_engine_up` is 0.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import orjson
from prometheus_client.metrics_core import Metric

from cli.metrics.process import Metrics, labelled_gauge, process_metrics
from cli.process.supervisor_pipe import EngineEnd

_LABEL = "engine"


class Engine(Protocol):
    number: int

    async def ask(self) -> bytes | None:
        """Return the metrics of the engine, or None if it does not respond."""


class SupervisorCollector:
    """Collects the metrics of all engines, and of the supervisor's own process."""

    def __init__(self, engines: Sequence[Engine]):
        self._engines = engines

    async def scrape(self) -> Sequence[Metric]:
        merged = {metric.name: metric for metric in process_metrics()}
        up = {}
        for number, response in await self._ask_all():
            up[number] = int(response is not None)
            for name, documentation, kind, samples in response["metrics"] if response else ():
                metric = merged.setdefault(name, Metric(name, documentation, kind))
                for sample_name, labels, value in samples:
                    metric.add_sample(sample_name, {_LABEL: number, **labels}, value)
        documentation = "Whether the engine responds to its supervisor."
        return [
            labelled_gauge("postrider_engine_up", documentation, _LABEL, up),
            *merged.values(),
        ]

    async def is_ready(self) -> bool:
        """Return whether all engines are ready, so that one that keeps crashing is noticed."""
        return all(response and response["ready"] for _, response in await self._ask_all())

    async def _ask_all(self) -> list[tuple[str, Any]]:
        """Return the number and the response of each engine."""
        responses = await asyncio.gather(*(engine.ask() for engine in self._engines))
        return [
            (str(engine.number), orjson.loads(response) if response else None)
            for engine, response in zip(self._engines, responses, strict=True)
        ]


@asynccontextmanager
async def answer_supervisor(end: EngineEnd, metrics: Metrics) -> AsyncIterator[None]:
    """Respond with the metrics of this engine when the supervisor requests them."""

    async def read() -> bytes:
        families = [
            [m.name, m.documentation, m.type, [[s.name, s.labels, s.value] for s in m.samples]]
            for m in await metrics.scrape()
        ]
        return orjson.dumps({"ready": await metrics.is_ready(), "metrics": families})

    end.read_metrics = read
    yield
