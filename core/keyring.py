"""Encryption of signing secrets at rest: AES-256-GCM, bound to the row that holds them.

Each record carries the id of its key, so keys can be rotated. The webhook config's id is the
associated data: a ciphertext copied into another row does not decrypt.
"""

import base64
import os
import re
import secrets
from collections.abc import Mapping
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from core.config import EncryptionSettings
from core.errors import ConfigurationError
from core.secret_file import Renewed, Secret

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
