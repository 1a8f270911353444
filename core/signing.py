"""Signatures of webhooks (pure): one of two schemes, told in two notations.

What is signed is `webhook-id "." timestamp "." body` (Standard Webhooks 1.0.0), the body being
exactly the bytes that are sent. A secret says itself how it signs: 64 hexadecimal digits are the
key of an HMAC-SHA256 as they stand (`v1`), `whsk_…` is an Ed25519 key pair (`v1a`), of which the
merchant has the public half alone. `webhook-signature` holds the signature in base64;
`X-Webhook-Signature` holds the same one in hexadecimal, in the `t=…,v1=…` form merchants know from
other senders. While a secret is changed over, both headers hold a signature for each of the two,
the new one first.
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

#: As the Standard Webhooks write keys: a symmetric one, a private one, a public one.
_SYMMETRIC = "whsec_"
_PRIVATE = "whsk_"
_PUBLIC = "whpk_"


class SignatureScheme(StrEnum):
    """How webhooks are signed."""

    HMAC_SHA256 = "hmac_sha256"
    ED25519 = "ed25519"


def new_secret(scheme: SignatureScheme = SignatureScheme.HMAC_SHA256) -> str:
    """A fresh secret: 32 random bytes as 64 hexadecimal digits, or a `whsk_` key pair."""
    if scheme is SignatureScheme.HMAC_SHA256:
        return secrets.token_hex(32)
    key = Ed25519PrivateKey.from_private_bytes(secrets.token_bytes(32))
    pair = key.private_bytes_raw() + key.public_key().public_bytes_raw()
    return _PRIVATE + base64.b64encode(pair).decode()


def public_key(secret: str) -> str | None:
    """What verifies the signatures of a key pair, `whpk_` and base64; None for an HMAC secret."""
    if not secret.startswith(_PRIVATE):
        return None
    return _PUBLIC + base64.b64encode(_private_key(secret).public_key().public_bytes_raw()).decode()


def standard_secret(secret: str) -> str:
    """An HMAC secret as Standard Webhooks libraries take it: `whsec_` and base64 of the key."""
    return _SYMMETRIC + base64.b64encode(secret.encode()).decode()


def signature_headers(
    secrets: Sequence[str], message_id: str, timestamp: int, body: bytes, prefix: str = ""
) -> dict[str, str]:
    """The headers that identify and sign one request; timestamp in Unix seconds.

    One signature for each secret, in their order: the present one first, then a retired one. With
    a prefix such as `acme`, id, timestamp and signature are there as `acme-id` and so on, too.
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
    """The headers of id, timestamp and signature under a prefix of the merchant's choice."""
    return f"{prefix}-id", f"{prefix}-timestamp", f"{prefix}-signature"


def _signature(secret: str, message: bytes) -> tuple[str, bytes]:
    """The version that receivers know the scheme by, and the signature itself."""
    if secret.startswith(_PRIVATE):
        return "v1a", _private_key(secret).sign(message)
    return "v1", hmac.digest(secret.encode(), message, hashlib.sha256)


def _base64(code: bytes) -> str:
    return b2a_base64(code, newline=False).decode()


# Its public half is computed anew for each object: most of what a signature costs.
@lru_cache(maxsize=4096)
def _private_key(secret: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(
        base64.b64decode(secret.removeprefix(_PRIVATE), validate=True)[:32]
    )
