"""The keys that encrypt signing secrets: `postrider encryption-key` and `postrider keys`."""

import sys

import click
import uvloop

from cli.settings import load
from core.encryption import new_key
from core.settings import DatabaseSettings, EncryptionSettings


@click.command("encryption-key")
def encryption_key() -> None:
    """Print a new `id:key` pair for WEBHOOK_ENCRYPTION_KEYS."""
    click.echo(new_key())


@click.group()
def keys() -> None:
    """Manage the keys that encrypt signing secrets at rest.

    To change the key: add a new one after the others (`postrider encryption-key` creates one). When
    every server and engine has it, put it first and run `postrider keys rotate`. Remove the old one
    when `postrider keys status` calls it not needed. Processes reload WEBHOOK_ENCRYPTION_KEYS_FILE.
    Without a file, they need a restart after each step.
    """


@keys.command("status")
def keys_status() -> None:
    """Show how many records each encryption key has.

    Needs WEBHOOK_DATABASE_URL and the encryption keys of the servers.
    """
    from cli.ops.keys import report

    uvloop.run(report(load(DatabaseSettings), load(EncryptionSettings), click.echo))


@keys.command("rotate")
@click.option("--to", metavar="KEY_ID", help="Fail unless this is the first key.")
def keys_rotate(to: str | None) -> None:
    """Encrypt every signing secret with the first key.

    Needs WEBHOOK_DATABASE_URL and the encryption keys. It is safe while everything runs. An
    interrupted run continues at the next start. Exits with 1 if a record could not be read.
    """
    from cli.ops.keys import rotate

    if not uvloop.run(rotate(load(DatabaseSettings), load(EncryptionSettings), to, click.echo)):
        sys.exit(1)
