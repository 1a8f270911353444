"""PostriderClient: one channel to Postrider with the typed stubs of all services."""

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
from postrider_client.calls import (
    BidirectionalStreamInterceptor,
    CallPolicy,
    ResponseStreamInterceptor,
    UnaryInterceptor,
)
from postrider_client.loop_guard import LoopGuard
from postrider_client.publisher import Published, Publisher
from postrider_client.stream import StreamTransport
from postrider_client.tokens import TokenCache, TokenSource
from postrider_client.transport import UnaryTransport

_OPTIONS = [
    # Detects a dead network path. The server allows one ping per 20 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    # A token may have 4 KiB, and the details of an error are sent twice.
    ("grpc.max_metadata_size", 16 * 1024),
]


class PostriderClient:
    """Calls Postrider. Use one client per event loop, with `async with`.

    `events`, `webhooks`, `deliveries` and `admin` are the generated stubs. Each call through them
    gets a token and a deadline. Reads and publishes are repeated while the server is unavailable.
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
        """Create a client inside a running event loop.

        `tls` is True for the system's certificate authorities, or your own channel credentials.
        False is plain text, which exposes the token: only for loopback and service meshes. Without
        a `token_source`, `tls` must be credentials with a client certificate.

        Raises ValueError without token and credentials, and WrongEventLoop without a running loop.
        """
        if token_source is None and isinstance(tls, bool):
            raise ValueError(
                "without a token_source, tls must be channel credentials with a certificate"
            )
        policy = policy or CallPolicy()
        self._loop_guard = LoopGuard()
        self._policy = policy
        self._tokens: TokenCache | None = None
        if token_source is not None:
            self._tokens = TokenCache(token_source, refresh_ahead_seconds=refresh_ahead_seconds)
        interceptors: list[grpc.aio.ClientInterceptor] = [
            UnaryInterceptor(self._tokens, policy),
            ResponseStreamInterceptor(self._tokens, policy),
            BidirectionalStreamInterceptor(self._tokens, policy),
        ]
        if tls is False:
            self._channel = grpc.aio.insecure_channel(address, _OPTIONS, interceptors=interceptors)
        else:
            credentials = grpc.ssl_channel_credentials() if tls is True else tls
            self._channel = grpc.aio.secure_channel(
                address, credentials, _OPTIONS, interceptors=interceptors
            )
        self.events = self._loop_guard.guard(event_service_pb2_grpc.EventServiceStub(self._channel))
        self.webhooks = self._loop_guard.guard(
            webhook_config_service_pb2_grpc.WebhookConfigServiceStub(self._channel)
        )
        self.deliveries = self._loop_guard.guard(
            delivery_service_pb2_grpc.DeliveryServiceStub(self._channel)
        )
        self.admin = self._loop_guard.guard(admin_service_pb2_grpc.AdminServiceStub(self._channel))

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
        """Return a publisher on this client. Close it before the client.

        With `stream` it uses StreamEvents, otherwise PublishEvents.
        """
        self._loop_guard.check()
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
        """Cancel running calls and close the connection."""
        self._loop_guard.check()
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
