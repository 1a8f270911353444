"""What an operator does beside the processes: migrate, look, check, and keep house."""

import asyncio
import sys
from typing import TYPE_CHECKING

import click

from cli.settings import load
from core.errors import ConfigurationError, Unavailable
from core.settings import DatabaseSettings, RetentionSettings
from delivery.settings import DeliverySettings
from server.settings import ServerSettings

if TYPE_CHECKING:
    from cli.ops.health import Process


@click.command()
@click.option(
    "--down-to",
    metavar="REVISION",
    help='Undo migrations down to REVISION, or all of them with "base". Undoing drops data.',
)
def migrate(down_to: str | None) -> None:
    """Bring the database schema to this release's version.

    Needs WEBHOOK_DATABASE_URL. Safe to run while the previous release serves, and from several
    places at once: one migrates, the others wait. Each step is a transaction of its own.
    """
    from cli.ops.migrate import migrate as run_migrations
    from cli.startup import head

    run_migrations(load(DatabaseSettings), down_to=down_to, announce=click.echo)
    click.echo(f"the schema is at {down_to or head()}")


@click.command()
@click.option(
    "--for",
    "process",
    type=click.Choice(["server", "delivery", "all"]),
    default="all",
    show_default=True,
    help="Whose settings to look at.",
)
@click.option("--check", is_flag=True, help="Ask the database and the issuer, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def config(process: str, check: bool, as_json: bool) -> None:
    """Show every setting, where it comes from, and all that is wrong with them.

    Secrets are masked. With --check, it connects: is the database there, at this release's schema,
    with keys that read its secrets, and a clock like this machine's; can the issuer's keys be had.
    Exits with 0 when nothing is wrong and 1 when something is.
    """
    from cli.ops.configuration import read_configuration
    from cli.ops.configuration_faults import faults_outside

    found = read_configuration(process)
    if check:
        found = found.with_problems(asyncio.run(faults_outside(found.blocks)))
    click.echo(found.report(as_json=as_json))
    if found.problems:
        sys.exit(1)


@click.command()
@click.option(
    "--seconds",
    default=60.0,
    show_default=True,
    type=click.FloatRange(1, 86_400),
    help="How long to go on looking, the newest first.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def verify(seconds: float, as_json: bool) -> None:
    """Check what must hold of everything accepted, in a database at work.

    Needs WEBHOOK_DATABASE_URL. Every event has all its deliveries, attempts have no gaps, nothing
    is stuck, and so on: prints what it looked at, and ids of what is not so. Reads only, in short
    statements, and may run at any time. Exits with 0 when nothing is broken, 1 when something is,
    and 2 when it could not look.
    """
    from cli.ops.verify import verify as look

    try:
        report, clean = look(load(DatabaseSettings), seconds, as_json=as_json)
    except Unavailable as error:
        raise ConfigurationError(error.message) from error
    click.echo(report)
    if not clean:
        sys.exit(1)


@click.command()
@click.argument("process", type=click.Choice(["server", "delivery"]), required=False)
@click.argument("question", required=False)
@click.option("--address", metavar="HOST:PORT", help="Where to ask, instead of what is set.")
@click.option(
    "--seconds",
    default=4.0,
    show_default=True,
    type=click.FloatRange(0.1, 60),
    help="How long an answer may take.",
)
def health(
    process: "Process | None",
    question: str | None,
    address: str | None,
    seconds: float,
) -> None:
    """Ask the processes on this machine whether they are well.

    `health server [SERVICE]` asks grpc.health.v1 at WEBHOOK_ADMIN_ADDRESS: for all services, for
    one by its name, or for `liveness`, which is not about the database. `health delivery
    [live|ready]` asks the engines at WEBHOOK_DELIVERY_METRICS_ADDRESS. `health` alone asks
    whichever run here.

    Exits with 0 when what was asked is well, 1 when it is not or does not answer, and 2 when the
    question was wrong.
    """
    from cli.ops.health import ask, ask_all

    addresses: dict[Process, str | None] = {
        "server": load(ServerSettings).admin_address,
        "delivery": load(DeliverySettings).delivery_metrics_address,
    }
    if process is not None:
        click.echo(ask(process, address or addresses[process], question, seconds))
    elif address is None:
        click.echo(ask_all(addresses, seconds))
    else:
        raise ConfigurationError("say who is at --address: `health server` or `health delivery`")


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what a run would do, and change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def retention(dry_run: bool, as_json: bool) -> None:
    """Make the days ahead, and remove what has been kept for long enough.

    Needs WEBHOOK_DATABASE_URL, and the WEBHOOK_RETENTION_ settings as the engines have them: these
    do the same by themselves every hour. Safe beside everything that runs, in short steps;
    interrupted, the next run goes on with what is left. A run is in the audit log.
    """
    from cli.ops.retention import retain_once

    settings = load(RetentionSettings)
    retain_once(load(DatabaseSettings), settings, click.echo, dry_run=dry_run, as_json=as_json)
