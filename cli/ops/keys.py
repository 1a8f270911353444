"""Counts the records of each encryption key, and rotates them, for `postrider keys`."""

from collections.abc import Callable

from cli.ops.operator import present_operator
from cli.startup import require_encryption_keys, require_schema
from core.encryption import KeyRing, count_records, load_keyring, rotate_records
from core.errors import ConfigurationError
from core.ids import format_id
from core.postgres.pool import open_pool
from core.settings import DatabaseSettings, EncryptionSettings

_APPLICATION = "postrider-keys"


async def report(
    database: DatabaseSettings, encryption: EncryptionSettings, announce: Callable[[str], None]
) -> None:
    """Announce the number of records of each key, configured or not."""
    keyring = load_keyring(encryption)
    async with await open_pool(database, _APPLICATION, 2) as pool:
        await require_schema(pool)
        counts = await count_records(pool)
    for key_id in dict.fromkeys([*keyring.key_ids, *counts]):
        count = counts.get(key_id, 0)
        unit = "record" if count == 1 else "records"
        announce(f"{key_id}: {count} {unit}{_remark(keyring, counts, key_id)}")


async def rotate(
    database: DatabaseSettings,
    encryption: EncryptionSettings,
    to: str | None,
    announce: Callable[[str], None],
) -> bool:
    """Encrypt every record with the first key. Returns False if some could not be read.

    Raises ConfigurationError before any change if `to` is not the first key or a key is missing.
    """
    keyring = load_keyring(encryption)
    first = keyring.current_key_id
    if to is not None and to != first:
        raise ConfigurationError(
            f"{to} is not the first key of the setting, {first} is: put "
            f"{to} before it (and restart servers and engines, unless a file holds the keys), "
            "then rotate"
        )
    async with await open_pool(database, _APPLICATION, 2) as pool:
        await require_schema(pool)
        await require_encryption_keys(pool, keyring)
        left = _left(keyring, await count_records(pool))
        done, unreadable = 0, []
        async for page in rotate_records(pool, keyring, present_operator()):
            done += page.records
            unreadable += page.unreadable
            announce(f"{done} of {max(left, done)} records are encrypted with {first} now")
        counts = await count_records(pool)
    for webhook_id in unreadable:
        announce(f"{format_id('wh', webhook_id)}: its secret cannot be read and is unchanged")
    if not done and not unreadable:
        announce(f"nothing to do: every record is encrypted with {first}, the first key")
    for key_id in keyring.key_ids:
        if not counts.get(key_id) and key_id != first:
            announce(f"{key_id} is not used: remove it, or put it first to rotate to it")
    return not unreadable


def _left(keyring: KeyRing, counts: dict[str, int]) -> int:
    return sum(count for key_id, count in counts.items() if key_id != keyring.current_key_id)


def _remark(keyring: KeyRing, counts: dict[str, int], key_id: str) -> str:
    if keyring.missing_keys({key_id}):
        return " (not configured: these cannot be read)"
    if key_id == keyring.current_key_id:
        return " (first: it encrypts)"
    return "" if counts.get(key_id) else " (not needed)"
