"""A real Prometheus with the configuration of deploy/, for targets of the test."""

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp import web

from tests.support.paths import ROOT

CONFIGURATION = ROOT / "deploy/prometheus/prometheus.yml"
#: Instead of 15 s, so that rates have enough samples during a test.
SCRAPE_SECONDS = 1.0

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="Prometheus is not installed (Debian: apt-get install prometheus)",
)


class Scrapes:
    """Counts the scrapes of a target without metrics. The other targets have as many scrapes or
    one less."""

    def __init__(self) -> None:
        self.count = 0
        self._counted = asyncio.Condition()

    async def answer(self, _: web.Request) -> web.Response:
        async with self._counted:
            self.count += 1
            self._counted.notify_all()
        return web.Response()

    async def further(self, count: int) -> None:
        """Wait until this many more scrapes have started."""
        until = self.count + count
        async with asyncio.timeout(30), self._counted:
            await self._counted.wait_for(lambda: self.count >= until)


@dataclass(frozen=True, slots=True)
class Prometheus:
    """The HTTP API at `url`."""

    url: str
    scrapes: Scrapes
    _session: aiohttp.ClientSession

    async def get(self, path: str, **parameters: str) -> Any:
        """The `data` of a response. Fails with the error of Prometheus."""
        async with self._session.get(f"{self.url}/api/v1/{path}", params=parameters) as answer:
            told = await answer.json()
        assert told["status"] == "success", f"{parameters}: {told}"
        return told["data"]

    async def instant(self, expression: str) -> list[dict[str, Any]]:
        """The current series of an expression."""
        data = await self.get("query", query=expression)
        assert data["resultType"] == "vector", expression
        result: list[dict[str, Any]] = data["result"]
        return result


@asynccontextmanager
async def running_prometheus(
    directory: Path, targets: Mapping[str, str]
) -> AsyncIterator[Prometheus]:
    """Start Prometheus with the alerts of deploy/. `targets` are addresses by job."""
    scrapes = Scrapes()
    app = web.Application()
    app.router.add_get("/metrics", scrapes.answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    beat = f"127.0.0.1:{runner.addresses[0][1]}"
    file = directory / "prometheus.yml"
    file.write_text(_configuration(targets, beat))
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={file}",
        f"--storage.tsdb.path={directory / 'prometheus'}",
        f"--web.listen-address={address}",
        "--log.level=warn",
    )
    try:
        # The first scrape shows that Prometheus is ready.
        await scrapes.further(1)
        async with aiohttp.ClientSession() as session:
            yield Prometheus(f"http://{address}", scrapes, session)
    finally:
        process.terminate()
        await process.wait()
        await runner.cleanup()


def _configuration(targets: Mapping[str, str], beat: str) -> str:
    """The configuration of deploy/. `targets` must have exactly its jobs."""
    loaded = yaml.safe_load(CONFIGURATION.read_text())
    jobs = loaded["scrape_configs"]
    assert {job["job_name"] for job in jobs} == targets.keys()
    for job in jobs:
        job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
    jobs.append({"job_name": "beat", "static_configs": [{"targets": [beat]}]})
    interval = f"{int(SCRAPE_SECONDS * 1000)}ms"
    loaded["global"] = dict.fromkeys(("scrape_interval", "evaluation_interval"), interval)
    loaded["global"]["scrape_timeout"] = interval
    loaded["rule_files"] = [str(CONFIGURATION.parent / name) for name in loaded["rule_files"]]
    return yaml.safe_dump(loaded)
