"""The processes of production: `postrider server` and `postrider delivery`."""

import asyncio
import sys
from functools import partial

import click
import uvloop

from cli.settings import load
from cli.startup import exclude_modules_from_gc
from core.logs import configure_logs
from core.settings import (
    DatabaseSettings,
    EgressSettings,
    EncryptionSettings,
    LogSettings,
    RetentionSettings,
    TraceSettings,
)
from delivery.settings import MAX_PROCESSES, DeliverySettings
from server.settings import AuthSettings, ServerSettings, TlsSettings


@click.command()
def server() -> None:
    """Serve the gRPC API until SIGTERM.

    Needs WEBHOOK_DATABASE_URL, WEBHOOK_ENCRYPTION_KEYS, WEBHOOK_JWT_ISSUER, and
    WEBHOOK_JWT_JWKS_URL or WEBHOOK_JWT_PUBLIC_KEY_FILE. Any number may run on one database. After
    SIGTERM, health is NOT_SERVING and running calls finish.
    """
    from cli.process.app import ServerProcessSettings
    from cli.process.server import serve
    from cli.process.signals import stop_on_signals

    configure_logs(load(LogSettings))
    settings = ServerProcessSettings(
        database=load(DatabaseSettings),
        encryption=load(EncryptionSettings),
        egress=load(EgressSettings),
        server=load(ServerSettings),
        auth=load(AuthSettings),
        logs=load(LogSettings),
        traces=load(TraceSettings),
        tls=load(TlsSettings),
    )

    async def run() -> None:
        await serve(settings, stop_on_signals())

    exclude_modules_from_gc()
    uvloop.run(run())


@click.command()
@click.option(
    "--processes",
    type=click.IntRange(1, MAX_PROCESSES),
    help="Engine processes, instead of WEBHOOK_DELIVERY_PROCESSES.",
)
@click.option("--lifeline", type=int, hidden=True, help="For an engine that a supervisor starts.")
def delivery(processes: int | None, lifeline: int | None) -> None:
    """Deliver webhooks until SIGTERM.

    Needs WEBHOOK_DATABASE_URL and WEBHOOK_ENCRYPTION_KEYS. Any number may run on one database,
    also on several machines. After SIGTERM it claims nothing and finishes open attempts. After a
    kill, other engines repeat its open attempts when their leases end.

    One engine uses one core at most. With --processes, a supervisor starts that many and restarts
    those that end. They drain after SIGTERM, and when the supervisor is killed.
    """
    from cli.metrics.http import MetricsAddress
    from cli.metrics.supervisor import answer_supervisor
    from cli.process.delivery import EngineProcessSettings, deliver
    from cli.process.signals import stop_on_signals
    from cli.process.supervisor import supervise
    from cli.process.supervisor_pipe import EngineEnd

    configure_logs(load(LogSettings))
    settings = EngineProcessSettings(
        database=load(DatabaseSettings),
        encryption=load(EncryptionSettings),
        egress=load(EgressSettings),
        delivery=load(DeliverySettings),
        logs=load(LogSettings),
        traces=load(TraceSettings),
        retention=load(RetentionSettings),
    )
    processes = processes or settings.delivery.delivery_processes
    if processes > 1:
        metrics_address = MetricsAddress.from_settings(
            settings.delivery, "delivery_metrics_address"
        )
        sys.exit(asyncio.run(supervise(processes, metrics_address)))

    async def run() -> None:
        stop = stop_on_signals()
        if lifeline is None:
            await deliver(settings, stop)
        else:
            end = EngineEnd(lifeline)
            end.forward_stop(stop)
            await deliver(settings, stop, end.report_ready, partial(answer_supervisor, end))

    exclude_modules_from_gc()
    uvloop.run(run())
