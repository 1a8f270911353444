"""Encryption of signing secrets at rest: AES-256-GCM, bound to the row that holds them.

Each record carries the id of its key, so keys can be rotated. The webhook config's id is the
associated data: a ciphertext copied into another row does not decrypt.
"""

import base64
import os
import re
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from core.errors import ConfigurationError
from core.file_secrets import Renewed, Secret
from core.operator_audit import RECORD_COMMAND, Operator, command_entry
from core.postgres.pool import Pool
from core.settings import EncryptionSettings

_NONCE_BYTES = 12
_KEY_ID = re.compile(r"[A-Za-z0-9_-]{1,32}")


class UndecryptableSecret(Exception):  # noqa: N818 - named for what happened, as in core/errors.py
    """The record's key is not in the ring, or the record is not what was written."""


class KeyRing:
    """An ordered set of named keys: the first encrypts, all decrypt."""

    def __init__(self, keys: Mapping[str, bytes]):
        self._ciphers = {key_id: AESGCM(key) for key_id, key in keys.items()}

    def __repr__(self) -> str:
        return f"KeyRing({', '.join(self.key_ids)})"

    def current(self) -> Mapping[str, AESGCM]:
        """The keys as they are now; whoever needs two of them takes them at once."""
        return self._ciphers

    @property
    def key_ids(self) -> list[str]:
        """The ids of all keys, the one that encrypts first."""
        return list(self.current())

    @property
    def current_key_id(self) -> str:
        """The id of the key that encrypts."""
        return self.key_ids[0]

    def encrypt(self, secret: str, webhook_id: UUID) -> tuple[str, bytes]:
        """The id of the key used, and nonce plus ciphertext."""
        nonce = os.urandom(_NONCE_BYTES)
        key_id, cipher = next(iter(self.current().items()))
        return key_id, nonce + cipher.encrypt(nonce, secret.encode(), webhook_id.bytes)

    def decrypt(self, key_id: str, record: bytes, webhook_id: UUID) -> str:
        """The secret; UndecryptableSecret when this ring cannot read the record."""
        cipher = self.current().get(key_id)
        if cipher is None:
            raise UndecryptableSecret(f"no encryption key with id {key_id!r}")
        nonce, ciphertext = record[:_NONCE_BYTES], record[_NONCE_BYTES:]
        try:
            return cipher.decrypt(nonce, ciphertext, webhook_id.bytes).decode()
        except (InvalidTag, ValueError):
            raise UndecryptableSecret(
                f"the key {key_id!r} does not fit, or the record was altered"
            ) from None

    def missing(self, key_ids: set[str]) -> set[str]:
        """Those of the given key ids that this ring does not hold."""
        return key_ids - self.current().keys()


class ConfiguredKeyRing(KeyRing):
    """The keys of the settings; those of a file as it is whenever one of them is used."""

    def __init__(self, secret: Secret):
        self._keys = Renewed(
            secret,
            lambda text: KeyRing(_parse(text, secret.source)),
            show=lambda ring: ring.key_ids,
        )

    def current(self) -> Mapping[str, AESGCM]:
        return self._keys.current().current()


def new_key() -> str:
    """A fresh `id:key` pair for WEBHOOK_ENCRYPTION_KEYS."""
    return f"k{secrets.token_hex(3)}:{base64.b64encode(secrets.token_bytes(32)).decode()}"


def load_keyring(settings: EncryptionSettings) -> KeyRing:
    """The ring as configured; ConfigurationError when it cannot be read."""
    return ConfiguredKeyRing(settings.secret("encryption_keys"))


def _parse(text: str, source: str) -> dict[str, bytes]:
    pairs = [_parse_pair(pair, source) for pair in text.replace("\n", ",").split(",") if pair]
    if not pairs:
        raise ConfigurationError(f"{source} is empty; `postrider encryption-key` prints a new key")
    keys = dict(pairs)
    if len(keys) < len(pairs):
        raise ConfigurationError(f"{source} has two keys with the same id; each needs its own")
    return keys


