"""A running Postrider for tests: server and engine wired as `cli` wires them, and typed stubs."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message_factory import GetMessageClass
from pydantic import SecretStr

from cli.dev.signing_key import DevelopmentKey, ensure_development_key, mint_token
from cli.process.app import ServerProcessSettings
from cli.process.delivery import EngineProcessSettings, deliver
from cli.process.server import serve
from core.settings import (
    DatabaseSettings,
    EgressSettings,
    EncryptionSettings,
    LogSettings,
    TraceSettings,
)
from delivery.settings import DeliverySettings
from postrider.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    delivery_pb2,
    delivery_service_pb2,
    delivery_service_pb2_grpc,
    event_pb2,
    event_service_pb2,
    event_service_pb2_grpc,
    webhook_config_pb2,
    webhook_config_service_pb2,
    webhook_config_service_pb2_grpc,
)
from server.settings import AuthSettings, ServerSettings, TlsSettings

ISSUER = "https://issuer.test"
#: 32 bytes, 0 to 31; the same as the `keyring` fixture holds.
ENCRYPTION_KEYS = "k1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="

type Metadata = list[tuple[str, str]]

_REQUEST_CLASSES = {
    method.name: GetMessageClass(method.input_type)
    for module in (
        admin_service_pb2,
        delivery_service_pb2,
        event_service_pb2,
        webhook_config_service_pb2,
    )
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


class Calls:
    """Calls of one caller by the RPC's name: `await calls.GetWebhookConfig(id="wh_1")`."""

    def __init__(self, stubs: tuple[Any, ...], metadata: Metadata):
        self._stubs = stubs
        self._metadata = metadata

    def __getattr__(self, name: str) -> Callable[..., Any]:
        [rpc] = [getattr(stub, name) for stub in self._stubs if hasattr(stub, name)]
        return lambda **fields: rpc(_REQUEST_CLASSES[name](**fields), metadata=self._metadata)


@dataclass
class Platform:
    """One server, its stubs, and tokens for any caller."""

    address: str
    key: DevelopmentKey
    settings: ServerProcessSettings
    channel: grpc.aio.Channel
    tokens: dict[tuple[object, ...], str] = field(default_factory=dict)
    #: Set, it stops the server as a SIGTERM does.
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.webhooks = webhook_config_service_pb2_grpc.WebhookConfigServiceStub(self.channel)
        self.events = event_service_pb2_grpc.EventServiceStub(self.channel)
        self.deliveries = delivery_service_pb2_grpc.DeliveryServiceStub(self.channel)
        self.admin = admin_service_pb2_grpc.AdminServiceStub(self.channel)

    def calls(self, metadata: Metadata) -> Calls:
        return Calls((self.webhooks, self.events, self.deliveries, self.admin), metadata)

    def as_merchant(self, merchant_id: str = "m_1") -> Calls:
        """Calls of a merchant's gateway."""
        return self.calls(self.merchant(merchant_id))

    def as_producer(self) -> Calls:
        """Calls of a platform service that publishes for every merchant."""
        return self.calls(self.producer())

    def as_operator(self) -> Calls:
        return self.calls(self.operator())

    def token(self, *scopes: str, merchant_id: str | None = None, **claims: Any) -> str:
        key = (scopes, merchant_id, *claims.items())
        if key not in self.tokens:
            self.tokens[key] = mint_token(
                self.key.private_key_file,
                issuer=claims.get("issuer", ISSUER),
                audience=claims.get("audience", "postrider"),
                subject=claims.get("subject", "tester"),
                scopes=scopes,
                merchant_id=merchant_id,
                lifetime=claims.get("lifetime", timedelta(minutes=10)),
            )
        return self.tokens[key]

    def merchant(self, merchant_id: str = "m_1") -> Metadata:
        """Metadata of a merchant's gateway."""
        return bearer(self.token("webhooks:manage", merchant_id=merchant_id))

    def producer(self) -> Metadata:
        """Metadata of a platform service that publishes for every merchant."""
        return bearer(self.token("events:publish"))

    def operator(self) -> Metadata:
        """Metadata of an operator."""
        return bearer(self.token("webhooks:admin"))

    async def register(
        self,
        url: str,
        merchant_id: str = "m_1",
        events: tuple[str, ...] = ("payment.succeeded",),
        **fields: Any,
    ) -> webhook_config_service_pb2.CreateWebhookConfigResponse:
        """Create a webhook config."""
        config = webhook_config_pb2.WebhookConfig(url=url, events=events, **fields)
        response: webhook_config_service_pb2.CreateWebhookConfigResponse
        response = await self.as_merchant(merchant_id).CreateWebhookConfig(webhook_config=config)
        return response

    async def publish(
        self, payload: str = "{}", merchant_id: str = "m_1", **fields: Any
    ) -> event_service_pb2.PublishEventResponse:
        """Publish one event."""
        fields.setdefault("type", "payment.succeeded")
        event = event_pb2.EventInput(merchant_id=merchant_id, payload_text=payload, **fields)
        response: event_service_pb2.PublishEventResponse
        response = await self.as_producer().PublishEvent(event=event)
        return response

    async def publish_many(self, count: int, merchant_id: str = "m_1", **fields: Any) -> list[str]:
        """Publish this many equal events in one call. Returns their ids."""
        fields = {"type": "payment.succeeded", "payload_text": '{"amount": 1}', **fields}
        event = event_pb2.EventInput(merchant_id=merchant_id, **fields)
        response = await self.as_producer().PublishEvents(events=[event] * count)
        return [result.event.id for result in response.results]

    async def update(
        self, webhook_id: str, mask: Iterable[str] | None = None, **fields: Any
    ) -> webhook_config_pb2.WebhookConfig:
        """Change fields of a webhook config of m_1. The mask is by default all but `etag`."""
        paths = [name for name in fields if name != "etag"] if mask is None else list(mask)
        config: webhook_config_pb2.WebhookConfig
        response = await self.as_merchant().UpdateWebhookConfig(
            webhook_config=webhook_config_pb2.WebhookConfig(id=webhook_id, **fields),
            update_mask=FieldMask(paths=paths),
        )
        config = response.webhook_config
        return config

    async def delete(self, webhook_id: str, merchant_id: str = "m_1") -> int:
        """Delete a webhook config. Returns the number of cancelled deliveries."""
        response = await self.as_merchant(merchant_id).DeleteWebhookConfig(id=webhook_id)
        cancelled: int = response.cancelled_deliveries
        return cancelled

    async def config(self, webhook_id: str) -> webhook_config_pb2.WebhookConfig:
        """Read a webhook config of m_1."""
        config: webhook_config_pb2.WebhookConfig
        config = (await self.as_merchant().GetWebhookConfig(id=webhook_id)).webhook_config
        return config

    async def reactivate(self, webhook_id: str) -> webhook_config_pb2.WebhookConfig:
        config: webhook_config_pb2.WebhookConfig
        config = (await self.as_operator().ReactivateWebhookConfig(id=webhook_id)).webhook_config
        return config

    async def list_deliveries(self) -> list[delivery_pb2.Delivery]:
        """Return the deliveries of m_1 with their attempts, at most 100."""
        return list((await self.as_merchant().ListDeliveries(page_size=100)).deliveries)

    @asynccontextmanager
    async def engine(
        self, *, retention: Any = None, **delivery_settings: Any
    ) -> AsyncIterator[None]:
        """A delivery engine beside the server, drained at the end; `retention` are its settings."""
        settings = EngineProcessSettings(
            database=self.settings.database,
            encryption=self.settings.encryption,
            egress=self.settings.egress,
            delivery=DeliverySettings(**{"delivery_metrics_address": None, **delivery_settings}),
            logs=self.settings.logs,
            traces=self.settings.traces,
            retention=retention,
        )
        stop, ready = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(deliver(settings, stop, ready.set))
        try:
            await _until_ready(ready, task)
            yield
        finally:
            stop.set()
            await task


