"""Wires the delivery engine from settings, and runs it until a stop event."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog

from cli.metrics.engine import EngineCollector
from cli.metrics.http import MetricsAddress, serve_metrics
from cli.metrics.process import Metrics
from cli.process.tracing import open_tracer
from cli.startup import (
    checked_pool,
    in_flight_within_file_limit,
    open_receiver_client,
    url_policy,
    warn_of_allowed_cidrs,
)
from core.encryption import load_keyring
from core.file_secrets import reload_periodically
from core.logs import SuccessSampling
from core.retention import run_hourly
from core.settings import (
    DatabaseSettings,
    EgressSettings,
    EncryptionSettings,
    LogSettings,
    RetentionSettings,
    TraceSettings,
)
from delivery.database_stats import DatabaseStats
from delivery.engine import Engine
from delivery.metrics import EngineMetrics
from delivery.report import AttemptReports
from delivery.settings import DeliverySettings

log = structlog.get_logger()


@dataclass(frozen=True)
class EngineProcessSettings:
    """All settings of the delivery engine. Without `retention` it removes no data."""

    database: DatabaseSettings
    encryption: EncryptionSettings
    egress: EgressSettings
    delivery: DeliverySettings
    logs: LogSettings
    traces: TraceSettings
    retention: RetentionSettings | None


async def deliver(
    settings: EngineProcessSettings,
    stop: asyncio.Event,
    ready: Callable[[], None] = lambda: None,
    publish: Callable[[Metrics], AbstractAsyncContextManager[None]] | None = None,
) -> None:
    """Deliver until `stop`, then finish open attempts and release all leases.

    `publish` replaces the metrics listener of the settings.
    """
    keyring = load_keyring(settings.encryption)
    policy = url_policy(settings.egress)
    async with AsyncExitStack() as stack:
        tracer = await stack.enter_async_context(open_tracer(settings.traces, "postrider-delivery"))
        pool_size = settings.database.database_pool_size
        pool = await stack.enter_async_context(
            checked_pool(settings.database, "postrider-delivery", pool_size, keyring)
        )
        warn_of_allowed_cidrs(settings.egress)
        in_flight = in_flight_within_file_limit(settings.delivery.max_in_flight, pool_size)
        # Idle connections take the other half of the files.
        client = await stack.enter_async_context(
            open_receiver_client(settings.egress, policy, idle_max=in_flight)
        )
        bounded = settings.delivery.model_copy(update={"max_in_flight": in_flight})
        metrics = EngineMetrics()
        reports = AttemptReports(
            SuccessSampling(settings.logs),
            tracer,
            send_traceparent=settings.traces.send_traceparent,
        )
        engine = Engine(bounded, pool, client, keyring, policy, metrics=metrics, reports=reports)
        stats = DatabaseStats(pool)
        stack.push_async_callback(stats.close)
        publish = publish or partial(
            serve_metrics,
            MetricsAddress.from_settings(settings.delivery, "delivery_metrics_address"),
        )
        await stack.enter_async_context(publish(EngineCollector(metrics, pool, stats)))
        async with asyncio.TaskGroup() as group:
            running = group.create_task(engine.run())
            stopping = group.create_task(stop.wait())
            background: set[asyncio.Task[Any]] = {
                stopping,
                group.create_task(reload_periodically(keyring.ciphers)),
            }
            if settings.retention is not None:
                retaining = run_hourly(settings.database, settings.retention, pool)
                background.add(group.create_task(retaining))
            log.info("delivering")
            ready()
            await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
            log.info("stopping")
            engine.stop()
            for task in background:
                task.cancel()
