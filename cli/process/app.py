"""Wires the services of the gRPC server from the parts that `server.py` opens."""

from dataclasses import dataclass
from functools import partial

from core.encryption import KeyRing
from core.logs import SuccessSampling
from core.postgres.protocols import Pool
from core.settings import (
    DatabaseSettings,
    EgressSettings,
    EncryptionSettings,
    LogSettings,
    TraceSettings,
)
from core.tracing import Tracer
from core.urls import UrlPolicy
from delivery.http.client import WebhookClient
from delivery.ping import ping
from server.admin.service import AdminService
from server.app import App
from server.auth.jwks import KeySource
from server.auth.rate_limits import PingSlots, StreamSlots
from server.auth.tokens import TokenVerifier
from server.database import Sessions
from server.deliveries.service import DeliveryService
from server.deliveries.tail import Tail
from server.event_types.store import EventTypes
from server.events.ingest import Ingest
from server.events.service import EventService
from server.metrics import ServerMetrics
from server.notify import Notifier
from server.rpc.audit_refusals import RefusalAudit
from server.rpc.report import RpcReports
from server.settings import AuthSettings, ServerSettings, TlsSettings
from server.webhooks.service import WebhookConfigService


@dataclass(frozen=True)
class ServerProcessSettings:
    """All settings of the gRPC server."""

    database: DatabaseSettings
    encryption: EncryptionSettings
    egress: EgressSettings
    server: ServerSettings
    auth: AuthSettings
    logs: LogSettings
    traces: TraceSettings
    #: None selects plain text.
    tls: TlsSettings | None = None


@dataclass(frozen=True)
class ServerParts:
    """The parts that the services share."""

    pool: Pool
    sessions: Sessions
    client: WebhookClient
    keyring: KeyRing
    url_policy: UrlPolicy
    token_keys: KeySource
    notifier: Notifier
    tail: Tail
    metrics: ServerMetrics
    tracer: Tracer | None


def build_app(settings: ServerProcessSettings, parts: ServerParts) -> App:
    """Return the server, not started yet."""
    limits, auth = settings.server, settings.auth
    event_types = EventTypes(parts.pool)
    stream_slots = StreamSlots(limits.max_streams_per_merchant)
    return App(
        limits,
        TokenVerifier(
            parts.token_keys,
            issuer=auth.jwt_issuer,
            audience=auth.jwt_audience,
            max_lifetime_seconds=auth.jwt_max_lifetime_seconds,
        ),
        tls=settings.tls,
        refusals=RefusalAudit(parts.sessions),
        reports=RpcReports(parts.metrics, SuccessSampling(settings.logs), parts.tracer),
        webhook_configs=WebhookConfigService(
            sessions=parts.sessions,
            pool=parts.pool,
            event_types=event_types,
            keyring=parts.keyring,
            pinger=partial(ping, parts.client, parts.url_policy, limits.ping_timeout_seconds),
            url_policy=parts.url_policy,
            ping_slots=PingSlots(limits.max_pings_per_merchant),
            max_webhooks_per_merchant=limits.max_webhooks_per_merchant,
        ),
        events=EventService(
            Ingest(
                parts.pool, event_types, parts.notifier, limits.max_payload_bytes, parts.metrics
            ),
            parts.pool,
            stream_slots,
        ),
        deliveries=DeliveryService(
            parts.pool,
            parts.sessions,
            parts.notifier,
            tail=parts.tail,
            metrics=parts.metrics,
            keyring=parts.keyring,
            stream_slots=stream_slots,
            watch_keep_alive_seconds=limits.watch_keep_alive_seconds,
            watch_backlog=limits.watch_backlog,
        ),
        admin=AdminService(parts.sessions, parts.pool, parts.notifier, event_types),
    )
