"""The operator's commands: `migrate`, `config`, `verify`, `health` and `retention`."""

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
    help='Undo migrations down to REVISION, or all with "base". This drops data.',
)
def migrate(down_to: str | None) -> None:
    """Migrate the database schema.

    Migrates to the version of this release. Needs WEBHOOK_DATABASE_URL. It is safe while the
    previous release serves. If several run at once, one migrates and the others wait. Each step is
    one transaction.
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
    help="The process whose settings are shown.",
)
@click.option("--check", is_flag=True, help="Also connect to the database and the issuer.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def config(process: str, check: bool, as_json: bool) -> None:
    """Show every setting, its source, and all problems.

    Secrets are masked. With --check, it also checks the database (reachable, this release's schema,
    readable secrets, the same clock) and fetches the issuer's keys. Exits with 0 without problems,
    and with 1 otherwise.
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
    help="The time limit. The newest rows come first.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def verify(seconds: float, as_json: bool) -> None:
    """Check the invariants of the database.

    Needs WEBHOOK_DATABASE_URL. Every event has all its deliveries, attempts have no gaps, nothing
    is stuck, and so on. Prints the number of checked rows and the ids of broken ones. It only
    reads, in short statements, and may run at any time. Exits with 0 if nothing is broken, 1 if
    something is, and 2 if it could not check.
    """
    from cli.ops.verify import verify as check_database

    try:
        report, clean = check_database(load(DatabaseSettings), seconds, as_json=as_json)
    except Unavailable as error:
        raise ConfigurationError(error.message) from error
    click.echo(report)
    if not clean:
        sys.exit(1)


@click.command()
@click.argument("process", type=click.Choice(["server", "delivery"]), required=False)
@click.argument("question", required=False)
@click.option("--address", metavar="HOST:PORT", help="The address, instead of the setting.")
@click.option(
    "--seconds",
    default=4.0,
    show_default=True,
    type=click.FloatRange(0.1, 60),
    help="The time limit of a response.",
)
def health(
    process: "Process | None",
    question: str | None,
    address: str | None,
    seconds: float,
) -> None:
    """Check the processes on this machine.

    `health server [SERVICE]` asks grpc.health.v1 at WEBHOOK_ADMIN_ADDRESS: for all services, for
    one by its name, or for `liveness`, which ignores the database. `health delivery [live|ready]`
    asks the engines at WEBHOOK_DELIVERY_METRICS_ADDRESS. Without arguments, it asks all that run.

    Exits with 0 if healthy, 1 if unhealthy or without a response, and 2 if an argument is invalid.
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
        raise ConfigurationError(
            "--address needs the process: `health server` or `health delivery`"
        )


@click.command()
@click.option("--dry-run", is_flag=True, help="Show the effects of a run, and change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def retention(dry_run: bool, as_json: bool) -> None:
    """Create partitions and remove expired data.

    Needs WEBHOOK_DATABASE_URL, and the WEBHOOK_RETENTION_ settings of the engines, which do the
    same every hour. It is safe while everything runs, and works in short steps. After an
    interruption, the next run continues. The audit log records each run.
    """
    from cli.ops.retention import retain_once

    settings = load(RetentionSettings)
    retain_once(load(DatabaseSettings), settings, click.echo, dry_run=dry_run, as_json=as_json)
