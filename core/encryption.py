"""Encryption of signing secrets at rest (AES-256-GCM) and rotation of the encryption keys.

Each record stores the id of its key. The id of the webhook config is the associated data, so a
ciphertext that was copied into another row does not decrypt.
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
from core.file_secrets import ReloadedSecret, Secret
from core.operator_audit import INSERT_OPERATOR_ENTRY, Operator, operator_entry
from core.postgres.protocols import Pool
from core.settings import EncryptionSettings

_NONCE_BYTES = 12
_KEY_ID = re.compile(r"[A-Za-z0-9_-]{1,32}")


class UndecryptableSecret(Exception):  # noqa: N818 - named as in core/errors.py
    """The key ring has no key for the record, or the record was altered."""


class KeyRing:
    """Named keys in order: the first key encrypts and all keys decrypt."""

    def __init__(self, keys: Mapping[str, bytes]):
        self._ciphers = {key_id: AESGCM(key) for key_id, key in keys.items()}

    def __repr__(self) -> str:
        return f"KeyRing({', '.join(self.key_ids)})"

    def ciphers(self) -> Mapping[str, AESGCM]:
        """Return the current ciphers by key id. They may change between two calls."""
        return self._ciphers

    @property
    def key_ids(self) -> list[str]:
        """The ids of all keys, starting with the key that encrypts."""
        return list(self.ciphers())

    @property
    def current_key_id(self) -> str:
        """The id of the first key, which encrypts."""
        return self.key_ids[0]

    def encrypt(self, secret: str, webhook_id: UUID) -> tuple[str, bytes]:
        """Return the key id, and the nonce followed by the ciphertext."""
        nonce = os.urandom(_NONCE_BYTES)
        key_id, cipher = next(iter(self.ciphers().items()))
        return key_id, nonce + cipher.encrypt(nonce, secret.encode(), webhook_id.bytes)

    def decrypt(self, key_id: str, record: bytes, webhook_id: UUID) -> str:
        """Return the secret. Raises UndecryptableSecret."""
        cipher = self.ciphers().get(key_id)
        if cipher is None:
            raise UndecryptableSecret(f"no encryption key with id {key_id!r}")
        nonce, ciphertext = record[:_NONCE_BYTES], record[_NONCE_BYTES:]
        try:
            return cipher.decrypt(nonce, ciphertext, webhook_id.bytes).decode()
        except (InvalidTag, ValueError):
            raise UndecryptableSecret(
                f"encryption key {key_id!r} does not decrypt the record: wrong key or altered data"
            ) from None

    def missing_keys(self, key_ids: set[str]) -> set[str]:
        """Return the key ids that are not in this ring."""
        return key_ids - self.ciphers().keys()


class ReloadedKeyRing(KeyRing):
    """The configured keys. Keys from a file are reloaded when the file changes."""

    def __init__(self, secret: Secret):
        self._keys = ReloadedSecret(
            secret,
            lambda text: KeyRing(_parse(text, secret.source)),
            show=lambda ring: ring.key_ids,
        )

    def ciphers(self) -> Mapping[str, AESGCM]:
        return self._keys.current().ciphers()


def new_key() -> str:
    """Return a random `id:key` pair for WEBHOOK_ENCRYPTION_KEYS."""
    return f"k{secrets.token_hex(3)}:{base64.b64encode(secrets.token_bytes(32)).decode()}"


def load_keyring(settings: EncryptionSettings) -> KeyRing:
    """Return the configured keys. Raises ConfigurationError."""
    return ReloadedKeyRing(settings.secret("encryption_keys"))


def _parse(text: str, source: str) -> dict[str, bytes]:
    pairs = [_parse_pair(pair, source) for pair in text.replace("\n", ",").split(",") if pair]
    if not pairs:
        raise ConfigurationError(f"{source} is empty: `postrider encryption-key` prints a new key")
    keys = dict(pairs)
    if len(keys) < len(pairs):
        raise ConfigurationError(f"{source} has two keys with the same id: give each its own")
    return keys


def _parse_pair(pair: str, source: str) -> tuple[str, bytes]:
    key_id, _, encoded = pair.strip().partition(":")
    try:
        key = base64.b64decode(encoded, validate=True)
    except ValueError:
        key = b""
    if not _KEY_ID.fullmatch(key_id) or len(key) != 32:
        # The message must not show the pair, because it holds the key.
        raise ConfigurationError(
            f"{source} has an entry that is not `id:key` with 32 bytes of base64: "
            "`postrider encryption-key` prints a valid pair"
        )
    return key_id, key


# Rotation of the encryption keys, while all processes run.
#
# Each page is one transaction that locks its rows, so concurrent changes of a secret are kept.
# Config versions stay, because the secrets that engines cache are still right.

_PAGE_SIZE = 200

_COUNT_BY_KEY = """
SELECT key_id, count(*) AS records FROM (
    SELECT secret_key_id AS key_id FROM webhook_configs WHERE deleted_at IS NULL
    UNION ALL
    SELECT previous_secret_key_id FROM webhook_configs WHERE previous_secret_key_id IS NOT NULL
) records
GROUP BY key_id ORDER BY key_id
"""

_LOCK_PAGE = """
SELECT id, secret_key_id, secret_ciphertext, previous_secret_key_id, previous_secret_ciphertext
FROM webhook_configs
WHERE id > $1 AND deleted_at IS NULL AND (secret_key_id <> $2 OR previous_secret_key_id <> $2)
ORDER BY id LIMIT $3 FOR NO KEY UPDATE
"""

_UPDATE_CONFIG = """
UPDATE webhook_configs
SET secret_key_id = $2, secret_ciphertext = $3,
    previous_secret_key_id = $4, previous_secret_ciphertext = $5
