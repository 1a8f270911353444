"""What a supervisor says when Prometheus asks: the figures of its engines, told apart by a label.

An engine says them over its lifeline, as JSON. One that does not is missing, and down.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import orjson
from prometheus_client.metrics_core import Metric

from cli.metrics import families
from cli.metrics.process import Metrics, process_metrics
from cli.process.supervisor_pipe import EngineEnd

_LABEL = "engine"


class Engine(Protocol):
    """An engine process, as far as it matters here."""

    number: int

    async def ask(self) -> bytes | None:
        """What it says; None when it says nothing."""


class SupervisorCollector:
    """Of all engines, and of the supervisor's own process."""

    def __init__(self, engines: Sequence[Engine]):
        self._engines = engines

    async def scrape(self) -> Sequence[Metric]:
        answers = await self._ask_all()
        merged = {metric.name: metric for metric in process_metrics()}
        for engine, answer in zip(self._engines, answers, strict=True):
            if answer is not None:
                _add(merged, answer["metrics"], str(engine.number))
        up = families.ENGINE_UP.of(
            {
                (str(engine.number),): int(answer is not None)
                for engine, answer in zip(self._engines, answers, strict=True)
            }
        )
        return [up, *merged.values()]

    async def is_ready(self) -> bool:
        """All of them are: one that keeps ending is a matter for somebody."""
        return all(answer and answer["ready"] for answer in await self._ask_all())

    async def _ask_all(self) -> list[Any]:
        answers = await asyncio.gather(*(engine.ask() for engine in self._engines))
        return [orjson.loads(answer) if answer else None for answer in answers]


@asynccontextmanager
async def telling(end: EngineEnd, metrics: Metrics) -> AsyncIterator[None]:
    """For an engine: say its figures whenever its supervisor asks."""

    async def answer() -> bytes:
        told = [
            [m.name, m.documentation, m.type, [[s.name, s.labels, s.value] for s in m.samples]]
            for m in await metrics.scrape()
        ]
        return orjson.dumps({"ready": await metrics.is_ready(), "metrics": told})

    end.read_metrics = answer
    yield


def _add(merged: dict[str, Metric], told: Sequence[Any], engine: str) -> None:
    for name, documentation, kind, samples in told:
        metric = merged.setdefault(name, Metric(name, documentation, kind))
        for sample_name, labels, value in samples:
            metric.add_sample(sample_name, {_LABEL: engine, **labels}, value)
