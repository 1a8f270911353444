"""The development commands: `postrider run`, `demo`, `token` and `listen`."""

import importlib.util
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import uvloop

from cli.settings import LocalSettings, load
from core.errors import ConfigurationError


def has_development_code() -> bool:
    """Return whether this installation has `cli.dev`. The production image does not."""
    return importlib.util.find_spec("cli.dev") is not None


class _DevelopmentCommand(click.Command):
    def invoke(self, ctx: click.Context) -> Any:
        if not has_development_code():
            raise ConfigurationError(
                f"`postrider {self.name}` is for development, and this installation, such as "
                "the production image, has no development code: install Postrider with the extra, "
                "as in `pip install 'postrider[dev]'`"
            )
        return super().invoke(ctx)


@click.command(cls=_DevelopmentCommand)
@click.option("--events", default=6, show_default=True, type=click.IntRange(1, 10_000))
def run(events: int) -> None:
    """Run everything on this machine.

    Starts PostgreSQL (or uses WEBHOOK_DATABASE_URL), migrates it, starts the gRPC server, the
    delivery engine and a demo receiver on HTTPS, registers a webhook, publishes EVENTS events and
    shows each as it arrives. Runs until Ctrl-C. Data stays in .postrider/.
    """
    from cli.dev.run import run_everything

    run_everything(events)


@click.command(cls=_DevelopmentCommand)
@click.option("--events", default=20, show_default=True, type=click.IntRange(1, 10_000))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def demo(events: int, as_json: bool) -> None:
    """Deliver demo events on this machine, and exit.

    Uses a database in a temporary directory (or WEBHOOK_DATABASE_URL) and free ports, so several
    can run at once. The receiver counts the figures. Exits with 0 if every event arrived.
    """
    from cli.dev.run import demo_once

    if not demo_once(events, as_json=as_json):
        sys.exit(1)


@click.command(cls=_DevelopmentCommand)
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["webhooks:manage", "events:publish", "webhooks:admin"]),
    default=["webhooks:manage", "events:publish"],
    show_default=True,
    help="Repeat it for several.",
)
@click.option(
    "--merchant", "merchant_id", help="The merchant_id claim. Leave it out for platform services."
)
@click.option("--subject", default="developer", show_default=True, help="The sub claim.")
@click.option("--hours", default=1.0, show_default=True, type=click.FloatRange(0.01, 24))
def token(scopes: tuple[str, ...], merchant_id: str | None, subject: str, hours: float) -> None:
    """Print a token for development.

    It is signed with the key of `postrider run`. A server accepts it if its
    WEBHOOK_JWT_PUBLIC_KEY_FILE is .postrider/keys/public.pem and its WEBHOOK_JWT_ISSUER is
    postrider-development, as with `postrider run`.
    """
    from cli.dev.platform import DEVELOPMENT_ISSUER
    from cli.dev.signing_key import mint_token

    key_file: Path = load(LocalSettings).data_dir / "keys" / "private.pem"
    if not key_file.exists():
        raise ConfigurationError(
            f"there is no development key in {key_file.parent}: `postrider run` creates one"
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


@click.command(cls=_DevelopmentCommand)
@click.option("--port", default=8444, show_default=True, type=click.IntRange(0, 65535))
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--name",
    "names",
    multiple=True,
    help="A name or address in the certificate. Repeat it for several.",
)
@click.option(
    "--ca-file",
    type=click.Path(path_type=Path),
    help="The authority's certificate, created if missing.  [default: .postrider/receiver-ca.pem]",
)
@click.option("--plain-http", is_flag=True, help="For a tunnel that ends TLS.")
@click.option(
    "--secret", "secrets", multiple=True, help="A secret or whpk_ key. Repeat it for several."
)
@click.option(
    "--secret-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A file with secrets, read again for every webhook.",
)
@click.option("--status", default=200, show_default=True, type=click.IntRange(200, 599))
@click.option("--answer-after", default=0.0, type=click.FloatRange(0, 600), help="Seconds.")
@click.option(
    "--fail-first",
    default=0,
    type=click.IntRange(0),
    help="Respond 503 to this many attempts of each event.",
)
@click.option("--forward-to", metavar="URL", help="Forward each request, and return its response.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per webhook.")
@click.option("--count", type=click.IntRange(1), help="Exit after this many webhooks.")
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
    """Receive and verify webhooks on this machine.

    Shows whether each is genuine, with the reason. Verifies every signature header with the secrets
    of --secret, --secret-file and WEBHOOK_RECEIVER_SECRETS. Responds 401 to an invalid webhook, and
    200 to every ping. Exits with 0 after Ctrl-C, and with 1 if one of --count webhooks was invalid.
    """
    from cli.authority import AUTHORITY_FILE
    from cli.dev.listen import ListenOptions
    from cli.dev.listen import listen as receive
    from cli.dev.listen_receiver import Answers

    local = load(LocalSettings)
    listed = local.receiver_secrets.get_secret_value() if local.receiver_secrets else ""
    options = ListenOptions(
        host=host,
        port=port,
        names=names,
        ca_file=ca_file or local.data_dir / AUTHORITY_FILE,
        plain_http=plain_http,
        secrets=[*secrets, *(text.strip() for text in listed.split(",") if text.strip())],
        secret_file=secret_file,
        answers=Answers(status, answer_after, fail_first),
        forward_to=forward_to,
        as_json=as_json,
        count=count,
    )
    if not uvloop.run(receive(options)):
        sys.exit(1)
