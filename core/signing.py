"""Signatures of webhooks: two schemes, each in two header formats. Pure: no I/O.

The signed message is `webhook-id "." timestamp "." body` (Standard Webhooks 1.0.0) with the exact
bytes of the body. The form of a secret selects the scheme: 64 hexadecimal digits are the ASCII key
of an HMAC-SHA256 (`v1`), and `whsk_…` is an Ed25519 key pair (`v1a`), of which the merchant has
only the public key. `webhook-signature` holds the signature in base64. `X-Webhook-Signature` holds
the same signature in hexadecimal, as `t=…,v1=…`. During a rotation both headers hold a signature
per secret, the new one first.
"""

import base64
import hashlib
import hmac
import secrets
from binascii import b2a_base64
from collections.abc import Sequence
from enum import StrEnum
from functools import lru_cache

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ID_HEADER = "webhook-id"
TIMESTAMP_HEADER = "webhook-timestamp"
STANDARD_SIGNATURE_HEADER = "webhook-signature"
SIGNATURE_HEADER = "X-Webhook-Signature"

# Key prefixes of Standard Webhooks.
_SYMMETRIC = "whsec_"
_PRIVATE = "whsk_"
_PUBLIC = "whpk_"


class SignatureScheme(StrEnum):
    """How webhooks of a config are signed."""

    HMAC_SHA256 = "hmac_sha256"
    ED25519 = "ed25519"


def new_secret(scheme: SignatureScheme = SignatureScheme.HMAC_SHA256) -> str:
    """Return a random secret: 64 hexadecimal digits (32 bytes), or a `whsk_` key pair."""
    if scheme is SignatureScheme.HMAC_SHA256:
        return secrets.token_hex(32)
    key = Ed25519PrivateKey.from_private_bytes(secrets.token_bytes(32))
    pair = key.private_bytes_raw() + key.public_key().public_bytes_raw()
    return _PRIVATE + base64.b64encode(pair).decode()


def public_key(secret: str) -> str | None:
    """Return the `whpk_` public key of a key pair, or None for an HMAC secret."""
    if not secret.startswith(_PRIVATE):
        return None
    return _PUBLIC + base64.b64encode(_private_key(secret).public_key().public_bytes_raw()).decode()


def standard_secret(secret: str) -> str:
    """Return an HMAC secret as Standard Webhooks libraries expect it: `whsec_` and base64."""
    return _SYMMETRIC + base64.b64encode(secret.encode()).decode()


def signature_headers(
    secrets: Sequence[str], message_id: str, timestamp: int, body: bytes, prefix: str = ""
) -> dict[str, str]:
    """Return the headers that identify and sign one request. The timestamp is in Unix seconds.

    The order of the signatures is the order of the secrets. A prefix such as `acme` adds the
    headers `acme-id`, `acme-timestamp` and `acme-signature`.
    """
    message = b"%b.%d.%b" % (message_id.encode(), timestamp, body)
    signatures = [_signature(secret, message) for secret in secrets]
    standard = " ".join([f"{v},{_base64(code)}" for v, code in signatures])
    hexadecimal = ",".join([f"{v}={code.hex()}" for v, code in signatures])
    headers = {
        ID_HEADER: message_id,
        TIMESTAMP_HEADER: str(timestamp),
        STANDARD_SIGNATURE_HEADER: standard,
        SIGNATURE_HEADER: f"t={timestamp},{hexadecimal}",
    }
    if prefix:
        names = prefixed_names(prefix)
        headers |= dict(zip(names, (message_id, str(timestamp), standard), strict=True))
    return headers


def prefixed_names(prefix: str) -> tuple[str, str, str]:
    """Return the names of the three headers with the merchant's prefix."""
    return f"{prefix}-id", f"{prefix}-timestamp", f"{prefix}-signature"


def _signature(secret: str, message: bytes) -> tuple[str, bytes]:
    """Return the scheme's version (`v1` or `v1a`) and the signature."""
    if secret.startswith(_PRIVATE):
        return "v1a", _private_key(secret).sign(message)
    return "v1", hmac.digest(secret.encode(), message, hashlib.sha256)


def _base64(code: bytes) -> str:
    return b2a_base64(code, newline=False).decode()


# Cached, because deriving the public key for each object is most of the cost of a signature.
@lru_cache(maxsize=4096)
def _private_key(secret: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(
        base64.b64decode(secret.removeprefix(_PRIVATE), validate=True)[:32]
    )
