"""Runs `postrider listen`: opens the receiver, and prints how to send webhooks to it."""

import asyncio
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import click

from cli.authority import LOOPBACK, ensure_authority
from cli.dev.forward import forwarding
from cli.dev.listen_receiver import Answers, Listener, ListenerKeys
from cli.process.signals import stop_on_signals
from cli.receiver import accepting


@dataclass(frozen=True)
class ListenOptions:
    """The options of the command."""

    host: str
    port: int
    names: Sequence[str]
    ca_file: Path
    plain_http: bool
    secrets: Sequence[str]
    secret_file: Path | None
    answers: Answers
    forward_to: str | None
    as_json: bool
    count: int | None


async def listen(options: ListenOptions) -> bool:
    """Show webhooks until Ctrl-C or `count` of them. Returns whether all were valid.

    Raises ConfigurationError for a malformed secret or a port in use.
    """
    stop = stop_on_signals()
    # stdout is for JSON objects only.
    say = _to_stderr if options.as_json else click.echo
    keys = ListenerKeys(options.secrets, options.secret_file)
    name = options.names[0] if options.names else options.host
    async with AsyncExitStack() as stack:
        forward = None
        if options.forward_to:
            forward = await stack.enter_async_context(forwarding(options.forward_to))
        listener = Listener(
            keys, options.answers, forward, click.echo, as_json=options.as_json, count=options.count
        )
        tls = None
        if not options.plain_http:
            authority = ensure_authority(options.ca_file, [name, *options.names])
            tls = authority.server_context(list(dict.fromkeys([*LOOPBACK, name, *options.names])))
        advice = "stop the process that uses it, or choose another with --port"
        port = await stack.enter_async_context(
            accepting(listener.handle, options.host, options.port, tls, advice)
        )
        for line in _welcome(options, name, port, keys):
            say(line)
        waits = {asyncio.create_task(stop.wait()), asyncio.create_task(listener.done.wait())}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
    say(listener.summary())
    return stop.is_set() or not listener.invalid


def _welcome(options: ListenOptions, name: str, port: int, keys: ListenerKeys) -> list[str]:
    shown = f"[{name}]" if ":" in name else name
    if options.plain_http:
        return [f"Listening on http://{shown}:{port}/ without TLS; Ctrl-C ends it.", ""]
    url = f"https://{shown}:{port}/"
    bin_dir = Path(sys.prefix, "bin")
    lines = [
        f"Listening on {url} ; Ctrl-C ends it.",
        "",
        "Servers and engines need these settings and a restart to call it (`postrider run` has",
        "them already, for ports 8000 to 8999 of loopback):",
        f"  WEBHOOK_CA_FILE={options.ca_file.resolve()}",
        f"  WEBHOOK_ALLOWED_CIDRS={_network(name)}",
        f"  WEBHOOK_ALLOWED_PORTS=443,8443,{port}",
        "",
        "Register it, for example with `postrider run`:",
        f"  {bin_dir}/buf curl --protocol grpc --http2-prior-knowledge \\",
        f'    -H "authorization: Bearer $({bin_dir}/postrider token --merchant demo-merchant)" \\',
        f'    -d \'{{"webhook_config": {{"url": "{url}", "events": ["payment.*"]}}}}\' \\',
        "    http://127.0.0.1:50051/postrider.v1.WebhookConfigService/CreateWebhookConfig",
        "",
    ]
    if not keys.current():
        lines += [
            "Without a secret, nothing is verified. Write the secret that this call returns to a",
            "file, and give it by --secret-file. The file is read for every webhook.",
            "",
        ]
    return lines


def _network(name: str) -> str:
    try:
        address = ip_address(name)
    except ValueError:
        return (
            "127.0.0.0/8"
            if name == "localhost"
            else f"(the network of {name}, if it is a private one)"
        )
    if address.is_loopback:
        return "127.0.0.0/8" if address.version == 4 else "::1/128"
    return f"{address}/{address.max_prefixlen}"


def _to_stderr(line: str) -> None:
    click.echo(line, err=True)
