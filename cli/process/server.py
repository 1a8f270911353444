"""Opens the parts of the gRPC server, and runs it until a stop event."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

import structlog

from cli.metrics.http import MetricsAddress, serve_metrics
from cli.metrics.server import ServerCollector
from cli.process.app import ServerParts, ServerProcessSettings, build_app
from cli.process.jwks_fetch import key_set_fetch
from cli.process.tracing import open_tracer
from cli.startup import checked_pool, open_receiver_client, url_policy, warn_of_allowed_cidrs
from core.encryption import load_keyring
from core.file_secrets import reload_periodically
from core.postgres.pool import close_soon
from core.tasks import cancel_and_wait
from server.app import METHODS
from server.auth.jwks import JwksKeys, KeySource, PemKeys
from server.database import DatabaseWatch, open_sessions
from server.deliveries.tail import Tail
from server.metrics import ServerMetrics
from server.notify import Notifier
from server.settings import AuthSettings

log = structlog.get_logger()


async def serve(
    settings: ServerProcessSettings,
    stop: asyncio.Event,
    ready: Callable[[int], None] = lambda _: None,
) -> None:
    """Serve until `stop`, then let running calls finish. `ready` gets the port."""
    async with AsyncExitStack() as stack:
        parts = await _open_parts(settings, stack)
        app = build_app(settings, parts)

        async def report_database(is_up: bool) -> None:
            parts.metrics.database_up = is_up
            await app.set_serving(is_up)

        watch = DatabaseWatch(
            settings.database,
            report_database,
            interval_seconds=settings.server.health_interval_seconds,
        )
        await stack.enter_async_context(
            serve_metrics(
                MetricsAddress.from_settings(settings.server, "server_metrics_address"),
                ServerCollector(parts.metrics, parts.pool, parts.token_keys),
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
            notifying = background.create_task(parts.notifier.run())
            watching = background.create_task(watch.run())
            tailing = background.create_task(parts.tail.run())
            reloading = background.create_task(reload_periodically(parts.keyring.ciphers))
            ready(app.port)
            await stop.wait()
            log.info("stopping")
            # First, because a returning database would otherwise set the health to SERVING.
            watching.cancel()
            parts.tail.stop()
            await app.stop()
            await cancel_and_wait((notifying, watching, tailing, reloading))


async def _open_parts(settings: ServerProcessSettings, stack: AsyncExitStack) -> ServerParts:
    keyring = load_keyring(settings.encryption)
    policy = url_policy(settings.egress)
    tracer = await stack.enter_async_context(open_tracer(settings.traces, "postrider-server"))
    # Most connections are for publishing, the rest for other calls, so that neither starves.
    pool_size = settings.database.database_pool_size
    rest = max(pool_size * 2 // 5, 1)
    pool = await stack.enter_async_context(
        checked_pool(settings.database, "postrider-server", max(pool_size - rest, 1), keyring)
    )
    warn_of_allowed_cidrs(settings.egress)
    sessions = open_sessions(settings.database, rest)
    stack.push_async_callback(close_soon, sessions.kw["bind"].dispose)
    return ServerParts(
        pool=pool,
        sessions=sessions,
        client=await stack.enter_async_context(open_receiver_client(settings.egress, policy)),
        keyring=keyring,
        url_policy=policy,
        token_keys=await _token_keys(settings.auth, stack),
        notifier=Notifier(pool),
        tail=Tail(pool),
        metrics=ServerMetrics(METHODS),
        tracer=tracer,
    )


async def _token_keys(settings: AuthSettings, stack: AsyncExitStack) -> KeySource:
    if settings.jwt_public_key_file is not None:
        return PemKeys(settings.jwt_public_key_file)
    fetch = await stack.enter_async_context(key_set_fetch())
    return JwksKeys(settings.jwt_jwks_url or "", fetch)
