"""PostriderClient: one channel to Postrider and the typed stubs of every service on it."""

from types import TracebackType
from typing import Self

import grpc

from postrider.v1 import (
    admin_service_pb2_grpc,
    delivery_service_pb2_grpc,
    event_pb2,
    event_service_pb2,
    event_service_pb2_grpc,
    webhook_config_service_pb2_grpc,
)
from postrider_client.calls import CallPolicy, StreamStreamCalls, UnaryCalls, UnaryStreamCalls
from postrider_client.home_loop import HomeLoop
from postrider_client.publisher import Published, Publisher
from postrider_client.stream import StreamTransport
from postrider_client.tokens import TokenCache, TokenSource
from postrider_client.transport import UnaryTransport

_OPTIONS = [
    # Finds a peer that vanished behind a dead network path; the server allows one in 20 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    # A token may have 4 KiB, and an error's details come twice.
    ("grpc.max_metadata_size", 16 * 1024),
]


class PostriderClient:
    """Calls Postrider; `async with` closes it. One is enough for an event loop.

    `events`, `webhooks`, `deliveries` and `admin` are the generated stubs: every call through them
    carries a token and a deadline, and reads and publishes are repeated while the server is away.
    """

    def __init__(
        self,
        address: str,
        token_source: TokenSource | None,
        *,
        tls: bool | grpc.ChannelCredentials = True,
        policy: CallPolicy | None = None,
        refresh_ahead_seconds: float = 60.0,
    ):
        """`tls` is True for the system's authorities, credentials of your own, or False for
        plain text, which shows the token to whoever is on the way: for loopback and meshes.
        Without a `token_source` those credentials have to hold a certificate that Postrider
        knows; ValueError when there are none. WrongEventLoop outside of a running loop."""
        if token_source is None and isinstance(tls, bool):
            raise ValueError(
                "without a token_source, tls must be channel credentials with a certificate"
            )
        policy = policy or CallPolicy()
        self._home = HomeLoop()
        self._policy = policy
        self._tokens: TokenCache | None = None
        if token_source is not None:
            self._tokens = TokenCache(token_source, refresh_ahead_seconds=refresh_ahead_seconds)
        interceptors: list[grpc.aio.ClientInterceptor] = [
            kind(self._tokens, policy) for kind in (UnaryCalls, UnaryStreamCalls, StreamStreamCalls)
        ]
        if tls is False:
            self._channel = grpc.aio.insecure_channel(address, _OPTIONS, interceptors=interceptors)
        else:
            credentials = grpc.ssl_channel_credentials() if tls is True else tls
            self._channel = grpc.aio.secure_channel(
                address, credentials, _OPTIONS, interceptors=interceptors
            )
        self.events = self._home.keep(event_service_pb2_grpc.EventServiceStub(self._channel))
        self.webhooks = self._home.keep(
            webhook_config_service_pb2_grpc.WebhookConfigServiceStub(self._channel)
        )
        self.deliveries = self._home.keep(
            delivery_service_pb2_grpc.DeliveryServiceStub(self._channel)
        )
        self.admin = self._home.keep(admin_service_pb2_grpc.AdminServiceStub(self._channel))

    async def publish(
        self, event: event_pb2.EventInput, *, timeout: float | None = None
    ) -> Published:
        """Publish one event and wait until it is durable."""
        request = event_service_pb2.PublishEventRequest(event=event)
        response = await self.events.PublishEvent(request, timeout=timeout)
        return Published(response.event, response.duplicate)

    def publisher(
        self,
        *,
        stream: bool = True,
        linger_ms: float = 5.0,
        max_batch: int = 500,
        max_in_flight: int = 8,
        max_pending: int = 10_000,
        delivery_seconds: float = 60.0,
    ) -> Publisher:
        """A publisher on this client; close it first. Without `stream` it calls PublishEvents."""
        self._home.require()
        unary = UnaryTransport(self.events)
        return Publisher(
            StreamTransport(self.events, unary, self._policy) if stream else unary,
            linger_ms=linger_ms,
            max_batch=max_batch,
            max_in_flight=max_in_flight,
            max_pending=max_pending,
            delivery_seconds=delivery_seconds,
        )

    async def close(self) -> None:
        """End the calls that are under way, and the connection."""
        self._home.require()
        await self._channel.close()
        if self._tokens is not None:
            await self._tokens.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
