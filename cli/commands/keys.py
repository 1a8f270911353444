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
    from cli.ops.keys import report

    uvloop.run(report(load(DatabaseSettings), load(EncryptionSettings), click.echo))


@keys.command("rotate")
@click.option("--to", metavar="KEY_ID", help="Refuse unless this is the first key.")
def keys_rotate(to: str | None) -> None:
    """Encrypt every signing secret with the first key.

    Needs WEBHOOK_DATABASE_URL and the encryption keys. Safe while everything runs, page by page;
    interrupted, it goes on where it was. Exit code 1 when a record could not be read.
    """
    from cli.ops.keys import rotate

    if not uvloop.run(rotate(load(DatabaseSettings), load(EncryptionSettings), to, click.echo)):
        sys.exit(1)
