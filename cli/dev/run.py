"""Runs `postrider run` and `demo`: all processes on this machine, and a first delivery."""

import asyncio
import secrets
import sys
import tempfile
import time
from collections.abc import Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import uvloop

from cli.authority import AUTHORITY_FILE, ensure_authority
from cli.dev.demo import DemoMerchant, DemoResult, play
from cli.dev.demo_receiver import Receipt, receiving
from cli.dev.platform import (
    LocalPlatform,
    local_database,
    make_directory,
    running_platform,
)
from cli.process.signals import stop_on_signals
from cli.settings import LocalSettings, load
from core.logs import configure_logs
from core.settings import DatabaseSettings, LogSettings, RetentionSettings
from server.settings import ServerSettings

MERCHANT_ID = "demo-merchant"


def run_everything(events: int) -> None:
    """Start all processes, play the demo, and run until Ctrl-C."""
    settings = load(LocalSettings)
    directory = make_directory(settings)
    with ExitStack() as stack:
        log = stack.enter_context((directory / "postrider.log").open("ab", buffering=0))
        configure_logs(load(LogSettings, log_format="json"), log)
        click.echo("Postrider is starting. Press Ctrl-C to stop it.")
        database = stack.enter_context(local_database(directory, settings.pg_bin, _step))
        _step("PostgreSQL is ready")
        uvloop.run(_run(settings, database, directory, events))
        _step("stopping PostgreSQL")
    click.echo("Stopped.")


def demo_once(events: int, *, as_json: bool) -> bool:
    """Play the demo on a temporary database and free ports. Returns whether all events arrived."""
    announce = (lambda _: None) if as_json else _step
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="postrider-")))
        # If root runs this, PostgreSQL runs as another user, which needs access.
        directory.chmod(0o711)
        log = stack.enter_context((directory / "postrider.log").open("ab", buffering=0))
        configure_logs(load(LogSettings, log_format="json"), log)
        settings = load(LocalSettings)
        database = stack.enter_context(local_database(directory, settings.pg_bin, announce))
        result = uvloop.run(_demo(database, directory, events, quiet=as_json))
    if result is None:
        click.echo("Stopped before the end.", err=True)
        return False
    click.echo(result.as_json() if as_json else _summary(result))
    return result.lost == 0 and result.delivered == result.published


async def _run(
    settings: LocalSettings, database: DatabaseSettings, directory: Path, events: int
) -> None:
    stop = stop_on_signals()
    authority = ensure_authority(directory / AUTHORITY_FILE)
    async with (
        receiving(settings.receiver_port, authority, _show) as receiver,
        running_platform(
            database,
            directory,
            listen_address=load(ServerSettings).listen_address,
            receiver_port=receiver.port,
            ca_file=authority.ca_file,
            retention=load(RetentionSettings),
        ) as platform,
    ):
        _step(f"gRPC server on 127.0.0.1:{platform.port}, logs in {directory / 'postrider.log'}")
        merchant = DemoMerchant(platform, MERCHANT_ID, receiver)
        try:
            webhook_id = await merchant.resume(directory / "demo.json")
            _step(f"{MERCHANT_ID} registered {receiver.url} as {webhook_id}")
            _step(f"publishing {events} events; the receiver refuses one once, on purpose\n")
            result = await _until_stopped(stop, platform, play(merchant, receiver, events))
            if result is not None:
                click.echo(f"\n{_summary(result)}\n\n{_what_next(platform)}\n")
                await _until_stopped(stop, platform, asyncio.Event().wait())
        finally:
            await merchant.close()
        click.echo("\nStopping after the open attempts. Ctrl-C again stops at once.")


async def _demo(
    database: DatabaseSettings, directory: Path, events: int, *, quiet: bool
) -> DemoResult | None:
    stop = stop_on_signals()
    authority = ensure_authority(directory / AUTHORITY_FILE)
    async with (
        receiving(0, authority, (lambda _: None) if quiet else _show) as receiver,
        running_platform(
            database,
            directory,
            listen_address="127.0.0.1:0",
            receiver_port=receiver.port,
            ca_file=authority.ca_file,
            operator_listeners=False,
        ) as platform,
    ):
        # A new merchant, because WEBHOOK_DATABASE_URL may be a shared database.
        merchant = DemoMerchant(platform, f"demo-{secrets.token_hex(4)}", receiver)
        try:
            webhook_id = await merchant.register()
            result = await _until_stopped(stop, platform, play(merchant, receiver, events))
            await merchant.delete(webhook_id)
        finally:
            await merchant.close()
    return result


async def _until_stopped[T](
    stop: asyncio.Event, platform: LocalPlatform, work: Coroutine[Any, Any, T]
) -> T | None:
    """Return the result of `work`, or None after a stop. Raises the error of a failed process."""
    task = asyncio.create_task(work)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({task, stopping, *platform.processes}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if task.done():
        return task.result()
    task.cancel()
    for process in platform.processes:
        if process.done():
            process.result()
    return None


def _step(text: str) -> None:
    click.echo(f"  {text}")


def _show(receipt: Receipt) -> None:
    signature = "signature verified" if receipt.verified else "SIGNATURE INVALID"
    answer = f"answered {receipt.status}" + (", on purpose" if receipt.status == 503 else "")
    click.echo(
        f"  {time.strftime('%H:%M:%S')}  {receipt.event_type:<18} {receipt.message_id}  "
        f"attempt {receipt.attempt}: {signature}, {answer}"
    )


def _summary(result: DemoResult) -> str:
    return (
        f"{result.published} published, {result.delivered} delivered, {result.retried} retried, "
        f"{result.verified} signatures verified, {result.duplicates} duplicates, "
        f"{result.lost} lost, in {result.seconds:.1f} s"
    )


def _what_next(platform: LocalPlatform) -> str:
    token = platform.token(
        "webhooks:manage", "events:publish", "webhooks:admin", merchant_id=MERCHANT_ID
    )
    bin_dir = Path(sys.prefix, "bin")
    event = (
        f'{{"event": {{"merchant_id": "{MERCHANT_ID}", "type": "payment.succeeded", '
        '"payload_text": "{\\"amount\\": 4200}"}}'
    )
    return f"""Try next, in another terminal (the token is valid for a day):

TOKEN={token}

# publish an event, which appears here
{bin_dir}/buf curl --protocol grpc --http2-prior-knowledge -H "authorization: Bearer $TOKEN" \\
  -d '{event}' \\
  http://127.0.0.1:{platform.port}/postrider.v1.EventService/PublishEvent

# or with grpcurl: list the deliveries
grpcurl -plaintext -H "authorization: Bearer $TOKEN" \\
  127.0.0.1:{platform.port} postrider.v1.DeliveryService/ListDeliveries

Ctrl-C stops everything."""
