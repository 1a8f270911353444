"""Builds the gRPC server: services, dispatch, connection limits, health and reflection."""

from collections.abc import Iterable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from core.errors import ConfigurationError
from postrider.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    delivery_service_pb2,
    delivery_service_pb2_grpc,
    event_service_pb2,
    event_service_pb2_grpc,
    webhook_config_service_pb2,
    webhook_config_service_pb2_grpc,
)
from server.admin.service import AdminService
from server.admin_listener import AdminListener
from server.auth.certificates import CertificateCallers
from server.auth.rate_limits import CallerLimits
from server.auth.tokens import TokenVerifier
from server.deliveries.service import DeliveryService
from server.events.service import EventService
from server.rpc.audit_refusals import RefusalAudit
from server.rpc.authenticate import Authentication
from server.rpc.dispatch import Calls
from server.rpc.report import RpcReports
from server.rpc.tls import listeners
from server.settings import ServerSettings, TlsSettings
from server.webhooks.service import WebhookConfigService

_SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name]
    for module, name in (
        (webhook_config_service_pb2, "WebhookConfigService"),
        (event_service_pb2, "EventService"),
        (delivery_service_pb2, "DeliveryService"),
        (admin_service_pb2, "AdminService"),
    )
)
SERVICE_NAMES = tuple(service.full_name for service in _SERVICES)

