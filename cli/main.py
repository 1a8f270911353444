"""The `postrider` command. Each subcommand reads its settings and says plainly what is wrong."""

import asyncio
import os
import signal
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

# Before anything imports grpc: its core writes to stderr, past our logs.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import click
import uvloop

from cli.canary_command import canary
from cli.processes.collector import spare_what_is_loaded
from cli.settings import LocalSettings, load, refuse_unknown_variables
from core.config import (
    DatabaseSettings,
    EgressSettings,
    EncryptionSettings,
    LogSettings,
    RetentionSettings,
    TraceSettings,
)
from core.errors import ConfigurationError, PostriderError, Unavailable
from core.keyring import new_key
from core.logs import configure_logs
from delivery.config import MAX_PROCESSES

if TYPE_CHECKING:
    from cli.operations.health import Process


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> None:
        if os.getpid() == 1:
            # In a container. From the first process the kernel keeps what it does not handle, so a
            # stop would wait until it kills. Servers and engines replace this by their own. As the
            # kernel would, without an exception: one raised inside a callback of asyncpg was lost.
            signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
        try:
            super().invoke(ctx)
        except PostriderError as error:
            for line in error.message.splitlines():
                click.echo(f"postrider: {line}", err=True)
            sys.exit(2 if isinstance(error, ConfigurationError) else 1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="postrider")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Postrider delivers webhooks: gRPC in, signed HTTPS out, PostgreSQL in between.

    Try it on this machine with `postrider run`. In production, `postrider migrate` once, then any
    number of `postrider server` and `postrider delivery` on one database.

    Settings are environment variables that begin with WEBHOOK_; the README lists them all, and
    `postrider config` says how they stand.
    """
    # To stderr, where it spoils nobody's JSON. The settings of logs may be what is wrong.
    configure_logs(LogSettings.model_construct(log_level="warning", log_format="auto"))
    # That command tells everything that is wrong, not only this.
    if ctx.invoked_subcommand != "config":
        refuse_unknown_variables(os.environ)


@main.command()
def server() -> None:
    """Serve the gRPC API until SIGTERM.

    Needs WEBHOOK_DATABASE_URL, WEBHOOK_ENCRYPTION_KEYS, WEBHOOK_JWT_ISSUER, and
    WEBHOOK_JWT_JWKS_URL or WEBHOOK_JWT_PUBLIC_KEY_FILE. Any number may run on one database. After
    SIGTERM, health says NOT_SERVING and running calls finish.
    """
    from cli.processes.serve import ServeSettings, serve  # noqa: PLC0415 - the other commands start faster
    from cli.stop import stop_on_signals  # noqa: PLC0415
    from server.config import AuthSettings, ServerSettings, TlsSettings  # noqa: PLC0415

    configure_logs(load(LogSettings))
    settings = ServeSettings(
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

    spare_what_is_loaded()
    uvloop.run(run())


@main.command()
@click.option(
    "--processes",
    type=click.IntRange(1, MAX_PROCESSES),
    help="Engine processes to keep running here, instead of WEBHOOK_DELIVERY_PROCESSES.",
)
@click.option("--lifeline", type=int, hidden=True, help="For an engine that a supervisor starts.")
def delivery(processes: int | None, lifeline: int | None) -> None:
    """Deliver webhooks until SIGTERM.

    Needs WEBHOOK_DATABASE_URL and WEBHOOK_ENCRYPTION_KEYS. Any number may run on one database,
    also on many machines. After SIGTERM nothing new is claimed and attempts in flight finish; what
    a killed engine had in flight is sent again by the others when its lease ends.

    One engine uses one core at most. With --processes, a supervisor starts so many, starts one anew
    that ended, and has all of them drain after SIGTERM, or when it is itself killed.
    """
    from cli.metrics.listener import Place  # noqa: PLC0415
    from cli.metrics.supervisor import telling  # noqa: PLC0415
    from cli.processes.deliver import DeliverSettings, deliver  # noqa: PLC0415
    from cli.processes.lifeline import EngineEnd  # noqa: PLC0415
    from cli.processes.supervise import supervise  # noqa: PLC0415
    from cli.stop import stop_on_signals  # noqa: PLC0415
    from delivery.config import DeliverySettings  # noqa: PLC0415

    configure_logs(load(LogSettings))
    settings = DeliverSettings(
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
        place = Place.of(settings.delivery, "delivery_metrics_address")
        sys.exit(asyncio.run(supervise(processes, place)))

    async def run() -> None:
        stop = stop_on_signals()
        if lifeline is None:
            await deliver(settings, stop)
        else:
            end = EngineEnd(lifeline)
            end.pass_stop_on(stop)
            await deliver(settings, stop, end.say_ready, partial(telling, end))

    spare_what_is_loaded()
    uvloop.run(run())


@main.command()
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
    from cli.operations.migrate import migrate as run_migrations  # noqa: PLC0415
    from cli.schema import head  # noqa: PLC0415

    run_migrations(load(DatabaseSettings), down_to=down_to, announce=click.echo)
    click.echo(f"the schema is at {down_to or head()}")


@main.command()
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
    from cli.operations.configuration import read_configuration  # noqa: PLC0415 - the others start faster
    from cli.operations.configuration_faults import faults_outside  # noqa: PLC0415

    found = read_configuration(process)
    if check:
        found = found.with_problems(asyncio.run(faults_outside(found.blocks)))
    click.echo(found.report(as_json=as_json))
    if found.problems:
        sys.exit(1)


@main.command()
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
    from cli.operations.verify import verify as look  # noqa: PLC0415

    try:
        report, clean = look(load(DatabaseSettings), seconds, as_json=as_json)
    except Unavailable as error:
        raise ConfigurationError(error.message) from error
    click.echo(report)
    if not clean:
        sys.exit(1)


@main.command()
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
    from cli.operations.health import ask, ask_all  # noqa: PLC0415 - the other commands start faster
    from delivery.config import DeliverySettings  # noqa: PLC0415
    from server.config import ServerSettings  # noqa: PLC0415

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


@main.command()
@click.option("--dry-run", is_flag=True, help="Say what a run would do, and change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def retention(dry_run: bool, as_json: bool) -> None:
    """Make the days ahead, and remove what has been kept for long enough.

    Needs WEBHOOK_DATABASE_URL, and the WEBHOOK_RETENTION_ settings as the engines have them: these
    do the same by themselves every hour. Safe beside everything that runs, in short steps;
    interrupted, the next run goes on with what is left. A run is in the audit log.
    """
    from cli.operations.retention import retain_once  # noqa: PLC0415 - the other commands start faster

    settings = load(RetentionSettings)
    retain_once(load(DatabaseSettings), settings, click.echo, dry_run=dry_run, as_json=as_json)


@main.command()
@click.option("--events", default=6, show_default=True, type=click.IntRange(1, 10_000))
def run(events: int) -> None:
    """Run everything on this machine, and deliver a first webhook.

    Starts a PostgreSQL of its own (or uses WEBHOOK_DATABASE_URL), migrates it, starts the gRPC
    server, the delivery engine and a demo receiver on HTTPS, registers a webhook, publishes EVENTS
    events and shows each as it arrives. Stays up until Ctrl-C; data stays in .postrider/.
    """
    from cli.development.run import run_everything  # noqa: PLC0415

    run_everything(events)


@main.command()
@click.option("--events", default=20, show_default=True, type=click.IntRange(1, 10_000))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def demo(events: int, as_json: bool) -> None:
    """Do what `run` shows, once, and exit: 0 when every event arrived.

    Uses a database of its own in a temporary directory (or WEBHOOK_DATABASE_URL) and free ports,
    so it can run beside anything. Its figures are counted by the receiver.
    """
    from cli.development.run import demo_once  # noqa: PLC0415

    if not demo_once(events, as_json=as_json):
        sys.exit(1)


@main.command()
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["webhooks:manage", "events:publish", "webhooks:admin"]),
    default=["webhooks:manage", "events:publish"],
    show_default=True,
    help="What the token may do; repeat it for several.",
)
@click.option(
    "--merchant", "merchant_id", help="The merchant_id claim; none for platform services."
)
@click.option("--subject", default="developer", show_default=True, help="The sub claim.")
@click.option("--hours", default=1.0, show_default=True, type=click.FloatRange(0.01, 24))
def token(scopes: tuple[str, ...], merchant_id: str | None, subject: str, hours: float) -> None:
    """Print a token for development, signed with the key that `postrider run` made.

    A server accepts it when its WEBHOOK_JWT_PUBLIC_KEY_FILE is .postrider/keys/public.pem and its
    WEBHOOK_JWT_ISSUER is postrider-development, as `postrider run` sets them.
    """
    from cli.development.key import mint_token  # noqa: PLC0415
    from cli.development.platform import DEVELOPMENT_ISSUER  # noqa: PLC0415

    key_file: Path = load(LocalSettings).data_dir / "keys" / "private.pem"
    if not key_file.exists():
        raise ConfigurationError(
            f"there is no development key in {key_file.parent}; `postrider run` makes one"
        )
    click.echo(
        mint_token(
            key_file,
            issuer=os.environ.get("WEBHOOK_JWT_ISSUER", DEVELOPMENT_ISSUER),
            audience=os.environ.get("WEBHOOK_JWT_AUDIENCE", "postrider"),
            subject=subject,
            scopes=scopes,
            merchant_id=merchant_id,
            lifetime=timedelta(hours=hours),
        )
    )


@main.command()
@click.option("--port", default=8444, show_default=True, type=click.IntRange(0, 65535))
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--name", "names", multiple=True, help="Callers know it by this; repeatable.")
@click.option(
    "--ca-file",
    type=click.Path(path_type=Path),
    help="The authority's certificate, made when missing.  [default: .postrider/receiver-ca.pem]",
)
@click.option("--plain-http", is_flag=True, help="For tunnels that end the TLS before it.")
@click.option("--secret", "secrets", multiple=True, help="A secret or whpk_ key; repeatable.")
@click.option(
    "--secret-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A file with secrets, read again for every webhook.",
)
@click.option("--status", default=200, show_default=True, type=click.IntRange(200, 599))
@click.option("--answer-after", default=0.0, type=click.FloatRange(0, 600), help="Seconds.")
@click.option(
    "--fail-first", default=0, type=click.IntRange(0), help="503 to so many tries of each event."
)
@click.option("--forward-to", metavar="URL", help="Send each request on, and answer as that does.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a webhook.")
@click.option("--count", type=click.IntRange(1), help="Exit after so many webhooks.")
def listen(
    *,
    port: int,
    host: str,
    names: tuple[str, ...],
    ca_file: Path | None,
    plain_http: bool,
    secrets: tuple[str, ...],
    secret_file: Path | None,
    status: int,
    answer_after: float,
    fail_first: int,
    forward_to: str | None,
    as_json: bool,
    count: int | None,
) -> None:
    """Receive webhooks on this machine, and say of each whether it is genuine, and why not.

    Verifies every signature header with the secrets of --secret, --secret-file and
    WEBHOOK_RECEIVER_SECRETS. An invalid webhook is answered 401, pings always 200. Exits with 0
    after Ctrl-C, and with 1 when one of --count webhooks was invalid.
    """
    from cli.development.listen import ListenOptions  # noqa: PLC0415 - the other commands start faster
    from cli.development.listen import listen as receive  # noqa: PLC0415
    from cli.development.listener import Answers  # noqa: PLC0415
    from cli.development.platform import AUTHORITY_FILE  # noqa: PLC0415

    local = load(LocalSettings)
    told = local.receiver_secrets.get_secret_value() if local.receiver_secrets else ""
    options = ListenOptions(
        host=host,
        port=port,
        names=names,
        ca_file=ca_file or local.data_dir / AUTHORITY_FILE,
        plain_http=plain_http,
        secrets=[*secrets, *(text.strip() for text in told.split(",") if text.strip())],
        secret_file=secret_file,
        answers=Answers(status, answer_after, fail_first),
        forward_to=forward_to,
        as_json=as_json,
        count=count,
    )
    if not uvloop.run(receive(options)):
        sys.exit(1)


main.add_command(canary)


@main.command("encryption-key")
def encryption_key() -> None:
    """Print a new `id:key` pair for WEBHOOK_ENCRYPTION_KEYS."""
    click.echo(new_key())


@main.group()
def keys() -> None:
    """Look after the keys that encrypt signing secrets at rest.

    To change the key: add the new one behind the others (`postrider encryption-key` makes one);
    when every server and engine has it, put it first; `postrider keys rotate`; when `postrider keys
    status` calls the old one not needed, remove it. They take what changes in
    WEBHOOK_ENCRYPTION_KEYS_FILE by themselves, and need a restart after each step without it.
    """


@keys.command("status")
def keys_status() -> None:
    """Say how many records each encryption key has.

    Needs WEBHOOK_DATABASE_URL and the encryption keys, as the servers have them.
    """
    from cli.operations.keys import report  # noqa: PLC0415 - the other commands start faster

    uvloop.run(report(load(DatabaseSettings), load(EncryptionSettings), click.echo))


@keys.command("rotate")
@click.option("--to", metavar="KEY_ID", help="Refuse unless this is the first key.")
def keys_rotate(to: str | None) -> None:
    """Encrypt every signing secret with the first key.

    Needs WEBHOOK_DATABASE_URL and the encryption keys. Safe while everything runs, page by page;
    interrupted, it goes on where it was. Exit code 1 when a record could not be read.
    """
    from cli.operations.keys import rotate  # noqa: PLC0415

    if not uvloop.run(rotate(load(DatabaseSettings), load(EncryptionSettings), to, click.echo)):
        sys.exit(1)


if __name__ == "__main__":
    main()
