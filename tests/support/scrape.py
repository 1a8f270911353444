"""Reads a metrics listener like Prometheus."""

from collections.abc import Mapping

import aiohttp
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families


class Scrape:
    """One response of /metrics."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families: Mapping[str, Metric] = {
            family.name: family for family in text_string_to_metric_families(text)
        }

    def sum(self, name: str, **labels: str) -> float:
        """Return the sum of the samples with this name and these labels. Fails without any."""
        found = self.values(name, **labels)
        assert found, f"{name}{labels} is absent"
        return sum(found)

    def values(self, name: str, **labels: str) -> list[float]:
        return [
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]


async def scrape(port: int) -> Scrape:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}/metrics") as response,
    ):
        assert response.status == 200
        return Scrape(await response.text())


async def status_of(port: int, path: str) -> int:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}{path}") as response,
    ):
        return response.status
