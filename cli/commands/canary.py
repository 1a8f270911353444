"""The options of `postrider canary`."""

import asyncio
import ssl
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import uvloop

from cli.commands.dev import has_development_code
from cli.settings import CanarySettings, LocalSettings, load
from core.errors import ConfigurationError

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.option("--address", default="127.0.0.1:50051", show_default=True, help="The gRPC server.")
@click.option("--tls", is_flag=True, help="Use TLS, and trust the system's CAs.")
@click.option("--server-ca-file", type=_FILE, help="Use TLS, and trust the CAs of this file.")
@click.option("--client-certificate-file", type=_FILE, help="For mTLS.")
@click.option("--client-key-file", type=_FILE, help="The private key of that certificate.")
@click.option("--publish-token-file", type=_FILE, help="Scope events:publish. Read for every call.")
@click.option("--manage-token-file", type=_FILE, help="Scope webhooks:manage, for the merchant.")
@click.option("--token-file", type=_FILE, help="One token for both.")
@click.option("--merchant", default="canary", show_default=True, help="Use it for canaries only.")
@click.option("--event-type", default="payment.succeeded", show_default=True)
@click.option("--listen", default="127.0.0.1:8445", show_default=True, help="host:port.")
@click.option("--public-url", default="", help="https://… at which engines reach it.")
@click.option(
    "--certificate-file", type=_FILE, help="Of the receiver. Default: signed by a local authority."
)
@click.option("--key-file", type=_FILE, help="The private key of that certificate.")
@click.option("--plain-http", is_flag=True, help="For a proxy that ends TLS. Needs --public-url.")
@click.option("--timeout", default=60.0, show_default=True, type=click.FloatRange(1, 3600))
def canary(**given: Any) -> None:
    """Check a running service through its API.

    Prints one JSON line. Creates a webhook config at its own receiver, publishes to it, rotates its
    secret, pauses and deletes it. Tokens are read from files, or from WEBHOOK_CANARY_PUBLISH_TOKEN
    and WEBHOOK_CANARY_MANAGE_TOKEN. Without any, it signs tokens with the key of `postrider run`.
    Exits with 0 if all steps succeeded, 1 if one failed, and 2 if it could not start. After
    --timeout it takes at most 15 s more, to clean up.
    """
    from cli.canary.check import CanaryReport

    try:
        report = uvloop.run(_run(given))
    except ConfigurationError as error:
        click.echo(CanaryReport(failed_step="start", error=error.message).as_json())
        raise
    click.echo(report.as_json())
    if not report.ok:
        sys.exit(1)


async def _run(given: dict[str, Any]) -> Any:
    from cli.canary.api import CanaryApi
    from cli.canary.check import check
    from cli.canary.receiver import CanaryReceiver
    from cli.process.signals import stop_on_signals

    stop: asyncio.Event = stop_on_signals()
    host, _, port = given["listen"].rpartition(":")
    if not host or not port.isdigit():
        raise ConfigurationError("--listen must be host:port, such as 0.0.0.0:8443")
    public_url = given["public_url"].rstrip("/")
    if public_url and not public_url.startswith("https://"):
        raise ConfigurationError("--public-url must begin with https://, as every webhook URL")
    if given["plain_http"] and not public_url:
        raise ConfigurationError(
            "--plain-http needs --public-url, the address of the proxy that ends TLS"
        )
    publish, manage = _tokens(given)
    receiver = CanaryReceiver(host.strip("[]"), int(port), public_url, _receiver_tls(given, host))
    api = CanaryApi(_channel(given), given["merchant"], given["event_type"], publish, manage)
    announce: Callable[[str], None] = lambda _: None  # noqa: E731
    if sys.stderr.isatty():
        announce = lambda line: click.echo(line, err=True)  # noqa: E731
    return await check(api, receiver, given["timeout"], announce, stop)


def _receiver_tls(given: dict[str, Any], host: str) -> ssl.SSLContext | None:
    from cli.authority import AUTHORITY_FILE, ensure_authority

    if given["plain_http"]:
        return None
    if given["certificate_file"] is None:
        authority = ensure_authority(load(LocalSettings).data_dir / AUTHORITY_FILE, [host])
        return authority.server_context([host])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(given["certificate_file"], given["key_file"])
    except OSError as error:
        raise ConfigurationError(
            f"--certificate-file and --key-file cannot be used ({error.strerror or error}): name "
            "a PEM certificate and its key"
        ) from None
    return context


def _channel(given: dict[str, Any]) -> Any:
    import grpc

    def read(name: str) -> bytes | None:
        path = given[name]
        return None if path is None else _content(path).encode()

    names = ("server_ca_file", "client_certificate_file", "client_key_file")
    if not (given["tls"] or any(given[name] is not None for name in names)):
        return grpc.aio.insecure_channel(given["address"])
    authorities, certificate, key = (read(name) for name in names)
    # gRPC aborts the process for half a pair, and does not report unusable files.
    if (certificate is None) != (key is None):
        raise ConfigurationError(
            "--client-certificate-file and --client-key-file need each other: give both"
        )
    _check_pem(given)
    credentials = grpc.ssl_channel_credentials(authorities, key, certificate)
    return grpc.aio.secure_channel(given["address"], credentials)


def _check_pem(given: dict[str, Any]) -> None:
    context = ssl.create_default_context()
    options = "--server-ca-file"
    try:
        if given["server_ca_file"] is not None:
            context.load_verify_locations(given["server_ca_file"])
        if given["client_certificate_file"] is not None:
            options = "--client-certificate-file and --client-key-file"
            # The password keeps OpenSSL from prompting for that of an encrypted key.
            context.load_cert_chain(
                given["client_certificate_file"], given["client_key_file"], password=bytes
            )
    except OSError as error:
        raise ConfigurationError(
            f"{options} cannot be used ({error.strerror or error}): name PEM files, and the "
            "key that belongs to the certificate"
        ) from None


def _tokens(given: dict[str, Any]) -> tuple[Callable[[], str], Callable[[], str]]:
    settings = load(CanarySettings)

    def source(name: str, secret: Any, scope: str, merchant: str | None) -> Callable[[], str]:
        path = given[f"{name}_token_file"] or given["token_file"]
        if path is not None:
            _content(path)
            return lambda: _content(path)
        if secret is not None:
            return lambda: str(secret.get_secret_value())
        if name == "publish" and given["client_certificate_file"]:
            return lambda: ""
        return _development_token(name, scope, merchant)

    return (
        source("publish", settings.canary_publish_token, "events:publish", None),
        source("manage", settings.canary_manage_token, "webhooks:manage", given["merchant"]),
    )


def _development_token(name: str, scope: str, merchant: str | None) -> Callable[[], str]:
    key_file = load(LocalSettings).data_dir / "keys" / "private.pem"
    if not key_file.exists() or not has_development_code():
        raise ConfigurationError(
            f"no token: give --{name}-token-file, or set WEBHOOK_CANARY_{name.upper()}_TOKEN"
        )
    from cli.dev.platform import DEVELOPMENT_ISSUER
    from cli.dev.signing_key import mint_token

    token = mint_token(
        key_file,
        issuer=DEVELOPMENT_ISSUER,
        audience="postrider",
        subject="canary",
        scopes=[scope],
        merchant_id=merchant,
        lifetime=timedelta(hours=2),
    )
    return lambda: token


def _content(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error})") from None
