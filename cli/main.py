"""The `postrider` command: common options, and errors as one line on stderr."""

import os
import signal
import sys

# Before anything imports grpc: its core writes to stderr, past our logs.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import click

from cli.commands.canary import canary
from cli.commands.dev import demo, listen, run, token
from cli.commands.keys import encryption_key, keys
from cli.commands.ops import config, health, migrate, retention, verify
from cli.commands.process import delivery, server
from cli.settings import refuse_unknown_variables, warn_of_removed_variables
from core.errors import ConfigurationError, PostriderError
from core.logs import configure_logs
from core.settings import LogSettings


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> None:
        if os.getpid() == 1:
            # In a container. The kernel discards signals that the first process does not handle,
            # so a stop would take until the kill. Servers and engines install their own handlers.
            # No exception, because asyncpg swallows one that is raised in its callbacks.
            signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
        try:
            super().invoke(ctx)
        except PostriderError as error:
            for line in error.message.splitlines():
                click.echo(f"postrider: {line}", err=True)
            sys.exit(2 if isinstance(error, ConfigurationError) else 1)


@click.group(
    cls=_Group,
    commands=[
        server,
        delivery,
        migrate,
        config,
        verify,
        health,
        retention,
        encryption_key,
        keys,
        run,
        demo,
        token,
        listen,
        canary,
    ],
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="postrider")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Postrider delivers webhooks: gRPC in, signed HTTPS out, PostgreSQL in between.

    Try it on this machine with `postrider run`. In production, run `postrider migrate` once, then
    any number of `postrider server` and `postrider delivery` on one database.

    Settings are environment variables that begin with WEBHOOK_. docs/settings.md lists them.
    `postrider config` shows their values.
    """
    # To stderr, because stdout may be JSON. The log settings are not read, as they may be invalid.
    configure_logs(LogSettings.model_construct(log_level="warning", log_format="auto"))
    warn_of_removed_variables(os.environ)
    # `config` reports unknown variables together with all other problems.
    if ctx.invoked_subcommand != "config":
        refuse_unknown_variables(os.environ)


if __name__ == "__main__":
    main()