# Probes of an orchestrator have no token.
_HEALTH_METHODS = frozenset(
    {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/List"}
)
# Clients try v1 first, and v1alpha only if v1 is unimplemented.
_REFLECTION_METHODS = frozenset(
    f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
    for version in ("v1", "v1alpha")
)

#: Every served method as /package.Service/Method, and whether it is a stream.
METHODS = {
    f"/{service.full_name}/{method.name}": method.client_streaming or method.server_streaming
    for service in (*_SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"])
    for method in service.methods
} | dict.fromkeys(_REFLECTION_METHODS, True)

#: A health service for liveness probes. It ignores the database, which a restart does not fix.
LIVENESS = "liveness"


class _Services:
    """Collects the generic handlers that generated code adds to a server.

    Generated code also registers each method. grpc.aio waits for registered methods one by one, so
    every call would pay for all of them.
    """

    def __init__(self) -> None:
        self.handlers: list[grpc.GenericRpcHandler] = []

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        self.handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """Ignore registered methods."""


class App:
    """The server and its health. `port` is known after start(), and `mtls_port` if there is one."""

    def __init__(
        self,
        settings: ServerSettings,
        verifier: TokenVerifier,
        *,
        tls: TlsSettings | None,
        refusals: RefusalAudit,
        reports: RpcReports,
        webhook_configs: WebhookConfigService,
        events: EventService,
        deliveries: DeliveryService,
        admin: AdminService,
    ):
        self._settings = settings
        self._tls = tls
        self._events = events
        public = _HEALTH_METHODS | (_REFLECTION_METHODS if settings.reflection else frozenset())
        scopes = tls.certificate_scopes if tls else ()
        authentication = Authentication(
            verifier,
            CallerLimits(settings),
            public,
            CertificateCallers(scopes) if scopes else None,
        )
        self._health = Health(("", LIVENESS, *SERVICE_NAMES))
        services: Any = _Services()
        event_service_pb2_grpc.add_EventServiceServicer_to_server(events, services)
        webhook_config_service_pb2_grpc.add_WebhookConfigServiceServicer_to_server(
            webhook_configs, services
        )
        delivery_service_pb2_grpc.add_DeliveryServiceServicer_to_server(deliveries, services)
        admin_service_pb2_grpc.add_AdminServiceServicer_to_server(admin, services)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, services)
        if settings.reflection:
            names = (*SERVICE_NAMES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(  # type: ignore[no-untyped-call]
                reflection.aio.ReflectionServicer((*names, reflection.SERVICE_NAME)), services
            )
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=settings.max_concurrent_rpcs,
            options=channel_options(settings),
        )
        self._server.add_generic_rpc_handlers(
            [Calls(services.handlers, authentication, refusals, reports)]
        )
        self._admin = AdminListener(settings, self._health, SERVICE_NAMES)
        self.port = 0
        self.mtls_port = 0

    @property
    def admin_port(self) -> int:
        """Port of the operators' listener, or 0 if it is off."""
        return self._admin.port

    async def start(self) -> None:
        """Listen and serve. Raises ConfigurationError if an address is not available."""
        self.port, *others = [
            self._listen(address, credentials)
            for address, credentials in listeners(self._settings.listen_address, self._tls)
        ]
        self.mtls_port = others[0] if others else 0
        await self._health.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        await self.set_serving(True)
        await self._admin.start()
        await self._server.start()

    def _listen(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        try:
            if credentials is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, credentials)
        except RuntimeError:
            raise ConfigurationError(
                f"cannot listen on {address}: stop what uses it, or set WEBHOOK_LISTEN_ADDRESS or "
                "WEBHOOK_MTLS_LISTEN_ADDRESS"
            ) from None

    async def set_serving(self, serving: bool) -> None:
        """Set the health of every service. stop() overrides it."""
        status = health_pb2.HealthCheckResponse
        for name in ("", *SERVICE_NAMES):
            await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def stop(self) -> None:
        """Report NOT_SERVING, then let running calls finish."""
        await self._health.enter_graceful_shutdown()
        self._events.drain()
        await self._server.stop(self._settings.server_drain_seconds)
        await self._admin.stop()


type Option = tuple[str, int]


def channel_options(settings: ServerSettings) -> list[Option]:
    """Return the limits of one connection to the main listener, as options of grpc.aio.server.

    Connections are closed after a while, so that clients find new servers. Batches that a stream
    had not acknowledged are sent again. Pings are limited.
    """
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_concurrent_streams", settings.max_streams_per_connection),
        # gRPC varies the age by a tenth, so that clients do not all reconnect at once.
        ("grpc.max_connection_age_ms", _ms(settings.max_connection_age_seconds)),
        ("grpc.max_connection_age_grace_ms", _ms(settings.max_connection_grace_seconds)),
        ("grpc.max_connection_idle_ms", _ms(settings.max_connection_idle_seconds)),
        # Detects vanished peers, whose streams would otherwise stay open for hours.
        ("grpc.keepalive_time_ms", _ms(settings.keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", _ms(settings.keepalive_timeout_seconds)),
        # The longer one of the two applies, and the default of this one is a minute.
        ("grpc.http2.ping_timeout_ms", _ms(settings.keepalive_timeout_seconds)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", _ms(settings.min_ping_interval_seconds)),
        ("grpc.http2.max_ping_strikes", settings.max_ping_strikes),
        # Without it, a client with an idle connection may ping once in two hours.
        ("grpc.keepalive_permit_without_calls", 1),
        # Otherwise two servers on one port would silently share the calls.
        ("grpc.so_reuseport", 0),
        # A token may have 4 KiB, and the default refuses metadata above 8 KiB at random.
        ("grpc.max_metadata_size", 16 * 1024),
        ("grpc.absolute_max_metadata_size", 32 * 1024),
        ("grpc.enable_channelz", int(settings.admin_address is not None)),
    ]


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


# The type stubs lack the messages of List.
pb: Any = health_pb2


class Health(health_aio.HealthServicer):
    """grpc.health.v1 with List, which the library lacks. The name "" is the whole server."""

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self._names = names

    async def List(self, _request: Any, context: Any) -> Any:  # noqa: N802 - as gRPC names it
        """Return the health of all services."""
        response = pb.HealthListResponse()
        for name in self._names:
            asked = pb.HealthCheckRequest(service=name)
            response.statuses[name].CopyFrom(await self.Check(asked, context))
        return response