def bearer(token: str) -> Metadata:
    return [("authorization", f"Bearer {token}")]


def serve_settings(
    database_url: str,
    ca_file: Path,
    key: DevelopmentKey,
    *,
    tls: TlsSettings | None = None,
    egress: EgressSettings | None = None,
    logs: LogSettings | None = None,
    traces: TraceSettings | None = None,
    **server_settings: Any,
) -> ServerProcessSettings:
    """Settings of a server on a free port. By default receivers on loopback are allowed."""
    return ServerProcessSettings(
        database=DatabaseSettings(database_url=SecretStr(database_url)),
        encryption=EncryptionSettings(encryption_keys=SecretStr(ENCRYPTION_KEYS)),
        egress=egress
        or EgressSettings(allowed_cidrs="127.0.0.0/8", allowed_ports="1-65535", ca_file=ca_file),
        server=ServerSettings(
            **{
                "listen_address": "127.0.0.1:0",
                "admin_address": None,
                "server_metrics_address": None,
                **server_settings,
            }
        ),
        auth=AuthSettings(jwt_issuer=ISSUER, jwt_public_key_file=key.public_key_file),
        logs=logs or LogSettings(),
        traces=traces or TraceSettings(),
        tls=tls,
    )


@asynccontextmanager
async def running_platform(
    database_url: str,
    ca_file: Path,
    directory: Path,
    *,
    tls: TlsSettings | None = None,
    channel_credentials: grpc.ChannelCredentials | None = None,
    egress: EgressSettings | None = None,
    **server_settings: Any,
) -> AsyncIterator[Platform]:
    """A server with such settings, as long as the context lasts.

    With `tls` the platform's own channel needs credentials.
    """
    key = ensure_development_key(directory / "keys")
    settings = serve_settings(database_url, ca_file, key, tls=tls, egress=egress, **server_settings)
    stop, ready = asyncio.Event(), asyncio.Event()
    ports: list[int] = []

    def on_ready(port: int) -> None:
        ports.append(port)
        ready.set()

    task = asyncio.create_task(serve(settings, stop, on_ready))
    try:
        await _until_ready(ready, task)
        address = f"127.0.0.1:{ports[0]}"
        channel = (
            grpc.aio.insecure_channel(address)
            if channel_credentials is None
            else grpc.aio.secure_channel(address, channel_credentials)
        )
        async with channel:
            yield Platform(address, key, settings, channel, stop=stop)
    finally:
        stop.set()
        await task


async def _until_ready(ready: asyncio.Event, task: asyncio.Task[None]) -> None:
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait({waiting, task}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        task.result()
