"""Wires the gRPC server from settings, and runs it until a stop event."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

import structlog

from cli.metrics.http import Place, listening
from cli.metrics.server import ServerCollector
from cli.process.jwks_fetch import key_set_fetch
from cli.process.tracing import open_tracer
from cli.startup import require_encryption_keys, require_schema, url_policy, warn_of_allowed_cidrs
from core.encryption import load_keyring
from core.file_secrets import reload_periodically
from core.logs import SuccessSampling
from core.postgres.pool import close_soon, open_pool
from core.settings import (
    DatabaseSettings,
    EgressSettings,
    EncryptionSettings,
    LogSettings,
    TraceSettings,
)
from core.tasks import cancel_and_wait
from delivery.http.client import open_client
from delivery.ping import ping
from server.admin.service import AdminService
from server.app import METHODS, App
from server.auth.jwks import JwksKeys, KeySource, PemKeys
from server.auth.rate_limits import PingSlots, StreamSlots
from server.auth.tokens import TokenVerifier
from server.database import DatabaseWatch, open_sessions
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

log = structlog.get_logger()


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


async def serve(
    settings: ServerProcessSettings,
    stop: asyncio.Event,
    ready: Callable[[int], None] = lambda _: None,
) -> None:
    """Serve until `stop`, then let running calls finish. `ready` gets the port."""
    keyring = load_keyring(settings.encryption)
    policy = url_policy(settings.egress)
    async with AsyncExitStack() as stack:
        tracer = await stack.enter_async_context(open_tracer(settings.traces, "postrider-server"))
        pool_size = settings.database.database_pool_size
        # Most connections are for publishing, the rest for other calls, so that neither starves.
        rest = max(pool_size * 2 // 5, 1)
        pool = await open_pool(settings.database, "postrider-server", max(pool_size - rest, 1))
        stack.push_async_callback(close_soon, pool.close)
        await require_schema(pool)
        await require_encryption_keys(pool, keyring)
        warn_of_allowed_cidrs(settings.egress)
        sessions = open_sessions(settings.database, rest)
        stack.push_async_callback(close_soon, sessions.kw["bind"].dispose)
        receivers = await stack.enter_async_context(
            open_client(
                policy=policy.addresses,
                ca_file=settings.egress.ca_file,
                age_seconds_max=settings.egress.receiver_connection_seconds,
                proxy=settings.egress.secret("egress_proxy"),
            )
        )
        keys = await _keys(settings.auth, stack)
        verifier = TokenVerifier(
            keys,
            issuer=settings.auth.jwt_issuer,
            audience=settings.auth.jwt_audience,
            max_lifetime_seconds=settings.auth.jwt_max_lifetime_seconds,
        )
        event_types = EventTypes(pool)
        notifier = Notifier(pool)
        tail = Tail(pool)
        metrics = ServerMetrics(METHODS)
        stream_slots = StreamSlots(settings.server.max_streams_per_merchant)
        app = App(
            settings.server,
            verifier,
            tls=settings.tls,
            refusals=RefusalAudit(sessions),
            reports=RpcReports(metrics, SuccessSampling(settings.logs), tracer),
            webhook_configs=WebhookConfigService(
                sessions=sessions,
                pool=pool,
                event_types=event_types,
                keyring=keyring,
                pinger=partial(ping, receivers, policy, settings.server.ping_timeout_seconds),
                url_policy=policy,
                ping_slots=PingSlots(settings.server.max_pings_per_merchant),
                max_webhooks_per_merchant=settings.server.max_webhooks_per_merchant,
            ),
            events=EventService(
                Ingest(pool, event_types, notifier, settings.server.max_payload_bytes, metrics),
                pool,
                stream_slots,
            ),
            deliveries=DeliveryService(
                pool,
                sessions,
                notifier,
                tail=tail,
                metrics=metrics,
                keyring=keyring,
                stream_slots=stream_slots,
                watch_keep_alive_seconds=settings.server.watch_keep_alive_seconds,
                watch_backlog=settings.server.watch_backlog,
            ),
            admin=AdminService(sessions, pool, notifier, event_types),
        )

        async def report_database(is_up: bool) -> None:
            metrics.database_up = is_up
            await app.set_serving(is_up)

        watch = DatabaseWatch(
            settings.database,
            report_database,
            interval_seconds=settings.server.health_interval_seconds,
        )
        await stack.enter_async_context(
            listening(
                Place.of(settings.server, "server_metrics_address"),
                ServerCollector(metrics, pool, keys),
            )
        )
        await app.start()
        log.info(
            "serving",
            address=settings.server.listen_address,
            port=app.port,
            tls=settings.tls is not None and settings.tls.tls_certificate_file is not None,
            mtls_port=app.mtls_port or None,
        )
        async with asyncio.TaskGroup() as background:
            notifying = background.create_task(notifier.run())
            watching = background.create_task(watch.run())
            tailing = background.create_task(tail.run())
            reloading = background.create_task(reload_periodically(keyring.ciphers))
            ready(app.port)
            await stop.wait()
            log.info("stopping")
            # First, because a returning database would otherwise set the health to SERVING.
            watching.cancel()
            tail.stop()
            await app.stop()
            await cancel_and_wait((notifying, watching, tailing, reloading))


async def _keys(settings: AuthSettings, stack: AsyncExitStack) -> KeySource:
    if settings.jwt_public_key_file is not None:
        return PemKeys(settings.jwt_public_key_file)
    fetch = await stack.enter_async_context(key_set_fetch())
    return JwksKeys(settings.jwt_jwks_url or "", fetch)