def _parse_pair(pair: str, source: str) -> tuple[str, bytes]:
    key_id, _, encoded = pair.strip().partition(":")
    try:
        key = base64.b64decode(encoded, validate=True)
    except ValueError:
        key = b""
    if not _KEY_ID.fullmatch(key_id) or len(key) != 32:
        # The pair itself stays out of the message: half of it is a secret.
        raise ConfigurationError(
            f"{source} holds something that is not `id:key` with 32 bytes of base64; "
            "`postrider encryption-key` prints a valid pair"
        )
    return key_id, key


# Moving the records of signing secrets to the ring's first key, beside everything that runs.
#
# A page is one transaction that locks its rows, so a secret that is rotated or forgotten
# meanwhile is
# neither lost nor brought back. Versions stay: what engines hold in memory is the same secret.

_PAGE = 200

_COUNT = """
SELECT key_id, count(*) AS records FROM (
    SELECT secret_key_id AS key_id FROM webhook_configs WHERE deleted_at IS NULL
    UNION ALL
    SELECT previous_secret_key_id FROM webhook_configs WHERE previous_secret_key_id IS NOT NULL
) records
GROUP BY key_id ORDER BY key_id
"""

_TAKE = """
SELECT id, secret_key_id, secret_ciphertext, previous_secret_key_id, previous_secret_ciphertext
FROM webhook_configs
WHERE id > $1 AND deleted_at IS NULL AND (secret_key_id <> $2 OR previous_secret_key_id <> $2)
ORDER BY id LIMIT $3 FOR NO KEY UPDATE
"""

_PUT = """
UPDATE webhook_configs
SET secret_key_id = $2, secret_ciphertext = $3,
    previous_secret_key_id = $4, previous_secret_ciphertext = $5
WHERE id = $1
"""


@dataclass(frozen=True, slots=True)
class RotatedPage:
    """How many records one transaction moved, and the configs with one that no key reads."""

    records: int
    unreadable: list[UUID]


async def count_records(pool: Pool) -> dict[str, int]:
    """How many records each key encrypts; a config in an overlap has two."""
    return {row["key_id"]: row["records"] for row in await pool.fetch(_COUNT)}


async def rotate_records(
    pool: Pool, keyring: KeyRing, operator: Operator
) -> AsyncGenerator[RotatedPage]:
    """Encrypt every record with the ring's first key, a page at a time.

    To stop anywhere is safe: the next run goes on with what is left. The audit entry is in the
    transaction of the first page that changes something.
    """
    last, recorded = UUID(int=0), False
    while True:
        async with pool.acquire() as connection, connection.transaction():
            rows = await connection.fetch(_TAKE, last, keyring.current_key_id, _PAGE)
            if not rows:
                return
            page, changes = _encrypt_anew(keyring, rows)
            await connection.executemany(_PUT, changes)
            if changes and not recorded:
                entry = command_entry(
                    operator,
                    action="RotateEncryptionKey",
                    resource=f"encryption_key:{keyring.current_key_id}",
                    changed_fields=["secret"],
                )
                await connection.execute(RECORD_COMMAND, *entry)
                recorded = True
        last = rows[-1]["id"]
        yield page


def _encrypt_anew(keyring: KeyRing, rows: Sequence[Any]) -> tuple[RotatedPage, list[Any]]:
    """The page's report, and the parameters of _PUT for the rows whose secrets could be read."""
    records, unreadable, changes = 0, [], []
    for row in rows:
        try:
            present = _moved(keyring, row, "secret")
            previous = _moved(keyring, row, "previous_secret")
        except UndecryptableSecret:
            unreadable.append(row["id"])
            continue
        records += (present[0] != row["secret_key_id"]) + (
            previous[0] != row["previous_secret_key_id"]
        )
        changes.append((row["id"], *present, *previous))
    return RotatedPage(records, unreadable), changes


def _moved(keyring: KeyRing, row: Any, name: str) -> tuple[str | None, bytes | None]:
    """Key id and ciphertext of one record as they shall be."""
    key_id, ciphertext = row[f"{name}_key_id"], row[f"{name}_ciphertext"]
    if key_id is None or key_id == keyring.current_key_id:
        return key_id, ciphertext
    return keyring.encrypt(keyring.decrypt(key_id, ciphertext, row["id"]), row["id"])