WHERE id = $1
"""


@dataclass(frozen=True, slots=True)
class RotatedPage:
    """One transaction: the number of rotated records, and the configs that no key decrypts."""

    records: int
    unreadable: list[UUID]


async def count_records(pool: Pool) -> dict[str, int]:
    """Count the records by key id. During a secret's overlap a config has two records."""
    return {row["key_id"]: row["records"] for row in await pool.fetch(_COUNT_BY_KEY)}


async def rotate_records(
    pool: Pool, keyring: KeyRing, operator: Operator
) -> AsyncGenerator[RotatedPage]:
    """Encrypt every record with the first key, one page per transaction.

    An interrupted rotation is safe: the next one continues. The first page with a change also
    writes the audit entry.
    """
    last_id, audited = UUID(int=0), False
    while True:
        async with pool.acquire() as connection, connection.transaction():
            rows = await connection.fetch(_LOCK_PAGE, last_id, keyring.current_key_id, _PAGE_SIZE)
            if not rows:
                return
            page, changes = _reencrypt_page(keyring, rows)
            await connection.executemany(_UPDATE_CONFIG, changes)
            if changes and not audited:
                entry = operator_entry(
                    operator,
                    action="RotateEncryptionKey",
                    resource=f"encryption_key:{keyring.current_key_id}",
                    changed_fields=["secret"],
                )
                await connection.execute(INSERT_OPERATOR_ENTRY, *entry)
                audited = True
        last_id = rows[-1]["id"]
        yield page


def _reencrypt_page(keyring: KeyRing, rows: Sequence[Any]) -> tuple[RotatedPage, list[Any]]:
    """Return the report, and the parameters of _UPDATE_CONFIG for each readable config."""
    records, unreadable, changes = 0, [], []
    for row in rows:
        try:
            current = _reencrypt(keyring, row, "secret")
            previous = _reencrypt(keyring, row, "previous_secret")
        except UndecryptableSecret:
            unreadable.append(row["id"])
            continue
        records += current[0] != row["secret_key_id"]
        records += previous[0] != row["previous_secret_key_id"]
        changes.append((row["id"], *current, *previous))
    return RotatedPage(records, unreadable), changes


def _reencrypt(keyring: KeyRing, row: Any, name: str) -> tuple[str | None, bytes | None]:
    """Return the new key id and ciphertext of one record."""
    key_id, ciphertext = row[f"{name}_key_id"], row[f"{name}_ciphertext"]
    if key_id is None or key_id == keyring.current_key_id:
        return key_id, ciphertext
    return keyring.encrypt(keyring.decrypt(key_id, ciphertext, row["id"]), row["id"])
