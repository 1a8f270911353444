"""Postrider with real processes, traffic of every kind and a real Prometheus."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import orjson
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from google.protobuf.duration_pb2 import Duration
from jwt.algorithms import OKPAlgorithm

from cli.dev.signing_key import DevelopmentKey, ensure_development_key
from postrider.v1 import admin_service_pb2, delivery_service_pb2, event_pb2, event_service_pb2
from tests.support.platform import Platform, serve_settings
from tests.support.processes import AMPLE, Process, Processes, environment_of
from tests.support.prometheus import Prometheus, running_prometheus
from tests.support.receiver import Answer, Receiver

WELL, FLAKY, AWAY, STOPPED = "m_well", "m_flaky", "m_away", "m_stopped"
#: Breakers open and configs become inactive within seconds.
BRISK: dict[str, Any] = {
    "delivery_timeout_seconds": 5,
    "lease_seconds": 10,
    "retry_schedule_seconds": "0.1",
    "max_retries": 1,
    "max_consecutive_failures": 5,
    "breaker_failures": 3,
    "breaker_failing_seconds": 0.5,
    "breaker_cooldown_seconds": 0.5,
    "breaker_cooldown_max_seconds": 1,
}
ENGINES = 2


@dataclass(frozen=True, slots=True)
class MonitoredStack:
    """A running stack.

    `broken` holds the last path segments of the endpoints that fail.
    `addresses` holds the listening addresses, by Prometheus job or protocol.
    """

    platform: Platform
    processes: Processes
    engines: Process
    prometheus: Prometheus
    broken: set[str]
    addresses: dict[str, str]
    jwks_url: str


@asynccontextmanager
async def monitored_stack(
    database_url: str, ca_file: Path, directory: Path, receiver: Receiver
) -> AsyncIterator[MonitoredStack]:
    """Start a server, engines and Prometheus, with a webhook config of each kind."""
    key = ensure_development_key(directory / "keys")
    processes = Processes(environment_of(database_url, ca_file, key.public_key_file))
    broken = {AWAY, STOPPED}
    receiver.default = _answering(broken)
    try:
        async with _issuer(key) as jwks_url:
            server, address = await processes.server(
                jwt_public_key_file=None,
                jwt_jwks_url=jwks_url,
                reflection=True,
                admin_address="127.0.0.1:0",
                server_metrics_address="127.0.0.1:0",
            )
            engines = await processes.start(
                *("delivery", "--processes", str(ENGINES)),
                **BRISK,
                delivery_metrics_address="127.0.0.1:0",
            )
            await engines.wait_for("delivering", ENGINES)
            addresses = {"postrider-server": "", "postrider-delivery": ""}
            for job, process in zip(addresses, (server, engines), strict=True):
                [listening] = await process.wait_for("metrics_listening")
                addresses[job] = f"127.0.0.1:{listening['port']}"
            [admin] = await server.wait_for("admin_listening")
            async with (
                grpc.aio.insecure_channel(address) as channel,
                running_prometheus(directory, addresses) as prometheus,
            ):
                settings = serve_settings(database_url, ca_file, key)
                platform = Platform(address, key, settings, channel)
                addresses |= {"grpc": address, "admin": f"127.0.0.1:{admin['port']}"}
                await _register(platform, receiver)
                yield MonitoredStack(
                    platform, processes, engines, prometheus, broken, addresses, jwks_url
                )
    finally:
        await processes.kill_all()


@asynccontextmanager
async def traffic(platform: Platform) -> AsyncIterator[None]:
    """Publish events for all merchants and watch deliveries until the context ends."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_publish(platform)), group.create_task(_watch(platform))]
        yield
        for task in tasks:
            task.cancel()


async def stopped_is_inactive(stack: MonitoredStack) -> None:
    """Wait until STOPPED is inactive and Prometheus has scraped it."""
    request = admin_service_pb2.ListAllWebhookConfigsRequest(
        merchant_id=STOPPED, inactive_only=True
    )
    async with asyncio.timeout(AMPLE):
        while True:
            listed = await stack.platform.admin.ListAllWebhookConfigs(
                request, metadata=stack.platform.operator()
            )
            await stack.prometheus.scrapes.further(1)
            if listed.webhook_configs:
                return


async def _register(platform: Platform, receiver: Receiver) -> None:
    for merchant_id in (WELL, FLAKY, STOPPED):
        await platform.register(f"{receiver.url}/{merchant_id}", merchant_id)
    # A long schedule, so that the breaker opens but the config stays active.
    waits = [Duration(seconds=1)] * 20
    await platform.register(f"{receiver.url}/{AWAY}", AWAY, retry_schedule=waits)


def _answering(broken: Collection[str]) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if Path(request.path).name in broken or b"bad" in body:
            return web.Response(status=500, text="no disk left")
        return web.Response()

    return answer


async def _publish(platform: Platform) -> None:
    for number in itertools.count():
        # One in eight is too few for the endpoint to go inactive.
        payload = '{"is": "bad"}' if number % 8 == 0 else '{"is": "good"}'
        events = [
            event_pb2.EventInput(
                merchant_id=merchant_id, type="payment.succeeded", payload_text=payload
            )
            for merchant_id in (WELL, FLAKY, AWAY, STOPPED)
        ]
        events[0].payload_text = "{}"
        events += [
            event_pb2.EventInput(merchant_id=WELL, type="no.such", payload_text="{}"),
            event_pb2.EventInput(
                merchant_id=WELL, type="payment.succeeded", payload_text="{}", idempotency_key="1"
            ),
        ]
        await platform.events.PublishEvents(
            event_service_pb2.PublishEventsRequest(events=events), metadata=platform.producer()
        )
        # The pace of the producer.
        await asyncio.sleep(0.05)


async def _watch(platform: Platform) -> None:
    watching = platform.deliveries.WatchDeliveries(
        delivery_service_pb2.WatchDeliveriesRequest(), metadata=platform.merchant(WELL)
    )
    async for _ in watching:
        pass


@asynccontextmanager
async def _issuer(key: DevelopmentKey) -> AsyncIterator[str]:
    """Serve a JWKS with this key. Yields its URL."""
    public_key = load_pem_public_key(key.public_key_file.read_bytes())
    assert isinstance(public_key, Ed25519PublicKey)
    jwk = OKPAlgorithm.to_jwk(public_key, as_dict=True)
    document = orjson.dumps({"keys": [jwk]})

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=document)

    app = web.Application()
    app.router.add_get("/jwks", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/jwks"
    finally:
        await runner.cleanup()
